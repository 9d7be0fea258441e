"""One step: parts in, the optimizer's own class called, and no policy imported.

``setting`` shares decay out between the class and a pass beside its step; ``kernel``,
``adam_kernel`` and ``sgd_kernel`` describe torch's three classes. ``implementation``
chooses fused for each parameter and makes the ``parts``; ``class_step`` surrounds a
step of the class with ``passes`` and what a ``grad_scaler`` asks for. ``lasting`` holds
the parts of any other class, ``refusals`` what cannot be served.

The page ``docs/step.md`` opens with a reference step of thirty lines.
"""
