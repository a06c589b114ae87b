"""Triton kernels: one file per op. `common/` has the code that several kernels share.

A file holds the kernels first and the launcher last. `<op>.launch` takes the arguments of the op
and returns its results; it only launches kernels. Triton is imported when an op first runs on a
GPU.

With TRITON_INTERPRET=1 in the environment before the import, the launchers run on CPU tensors.

Kernels share these conventions.

    Widths    I and O, the widths of x, dy, A and the router's weight, are multiples of 16 in a
              kernel: `launcher.rows_dense` pads the tensors with zeros, so that every load of a row
              is aligned. `launcher.cropped` removes what a kernel stored beyond the width.
    Names     `types` explains T, I, O, E, K, R, n, P, N.
    Masks     `tokens_in`, `columns_in`, ... [BLOCK]: which elements of `tokens`, `columns` exist.
              `in_bounds` [BLOCK, BLOCK] is the mask of a tile.
    Grid      all programs are on grid.x. The first line of a kernel computes the indices of its
              tiles from the number of the program.
    Sums      accumulators are float32. A long sum can be split: each split writes a partial sum,
              and a second launch adds the partial sums in a fixed order, without atomics.
    UPCAST    True in the interpreter, which computes products of 16-bit tiles wrongly.
    Dropout   DROPOUT is the smallest random number of 16 bits whose element is kept
              (`numerics.dropout_threshold`), 0 without dropout. dropout_scale =
              1 / keep_probability(p) multiplies the elements that are kept. PER_EXPERT: every
              expert has a separate mask. row_counters is `dropout.num_counters` of the width
              before padding.
    Ranks     RANK_DIVISOR is a power of two that divides every rank, so that Triton can load
              several elements at a time.
    K         the slots of a sparse gate or of a router; 0 for a dense gate.
"""
