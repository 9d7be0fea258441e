"""The accelerator: torch's fused kernels, called by a plan that is kept between steps.

``stepper`` keeps the plan and makes another where it no longer holds; ``plan`` proves
that it holds, with ``guards``, and runs the calls of its buckets.
"""
