"""Routing distributions, reference steps and error budgets for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.numerics import compute_dtype, host_tensor
from moelora_kernels.types import (
    NO_DROPOUT,
    Dropout,
    Gate,
    LinearTensors,
    Mixture,
    RouterTensors,
)

# Name -> the likelihood of every expert, [E], not normalised.
ROUTINGS: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda experts: torch.ones(experts, device="cpu"),
    "zipf": lambda experts: 1.0 / torch.arange(1, experts + 1, device="cpu"),
    # Expert 0 is as likely as all others together: it gets about half of the first slots.
    "skewed": lambda experts: host_tensor([experts - 1.0] + [1.0] * (experts - 1)),
    # Every token goes to expert 0; a second slot is uniform over the others.
    "one": lambda experts: host_tensor([1.0] + [1e-9] * (experts - 1)),
    # The last expert never gets a token.
    "empty": lambda experts: host_tensor([1.0] * (experts - 1) + [0.0]),
}


def expert_likelihood(routing: str, experts: int, top_k: int) -> Tensor:
    """Return the likelihood of every expert under a routing of ROUTINGS, [E], not normalised.

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
    """Draw K distinct experts for every token from the named distribution: [T, K] int64."""
    likelihood = expert_likelihood(routing, experts, top_k)
    if tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int64, device="cpu")
    return torch.multinomial(likelihood.expand(tokens, experts), top_k, generator=generator)


def clear_routing(x: Tensor, router: RouterTensors, top_k: int, least: float = 1e-3) -> Tensor:
    """Return x [T, I] without the tokens whose experts depend on the last bits of their logits.

    A token whose first K + 1 logits of a router are closer than `least` becomes a copy of the token
    whose logits are farthest apart. With K = E nothing is chosen.
    """
    if not len(x) or not router.weight or router.weight[0].shape[0] == top_k:
        return x
    gap = x.new_full(x.shape[:1], float("inf"), dtype=torch.float64)
    for i, weight in enumerate(router.weight):
        logits = x.double() @ weight.double().t()
        if router.bias:
            logits += router.bias[i].double()
        largest = logits.sort(dim=1, descending=True).values[:, : top_k + 1]
        gap = gap.minimum((largest[:, :-1] - largest[:, 1:]).amin(dim=1))
    return torch.where((gap < least)[:, None], x[gap.argmax()], x)


def reference_step(
    mixture: Mixture,
    x: Tensor,
    linears: Sequence[LinearTensors],
    dy: Sequence[Tensor],
    gate: Gate | None = None,
    dropout: Dropout = NO_DROPOUT,
    dlogits: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return outputs and gradients of a layer by name, computed only with the reference ops.

    Every op rounds once to the dtype of its inputs. For float64 inputs the result is exact enough
    to compare with. For bfloat16 inputs its error is the error of bfloat16 itself.

    Args:
        mixture: the static options.
        x: [T, I].
        linears: n siblings, all with a weight.
        dy: n x [T, O_i].
        gate: the gate; None if the linear routers compute it.
        dropout: applied to x before A.
        dlogits: [T, n E], the gradient of the logits from auxiliary losses, or None.

    Returns:
        y0, dA0, dB0 of sibling 0, and so on for every sibling; dx. With routers also drouter0 and
        dbias0 (of the router); without routers also dgates.
    """
    dtype = compute_dtype(x)
    n, has_router = len(linears), gate is None
    a, b = [s.lora_a for s in linears], [s.lora_b for s in linears]
    router = RouterTensors(
        [s.router_weight for s in linears if s.router_weight is not None],
        [s.router_bias for s in linears if s.router_bias is not None],
    )
    h, u, weights, experts, logits = reference.shrink_gate(x, a, router, gate, mixture, dropout)
    if has_router:
        gate = mixture.router_gate(weights, experts, logits)
    dh, u, dgate = reference.shrink_gate_backward(
        [g.to(x.dtype) for g in dy], b, h, gate, dlogits, mixture
    )
    dlogits = dgate if has_router else None
    router_dtype = router.weight[0].dtype if has_router else x.dtype
    da, drouter, dbias, db = reference.weight_grad(
        x, dh, dlogits, dy, u, mixture.ranks, dropout, a[0].dtype, router_dtype
    )
    dx = reference.shrink_dx(dh, dlogits, a, router.weight, mixture.ranks, dropout).to(dtype)

    result: dict[str, Tensor] = {}
    for i, (s, u_i) in enumerate(zip(linears, u.chunk(n, dim=1), strict=True)):
        bias = 0 if s.bias is None else s.bias.to(dtype)
        base = x.to(dtype) @ s.weight.to(dtype).t() + bias
        result[f"y{i}"] = (base + u_i.to(dtype) @ s.lora_b.to(dtype).t()).to(x.dtype)
        dx = dx + dy[i].to(dtype) @ s.weight.to(dtype)
        result[f"dA{i}"], result[f"dB{i}"] = da.chunk(n)[i], db[i]
        if has_router:
            result[f"drouter{i}"] = drouter.chunk(n)[i]
        if router.bias:
            result[f"dbias{i}"] = dbias.chunk(n)[i]
    result["dx"] = dx.to(x.dtype)
    if not has_router:
        result["dgates"] = dgate.to(gate.weights.dtype)
    return result


def error(actual: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference; 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    return (actual.double() - truth.double()).abs().max().item()


def assert_within_budget(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
    dtype: torch.dtype,
    truncations: int = 0,
) -> None:
    """Assert that `actual` has every tensor of `truth`: same shape, finite, error in the budget.

        budget = 2 * (error of the baseline + one rounding of the largest value in `dtype`)

    Args:
        actual: the results to check, by name.
        truth: the same results in float64.
        baseline: the results of the reference in `dtype`.
        dtype: the dtype in which `actual` was computed.
        truncations: how often hardware truncates a running float32 sum instead of rounding it. Each
            truncation adds one unit in the last place of the largest value to the budget.
    """
    rounding = torch.finfo(dtype).eps / 2
    for name, expected in truth.items():
        result = actual[name]
        assert result.shape == expected.shape, f"{name}: {result.shape}, expected {expected.shape}"
        assert torch.isfinite(result).all(), f"{name}: non-finite values"
        largest = expected.abs().max().item() if expected.numel() else 0.0
        baseline_error = error(baseline[name], expected)
        budget = 2 * (baseline_error + rounding * largest)
        budget += truncations * torch.finfo(torch.float32).eps * largest
        measured = error(result, expected)
        assert measured <= budget, (
            f"{name}: error {measured:.3e} exceeds {budget:.3e} "
            f"(reference {baseline_error:.3e}, largest value {largest:.3e})"
        )
