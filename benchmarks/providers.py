"""Who is measured: the frozen linear, moelora, and the ways people write the same layer today.

Every provider is a module `provider(x [T, I]) -> (y [T, O], ...)`, one y per sibling, built from
the same Layer, and `provider.gradients()` names what it trains. The router is part of all of them
that have experts: linear with bias, top-K logits, softmax over the chosen (the preset "ming").
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inputs import Adapter, Layer


def frozen_linear(adapter: Adapter) -> nn.Linear:
    """The nn.Linear under the adapter, without copying W."""
    out_features, in_features = adapter.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(adapter.weight, requires_grad=False)
    linear.bias = nn.Parameter(adapter.bias, requires_grad=False)
    return linear


class Frozen(nn.Module):
    """y = x Wt + b: what everything else is compared to."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__()
        self.base = frozen_linear(adapter)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    def gradients(self) -> dict[str, Tensor]:
        return {}


class PlainLora(nn.Module):
    """y = x Wt + b + scale (x At) Bt: a LoRA of the same total rank, without a gate."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__()
        self.base = frozen_linear(adapter)
        self.lora_A = nn.Parameter(adapter.lora_A)
        self.lora_B = nn.Parameter(adapter.lora_B)
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_A)
        return self.base(x) + F.linear(h * self.scaling, self.lora_B)

    def gradients(self) -> dict[str, Tensor]:
        return {"dA": self.lora_A.grad, "dB": self.lora_B.grad}


class Routed(nn.Module):
    """A base and a router; subclasses add the experts."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__()
        self.base = frozen_linear(adapter)
        self.router = nn.Linear(layer.case.in_features, layer.experts, device="meta")
        self.router.weight = nn.Parameter(adapter.router_weight)
        self.router.bias = nn.Parameter(adapter.router_bias)
        self.experts, self.rank, self.top_k = layer.experts, layer.rank, layer.top_k
        self.scaling = layer.scaling

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale * gate of the chosen [T, K], and who they are [T, K]."""
        top, chosen = self.router(x).float().topk(self.top_k, dim=-1)
        return (top.softmax(dim=-1) * self.scaling).to(x.dtype), chosen

    def gradients(self) -> dict[str, Tensor]:
        return {
            "drouter_weight": self.router.weight.grad,
            "drouter_bias": self.router.bias.grad,
        }


class Masked(Routed):
    """The honest rival: one wide LoRA, the gate of experts not chosen is zero."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__(adapter, layer)
        self.lora_A = nn.Parameter(adapter.lora_A)
        self.lora_B = nn.Parameter(adapter.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        gate = x.new_zeros(len(x), self.experts).scatter(1, chosen, weights)
        h = F.linear(x, self.lora_A)
        u = h * gate.repeat_interleave(self.rank, dim=1)
        return self.base(x) + F.linear(u, self.lora_B)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"dA": self.lora_A.grad, "dB": self.lora_B.grad}


class SeparateExperts(Routed):
    """Experts as separate parameters A_e [r, I], B_e [O, r]; names their gradients as one."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__(adapter, layer)
        blocks_A = adapter.lora_A.split(layer.rank)
        blocks_B = adapter.lora_B.split(layer.rank, dim=1)
        self.A = nn.ParameterList(block.contiguous() for block in blocks_A)
        self.B = nn.ParameterList(block.contiguous() for block in blocks_B)

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.linear(x, self.A[e]), self.B[e])

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {
            "dA": torch.cat([parameter.grad for parameter in self.A]),
            "dB": torch.cat([parameter.grad for parameter in self.B], dim=1),
        }


class Loop(SeparateExperts):
    """A loop over experts, each on its own tokens: as the MoE blocks of model libraries do it."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        y = self.base(x)
        for e in range(self.experts):
            token, place = torch.where(chosen == e)
            delta = self.expert(x.index_select(0, token), e) * weights[token, place, None]
            y.index_add_(0, token, delta)
        return y


