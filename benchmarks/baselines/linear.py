"""The providers of a linear: the frozen one, the package, and other ways to write the same layer.

Every provider is a module `provider(x [T, I]) -> (y [T, O], ...)`, with one y per sibling. All are
built from the same Layer. `provider.gradients()` returns the gradients by name. Every provider with
experts has a router: linear with bias, the K largest logits, their softmax (the preset "ming").
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure.inputs import Adapter, Layer


def frozen_linear(adapter: Adapter) -> nn.Linear:
    """Return the frozen nn.Linear of an adapter; it shares W."""
    out_features, in_features = adapter.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(adapter.weight, requires_grad=False)
    linear.bias = None
    if adapter.bias is not None:
        linear.bias = nn.Parameter(adapter.bias, requires_grad=False)
    return linear


class Frozen(nn.Module):
    """y = x Wt + b: every ratio is against its time."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__()
        self.base = frozen_linear(adapter)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    def gradients(self) -> dict[str, Tensor]:
        return {}


class PlainLora(nn.Module):
    """y = x Wt + b + scale (x At) Bt: one LoRA of rank R, without a gate."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__()
        self.base = frozen_linear(adapter)
        columns = self.columns(layer)
        self.lora_A = nn.Parameter(adapter.lora_A[:columns])
        self.lora_B = nn.Parameter(adapter.lora_B[:, :columns].contiguous())
        self.scaling = layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.lora_A)
        return self.base(x) + F.linear(h * self.scaling, self.lora_B)

    def gradients(self) -> dict[str, Tensor]:
        return {"dA": self.lora_A.grad, "dB": self.lora_B.grad}

    def columns(self, layer: Layer) -> int:
        """Return the rank."""
        return layer.experts * layer.rank


class ActiveLora(PlainLora):
    """A LoRA of rank K r, the number of columns of the mixture that one token uses."""

    def columns(self, layer: Layer) -> int:
        return layer.top_k * layer.rank


class Routed(nn.Module):
    """A frozen linear and a router. Subclasses add the experts."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__()
        self.base = frozen_linear(adapter)
        self.router = nn.Linear(layer.case.in_features, layer.experts, device="meta")
        self.router.weight = nn.Parameter(adapter.router_weight)
        self.router.bias = nn.Parameter(adapter.router_bias)
        self.experts, self.rank, self.top_k = layer.experts, layer.rank, layer.top_k
        self.scaling = layer.scaling

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale * gate [T, K] and the experts [T, K] of every token."""
        top, experts = self.router(x).float().topk(self.top_k, dim=-1)
        return (top.softmax(dim=-1) * self.scaling).to(x.dtype), experts

    def gradients(self) -> dict[str, Tensor]:
        return {
            "drouter_weight": self.router.weight.grad,
            "drouter_bias": self.router.bias.grad,
        }


class Masked(Routed):
    """One wide LoRA in plain PyTorch. The gate of an expert that a token does not use is zero."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__(adapter, layer)
        self.lora_A = nn.Parameter(adapter.lora_A)
        self.lora_B = nn.Parameter(adapter.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        gate = x.new_zeros(len(x), self.experts).scatter(1, experts, weights)
        h = F.linear(x, self.lora_A)
        u = h * gate.repeat_interleave(self.rank, dim=1)
        return self.base(x) + F.linear(u, self.lora_B)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"dA": self.lora_A.grad, "dB": self.lora_B.grad}


class SeparateExperts(Routed):
    """Experts with separate parameters A_e [r, I] and B_e [O, r]."""

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__(adapter, layer)
        blocks_A = adapter.lora_A.split(layer.rank)
        blocks_B = adapter.lora_B.split(layer.rank, dim=1)
        self.A = nn.ParameterList(block.contiguous() for block in blocks_A)
        self.B = nn.ParameterList(block.contiguous() for block in blocks_B)

    def expert(self, x: Tensor, e: int) -> Tensor:
        """Return B_e A_e x."""
        return F.linear(F.linear(x, self.A[e]), self.B[e])

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {
            "dA": torch.cat([parameter.grad for parameter in self.A]),
            "dB": torch.cat([parameter.grad for parameter in self.B], dim=1),
        }


