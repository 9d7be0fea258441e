"""A step on a GPU, where the host and the device take their times apart.

``device`` is what is asked of a GPU, and a stand-in that rehearses it on a CPU.
``clock`` launches steps while the device is busy with something else: what the host
takes to launch one, and what the device takes to run one, then do not mix. ``run``
measures a case so, its steps replayed from a CUDA graph among the arms; ``training``
a whole training step. ``goals`` judges and ``tables`` shows a run.
"""
