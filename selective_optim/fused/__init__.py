"""The accelerator: torch's fused kernels, called by a plan that is kept between steps.

``stepper`` keeps the plan, ``plan`` proves by ``guards`` that it holds, and runs it.
What it is given is chosen in ``step/parts.py``: ``fused_choice``, ``wants_fused``.
"""
