"""The gradient of gate rows that several tokens share: dgate summed over the tokens of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.memory import load_rows, store_transposed
from moelora_kernels.kernels.common.products import exact_sum
from moelora_kernels.kernels.common.reduce_partials import Partials
from moelora_kernels.kernels.common.splits import num_splits

# Gate rows of one program: the smallest operand of a product.
BLOCK_G = 16


@triton.jit(do_not_specialize=["splits", "T", "G"])
def gate_rows_kernel(
    dgate_ptr,
    rows_ptr,
    partials_ptr,
    T,
    G,
    t_per_split,
    splits,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """partials[s, g] = sum of dgate[t] over the tokens t of split s whose gate row is g.

    dgate    [T, WIDTH] float32
    rows     [T] integer; None if every token has row 0
    partials [splits, G, WIDTH] float32

    Programs: (tile of G, tile of WIDTH, split), the last fastest.
    """
    pid = tl.program_id(0)
    split = pid % splits
    WIDTH_TILES: tl.constexpr = (WIDTH + BLOCK_E - 1) // BLOCK_E
    columns = pid // splits % WIDTH_TILES * BLOCK_E + tl.arange(0, BLOCK_E)
    columns_in = columns < WIDTH
    g = (pid // (splits * WIDTH_TILES)).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)

    # Sum: the product with a matrix that is 1 if a token has the gate row, else 0.
    total = tl.zeros((BLOCK_E, BLOCK_G), tl.float32)
    for first in range(split * t_per_split, tl.minimum((split + 1) * t_per_split, T), BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        tokens_in = tokens < T
        row = tokens * 0
        if rows_ptr is not None:
            row = tl.load(rows_ptr + tokens, mask=tokens_in, other=-1).to(tl.int64)
        dgate = load_rows(dgate_ptr, WIDTH, tokens, columns, tokens_in, columns_in)
        has_row = tl.where(row[:, None] == g[None, :], 1.0, 0.0).to(
            tl.bfloat16
        )  # [BLOCK_T, BLOCK_G]
        total = exact_sum(tl.trans(dgate), has_row, total, UPCAST)

    partial_rows = split * G + g
    store_transposed(partials_ptr, WIDTH, partial_rows, columns, g < G, columns_in, total)


def launch(dgate: Tensor, rows: Tensor | None, G: int) -> Tensor:
    """Return the gradient of gate weights [G, n E] from dgate [T, n E] and rows [T] or None."""
    T, width = dgate.shape
    tile_config = configs.ROW_TILE
    block_e = min(launcher.block(width), tile_config.step)

    programs = launcher.ceil_div(G, BLOCK_G) * launcher.ceil_div(width, block_e)
    steps = launcher.ceil_div(T, tile_config.tokens)
    split = num_splits(dgate.device, tile_config, programs, steps)

    total = dgate.new_empty((G, width))
    partials = Partials([total], split, alignment=1)
    launcher.run(
        gate_rows_kernel,
        programs * split,
        tile_config,
        dict(
            dgate_ptr=dgate,
            rows_ptr=None if rows is None else launcher.aligned(rows),
            partials_ptr=partials.targets[0],
            T=T,
            G=G,
            t_per_split=launcher.ceil_div(steps, split) * tile_config.tokens,
            splits=split,
        ),
        dict(
            WIDTH=width,
            BLOCK_T=tile_config.tokens,
            BLOCK_G=BLOCK_G,
            BLOCK_E=block_e,
            UPCAST=launcher.INTERPRET,
        ),
    )
    partials.reduce()
    return total
