"""Code that the kernels of several ops share.

configs            the tile sizes and compiler options of every kernel, by architecture
blocks             how many programs of a kernel one multiprocessor runs, for `configs`
splits             into how many parts a sum is split
tuned              the file of tuned tiles
launcher           launches a kernel, or records the launch
tables             small tensors that depend only on ranks and scaling, built once per device
memory             loads and stores of one tile of a matrix
products           products of two tiles
gates              the gate of a tile of tokens: load it, or compute it from logits
gates_backward     the gradient of the gate of a tile of tokens
tiles              the sorted positions of a program in the grouped kernels
reduce_partials    partial sums of a split sum: store, load, and the launch that adds them
chunks             the sums over the pairs of an expert, in chunks
gate_rows          the gradient of gate rows that several tokens share: one more launch
"""
