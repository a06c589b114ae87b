"""Plans: the recorded steps of a layer op, replayed with the pointers of other tensors.

A layer op (`wide`, `wide_backward`, `grouped`, `grouped_backward`) allocates, launches kernels and
calls products of ATen. These steps depend only on the shapes, strides, dtypes, devices and
alignment of its tensors and on its other arguments: its key. `PlannedOp` records the steps of a
key once, and then replays them. A replay skips the Python of the launchers and of Triton, so it
takes a fraction of the host time. If the native library is loaded, it replays the plans.

    steps.py       the steps, and the replay
    recorder.py    records the steps of one call
    cache.py       the key of a call; which calls are recorded and replayed
    native.py      plans for the native library
"""

from moelora_kernels.plans.cache import PlannedOp
from moelora_kernels.plans.native import native_replay

__all__ = ["PlannedOp", "native_replay"]
