"""Draw the tensors that all providers share: frozen weights, adapters, router, x and dy.

T tokens, I in_features, O out_features, E experts, K experts per token, r rank, R = E r.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.suites.shapes import Case
from moelora_kernels.testing import draw_experts, expert_likelihood

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Adapter:
    """The tensors of one sibling: y = x Wt + b + mixture.

    weight [O, I], bias [O] or None;  lora_A [R, I], lora_B [O, R];
    router_weight [E, I], router_bias [E], or None if the layer has one router for all siblings.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    router_weight: Tensor | None
    router_bias: Tensor | None


@dataclass
class Layer:
    """A case with its tensors: n siblings, each with E experts of rank r, top K, scale alpha/r."""

    case: Case
    adapters: list[Adapter]
    experts: int
    rank: int
    top_k: int
    alpha: float

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def routers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight [E, I] and bias [E] of every router."""
        return [(adapter.router_weight, adapter.router_bias) for adapter in self.adapters]

    def label(self, index: int, tensor: str) -> str:
        """Return the name of a tensor: `dA` for a single linear, `q_proj.dA` for a sibling."""
        single = len(self.adapters) == 1
        return tensor if single else f"{self.adapters[index].name}.{tensor}"


def make_layer(
    case: Case, experts: int, rank: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> Layer:
    """Draw a layer whose base product, h and mixture have entries of order one.

    W, A and the router ~ N(0, 1/I): x ~ N(0, 1) gives y, h and logits of order one.
    B ~ N(0, 1/R) instead of zero: the adapter is a large part of y, so that an error in it is not
    hidden by the base product.
    """
    generator = torch.Generator(device).manual_seed(len(case.name) + case.in_features)

    def normal(*shape: int, variance: float) -> Tensor:
        draw = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return draw.mul_(variance**0.5).to(dtype)

    fan_in, width = case.in_features, experts * rank
    adapters = [
        Adapter(
            name=name,
            weight=normal(out, fan_in, variance=1 / fan_in),
            bias=normal(out, variance=0.01),
            lora_A=normal(width, fan_in, variance=1 / fan_in),
            lora_B=normal(out, width, variance=1 / width),
            router_weight=normal(experts, fan_in, variance=1 / fan_in),
            router_bias=normal(experts, variance=0.01),
        )
        for name, out in case.siblings
    ]
    return Layer(case, adapters, experts, rank, top_k, alpha=2.0 * rank)


def check_mixture(case: Case, routing: str, experts: int, top_k: int) -> None:
    """Raise ValueError if x cannot be constructed for this mixture and routing on this case."""
    expert_likelihood(routing, experts, top_k)
    # Every sibling has a router; a feed-forward network has one.
    logits = experts * len(case.siblings)
    if logits >= case.in_features:
        raise ValueError(
            f"experts: expected fewer logits than the {case.in_features} features of {case.name}, "
            f"got {logits} logits"
        )


def draw_inputs(layer: Layer, tokens: int, routing: str) -> tuple[Tensor, list[Tensor]]:
    """Return x [T, I], whose routing follows `routing` with a wide margin, and dy [T, O] each.

    If x is random, some token has two nearly equal logits. Then rounding chooses the expert, and a
    correct bf16 provider differs by a whole expert. So the experts are drawn first. Logits are set
    around them: in [1, 2] for the drawn experts, in [-1, 0.5] for the others, a gap of at least
    0.5. x is the nearest one to a random x0 whose routers return these logits:

        x = x0 + (logits - b - x0 Wt) (W Wt)^-1 W        W [n E, I]: the routers of all n siblings.

    I is much larger than n E, so that most directions of x stay N(0, 1). Rounding x to bf16 moves
    a logit by about 2^-9, far less than the gap.
    Raises ArithmeticError if a router chooses other experts than the drawn ones.
    """
    case, first = layer.case, layer.adapters[0]
    device, dtype = first.weight.device, first.weight.dtype
    on_cpu = torch.Generator().manual_seed(tokens)
    drawn, targets = [], []
    for _ in layer.routers:
        experts = draw_experts(routing, tokens, layer.experts, layer.top_k, on_cpu)
        low = torch.rand(tokens, layer.experts, generator=on_cpu) * 1.5 - 1.0
        high = torch.rand(tokens, layer.top_k, generator=on_cpu) + 1.0
        drawn.append(experts.to(device))
        targets.append(low.scatter(1, experts, high))
    logits = torch.cat(targets, dim=1).to(device)  # [T, n E]

    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, case.in_features, generator=generator, device=device)
    routers = torch.cat([weight for weight, _ in layer.routers]).double()
    biases = torch.cat([bias for _, bias in layer.routers])
    difference = (logits - biases - x @ routers.float().T).double()
    moves = torch.linalg.solve(routers @ routers.T, difference.T).T @ routers
    x = (x + moves).to(dtype)
    check_routing(layer, x, drawn)
    dys = [
        torch.randn(tokens, out, generator=generator, device=device).to(dtype)
        for out in case.out_features
    ]
    return x, dys


def check_routing(layer: Layer, x: Tensor, drawn: list[Tensor]) -> None:
    """Raise ArithmeticError if a router chooses other experts than drawn [T, K]."""
    for (weight, bias), expected in zip(layer.routers, drawn, strict=True):
        experts = (x.float() @ weight.float().T + bias.float()).topk(layer.top_k, dim=1).indices
        wrong = (experts.sort(dim=1).values != expected.sort(dim=1).values).any(dim=1).sum().item()
        if wrong:
            raise ArithmeticError(f"{wrong} of {len(x)} tokens choose other experts than drawn")
