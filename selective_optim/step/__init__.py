"""One step: parts in, the optimizer's own class called, and no policy imported.

``parts`` splits groups of SGD, Adam and AdamW and chooses fused for each parameter;
``lasting_parts`` splits those of any other class. ``setting`` shares decay out between
the class and a pass beside its step; ``kernels`` describes torch's three classes.
``class_step`` has ``decay_passes`` around it, and what a ``GradScaler`` asks for.

A parameter without a gradient is skipped, as in torch. ``parts`` leaves one that never
had a gradient out, a plan (``fused``) masks one that had, and a pass asks each part for
those that have one. ``docs/step.md`` opens with a reference step of thirty lines.
"""