class Stacked(SeparateExperts):
    """All experts on all tokens, stacked [E, T, O], then the chosen gathered: as MING trains."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        outputs = torch.stack([self.expert(x, e) for e in range(self.experts)])
        token = torch.arange(len(x), device=x.device)[:, None]
        return self.base(x) + (outputs[chosen, token] * weights[..., None]).sum(dim=1)


class Siblings(nn.Module):
    """One single-linear provider per sibling, all reading the same x; autograd sums their dx."""

    def __init__(self, kind: type[nn.Module], layer: Layer):
        super().__init__()
        self.names = [adapter.name for adapter in layer.adapters]
        self.layer = layer
        self.each = nn.ModuleList(kind(adapter, layer) for adapter in layer.adapters)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(single(x) for single in self.each)

    def gradients(self) -> dict[str, Tensor]:
        return {
            self.layer.label(index, tensor): gradient
            for index, single in enumerate(self.each)
            for tensor, gradient in single.gradients().items()
        }


class CompiledMasked(Siblings):
    """Masked, all siblings in one graph, under torch.compile for exactly this T."""

    def __init__(self, layer: Layer):
        super().__init__(Masked, layer)
        # Other cells compiled the same code for other shapes; without a reset the limit on
        # recompilations is reached after a few cells and a fullgraph compile raises.
        torch._dynamo.reset()
        self.compiled = torch.compile(super().forward, fullgraph=True, dynamic=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.compiled(x)


class MoeLora(nn.Module):
    """The package: MoeLoraLinear, or MoeLoraGroup where there are siblings."""

    def __init__(self, layer: Layer):
        super().__init__()
        # Imported late: the rivals can be measured where the package does not import.
        from moelora_kernels import MoeLoraConfig, MoeLoraGroup, MoeLoraLinear, formulation

        self.layer, self.choose = layer, formulation.choose
        config = MoeLoraConfig.preset(
            "ming",
            num_experts=layer.experts,
            rank=layer.rank,
            top_k=layer.top_k,
            alpha=layer.alpha,
        )
        linears = {}
        for adapter in layer.adapters:
            linear = MoeLoraLinear.from_linear(frozen_linear(adapter), config=config)
            linear = linear.to(device=adapter.weight.device, dtype=adapter.weight.dtype)
            with torch.no_grad():
                linear.lora_A.copy_(adapter.lora_A)
                linear.lora_B.copy_(adapter.lora_B)
                linear.router.weight.copy_(adapter.router_weight)
                linear.router.bias.copy_(adapter.router_bias)
            linears[adapter.name] = linear
        self.linears = list(linears.values())
        self.single = len(linears) == 1
        self.module = self.linears[0] if self.single else MoeLoraGroup(**linears)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.module(x),) if self.single else self.module(x)

    def implementation(self, x: Tensor) -> str:
        """What impl="auto" takes for these sizes."""
        return self.choose(
            x.device.type,
            tokens=len(x),
            in_features=self.layer.case.in_features,
            out_features=sum(self.layer.case.out_features),
            num_experts=self.layer.experts,
            rank=self.layer.rank,
            top_k=self.layer.top_k,
        ).impl

    def gradients(self) -> dict[str, Tensor]:
        return {
            self.layer.label(index, tensor): parameter.grad
            for index, linear in enumerate(self.linears)
            for tensor, parameter in {
                "dA": linear.lora_A,
                "dB": linear.lora_B,
                "drouter_weight": linear.router.weight,
                "drouter_bias": linear.router.bias,
            }.items()
        }


# name -> (build, formula of check.py that it must satisfy), in the order of the tables
PROVIDERS = {
    "frozen": (lambda layer: Siblings(Frozen, layer), "base"),
    "moelora": (MoeLora, "mixture"),
    "masked": (lambda layer: Siblings(Masked, layer), "mixture"),
    "masked_compiled": (CompiledMasked, "mixture"),
    "plain_lora": (lambda layer: Siblings(PlainLora, layer), "plain"),
    "loop": (lambda layer: Siblings(Loop, layer), "mixture"),
    "stacked": (lambda layer: Siblings(Stacked, layer), "mixture"),
}
