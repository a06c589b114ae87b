"""Layers at the sizes of models; their launches are recorded on tensors without data."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from moelora_kernels import reference
from moelora_kernels.kernels.common.launcher import Launch
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    NO_ROUTER,
    Dropout,
    Gate,
    InnerAdapters,
    InnerInputs,
    InnerOptions,
    Mixture,
    RouterTensors,
    Routing,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Layer(NamedTuple):
    """A layer whose launches are compiled: sizes, gate form and dtypes.

    adapters: of A, B and the routers; None is `dtype`. routers: of the routers; None is `adapters`.
    by_pair: x and dy have a row for every (token, expert) pair, like in whole-FFN experts.
    oversized: more experts than the tiles are made for; the kernels may spill.
    plain: the layer whose machine code `TileConfig.blocks` states.
    ffn: `ffn_inner` and its backward between the frozen products of whole-FFN experts, without the
    linears; out_features holds F.
    whole_ffn: the same with the router, and with the rank space of the linears around it.
    decodes: a forward without gradients; there is no backward.
    clusters: with the shrink in CUDA C++ for clusters of sm_90a, where the launcher takes it.
    """

    name: str
    tokens: int = 8192
    in_features: int = 4096
    out_features: tuple[int, ...] = (4096,)
    ranks: tuple[int, ...] = (16,) * 8
    gate: str = "router"
    top_k: int = 2
    dtype: torch.dtype = BF16
    adapters: torch.dtype | None = None
    routers: torch.dtype | None = None
    share_a: bool = False
    dropout: float = 0.0
    per_expert: bool = False
    renormalize: bool = True
    oversized: bool = False
    grouped: bool = False
    by_pair: bool = False
    ffn: bool = False
    whole_ffn: bool = False
    decodes: bool = False
    plain: bool = False
    clusters: bool = False


# Ranks of 8 experts that fill the tiles of R = 16 to 128.
RANKS = (2, 4, 8, 16)
# Every entry of the tile tables and every variant of a kernel that a preset leads to.
LAYERS = [
    *(Layer(f"R={8 * r}", ranks=(r,) * 8, plain=True) for r in RANKS),
    *(Layer(f"R={8 * r} fp32", ranks=(r,) * 8, dtype=FP32, plain=True) for r in RANKS),
    *(Layer(f"R={8 * r} T=1024", tokens=1024, ranks=(r,) * 8, plain=True) for r in (8, 16)),
    Layer("R=128 fp16", dtype=FP16),
    Layer("R=128 fp32 adapters", adapters=FP32),
    Layer("R=128 fp16 under fp32 adapters", dtype=FP16, adapters=FP32),
    # The wide form casts float32 A and B from 2048 tokens on.
    *(Layer(f"R={8 * r} fp32 routers", ranks=(r,) * 8, routers=FP32) for r in RANKS),
    Layer("R=128 fp16 under fp32 routers", dtype=FP16, routers=FP32),
    Layer("R=256", ranks=(32,) * 8),
    Layer("R=24 of mixed ranks", ranks=(2, 6, 16)),
    Layer("R=32 fp32 adapters", ranks=(4,) * 8, adapters=FP32),
    Layer("R=64 fp32 adapters", ranks=(8,) * 8, adapters=FP32),
    Layer("qkv R=64", out_features=(4096, 1024, 1024), ranks=(8,) * 8),
    Layer("softmax before top-k", renormalize=False),
    Layer("all experts", top_k=8),
    Layer("sparse gates", gate="sparse"),
    Layer("dense gates", gate="dense"),
    Layer("task gates", gate="rows"),
    Layer("dropout", dropout=0.05),
    Layer("dropout T=1024", tokens=1024, dropout=0.05),
    Layer("task gates, dropout per expert", gate="rows", dropout=0.05, per_expert=True),
    Layer("shared A", share_a=True, ranks=(8,) * 3, top_k=3),
    # Widths that are not a multiple of 8, and ranks whose rows are not aligned.
    Layer("odd widths", in_features=4099, out_features=(4097,)),
    Layer("odd widths fp32", in_features=4099, out_features=(4097,), dtype=FP32),
    Layer("odd ranks R=35", ranks=(5,) * 7),
    Layer("odd ranks R=35 qkv", out_features=(4096, 1024, 1024), ranks=(5,) * 7),
    Layer("odd ranks R=35 fp32", ranks=(5,) * 7, dtype=FP32),
    Layer("odd ranks R=35 fp32 adapters", ranks=(5,) * 7, adapters=FP32),
    Layer("odd ranks R=36", ranks=(9,) * 4),
    Layer("odd ranks R=118 fp32", ranks=(59,) * 2, dtype=FP32),
    Layer("odd ranks R=119", ranks=(17,) * 7),
    Layer("odd ranks R=119 fp32", ranks=(17,) * 7, dtype=FP32),
    # More experts than the tiles are made for: these have to launch, and may spill.
    Layer("E=32", ranks=(4,) * 32, top_k=32, oversized=True),
    Layer("E=64", ranks=(8,) * 64, oversized=True),
    Layer("E=128 of rank 1", ranks=(1,) * 128, oversized=True),
    Layer("E=64 siblings", out_features=(4096,) * 3, ranks=(1,) * 64, oversized=True),
    Layer("E=64 shared A", share_a=True, ranks=(8,) * 64, oversized=True),
    Layer("grouped E=64 r=16", ranks=(16,) * 64, grouped=True),
    Layer("grouped E=64 r=64 K=4", ranks=(64,) * 64, top_k=4, grouped=True),
    Layer("grouped E=256 r=16 K=8", ranks=(16,) * 256, top_k=8, grouped=True),
    # The dlogits of all experts: `grouped_dx` multiplies them and Wr.
    Layer("grouped softmax before top-k", ranks=(16,) * 64, renormalize=False, grouped=True),
    Layer(
        "grouped softmax before top-k fp32",
        ranks=(32,) * 32,
        renormalize=False,
        dtype=FP32,
        grouped=True,
    ),
    Layer("grouped qkv", out_features=(4096, 1024, 1024), ranks=(16,) * 8, grouped=True),
    Layer(
        "grouped experts by pair", out_features=(11008,), gate="sparse", by_pair=True, grouped=True
    ),
    Layer("grouped E=32 r=32", ranks=(32,) * 32, grouped=True),
    Layer("grouped mixed ranks", ranks=(8, 24, 64, 128), grouped=True),
    Layer("grouped dropout per expert", dropout=0.05, per_expert=True, grouped=True),
    Layer("grouped odd widths", in_features=4099, out_features=(4097,), grouped=True),
    Layer("grouped odd ranks r=5", ranks=(5,) * 7, dropout=0.05, grouped=True),
    Layer("grouped odd ranks r=33", ranks=(33,) * 16, grouped=True),
    Layer("grouped odd ranks r=5 fp32", ranks=(5,) * 7, dtype=FP32, grouped=True),
    Layer("grouped odd ranks r=17 fp32", ranks=(17,) * 7, dtype=FP32, grouped=True),
    Layer("grouped odd ranks r=33 fp32", ranks=(33,) * 7, dtype=FP32, grouped=True),
    Layer("grouped fp32 adapters", adapters=FP32, ranks=(64,) * 16, grouped=True),
    *(
        Layer(f"grouped E={r} r={r} fp32", ranks=(r,) * r, dtype=FP32, grouped=True)
        for r in (16, 32, 64)
    ),
    *(Layer(f"ffn R={8 * r}", out_features=(14336,), ranks=(r,) * 8, ffn=True) for r in RANKS),
    # The rank space of every expert is aligned, so the tiles have all rows of their entries.
    *(Layer(f"ffn r=8 R={8 * n}", out_features=(5504,), ranks=(8,) * n, ffn=True) for n in (2, 4)),
    Layer("ffn fp32 adapters", out_features=(5504,), adapters=FP32, ffn=True),
    Layer("ffn fp16 K=4", out_features=(5504,), ranks=(8,) * 16, top_k=4, dtype=FP16, ffn=True),
    Layer("ffn dropout per expert", out_features=(5504,), dropout=0.05, per_expert=True, ffn=True),
    Layer("ffn odd ranks R=35", out_features=(5503,), ranks=(5,) * 7, ffn=True),
    Layer("ffn odd ranks R=119", out_features=(5503,), ranks=(17,) * 7, dropout=0.05, ffn=True),
    Layer("ffn mixed ranks", out_features=(5504,), ranks=(8, 24, 64), ffn=True),
]


def stores_partials(launch: Launch) -> bool:
    """Return whether a launch stores partial sums, which another launch adds."""
    if "ONE_LAUNCH" in launch.constants:
        return not launch.constants["ONE_LAUNCH"]
    return launch.arguments.get("splits", 1) > 1 or launch.arguments.get("partial_stride", 0) > 0


def record(layer: Layer) -> list[Launch]:
    """Return the launches of one forward and backward of a layer, op by op."""
    forward, backward = record_directions(layer)
    return [*forward, *backward]


def record_directions(layer: Layer) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of one forward of a layer, and those of its backward, op by op."""
    if layer.whole_ffn:
        return record_whole_ffn(layer)
    if layer.ffn:
        return record_ffn(layer)
    forward, backward = record_grouped(layer) if layer.grouped else record_wide(layer)
    return forward, [] if layer.decodes else backward


