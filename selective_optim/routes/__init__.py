"""Routes, and optimizers of several classes that step what their routes take."""
