"""What the tests and benchmarks of this package, and of packages built on it, share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.autograd.linear import _Flat as Mixture
from moelora_kernels.types import LinearTensors

# name -> how likely each expert is [E], not normalised.
ROUTINGS: dict[str, Callable[[int], Tensor]] = {
    "uniform": torch.ones,
    "zipf": lambda experts: 1.0 / torch.arange(1, experts + 1),
    # Expert 0 outweighs all others together: about half of the first places.
    "skewed": lambda experts: torch.tensor([experts - 1.0] + [1.0] * (experts - 1)),
    # Every token goes to expert 0; a second place is uniform over the others.
    "one": lambda experts: torch.tensor([1.0] + [1e-9] * (experts - 1)),
    # The last expert never gets a token.
    "empty": lambda experts: torch.tensor([1.0] * (experts - 1) + [0.0]),
}


def expert_likelihood(routing: str, experts: int, top_k: int) -> Tensor:
    """How likely each of `experts` is under a routing of ROUTINGS, [E], not normalised.

    Raises ValueError for an unknown routing, or one with fewer than top_k experts to choose from.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
    if experts < 1:
        raise ValueError(f"experts: expected at least 1, got {experts}")
    likelihood = ROUTINGS[routing](experts)
    available = int((likelihood > 0).sum())
    if not 1 <= top_k <= available:
        raise ValueError(f"top_k: expected 1 to {available} with routing {routing!r}, got {top_k}")
    return likelihood


def draw_experts(
    routing: str, tokens: int, experts: int, top_k: int, generator: torch.Generator
) -> Tensor:
    """K distinct experts for every token, drawn from the named distribution, [T, K] int64."""
    likelihood = expert_likelihood(routing, experts, top_k)
    if tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int64)
    return torch.multinomial(likelihood.expand(tokens, experts), top_k, generator=generator)


def reference_step(
    mixture: Mixture,
    x: Tensor,
    siblings: Sequence[LinearTensors],
    dy: Sequence[Tensor],
    *,
    gates: Tensor | None = None,
    indices: Tensor | None = None,
    rows: Tensor | None = None,
    seed: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients of a layer by name, from the reference ops and nothing else.

    Every op rounds to its inputs' dtype once, so that on float64 inputs this is the truth and on
    bfloat16 inputs the error that bfloat16 alone costs. Names: y0, dA0, dB0, drouter0, dbias0 (of
    the router) per sibling, and dx, dgates.
    """
    dtype = reference.compute_dtype(x)
    routers = [s.router_weight for s in siblings if s.router_weight is not None]
    biases = [s.router_bias for s in siblings if s.router_bias is not None]
    a, b = [s.lora_a for s in siblings], [s.lora_b for s in siblings]
    h, u, weights, chosen, logits = reference.shrink_gate(
        x, a, gates, indices, rows, routers, biases, *mixture, seed
    )
    if routers:
        gates, indices = weights, chosen if mixture.top_k < len(mixture.ranks) else None
    dh, u, dgate = reference.shrink_gate_backward(
        [g.to(x.dtype) for g in dy], b, h, gates, indices, rows, logits if routers else None,
        dlogits, mixture.ranks, mixture.scaling, mixture.share_a, mixture.top_k,
        mixture.renormalize, mixture.temperature,
    )  # fmt: skip
    da, drouter, dbias, db = reference.weight_grad(
        x, dh, dgate if routers else None, dy, u, a[0].dtype,
        routers[0].dtype if routers else x.dtype, mixture.ranks, mixture.dropout,
        mixture.dropout_per_expert, seed,
    )  # fmt: skip

    found: dict[str, Tensor] = {}
    dlogits = dgate if routers else None
    dx = reference.shrink_dx(
        dh, dlogits, a, routers, mixture.ranks, mixture.dropout, mixture.dropout_per_expert, seed
    ).to(dtype)
    n = len(siblings)
    for i, (s, gated) in enumerate(zip(siblings, u.chunk(n, dim=1), strict=True)):
        bias = 0 if s.bias is None else s.bias.to(dtype)
        base = x.to(dtype) @ s.weight.to(dtype).t() + bias
        found[f"y{i}"] = (base + gated.to(dtype) @ s.lora_b.to(dtype).t()).to(x.dtype)
        dx = dx + dy[i].to(dtype) @ s.weight.to(dtype)
        found[f"dA{i}"], found[f"dB{i}"] = da.chunk(n)[i], db[i]
        if routers:
            found[f"drouter{i}"] = drouter.chunk(n)[i]
        if biases:
            found[f"dbias{i}"] = dbias.chunk(n)[i]
    found["dx"] = dx.to(x.dtype)
    if not routers:
        found["dgates"] = dgate.to(gates.dtype)
    return found


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    return (actual.double() - truth.double()).abs().max().item()


def assert_within_budget(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    yardstick: Mapping[str, Tensor],
    dtype: torch.dtype,
    truncations: int = 0,
) -> None:
    """Every tensor of `truth` by name: finite, of its shape, and within a budget from the data.

        budget = 2 * (error of the yardstick + one rounding of the largest value in `dtype`)

    `truth` is float64, `yardstick` the reference in the dtype that `actual` was computed in.
    `truncations` of a running float32 sum, where hardware cuts instead of rounding, may each cost
    one unit in the last place of the largest value more.
    """
    rounding = torch.finfo(dtype).eps / 2
    for name, expected in truth.items():
        found = actual[name]
        assert found.shape == expected.shape, f"{name}: {found.shape}, expected {expected.shape}"
        assert torch.isfinite(found).all(), f"{name}: non-finite values"
        largest = expected.abs().max().item() if expected.numel() else 0.0
        of_reference = error(yardstick[name], expected)
        budget = 2 * (of_reference + rounding * largest)
        budget += truncations * torch.finfo(torch.float32).eps * largest
        measured = error(found, expected)
        assert measured <= budget, (
            f"{name}: error {measured:.3e} exceeds {budget:.3e} "
            f"(reference {of_reference:.3e}, largest value {largest:.3e})"
        )
