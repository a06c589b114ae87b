"""What the kernels of several ops share.

configs            how large the tiles of a kernel are and how it is compiled, by architecture
launcher           launches a kernel, or records the launch
tables             small tensors that depend on ranks and scaling alone, made once per device
memory             loads and stores of one tile of a matrix
products           products of two tiles
gates              the gate of a tile of tokens: load it, or make it from logits
gates_backward     the gradient of the gate of a tile of tokens
tiles              the sorted positions that a program of the grouped kernels works on
reduce_partials    partial sums of a split sum: store, load, and the launch that adds them
gate_rows          the gradient of gate rows that several tokens share: one more launch
"""
