"""The gradient of gate rows that several tokens share: dgate summed over the tokens of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.reduce_partials import reduce_partials


@triton.jit(do_not_specialize=["T", "G"])
def gate_rows_kernel(
    dgate_ptr,
    rows_ptr,
    partials_ptr,
    T,
    G,
    per_split,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """partials[split, g] = sum of dgate[t] over the tokens of a split with gate row g.

    dgate [T, WIDTH], partials [SPLIT, G, WIDTH]; without rows every token has row 0.
    Programs: (tile of G, tile of WIDTH, split).
    """
    pid = tl.program_id(0)
    split = pid % SPLIT
    WIDTH_TILES: tl.constexpr = (WIDTH + BLOCK_E - 1) // BLOCK_E
    e = pid // SPLIT % WIDTH_TILES * BLOCK_E + tl.arange(0, BLOCK_E)
    g = (pid // (SPLIT * WIDTH_TILES)).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    total = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, T), BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        inside = tokens < T
        row = tokens * 0
        if rows_ptr is not None:
            row = tl.load(rows_ptr + tokens, mask=inside, other=-1).to(tl.int64)
        dgate = tl.load(
            dgate_ptr + tokens[:, None] * WIDTH + e[None, :],
            mask=inside[:, None] & (e < WIDTH)[None, :],
            other=0.0,
        )
        here = (g[:, None] == row[None, :]).to(tl.float32)
        total = tl.dot(here, dgate, total, input_precision="tf32x3")
    at = (split * G + g)[:, None] * WIDTH + e[None, :]
    tl.store(partials_ptr + at, total, mask=(g < G)[:, None] & (e < WIDTH)[None, :])


def launch(dgate: Tensor, rows: Tensor | None, G: int) -> Tensor:
    """The gradient of gates [G, n E] from dgate [T, n E]; two launches."""
    T, width = dgate.shape
    tile, block_g = configs.ROWS, 16
    block_e = min(launcher.block(width), tile.step)
    programs = launcher.ceil_div(G, block_g) * launcher.ceil_div(width, block_e)
    steps = launcher.ceil_div(T, tile.tokens)
    split = configs.splits(dgate.device, programs, steps)
    partials = dgate.new_empty((split, G * width))
    launcher.run(
        gate_rows_kernel,
        programs * split,
        tile,
        dict(
            dgate_ptr=dgate,
            rows_ptr=None if rows is None else rows.contiguous(),
            partials_ptr=partials,
            T=T,
            G=G,
            per_split=launcher.ceil_div(steps, split) * tile.tokens,
        ),
        dict(WIDTH=width, SPLIT=split, BLOCK_T=tile.tokens, BLOCK_G=block_g, BLOCK_E=block_e),
    )
    total = dgate.new_empty((G, width))
    reduce_partials(partials, [total])
    return total