def record_wide(layer: Layer) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of one forward and of one backward of the wide formulation."""
    from moelora_kernels.kernels import shrink_dx, shrink_gate, shrink_gate_backward, weight_grad
    from moelora_kernels.kernels.common import launcher

    empty = partial(torch.empty, dtype=layer.dtype, device="meta")
    T, I = layer.tokens, layer.in_features  # noqa: E741
    n, E, R = len(layer.out_features), len(layer.ranks), sum(layer.ranks)
    of = layer.adapters or layer.dtype
    rows_of_a = layer.ranks[0] if layer.share_a else R
    x, seed = empty(T, I), empty(1, dtype=torch.int64)
    lora_a = [empty(rows_of_a, I, dtype=of) for _ in range(n)]
    lora_b = [empty(O, R, dtype=of) for O in layer.out_features]  # noqa: E741
    dy = [empty(T, O) for O in layer.out_features]  # noqa: E741
    router, gate, top_k = NO_ROUTER, None, 0
    if layer.gate == "router":
        weights = [empty(E, I, dtype=layer.routers or of) for _ in range(n)]
        router, top_k = RouterTensors(weights), layer.top_k
    elif layer.gate == "sparse":
        experts = empty(T, n * layer.top_k, dtype=torch.int32)
        gate = Gate(empty(T, n * layer.top_k), experts)
    else:
        rows = empty(T, dtype=torch.int32) if layer.gate == "rows" else None
        gate = Gate(empty(8 if layer.gate == "rows" else T, n * E, dtype=FP32), rows=rows)
    ranks = layer.ranks
    mixture = Mixture(ranks, (2.0,) * E, layer.share_a, top_k, layer.renormalize)
    dropout = Dropout(layer.dropout, layer.per_expert, seed)
    with launcher.recording() as forward:
        h, u, *router_gate = shrink_gate.launch(
            x, lora_a, router, gate or Gate(*NO_GATE), mixture, dropout
        )
    if gate is None:
        gate = mixture.router_gate(*router_gate)
    with launcher.recording() as backward:
        dh, u, dgate = shrink_gate_backward.launch(dy, lora_b, h, gate, None, mixture)
        dlogits = dgate if top_k else None
        shrink_dx.launch(dh, dlogits, lora_a, router.weight, ranks, dropout)
        weight_grad.launch(x, dh, dlogits, dy, u, ranks, dropout, of, layer.routers or of)
    return forward, backward


def _balanced(layer: Layer) -> Routing:
    """Return routing arrays with data, in which every expert has the same number of pairs."""
    n, E = len(layer.out_features), len(layer.ranks)
    slots = torch.arange(n * layer.top_k) % layer.top_k
    ids = (torch.arange(layer.tokens)[:, None] * layer.top_k + slots) % E
    return reference.route(ids, E, n)


def record_grouped(layer: Layer) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of one forward and of one backward of the grouped formulation."""
    from moelora_kernels.kernels import (
        grouped_expand,
        grouped_shrink,
        grouped_shrink_backward,
        grouped_weight_grad,
        router,
        topk_gate,
    )
    from moelora_kernels.kernels.common import launcher

    empty = partial(torch.empty, dtype=layer.dtype, device="meta")
    T, I, K = layer.tokens, layer.in_features, layer.top_k  # noqa: E741
    n, E, R = len(layer.out_features), len(layer.ranks), sum(layer.ranks)
    rows, of = T * K if layer.by_pair else T, layer.adapters or layer.dtype
    x, seed = empty(rows, I), empty(1, dtype=torch.int64)
    lora_a = [empty(R, I, dtype=of) for _ in range(n)]
    lora_b = [empty(O, R, dtype=of) for O in layer.out_features]  # noqa: E741
    dy = [empty(rows, O) for O in layer.out_features]  # noqa: E741
    routers = [empty(E, I, dtype=of) for _ in range(n)] if layer.gate == "router" else []
    ranks, scaling, by_pair = layer.ranks, (2.0,) * E, layer.by_pair
    dropout, routing = Dropout(layer.dropout, layer.per_expert, seed), _balanced(layer)
    weights = empty(T, n * K, dtype=FP32)
    with launcher.recording() as forward:
        if routers:
            logits = router.launch_logits(x, RouterTensors(routers))
            by_sibling, chosen = topk_gate.launch(logits.view(-1, E), K, layer.renormalize, 1.0)
        h, u = grouped_shrink.launch(x, lora_a, weights, routing, ranks, scaling, dropout)
        for i, b in enumerate(lora_b):
            grouped_expand.launch(u, [b], None, routing, ranks, NO_DROPOUT, T, i, by_pair)
    with launcher.recording() as backward:
        dh, u, dweights = grouped_shrink_backward.launch(
            dy, lora_b, h, weights, routing, ranks, scaling
        )
        dlogits = None
        if routers:
            dlogits = topk_gate.launch_backward(
                dweights.view(-1, K), by_sibling, chosen, logits.view(-1, E), layer.renormalize, 1.0
            ).view(T, n * E)
        if by_pair:
            transposed = [a.t() for a in lora_a]
            grouped_expand.launch(dh, transposed, None, routing, ranks, dropout, T, 0, by_pair)
        else:
            grouped_expand.launch_dx(
                dh, dlogits, lora_a, routers, routing, ranks, dropout, T, layer.renormalize
            )
        grouped_weight_grad.launch(x, dh, dy, u, routing, ranks, dropout, of)
        if dlogits is not None:
            router.launch_grad(dlogits, x, of)
    return forward, backward