class Loop(SeparateExperts):
    """A loop over the experts, each on its own tokens, like the MoE blocks of model libraries."""

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        y = self.base(x)
        for e in range(self.experts):
            token, slot = torch.where(experts == e)
            delta = self.expert(x.index_select(0, token), e) * weights[token, slot, None]
            y.index_add_(0, token, delta)
        return y


class GroupedMM(Routed):
    """(token, slot) pairs sorted by expert, then one product with all experts.

    The device sorts. The host does not wait for the number of tokens of an expert.
    """

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__(adapter, layer)
        in_features, experts, rank = layer.case.in_features, layer.experts, layer.rank
        by_expert = adapter.lora_B.view(-1, experts, rank).transpose(0, 1)
        self.A = nn.Parameter(adapter.lora_A.view(experts, rank, in_features))  # [E, r, I]
        self.B = nn.Parameter(by_expert.contiguous())  # [E, O, r]

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        ordered, order = experts.flatten().sort(stable=True)
        every = torch.arange(self.experts, device=x.device)
        ends = torch.searchsorted(ordered, every, right=True, out_int32=True)
        token = order // self.top_k
        h = grouped_mm(x.index_select(0, token), self.A.transpose(1, 2), ends)
        u = h * weights.flatten().index_select(0, order)[:, None]
        delta = grouped_mm(u, self.B.transpose(1, 2), ends)
        return self.base(x).index_add_(0, token, delta)

    def gradients(self) -> dict[str, Tensor]:
        dB = self.B.grad.transpose(0, 1)  # [O, E, r]
        return super().gradients() | {
            "dA": self.A.grad.flatten(0, 1),
            "dB": dB.reshape(len(dB), -1),
        }


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return [P, n]: rows [P, d], those of expert e up to ends[e], times matrices[e] [d, n]."""
    return F.grouped_mm(rows, matrices, offs=ends)


class Stacked(SeparateExperts):
    """All experts on all tokens, stacked [E, T, O], then a gather: the training code of MING."""

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        outputs = torch.stack([self.expert(x, e) for e in range(self.experts)])
        token = torch.arange(len(x), device=x.device)[:, None]
        return self.base(x) + (outputs[experts, token] * weights[..., None]).sum(dim=1)


class Siblings(nn.Module):
    """A provider per sibling. All read the same x; autograd sums their dx."""

    def __init__(self, kind: type[nn.Module], layer: Layer):
        super().__init__()
        self.names = [adapter.name for adapter in layer.adapters]
        self.layer = layer
        self.linears = nn.ModuleList(kind(adapter, layer) for adapter in layer.adapters)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)

    def gradients(self) -> dict[str, Tensor]:
        return {
            self.layer.label(index, tensor): gradient
            for index, linear in enumerate(self.linears)
            for tensor, gradient in linear.gradients().items()
        }


class CompiledMasked(Siblings):
    """Masked, all siblings in one graph, under torch.compile for exactly this T."""

    def __init__(self, layer: Layer):
        super().__init__(Masked, layer)
        # Other cells compiled the same code for other shapes. Without a reset, a few cells reach
        # the limit on recompilations, and a fullgraph compile raises.
        torch._dynamo.reset()
        self.compiled = torch.compile(super().forward, fullgraph=True, dynamic=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.compiled(x)


class MoeLora(nn.Module):
    """The package: MoeLoraLinear, or MoeLoraGroup for several siblings."""

    def __init__(self, layer: Layer, impl: str = "auto"):
        super().__init__()
        # Imported here, so that the other providers run if the package cannot be imported.
        from moelora_kernels import MoeLoraConfig, MoeLoraGroup, MoeLoraLinear, dispatch

        self.layer, self.impl, self.choose = layer, impl, dispatch.explain_choice
        config = MoeLoraConfig.preset(
            "ming",
            num_experts=layer.experts,
            rank=layer.rank,
            top_k=layer.top_k,
            alpha=layer.alpha,
            impl=impl,
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
        """Return the formulation: the explicit `impl`, or the choice of "auto" for these sizes."""
        if self.impl != "auto":
            return self.impl
        return self.choose(
            x.device.type,
            tokens=len(x),
            in_features=self.layer.case.in_features,
            out_features=sum(self.layer.case.out_features),
            num_experts=self.layer.experts,
            rank=self.layer.rank,
            top_k=self.layer.top_k,
            trains=self.training,
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


class Provider(NamedTuple):
    """build(layer) returns the module; formula: the one of `check.reference` that it computes."""

    build: Callable[[Layer], nn.Module]
    formula: str


# In the order of the tables.
PROVIDERS = {
    "frozen": Provider(lambda layer: Siblings(Frozen, layer), "base"),
    "moelora": Provider(MoeLora, "mixture"),
    "moelora_wide": Provider(lambda layer: MoeLora(layer, "wide"), "mixture"),
    "moelora_grouped": Provider(lambda layer: MoeLora(layer, "grouped"), "mixture"),
    "masked": Provider(lambda layer: Siblings(Masked, layer), "mixture"),
    "masked_compiled": Provider(CompiledMasked, "mixture"),
    "plain_lora": Provider(lambda layer: Siblings(PlainLora, layer), "plain"),
    "loop": Provider(lambda layer: Siblings(Loop, layer), "mixture"),
    "stacked": Provider(lambda layer: Siblings(Stacked, layer), "mixture"),
    "grouped_mm": Provider(lambda layer: Siblings(GroupedMM, layer), "mixture"),
}

# If R is much larger than K r, a plain LoRA of rank K r is the fair comparison.
GROUPED_PROVIDERS = PROVIDERS | {
    "plain_lora": Provider(lambda layer: Siblings(ActiveLora, layer), "active")
}

# A token of a batch that decodes reads K r columns, so this is the fair plain LoRA there, too.
DECODE_PROVIDERS = {
    name: GROUPED_PROVIDERS[name]
    for name in ("frozen", "moelora", "masked", "masked_compiled", "plain_lora", "loop")
}
# Providers whose host waits for the device: they have no CUDA graph.
HOST_WAITS = ("loop",)

# Providers that multiply with all R columns, forward and backward.
WIDE = ("moelora_wide", "masked", "masked_compiled")

# They are not measured if R exceeds WIDEST d, with d the smaller of I and O: they take more than
# 1 + 3 R / d = 7 times the frozen layer there.
WIDEST = 2


def memory_of(device: torch.device) -> int:
    """Return the total bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def skip_reason(name: str, layer: Layer, tokens: int) -> str:
    """Return why a provider is not measured on a layer at T, or an empty string."""
    adapter, R = layer.adapters[0], layer.experts * layer.rank
    size, widest = adapter.weight.itemsize, WIDEST * min(*adapter.weight.shape)
    if name in WIDE and widest < R:
        return f"R = {R} columns, above {widest}: more than 7 times the frozen layer"
    if name == "moelora_grouped" and layer.top_k >= layer.experts:
        return "every token uses every expert"
    if name == "grouped_mm" and layer.rank * size % 16:
        return f"rows of rank {layer.rank} are not a multiple of 16 bytes"
    if name == "stacked":
        # The outputs of all experts, their stack, and the gradients of both.
        needed = 4 * layer.experts * tokens * sum(layer.case.out_features) * size
        total = memory_of(adapter.weight.device)
        if needed > total / 2:
            return f"needs {needed / 2**30:.0f} GiB, more than half of {total / 2**30:.0f} GiB"
    return ""
