"""Linear routers without experts: logits in float32 precision, and their backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.memory import load_rows, load_transposed, store_transposed
from moelora_kernels.kernels.common.products import exact_product, select_from
from moelora_kernels.kernels.common.reduce_partials import Partials, store_partial
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.numerics import compute_dtype
from moelora_kernels.types import RouterTensors

# Most experts, or columns of dlogits, of one program.
COLUMNS = 64


@triton.jit(do_not_specialize=["splits", "T"])
def router_logits_kernel(
    x_ptr,
    stride_x,
    router_ptrs,
    bias_ptrs,
    logits_ptr,
    T,
    I,  # noqa: E741
    i_per_split,
    splits,
    n: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """logits_i = x Wr_i^T + br_i, split over I. The first split adds the bias.

    x        [T, I], rows stride_x apart
    router   n x [E, I], in the dtype of x or float32
    bias     n x [E]; None without one
    logits   [splits, T, n E] float32: partial sums if splits > 1

    Programs: (token tile, split of I, sibling, tile of E), the last fastest.
    """
    pid = tl.program_id(0)
    E_TILES: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    first_e = pid % E_TILES * BLOCK_E
    experts = first_e + tl.arange(0, BLOCK_E)
    sibling = pid // E_TILES % n
    split = pid // (E_TILES * n) % splits
    tokens = (pid // (E_TILES * n * splits)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_in = tokens < T
    experts_in = experts < E
    router_ptr = select_from(router_ptrs, sibling)

    # Product.
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(split * i_per_split, tl.minimum((split + 1) * i_per_split, I), BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        x = load_rows(x_ptr, stride_x, tokens, i, tokens_in, i < I)  # [BLOCK_T, BLOCK_I]
        router = load_transposed(router_ptr, I, experts, i, experts_in, i < I)
        logits = exact_product(x, router, logits, UPCAST)

    # Bias, in the first split only.
    if bias_ptrs is not None:
        bias_ptr = select_from(bias_ptrs, sibling) + experts
        bias = tl.load(bias_ptr, mask=experts < tl.where(split == 0, E, 0), other=0.0)
        logits += bias.to(tl.float32)[None, :]

    store_partial(
        logits_ptr, split, tokens, tokens_in, sibling, experts, experts_in, logits, T, n, E
    )


@triton.jit(do_not_specialize=["T"])
def router_grad_kernel(
    x_ptr,
    stride_x,
    dlogits_ptr,
    drouter_ptr,
    dbias_ptr,
    T,
    I,  # noqa: E741
    t_per_split,
    partial_stride,
    L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dWr = dlogits^T x and dbr = sum over the tokens of dlogits, split over T.

    x       [T, I], rows stride_x apart
    dlogits [T, L] float32, L = n E
    drouter [L, I] and dbias [L]; if split, float32 partial sums, partial_stride elements apart

    Programs: (split of T, tile of I, tile of L), the last fastest.
    """
    pid = tl.program_id(0)
    L_TILES: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    i_tiles = tl.cdiv(I, BLOCK_W)
    columns = pid % L_TILES * BLOCK_L + tl.arange(0, BLOCK_L)
    first_i = pid // L_TILES % i_tiles * BLOCK_W
    i = first_i + tl.arange(0, BLOCK_W)
    split = pid // (L_TILES * i_tiles)
    i_in = i < I
    columns_in = columns < L

    # Product and sum over the tokens of the split.
    drouter = tl.zeros((BLOCK_W, BLOCK_L), tl.float32)
    dbias = tl.zeros((BLOCK_L,), tl.float32)
    for first in range(split * t_per_split, tl.minimum((split + 1) * t_per_split, T), BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        tokens_in = tokens < T
        x = load_rows(x_ptr, stride_x, tokens, i, tokens_in, i_in)  # [BLOCK_T, BLOCK_W]
        dlogits = load_rows(dlogits_ptr, L, tokens, columns, tokens_in, columns_in)
        if first_i == 0:
            dbias += tl.sum(dlogits, axis=0)
        drouter = exact_product(tl.trans(x), dlogits, drouter, UPCAST)

    # Store. The programs of the first tile of I store the bias.
    partial = split.to(tl.int64) * partial_stride
    store_transposed(drouter_ptr + partial, I, columns, i, columns_in, i_in, drouter)
    if first_i == 0:
        out_ptr = dbias_ptr + partial + columns
        tl.store(out_ptr, dbias.to(dbias_ptr.dtype.element_ty), mask=columns_in)


def launch_logits(x: Tensor, router: RouterTensors, *, split: int | None = None) -> Tensor:
    """Return logits [T, n E] float32, like `reference.router_logits`.

    split: number of parts that I is cut into; None balances the programs.
    """
    router_weight, router_bias = router
    x = launcher.rows_dense(x)
    (T, I), n, E = x.shape, len(router_weight), router_weight[0].shape[0]  # noqa: E741
    logits = x.new_empty((T, n * E), dtype=compute_dtype(x))
    if T == 0:
        return logits

    block_e = min(launcher.block(E), COLUMNS)
    tile_config = configs.tile_config("router_logits", x.device, x.dtype, block_e)
    programs = launcher.ceil_div(T, tile_config.tokens) * n * launcher.ceil_div(E, block_e)
    steps = launcher.ceil_div(I, tile_config.step)
    if split is None:
        split = num_splits(x.device, tile_config, programs, steps)

    # The kernel computes the address of a partial sum from T, n and E: no space between them.
    partials = Partials([logits], split, alignment=1)
    launcher.run(
        router_logits_kernel,
        programs * split,
        tile_config,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            router_ptrs=launcher.all_padded(router_weight, E, I),
            bias_ptrs=launcher.all_aligned(router_bias),
            logits_ptr=partials.targets[0],
            T=T,
            I=I,
            i_per_split=launcher.ceil_div(steps, split) * tile_config.step,
            splits=split,
        ),
        dict(
            n=n,
            E=E,
            BLOCK_T=tile_config.tokens,
            BLOCK_I=tile_config.step,
            BLOCK_E=block_e,
            UPCAST=launcher.INTERPRET,
        ),
    )
    partials.reduce()
    return logits


