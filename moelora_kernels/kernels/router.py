"""Linear routers on their own: logits of float32 grade, and the gradients of weight and bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels import reference
from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.products import exact_product, pick
from moelora_kernels.kernels.common.reduce_partials import reduce_partials
from moelora_kernels.kernels.weight_grad import store_transposed

# Experts of one program.
COLUMNS = 64


@triton.jit(do_not_specialize=["T"])
def router_logits_kernel(
    x_ptr,
    stride_x,
    router_ptrs,
    bias_ptrs,
    logits_ptr,
    T,
    I,  # noqa: E741
    per_split,
    n: tl.constexpr,
    E: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """logits [SPLIT, T, n E] of the parts of I; the first has the bias.

    Programs: (token tile, split of I, sibling, tile of E), the last fastest.
    """
    pid = tl.program_id(0)
    e_tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    first_e = pid % e_tiles * BLOCK_E
    experts = first_e + tl.arange(0, BLOCK_E)
    sibling = pid // e_tiles % n
    split = pid // (e_tiles * n) % SPLIT
    tokens = (pid // (e_tiles * n * SPLIT)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    router_ptr = pick(router_ptrs, sibling) + experts.to(tl.int64)[None, :] * I
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, I), BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        some_i = i < I
        x = tl.load(
            x_ptr + tokens[:, None] * stride_x + i[None, :],
            mask=inside[:, None] & some_i[None, :],
            other=0.0,
        )
        w = tl.load(
            router_ptr + i[:, None], mask=some_i[:, None] & (experts < E)[None, :], other=0.0
        )
        logits = exact_product(x, w, logits, UPCAST)
    if bias_ptrs is not None:
        bias_ptr = pick(bias_ptrs, sibling) + experts
        bias = tl.load(bias_ptr, mask=experts < tl.where(split == 0, E, 0), other=0.0)
        logits += bias.to(tl.float32)[None, :]
    at = (split * T + tokens)[:, None] * (n * E) + sibling * E + experts[None, :]
    tl.store(logits_ptr + at, logits, mask=inside[:, None] & (experts < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def router_grad_kernel(
    x_ptr,
    stride_x,
    dlogits_ptr,
    drouter_ptr,
    dbias_ptr,
    T,
    I,  # noqa: E741
    per_split,
    stride_plane,
    L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dWr [L, I] and dbr [L] of dlogits [T, L], or their parts, stride_plane apart.

    Programs: (split of T, tile of I, tile of L), the last fastest.
    """
    pid = tl.program_id(0)
    l_tiles: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    i_tiles = tl.cdiv(I, BLOCK_W)
    columns = pid % l_tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    first_w = pid // l_tiles % i_tiles * BLOCK_W
    w = first_w + tl.arange(0, BLOCK_W)
    split = pid // (l_tiles * i_tiles)
    total = tl.zeros((BLOCK_W, BLOCK_L), tl.float32)
    of_bias = tl.zeros((BLOCK_L,), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, T), BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        inside = tokens < T
        x = tl.load(
            x_ptr + tokens[:, None] * stride_x + w[None, :],
            mask=inside[:, None] & (w < I)[None, :],
            other=0.0,
        )
        dlogits = tl.load(
            dlogits_ptr + tokens[:, None] * L + columns[None, :],
            mask=inside[:, None] & (columns < L)[None, :],
            other=0.0,
        )
        of_bias += tl.sum(dlogits, axis=0)
        total = exact_product(tl.trans(x), dlogits, total, UPCAST)
    plane = split.to(tl.int64) * stride_plane
    some = columns < L
    store_transposed(drouter_ptr + plane, I, total, w, w < I, columns, some)
    if first_w == 0:
        out_ptr = dbias_ptr + plane + columns
        tl.store(out_ptr, of_bias.to(dbias_ptr.dtype.element_ty), mask=some)


def launch_logits(x, router_weight, router_bias, *, split=None):
    """`reference.router_logits` on a GPU. `split`: parts of I, None: what fills the chip."""
    (T, I), n, E = x.shape, len(router_weight), router_weight[0].shape[0]  # noqa: E741
    logits = x.new_empty((T, n * E), dtype=reference.compute_dtype(x))
    if T == 0:
        return logits
    block_e = min(launcher.block(E), COLUMNS)
    tile = configs.tile("router_logits", x.device, x.dtype, block_e)
    programs = launcher.ceil_div(T, tile.tokens) * n * launcher.ceil_div(E, block_e)
    steps = launcher.ceil_div(I, tile.step)
    if split is None:
        split = configs.splits(x.device, programs, steps)
    partials = logits if split == 1 else x.new_empty((split, T * n * E), dtype=logits.dtype)
    x = launcher.rows_dense(x)
    launcher.run(
        router_logits_kernel,
        programs * split,
        tile,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            router_ptrs=launcher.contiguous(router_weight),
            bias_ptrs=launcher.contiguous(router_bias),
            logits_ptr=partials,
            T=T,
            I=I,
            per_split=launcher.ceil_div(steps, split) * tile.step,
        ),
        dict(
            n=n, E=E, SPLIT=split, BLOCK_T=tile.tokens, BLOCK_I=tile.step, BLOCK_E=block_e,
            UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    if split > 1:
        reduce_partials(partials, [logits])
    return logits


def launch_grad(dlogits, x, router_dtype, *, split=None):
    """`reference.router_grad` on a GPU. `split`: parts of T, None: what fills the chip."""
    (T, I), L = x.shape, dlogits.shape[1]  # noqa: E741
    make = x.new_zeros if T == 0 else x.new_empty
    drouter, dbias = make((L, I), dtype=router_dtype), make(L, dtype=router_dtype)
    if T == 0:
        return drouter, dbias
    block_l = min(launcher.block(L), COLUMNS)
    tile = configs.tile("router_grad", x.device, x.dtype, block_l)
    programs = launcher.ceil_div(I, tile.step) * launcher.ceil_div(L, block_l)
    steps = launcher.ceil_div(T, tile.tokens)
    if split is None:
        split = configs.splits(x.device, programs, steps)
    partials, starts, parts = None, [0, drouter.numel()], [drouter, dbias]
    if split > 1:
        # Every part starts at a multiple of 16 bytes.
        starts = [0, launcher.ceil_div(drouter.numel(), 16) * 16]
        sizes = starts[1] + launcher.ceil_div(L, 16) * 16
        partials = x.new_empty((split, sizes), dtype=torch.float32)
        parts = [partials[0, start:] for start in starts]
    x = launcher.rows_dense(x)
    launcher.run(
        router_grad_kernel,
        programs * split,
        tile,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            dlogits_ptr=dlogits.contiguous(),
            drouter_ptr=parts[0],
            dbias_ptr=parts[1],
            T=T,
            I=I,
            per_split=launcher.ceil_div(steps, split) * tile.tokens,
            stride_plane=0 if partials is None else partials.stride(0),
        ),
        dict(
            L=L, BLOCK_T=tile.tokens, BLOCK_W=tile.step, BLOCK_L=block_l, UPCAST=launcher.INTERPRET
        ),
    )
    if split > 1:
        reduce_partials(partials, [drouter, dbias], starts)
    return drouter, dbias
