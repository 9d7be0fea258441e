"""One step: parts in, the optimizer's own class called, and no policy imported.

``setting`` shares decay out between the class and a pass beside its step; ``kernels``
describes torch's three classes. ``parts`` chooses fused for each parameter; a
``class_step`` has ``passes`` around it, and what a ``GradScaler`` asks for. ``lasting``
holds the parts of any other class, ``refusals`` what cannot be served.

The page ``docs/step.md`` opens with a reference step of thirty lines.
"""
