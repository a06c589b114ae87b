"""Suite `ffn`: a feed-forward network whose experts are whole networks, as MixLoRA has them.

    a_e = silu(W1_e x) * (W3_e x)       y = sum over the K chosen e of g_e W2_e a_e
    Wi_e = Wi + scale B_ie A_ie         g = softmax of the K largest of E logits of x

Frozen products of a token, in units of one linear: 3 in the frozen network, 3 K with each expert
run on its own tokens, 2 + K where gate and up run once for all experts, 3 where down does as well,
on sum of g_e a_e.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.linear import ActiveLora, Frozen, frozen_linear
from benchmarks.measure.check import Checker, Expected
from benchmarks.measure.inputs import Adapter, Layer
from benchmarks.suites.shapes import Case

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class FeedForward(Layer):
    """A Layer whose adapters are gate, up and down; one router [E, I] for the three."""

    router_weight: Tensor | None = None

    @property
    def routers(self) -> list[tuple[Tensor, Tensor]]:
        """The router, which has no bias."""
        return [(self.router_weight, self.router_weight.new_zeros(self.experts))]

    def label(self, index: int, tensor: str) -> str:
        """`y` of the one output; gradients are named by `named`."""
        return tensor


def named(projection: str, tensor: str) -> str:
    return f"{projection}.{tensor}"


def make_feed_forward(
    case: Case, experts: int, rank: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> FeedForward:
    """Draw a network as `inputs.make_layer` draws a linear: its hidden units are of order one."""
    generator = torch.Generator(device).manual_seed(len(case.name) + case.in_features)

    def normal(*shape: int, variance: float) -> Tensor:
        draw = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return draw.mul_(variance**0.5).to(dtype)

    hidden, inner, width = case.in_features, case.intermediate, experts * rank
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    adapters = [
        Adapter(
            name=name,
            weight=normal(out, fan_in, variance=1 / fan_in),
            bias=None,
            lora_A=normal(width, fan_in, variance=1 / fan_in),
            lora_B=normal(out, width, variance=1 / width),
            router_weight=None,
            router_bias=None,
        )
        for name, (fan_in, out) in sizes.items()
    ]
    router = normal(experts, hidden, variance=1 / hidden)
    return FeedForward(case, adapters, experts, rank, top_k, 2.0 * rank, router)


class Network(nn.Module):
    """down(silu(gate(x)) * up(x)) of three linears of one kind: y = (one output,)."""

    def __init__(self, kind: type[nn.Module], layer: FeedForward):
        super().__init__()
        for adapter in layer.adapters:
            setattr(self, adapter.name, kind(adapter, layer))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)),)

    def gradients(self) -> dict[str, Tensor]:
        return {
            named(name, tensor): gradient
            for name in PROJECTIONS
            for tensor, gradient in getattr(self, name).gradients().items()
        }


class ExpertLinear(nn.Module):
    """W x + scale B_e A_e x for expert e on rows of its own; the frozen product may be given."""

    def __init__(self, adapter: Adapter, layer: FeedForward):
        super().__init__()
        self.base = frozen_linear(adapter)
        self.scaling = layer.scaling
        blocks_A = adapter.lora_A.split(layer.rank)
        blocks_B = adapter.lora_B.split(layer.rank, dim=1)
        self.A = nn.ParameterList(block.contiguous() for block in blocks_A)
        self.B = nn.ParameterList(block.contiguous() for block in blocks_B)

    def forward(self, x: Tensor, e: int, base: Tensor | None = None) -> Tensor:
        base = self.base(x) if base is None else base
        return base + F.linear(F.linear(x, self.A[e]) * self.scaling, self.B[e])

    def gradients(self) -> dict[str, Tensor]:
        return {
            "dA": torch.cat([parameter.grad for parameter in self.A]),
            "dB": torch.cat([parameter.grad for parameter in self.B], dim=1),
        }


class Loop(Network):
    """A loop over experts, the whole network of each on its own tokens: 3 K frozen products."""

    shared = False

    def __init__(self, layer: FeedForward):
        super().__init__(ExpertLinear, layer)
        self.router = nn.Parameter(layer.router_weight)
        self.top_k = layer.top_k

    def forward(self, x: Tensor) -> tuple[Tensor]:
        top, chosen = F.linear(x, self.router).float().topk(self.top_k, dim=-1)
        weights = top.softmax(dim=-1).to(x.dtype)
        bases = [each.base(x) for each in (self.gate_proj, self.up_proj)] if self.shared else []
        y = torch.zeros_like(x)
        for e in range(len(self.gate_proj.A)):
            token, place = torch.where(chosen == e)
            own = x.index_select(0, token)
            gate, up = [base.index_select(0, token) for base in bases] or (None, None)
            a = F.silu(self.gate_proj(own, e, gate)) * self.up_proj(own, e, up)
            y = y.index_add(0, token, self.down_proj(a, e) * weights[token, place, None])
        return (y,)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"drouter_weight": self.router.grad}


class SharedLoop(Loop):
    """The loop with gate and up of the frozen network run once for all tokens: 2 + K products."""

    shared = True


class FrozenMlp(nn.Module):
    """The network under the experts, under the names that Llama and Qwen give its parts."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        for adapter in layer.adapters:
            setattr(self, adapter.name, frozen_linear(adapter))
        self.act_fn = nn.SiLU()