def record_ffn(layer: Layer) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of `ffn_inner`, and those of its backward."""
    from moelora_kernels.kernels import ffn_inner, ffn_inner_backward
    from moelora_kernels.kernels.common import launcher

    empty = partial(torch.empty, dtype=layer.dtype, device="meta")
    T, F, K, R = layer.tokens, layer.out_features[0], layer.top_k, sum(layer.ranks)
    of, P, rank = layer.adapters or layer.dtype, T * K, max(layer.ranks)
    inner = InnerInputs(empty(T, F), empty(T, F), empty(P, rank), empty(P, rank))
    adapters = InnerAdapters(empty(F, R, dtype=of), empty(F, R, dtype=of), empty(R, F, dtype=of))
    weights, scaling = empty(T, K, dtype=FP32), (2.0,) * len(layer.ranks)
    dropout = Dropout(layer.dropout, layer.per_expert, empty(1, dtype=torch.int64))
    options = InnerOptions(layer.ranks, scaling, *dropout, "silu")
    tail = weights, _balanced(layer), options
    with launcher.recording() as forward:
        ffn_inner.launch(inner, adapters, *tail)
    with launcher.recording() as backward:
        ffn_inner_backward.launch(empty(T, F), inner, adapters, empty(P, rank), *tail)
    return forward, backward


def record_whole_ffn(layer: Layer) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of one forward and of one backward of a layer of whole-FFN experts."""
    from moelora_kernels.kernels import (
        grouped_expand,
        grouped_shrink,
        grouped_shrink_backward,
        grouped_weight_grad,
        router,
        topk_gate,
    )
    from moelora_kernels.kernels.common import launcher

    empty = partial(torch.empty, dtype=layer.dtype, device="meta")
    T, I, K = layer.tokens, layer.in_features, layer.top_k  # noqa: E741
    E, R, of = len(layer.ranks), sum(layer.ranks), layer.adapters or layer.dtype
    routing, ranks, scaling = _balanced(layer), layer.ranks, (2.0,) * E
    dropout = Dropout(layer.dropout, layer.per_expert, empty(1, dtype=torch.int64))
    x, lora_a, down_b = empty(T, I), empty(R, I, dtype=of), empty(I, R, dtype=of)
    rank_space, weights = empty(T * K, max(ranks)), empty(T, K, dtype=FP32)
    # In the place of a gradient that is computed elsewhere.
    nothing = empty(T, 0)
    inner_forward, inner_backward = record_ffn(layer)
    with launcher.recording() as before:
        logits = router.launch_logits(x, RouterTensors([empty(E, I, dtype=of)]))
        _, chosen = topk_gate.launch(logits, K, layer.renormalize, 1.0)
        for _ in range(2):
            grouped_shrink.launch(x, [lora_a], None, routing, ranks, scaling, dropout)
    with launcher.recording() as after:
        grouped_expand.launch(rank_space, [down_b], None, routing, ranks, NO_DROPOUT, T)
    with launcher.recording() as down:
        dh, u, _ = grouped_shrink_backward.launch(
            [x], [down_b], rank_space, weights, routing, ranks, scaling
        )
        grouped_weight_grad.launch(nothing, dh, [x], u, routing, ranks, NO_DROPOUT, of)
    with launcher.recording() as linears:
        dx = None
        for _ in range(2):
            grouped_weight_grad.launch(
                x, rank_space, [nothing], rank_space, routing, ranks, dropout, of
            )
            dx = grouped_expand.launch(rank_space, [lora_a.t()], dx, routing, ranks, dropout, T)
        dlogits = topk_gate.launch_backward(
            weights, weights, chosen, logits, layer.renormalize, 1.0
        )
        router.launch_grad(dlogits, x, of)
    return [*before, *inner_forward, *after], [*down, *inner_backward, *linears]
