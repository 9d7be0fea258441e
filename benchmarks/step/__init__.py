"""How long a step takes; ``python -m benchmarks.step`` measures it.

``cases`` has the networks as shapes and ``workload`` their tensors; ``arms`` is what
is compared, with ``bare`` as the floor. ``measure`` has clocks and statistics,
``once`` what is paid once, ``results`` a run as a record to save. ``tables``,
``picture`` and ``goals`` show it and judge it. ``gpu`` measures on a GPU, where host
and device take their times apart; ``on_gpu`` runs it there beside the tests.
"""