class MoeLora(nn.Module):
    """The package: MoeLoraFFN with the preset "mixlora", without dropout and auxiliary loss."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        # Imported late: the rivals can be measured where the package does not import.
        from moelora_kernels import MoeLoraConfig, MoeLoraFFN

        config = MoeLoraConfig.preset(
            "mixlora",
            num_experts=layer.experts,
            rank=layer.rank,
            top_k=layer.top_k,
            alpha=layer.alpha,
            dropout=0.0,
            aux={},
        )
        first = layer.adapters[0].weight
        module = MoeLoraFFN.from_mlp(FrozenMlp(layer), config)
        self.module = module.to(device=first.device, dtype=first.dtype)
        with torch.no_grad():
            for adapter in layer.adapters:
                lora_A, lora_B = self.adapters(adapter.name)
                lora_A.copy_(adapter.lora_A)
                lora_B.copy_(adapter.lora_B)
            self.module.router.weight.copy_(layer.router_weight)

    def adapters(self, projection: str) -> tuple[Tensor, Tensor]:
        """A and B of a projection."""
        stem = projection.removesuffix("_proj")
        return tuple(getattr(self.module, f"{stem}_lora_{matrix}") for matrix in "AB")

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.module(x),)

    def implementation(self, x: Tensor) -> str:
        """An activation lies between the products: each expert runs on its own tokens."""
        return "grouped"

    def gradients(self) -> dict[str, Tensor]:
        found = {"drouter_weight": self.module.router.weight.grad}
        for name in PROJECTIONS:
            for tensor, parameter in zip(("dA", "dB"), self.adapters(name), strict=True):
                found[named(name, tensor)] = parameter.grad
        return found


# name -> (build, formula of `reference` that it must satisfy), in the order of the tables
PROVIDERS = {
    "frozen": (lambda layer: Network(Frozen, layer), "base"),
    "moelora": (MoeLora, "mixture"),
    "plain_lora": (lambda layer: Network(ActiveLora, layer), "active"),
    "loop": (Loop, "mixture"),
    "loop_shared": (SharedLoop, "mixture"),
}


def reference(layer: FeedForward, x: Tensor, dy: Tensor, formula: str) -> dict[str, Expected]:
    """The rows x [t, I] and dy [t, I] in fp64: y, dx and the gradients by name.

    formula: "base" has no adapter, "active" one plain LoRA of rank K r on each linear, "mixture"
    the experts, every one of them on every row.
    """
    x, dy = x.double().requires_grad_(), dy.double()
    columns = layer.top_k * layer.rank if formula == "active" else layer.experts * layer.rank
    weights = {each.name: each.weight.double() for each in layer.adapters}
    trained = {
        each.name: [
            each.lora_A.double()[:columns].clone().requires_grad_(),
            each.lora_B.double()[:, :columns].clone().requires_grad_(),
        ]
        for each in layer.adapters
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
            of_expert = network(slice(e * layer.rank, (e + 1) * layer.rank), gate, up)
            y = y + gates[:, e, None] * of_expert
            sizes.append((dy * of_expert.detach()).norm(dim=1))
        scale = router_scale(gates.detach(), torch.stack(sizes, dim=1))
    else:
        y = network(slice(None))
    y.backward(dy)
    found = {"y": Expected(y.detach()), "dx": Expected(x.grad)}
    if formula == "base":
        return found
    for name, (lora_A, lora_B) in trained.items():
        found[named(name, "dA")] = Expected(lora_A.grad)
        found[named(name, "dB")] = Expected(lora_B.grad)
    if formula == "mixture":
        row = x.detach().norm().item() / len(x) ** 0.5
        found["drouter_weight"] = Expected(router.grad, scale * row)
    return found


def router_scale(gates: Tensor, sizes: Tensor) -> float:
    """Size of the terms of dlogits [t, E] as if none cancelled, as in `check.router_scale`.

    sizes [t, E]: of dgate_e = <dy, y_e>, the root of the sum of squares of its products.
    """
    return (gates * (sizes + (gates * sizes).sum(dim=1, keepdim=True))).norm().item()


class FeedForwardChecker(Checker):
    """As `Checker`, with the loop as the yardstick: there is no masked form of these experts."""

    yardstick = "loop"

    def providers(self) -> dict:
        """Those of this suite."""
        return PROVIDERS

    def reference(self, x: Tensor, dys: list[Tensor], formula: str) -> dict[str, Expected]:
        """The rows x and dy in fp64."""
        return reference(self.layer, x, dys[0], formula)
