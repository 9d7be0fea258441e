"""Random configurations against torch: ``python -m tests.soak --steps 10000``.

``config`` is what a configuration is and ``draw`` draws one; ``ours`` builds the
optimizer under test; ``twin`` holds the judges, ``events`` what befalls both sides
between steps, and ``world`` runs and compares them, by ``tensors`` bit for bit.
"""
