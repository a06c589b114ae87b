"""Compare the providers of the suite `ffn` with the formula in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.ffn import PROJECTIONS, PROVIDERS, FeedForward, named
from benchmarks.measure.check import Checker, Expected


def reference(layer: FeedForward, x: Tensor, dy: Tensor, formula: str) -> dict[str, Expected]:
    """Return y, dx and the gradients by name, in float64, for the rows x [t, I] and dy [t, I].

    formula: "base": without an adapter; "active": one plain LoRA of rank K r on each linear;
    "mixture": the experts. Every expert is computed on every row.
    """
    x, dy = x.double().requires_grad_(), dy.double()
    columns = layer.top_k * layer.rank if formula == "active" else layer.experts * layer.rank
    weights = {adapter.name: adapter.weight.double() for adapter in layer.adapters}
    trained = {
        adapter.name: [
            adapter.lora_A.double()[:columns].clone().requires_grad_(),
            adapter.lora_B.double()[:, :columns].clone().requires_grad_(),
        ]
        for adapter in layer.adapters
    }
    router = layer.router_weight.double().requires_grad_()

    def linear(name: str, rows: Tensor, base: Tensor | None, block: slice) -> Tensor:
        lora_A, lora_B = trained[name]
        base = rows @ weights[name].T if base is None else base
        if formula == "base":
            return base
        return base + layer.scaling * (rows @ lora_A[block].T) @ lora_B[:, block].T

    def network(block: slice, gate: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        a = F.silu(linear("gate_proj", x, gate, block)) * linear("up_proj", x, up, block)
        return linear("down_proj", a, None, block)

    scale = 0.0
    if formula == "mixture":
        logits = x @ router.T
        cut = logits.sort(dim=1, descending=True).values[:, layer.top_k - 1, None]
        gates = logits.masked_fill(logits < cut, -torch.inf).softmax(dim=1)
        gate, up = (x @ weights[name].T for name in PROJECTIONS[:2])
        y, sizes = torch.zeros_like(dy), []
        for e in range(layer.experts):
            output = network(slice(e * layer.rank, (e + 1) * layer.rank), gate, up)
            y = y + gates[:, e, None] * output
            sizes.append((dy * output.detach()).norm(dim=1))
        scale = router_scale(gates.detach(), torch.stack(sizes, dim=1))
    else:
        y = network(slice(None))
    y.backward(dy)
    expected = {"y": Expected(y.detach()), "dx": Expected(x.grad)}
    if formula == "base":
        return expected
    for name, (lora_A, lora_B) in trained.items():
        expected[named(name, "dA")] = Expected(lora_A.grad)
        expected[named(name, "dB")] = Expected(lora_B.grad)
    if formula == "mixture":
        row = x.detach().norm().item() / len(x) ** 0.5
        expected["drouter_weight"] = Expected(router.grad, scale * row)
    return expected


def router_scale(gates: Tensor, sizes: Tensor) -> float:
    """Return the norm of the terms of dlogits [t, E], as in `check.router_scale`.

    sizes [t, E]: for each dgate_e = <dy, y_e>, the root of the sum of the squares of its products.
    """
    return (gates * (sizes + (gates * sizes).sum(dim=1, keepdim=True))).norm().item()


class FeedForwardChecker(Checker):
    """A `Checker` whose baseline is the loop: these experts have no masked form."""

    baseline = "loop"

    def providers(self) -> dict:
        """Return the providers of this suite."""
        return PROVIDERS

    def reference(self, x: Tensor, dys: list[Tensor], formula: str) -> dict[str, Expected]:
        """Return y and the gradients of the rows x and dy in float64."""
        return reference(self.layer, x, dys[0], formula)
