"""Is a provider right? Every y and every gradient, by name, against the expert formula in fp64."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.baselines.linear import PROVIDERS
from benchmarks.measure.inputs import Adapter, Layer

# Rows that are compared. The provider runs at the full T, but the fp64 products need these rows
# only: on a slow CPU 128 rows of 4096x4096 take a fraction of a second.
CHECKED_ROWS = {"cpu": 128, "cuda": 1024}

# Rows of W that are converted to fp64 at a time, so that no second W is ever held.
BLOCK = 2048


def checked_rows(tokens: int, device: torch.device) -> Tensor:
    """Rows spread evenly over [0, T), the first and the last among them."""
    count = min(tokens, CHECKED_ROWS[device.type])
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64, device=device).round().long()


def base_product(adapter: Adapter, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x Wt + b [t, O] and dy W [t, I] in fp64, without autograd."""
    y, dx = [], torch.zeros_like(x)
    for weight, piece in zip(adapter.weight.split(BLOCK), dy.split(BLOCK, dim=1), strict=True):
        weight = weight.double()
        y.append(x @ weight.T)
        dx += piece @ weight
    return torch.cat(y, dim=1) + adapter.bias.double(), dx


def expert_sum(
    layer: Layer, x: Tensor, formula: str, trained: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Sum over e of scale * gate[:, e] * (x A_e^t) B_e^t, one expert at a time; and the gate.

    trained: A [R, I], B [O, R], router weight [E, I], router bias [E], fp64.
    formula "plain" has gate 1 for all; "active" is that with the first K r columns alone, as one
    expert; "mixture" has the softmax over the top K logits.
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
    """Size of the terms that make up dlogits [t, E], as if none of them cancelled.

        dgate = scale <P, h> over the ranks of e        dlogits = gate (dgate - <gate, dgate>)

    Where two experts of a token gain alike, or the ranks of one cancel, dlogits is nearly zero and
    all rounding, in every provider. So errors are measured against the root of the sum of squares.
    """
    lora_A, lora_B = trained[0].detach(), trained[1].detach()
    products = ((x.detach() @ lora_A.T) * (dy @ lora_B)).view(len(x), layer.experts, layer.rank)
    size = layer.scaling * products.norm(dim=2)
    terms = gate.detach() * (size + (gate.detach() * size).sum(dim=1, keepdim=True))
    return terms.norm().item()


@dataclass
class Expected:
    """A tensor in fp64, and the norm its error is measured against (None: its own)."""

    value: Tensor
    scale: float | None = None


def reference(layer: Layer, x: Tensor, dys: list[Tensor], formula: str) -> dict[str, Expected]:
    """The rows x [t, I], dy [t, O] in fp64: y, dx, dA, dB, drouter_weight, drouter_bias by name.

    formula: "base" has no adapter, "plain" one LoRA of rank R, "active" one of rank K r, "mixture"
    the gated experts.
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
            expected |= {layer.label(index, name): each for name, each in gradients.items()}
        expected[layer.label(index, "y")] = Expected(y)
    expected["dx"] = Expected(dx if x.grad is None else dx + x.grad)
    return expected


def run_provider(
    provider: nn.Module, layer: Layer, x: Tensor, dys: list[Tensor], rows: Tensor, mode: str
) -> dict[str, Tensor]:
    """What the provider computes at full T, cut down to the rows, under the reference's names.

    dy is zero outside the rows. So dA, dB and the router's gradients, sums over all T tokens, are
    sums over the rows, and one fp64 product of few rows checks the very shape that is timed.
    """
    if mode == "fwd":
        with torch.no_grad():
            outputs = provider(x)
        return {layer.label(i, "y"): y[rows] for i, y in enumerate(outputs)}
    provider.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    outputs = provider(x)
    sparse = [torch.zeros_like(dy).index_copy(0, rows, dy[rows]) for dy in dys]
    torch.autograd.backward(outputs, sparse)
    found = {layer.label(i, "y"): y.detach()[rows] for i, y in enumerate(outputs)}
    found |= {"dx": x.grad[rows]} | provider.gradients()
    provider.zero_grad(set_to_none=True)
    return found


def relative_rms(found: Tensor | None, expected: Expected) -> float:
    """||found - value|| / scale; inf for a missing, misshapen or non-finite tensor."""
    if found is None or found.shape != expected.value.shape:
        return float("inf")
    scale = expected.value.norm().item() if expected.scale is None else expected.scale
    error = (found.double() - expected.value).norm() / (scale or 1.0)
    return error.item() if torch.isfinite(error) else float("inf")


def roundoff(dtype: torch.dtype) -> float:
    """u + 16 u32: one rounding to the dtype, and the order in which fp32 sums are added up."""
    return torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps


class Checker:
    """The verdict on providers at one (layer, T), in both modes.

    For each tensor by name

        error  = ||found - fp64|| / ||fp64||                    for the router see `router_scale`
        budget = 2 * error of the masked eager provider in the same dtype + u + 16 u32

    so the tolerance is what plain PyTorch needs at this shape, not a constant somebody chose. u is
    the dtype's unit roundoff; 16 u32, a millionth, is the order in which fp32 sums are added up,
    and matters for fp32 alone.
    The masked provider cannot fail against itself; it is held to an absolute 2 % (0.1 % in fp32),
    which rounding does not reach and a wrong expert or a lost term exceeds.
    Raises ArithmeticError if it does.
    Subclasses have another yardstick, another reference.
    """

    yardstick = "masked"

    def __init__(self, layer: Layer, x: Tensor, dys: list[Tensor]):
        self.layer, self.x, self.dys = layer, x, dys
        self.rows = checked_rows(len(x), x.device)
        self.expected: dict[str, dict[str, Expected]] = {}
        build, formula = self.providers()[self.yardstick]
        ceiling = 0.001 if x.dtype == torch.float32 else 0.02
        self.budgets = {}
        for name, error in self.errors(build(layer), formula, "fwd_bwd").items():
            if error > ceiling:
                who = f"the {self.yardstick} provider is wrong"
                raise ArithmeticError(f"{who}: {name} is off by {error:.1e}")
            self.budgets[name] = 2 * error + roundoff(x.dtype)

    def providers(self) -> dict:
        """Where the yardstick is found."""
        return PROVIDERS

    def reference(self, x: Tensor, dys: list[Tensor], formula: str) -> dict[str, Expected]:
        """Everything that rows x and dy lead to, in fp64."""
        return reference(self.layer, x, dys, formula)

    def errors(self, provider: nn.Module, formula: str, mode: str) -> dict[str, float]:
        if formula not in self.expected:
            few = [dy[self.rows] for dy in self.dys]
            self.expected[formula] = self.reference(self.x[self.rows], few, formula)
        expected = self.expected[formula]
        if mode == "fwd":
            outputs = [self.layer.label(i, "y") for i in range(len(self.dys))]
            expected = {name: expected[name] for name in outputs}
        found = run_provider(provider, self.layer, self.x, self.dys, self.rows, mode)
        return {name: relative_rms(found.get(name), expected[name]) for name in expected}

    def verdict(self, provider: nn.Module, formula: str, mode: str) -> tuple[str, float, float]:
        """(name, error, budget) of the tensor that comes closest to its budget or exceeds it."""
        errors = self.errors(provider, formula, mode)
        worst = max(errors, key=lambda name: errors[name] / self.budgets[name])
        return worst, errors[worst], self.budgets[worst]
