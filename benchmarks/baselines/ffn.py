"""The providers of the suite `ffn`: networks whose experts are whole networks, like MixLoRA's.

    a_e = silu(W1_e x) * (W3_e x)       y = sum over the K experts e of g_e W2_e a_e
    Wi_e = Wi + scale B_ie A_ie         g = softmax of the K largest of E logits of x

Frozen products of a token, in units of one linear:

    frozen network                                                             3
    each expert on its own tokens                                              3 K
    gate and up once for all experts                                           2 + K
    gate and up once, down once on the sum of g_e a_e                          3
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.linear import ActiveLora, Frozen, Provider, frozen_linear
from benchmarks.measure.inputs import Adapter, Layer
from benchmarks.suites.shapes import Case

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class FeedForward(Layer):
    """A layer whose adapters are gate, up and down, with one router [E, I] for the three."""

    router_weight: Tensor | None = None

    @property
    def routers(self) -> list[tuple[Tensor, Tensor]]:
        """The router. It has no bias, so the bias is zeros."""
        return [(self.router_weight, self.router_weight.new_zeros(self.experts))]

    def label(self, index: int, tensor: str) -> str:
        """Return the name of a tensor of the one output; gradients get theirs from `named`."""
        return tensor


def named(projection: str, tensor: str) -> str:
    """Return the name of a gradient."""
    return f"{projection}.{tensor}"


def make_feed_forward(
    case: Case, experts: int, rank: int, top_k: int, dtype: torch.dtype, device: torch.device
) -> FeedForward:
    """Draw a network like `inputs.make_layer` draws a linear; its hidden units are of order one."""
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
    """down(silu(gate(x)) * up(x)) with three linears of one kind: y = (one output,)."""

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
    """W x + scale B_e A_e x for the rows of expert e; base: W x, if it is computed already."""

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
        return base + self.lora(x, e)

    def lora(self, x: Tensor, e: int) -> Tensor:
        """Return scale B_e A_e x."""
        return F.linear(F.linear(x, self.A[e]) * self.scaling, self.B[e])

    def gradients(self) -> dict[str, Tensor]:
        return {
            "dA": torch.cat([parameter.grad for parameter in self.A]),
            "dB": torch.cat([parameter.grad for parameter in self.B], dim=1),
        }


class Loop(Network):
    """A loop over the experts. Each runs its network on its own tokens: 3 K frozen products."""

    shared = False

    def __init__(self, layer: FeedForward):
        super().__init__(ExpertLinear, layer)
        self.router = nn.Parameter(layer.router_weight)
        self.top_k = layer.top_k

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = torch.zeros_like(x)
        for e, token, weight, a in self.activations(x):
            y = y.index_add(0, token, self.down_proj(a, e) * weight)
        return (y,)

    def activations(self, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield, for each expert e: e, its tokens [n], their weights [n, 1], and a_e [n, F]."""
        top, experts = F.linear(x, self.router).float().topk(self.top_k, dim=-1)
        weights = top.softmax(dim=-1).to(x.dtype)
        bases = [linear.base(x) for linear in (self.gate_proj, self.up_proj)] if self.shared else []
        for e in range(len(self.gate_proj.A)):
            token, slot = torch.where(experts == e)
            rows = x.index_select(0, token)
            gate, up = [base.index_select(0, token) for base in bases] or (None, None)
            a = F.silu(self.gate_proj(rows, e, gate)) * self.up_proj(rows, e, up)
            yield e, token, weights[token, slot, None], a

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"drouter_weight": self.router.grad}


class SharedLoop(Loop):
    """The loop; gate and up of the frozen network run once for all tokens: 2 + K products."""

    shared = True


class SharedDownLoop(SharedLoop):
    """The loop with shared gate and up; down of the frozen network runs once: 3 products.

    It is linear, so it runs on the weighted sum of the experts' activations.
    """

    def forward(self, x: Tensor) -> tuple[Tensor]:
        summed = x.new_zeros(len(x), self.down_proj.base.in_features)
        y = torch.zeros_like(x)
        for e, token, weight, a in self.activations(x):
            summed.index_add_(0, token, a * weight)
            y.index_add_(0, token, self.down_proj.lora(a, e) * weight)
        return (self.down_proj.base(summed) + y,)


class FrozenMlp(nn.Module):
    """The frozen network, with the names of Llama and Qwen for its parts."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        for adapter in layer.adapters:
            setattr(self, adapter.name, frozen_linear(adapter))
        self.act_fn = nn.SiLU()


class MoeLora(nn.Module):
    """The package: MoeLoraFFN with the preset "mixlora", without dropout and auxiliary loss."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        # Imported here, so that the other providers run if the package cannot be imported.
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
        """Return A and B of a projection."""
        stem = projection.removesuffix("_proj")
        return tuple(getattr(self.module, f"{stem}_lora_{matrix}") for matrix in "AB")

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.module(x),)

    def implementation(self, x: Tensor) -> str:
        """Return the formulation that the layer takes: "fused" or "grouped"."""
        from moelora_kernels import dispatch

        return dispatch.choose_ffn(
            x.device.type,
            dtype=x.dtype,
            total_rank=sum(self.module.mixture.ranks),
            top_k=self.module.config.top_k or self.module.config.num_experts,
        )

    def gradients(self) -> dict[str, Tensor]:
        gradients = {"drouter_weight": self.module.router.weight.grad}
        for name in PROJECTIONS:
            for tensor, parameter in zip(("dA", "dB"), self.adapters(name), strict=True):
                gradients[named(name, tensor)] = parameter.grad
        return gradients


# In the order of the tables. The formulas are those of `check_ffn.reference`.
PROVIDERS = {
    "frozen": Provider(lambda layer: Network(Frozen, layer), "base"),
    "moelora": Provider(MoeLora, "mixture"),
    "plain_lora": Provider(lambda layer: Network(ActiveLora, layer), "active"),
    "loop": Provider(Loop, "mixture"),
    "loop_shared": Provider(SharedLoop, "mixture"),
    "loop_shared_down": Provider(SharedDownLoop, "mixture"),
}