def launch_grad(
    dlogits: Tensor, x: Tensor, router_dtype: torch.dtype, *, split: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return drouter [n E, I] and dbias [n E] in router_dtype, like `reference.router_grad`.

    split: number of parts that T is cut into; None balances the programs.
    """
    width = x.shape[1]
    x = launcher.rows_dense(x)
    (T, I), L = x.shape, dlogits.shape[1]  # noqa: E741
    new = x.new_zeros if T == 0 else x.new_empty
    drouter, dbias = new((L, I), dtype=router_dtype), new(L, dtype=router_dtype)
    if T == 0:
        return launcher.cropped(drouter, L, width), dbias

    block_l = min(launcher.block(L), COLUMNS)
    tile_config = configs.tile_config("router_grad", x.device, x.dtype, block_l)
    programs = launcher.ceil_div(I, tile_config.step) * launcher.ceil_div(L, block_l)
    steps = launcher.ceil_div(T, tile_config.tokens)
    if split is None:
        split = num_splits(x.device, tile_config, programs, steps)

    partials = Partials([drouter, dbias], split)
    drouter_target, dbias_target = partials.targets
    launcher.run(
        router_grad_kernel,
        programs * split,
        tile_config,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            dlogits_ptr=launcher.aligned(dlogits),
            drouter_ptr=drouter_target,
            dbias_ptr=dbias_target,
            T=T,
            I=I,
            t_per_split=launcher.ceil_div(steps, split) * tile_config.tokens,
            partial_stride=partials.stride,
        ),
        dict(
            L=L,
            BLOCK_T=tile_config.tokens,
            BLOCK_W=tile_config.step,
            BLOCK_L=block_l,
            UPCAST=launcher.INTERPRET,
        ),
    )
    partials.reduce()
    return launcher.cropped(drouter, L, width), dbias
