"""The step. How one works, in the order of time, is told below (to be written)."""
