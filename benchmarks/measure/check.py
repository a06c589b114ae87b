"""Compare a provider with the expert formula in float64: every y and every gradient, by name."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines.linear import PROVIDERS
from benchmarks.measure.inputs import Adapter, Layer

# Rows that are compared. The provider runs at the full T; only these rows have float64 products.
# On a slow CPU, 128 rows of 4096x4096 take a fraction of a second.
CHECKED_ROWS = {"cpu": 128, "cuda": 1024}

# Rows of W that are converted to float64 at a time: a whole W in float64 may not fit into memory.
BLOCK = 2048


def checked_rows(tokens: int, device: torch.device) -> Tensor:
    """Return rows spread evenly over [0, T), with the first and the last one."""
    count = min(tokens, CHECKED_ROWS[device.type])
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64, device=device).round().long()


def base_product(adapter: Adapter, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return x Wt + b [t, O] and dy W [t, I] in float64, without autograd."""
    y, dx = [], torch.zeros_like(x)
    for weight, piece in zip(adapter.weight.split(BLOCK), dy.split(BLOCK, dim=1), strict=True):
        weight = weight.double()
        y.append(x @ weight.T)
        dx += piece @ weight
    return torch.cat(y, dim=1) + adapter.bias.double(), dx


def expert_sum(
    layer: Layer, x: Tensor, formula: str, trained: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the sum over e of scale * gate[:, e] * (x A_e^t) B_e^t, and the gate [t, E].

    trained: A [R, I], B [O, R], router weight [E, I], router bias [E], in float64.
    formula: "plain": the gate is 1 for all experts; "active": the same with only the first K r
    columns, as one expert; "mixture": the gate is the softmax over the K largest logits.
    """
    lora_A, lora_B, router_weight, router_bias = trained
    gate = x.new_ones(len(x), layer.experts)
    if formula == "active":
        return layer.scaling * (x @ lora_A.T) @ lora_B.T, gate
    if formula == "mixture":
        logits = x @ router_weight.T + router_bias
        cut = logits.sort(dim=1, descending=True).values[:, layer.top_k - 1, None]
        gate = logits.masked_fill(logits < cut, -torch.inf).softmax(dim=1)
    total = x.new_zeros(len(x), len(lora_B))
    for e in range(layer.experts):
        block = slice(e * layer.rank, (e + 1) * layer.rank)
        expert = (x @ lora_A[block].T) @ lora_B[:, block].T
        total = total + layer.scaling * gate[:, e, None] * expert
    return total, gate


def router_scale(layer: Layer, x: Tensor, dy: Tensor, gate: Tensor, trained: list) -> float:
    """Return the norm that errors of the router's gradients are measured against.

        dgate = scale <du, h> over the ranks of e        dlogits = gate (dgate - <gate, dgate>)

    If the terms of dlogits [t, E] cancel, dlogits is nearly zero and consists of rounding, in every
    provider. So the norm is the root of the sum of the squares of the terms, as if none cancelled.
    """
    lora_A, lora_B = trained[0].detach(), trained[1].detach()
    products = ((x.detach() @ lora_A.T) * (dy @ lora_B)).view(len(x), layer.experts, layer.rank)
    size = layer.scaling * products.norm(dim=2)
    terms = gate.detach() * (size + (gate.detach() * size).sum(dim=1, keepdim=True))
    return terms.norm().item()


class Verdict(NamedTuple):
    """The tensor of a provider that is closest to its budget, or furthest above it."""

    tensor: str
    error: float
    budget: float


@dataclass
class Expected:
    """A tensor in float64, and the norm that errors are measured against (None: its own)."""

    value: Tensor
    scale: float | None = None


def reference(layer: Layer, x: Tensor, dys: list[Tensor], formula: str) -> dict[str, Expected]:
    """Return y, dx, dA, dB, drouter_weight and drouter_bias by name, in float64.

    x [t, I], dys [t, O]: the compared rows.
    formula: "base": without an adapter; "plain": one LoRA of rank R; "active": one LoRA of rank
    K r; "mixture": the gated experts.
    """
    x = x.double().requires_grad_()
    expected, dx = {}, torch.zeros_like(x)
    for index, (adapter, dy) in enumerate(zip(layer.adapters, dys, strict=True)):
        dy = dy.double()
        y, base_dx = base_product(adapter, x.detach(), dy)
        dx += base_dx
        if formula != "base":
            tensors = (adapter.lora_A, adapter.lora_B, adapter.router_weight, adapter.router_bias)
            trained = [tensor.double() for tensor in tensors]
            if formula == "active":
                columns = layer.top_k * layer.rank
                trained[:2] = trained[0][:columns].clone(), trained[1][:, :columns].clone()
            trained = [tensor.requires_grad_() for tensor in trained]
            delta, gate = expert_sum(layer, x, formula, trained)
            delta.backward(dy)
            y = y + delta.detach()
            gradients = {"dA": Expected(trained[0].grad), "dB": Expected(trained[1].grad)}
            if formula == "mixture":
                scale = router_scale(layer, x, dy, gate, trained)
                row = x.detach().norm().item() / len(x) ** 0.5
                gradients["drouter_weight"] = Expected(trained[2].grad, scale * row)
                gradients["drouter_bias"] = Expected(trained[3].grad, scale)
            expected |= {layer.label(index, name): value for name, value in gradients.items()}
        expected[layer.label(index, "y")] = Expected(y)
    expected["dx"] = Expected(dx if x.grad is None else dx + x.grad)
    return expected


def run_provider(
    provider: nn.Module, layer: Layer, x: Tensor, dys: list[Tensor], rows: Tensor, mode: str
) -> dict[str, Tensor]:
    """Run a provider at the full T; return its outputs and gradients by name, for the rows.

    dy is zero outside the rows. So dA, dB and the router's gradients, which are sums over all T
    tokens, are sums over the rows. Few rows in float64 check the same shape that is timed.
    """
    if mode != "fwd_bwd":
        with torch.no_grad():
            outputs = provider(x)
        return {layer.label(i, "y"): y[rows] for i, y in enumerate(outputs)}
    provider.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    outputs = provider(x)
    sparse = [torch.zeros_like(dy).index_copy(0, rows, dy[rows]) for dy in dys]
    torch.autograd.backward(outputs, sparse)
    tensors = {layer.label(i, "y"): y.detach()[rows] for i, y in enumerate(outputs)}
    tensors |= {"dx": x.grad[rows]} | provider.gradients()
    provider.zero_grad(set_to_none=True)
    return tensors


def relative_rms(tensor: Tensor | None, expected: Expected) -> float:
    """Return ||tensor - value|| / scale; inf if it is missing, misshapen or not finite."""
    if tensor is None or tensor.shape != expected.value.shape:
        return float("inf")
    scale = expected.value.norm().item() if expected.scale is None else expected.scale
    error = (tensor.double() - expected.value).norm() / (scale or 1.0)
    return error.item() if torch.isfinite(error) else float("inf")


def roundoff(dtype: torch.dtype) -> float:
    """Return u + 16 u32: one rounding to the dtype, and the order of fp32 sums."""
    return torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps


class Checker:
    """Checks the providers of one layer at one T, in both modes.

    For each tensor by name

        error  = ||tensor - float64|| / ||float64||      for the router's gradients: `router_scale`
        budget = 2 * error of the baseline in the same dtype + u + 16 u32

    The baseline is the eager provider `masked`, so the budget follows the error of plain PyTorch at
    this shape. u is the unit roundoff of the dtype. 16 u32, a millionth, stands for the order in
    which fp32 sums are added up; it matters only for fp32.
    The baseline itself has an absolute limit: 2 %, in fp32 0.1 %. Rounding stays far below it; a
    wrong expert or a lost term exceeds it. Raises ArithmeticError if the baseline exceeds it.
    """

    baseline = "masked"

    def __init__(self, layer: Layer, x: Tensor, dys: list[Tensor]):
        self.layer, self.x, self.dys = layer, x, dys
        self.rows = checked_rows(len(x), x.device)
        self.expected: dict[str, dict[str, Expected]] = {}
        build, formula = self.providers()[self.baseline]
        limit = 0.001 if x.dtype == torch.float32 else 0.02
        self.budgets = {}
        for name, error in self.errors(build(layer), formula, "fwd_bwd").items():
            if error > limit:
                raise ArithmeticError(
                    f"the {self.baseline} provider is wrong: {name} is off by {error:.1e}, "
                    f"allowed {limit:.1e}"
                )
            self.budgets[name] = 2 * error + roundoff(x.dtype)

    def providers(self) -> dict:
        """Return the providers, with the baseline."""
        return PROVIDERS

    def reference(self, x: Tensor, dys: list[Tensor], formula: str) -> dict[str, Expected]:
        """Return y and the gradients of the rows x and dy in float64."""
        return reference(self.layer, x, dys, formula)

    def errors(self, provider: nn.Module, formula: str, mode: str) -> dict[str, float]:
        """Return the error of each tensor by name; without a backward only of y."""
        if formula not in self.expected:
            dys = [dy[self.rows] for dy in self.dys]
            self.expected[formula] = self.reference(self.x[self.rows], dys, formula)
        expected = self.expected[formula]
        if mode != "fwd_bwd":
            outputs = [self.layer.label(i, "y") for i in range(len(self.dys))]
            expected = {name: expected[name] for name in outputs}
        tensors = run_provider(provider, self.layer, self.x, self.dys, self.rows, mode)
        return {name: relative_rms(tensors.get(name), expected[name]) for name in expected}

    def verdict(self, provider: nn.Module, formula: str, mode: str) -> Verdict:
        """Return the tensor with the largest error in relation to its budget."""
        errors = self.errors(provider, formula, mode)
        worst = max(errors, key=lambda name: errors[name] / self.budgets[name])
        return Verdict(worst, errors[worst], self.budgets[worst])
