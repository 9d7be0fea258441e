"""One step: parts in, the optimizer's own class called, and no policy imported.

``docs/step.md`` opens with a reference step of thirty lines. A parameter without a
gradient is skipped: ``parts`` leaves out one that never had any, a plan (``fused``)
masks one that had, and a pass asks each part for those that have one.
"""
