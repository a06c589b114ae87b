"""Execute the PTX that Triton or nvcc compiles for a kernel, on a CPU, in NumPy, and check it.

The programs of a launch run in step, like the lanes of a vector: a register is an array
[programs, threads]. What is checked, beside the results:

* every access to global memory lies inside a tensor and is aligned to its width;
* no two programs of a launch write the same byte, or one of them reads what the other writes;
* shared memory: bytes that nobody wrote, accesses of two warps without a barrier between them,
  bytes under a pending cp.async or wgmma, a missing fence.proxy.async before a wgmma;
* PTX of nvcc: accesses of any two threads of a program without a barrier between them;
* clusters: bytes of a bulk copy that a thread reads without a wait for its mbarrier, or that a copy
  overwrites before all warps have released them; mbarriers that are used before their
  initialisation is known, or whose phase does not end; programs that end too early;
* copies and products may happen as soon as they are issued, or as late as their wait allows.

What stays unchecked: ptxas and its machine code, the order of memory between programs, time.

| file | content |
|---|---|
| `program.py` | parses PTX |
| `build.py` | the table opcode -> function, and the operands of an instruction |
| `arithmetic.py`, `moves.py`, `loads.py`, `atomics.py`, `copies.py`, `warp.py`, `mma.py`, `wgmma.py`, `control.py` | the instructions |
| `floats.py`, `fragments.py` | number formats, the sums of tensor cores, matrices in registers |
| `global_memory.py`, `shared_memory.py`, `ordering.py` | memory, and the checks of its accesses |
| `clusters.py`, `bulk.py` | the instructions of mbarriers and clusters; tensor maps and their copies |
| `mbarriers.py`, `clocks.py` | the phases of mbarriers; what a warp knows of the others of its cluster |
| `execution.py` | runs the programs of a launch |
| `compiler.py`, `launcher.py` | compile a launch, and run it in the place of a GPU |
"""  # noqa: E501
