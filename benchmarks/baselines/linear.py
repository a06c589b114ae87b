"""Who is measured: the frozen linear, moelora, and the ways people write the same layer today.

Every provider is a module `provider(x [T, I]) -> (y [T, O], ...)`, one y per sibling, built from
the same Layer, and `provider.gradients()` names what it trains. The router is part of all of them
that have experts: linear with bias, top-K logits, softmax over the chosen (the preset "ming").
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure.inputs import Adapter, Layer


def frozen_linear(adapter: Adapter) -> nn.Linear:
    """The nn.Linear under the adapter, without copying W."""
    out_features, in_features = adapter.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(adapter.weight, requires_grad=False)
    linear.bias = None
    if adapter.bias is not None:
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
    """y = x Wt + b + scale (x At) Bt: a LoRA of the same total rank R, without a gate."""

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
        return layer.experts * layer.rank


class ActiveLora(PlainLora):
    """A LoRA of rank K r: as many columns as one token uses of the mixture."""

    def columns(self, layer: Layer) -> int:
        return layer.top_k * layer.rank


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


class GroupedMM(Routed):
    """Pairs of token and slot in the order of experts, products with all experts in one call.

    Sorted on the device: nobody waits for the number of tokens of an expert.
    """

    def __init__(self, adapter: Adapter, layer: Layer):
        super().__init__(adapter, layer)
        in_features, experts, rank = layer.case.in_features, layer.experts, layer.rank
        by_expert = adapter.lora_B.view(-1, experts, rank).transpose(0, 1)
        self.A = nn.Parameter(adapter.lora_A.view(experts, rank, in_features))  # [E, r, I]
        self.B = nn.Parameter(by_expert.contiguous())  # [E, O, r]

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        of_slots = chosen.flatten()
        ordered, order = of_slots.sort(stable=True)
        experts = torch.arange(self.experts, device=x.device)
        ends = torch.searchsorted(ordered, experts, right=True, out_int32=True)
        token = order // self.top_k
        h = grouped_mm(x.index_select(0, token), self.A.transpose(1, 2), ends)
        u = h * weights.flatten().index_select(0, order)[:, None]
        delta = grouped_mm(u, self.B.transpose(1, 2), ends)
        return self.base(x).index_add_(0, token, delta)

    def gradients(self) -> dict[str, Tensor]:
        of_B = self.B.grad.transpose(0, 1)
        return super().gradients() | {
            "dA": self.A.grad.flatten(0, 1),
            "dB": of_B.reshape(len(of_B), -1),
        }


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows [P, d] of expert e, up to ends[e], times matrices[e] [d, n]: [P, n]."""
    return F.grouped_mm(rows, matrices, offs=ends)


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

    def __init__(self, layer: Layer, impl: str = "auto"):
        super().__init__()
        # Imported late: the rivals can be measured where the package does not import.
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
        """The formulation asked for; of "auto" what it takes for these sizes."""
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
    "moelora_wide": (lambda layer: MoeLora(layer, "wide"), "mixture"),
    "moelora_grouped": (lambda layer: MoeLora(layer, "grouped"), "mixture"),
    "masked": (lambda layer: Siblings(Masked, layer), "mixture"),
    "masked_compiled": (CompiledMasked, "mixture"),
    "plain_lora": (lambda layer: Siblings(PlainLora, layer), "plain"),
    "loop": (lambda layer: Siblings(Loop, layer), "mixture"),
    "stacked": (lambda layer: Siblings(Stacked, layer), "mixture"),
    "grouped_mm": (lambda layer: Siblings(GroupedMM, layer), "mixture"),
}

# Where R is far beyond what a token uses, the fair plain LoRA is the one of its K r columns.
GROUPED_PROVIDERS = PROVIDERS | {
    "plain_lora": (lambda layer: Siblings(ActiveLora, layer), "active")
}

# Products with all R columns, forward and backward.
WIDE = ("moelora_wide", "masked", "masked_compiled")

# Columns of rank space for each of the smaller of I and O beyond which those are not measured:
# 1 + 3 R / d = 7 times the frozen layer.
WIDEST = 2


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def why_left_out(name: str, layer: Layer, tokens: int) -> str:
    """Why a provider is not measured on a layer and T; empty where it is."""
    adapter, R = layer.adapters[0], layer.experts * layer.rank
    size, widest = adapter.weight.itemsize, WIDEST * min(*adapter.weight.shape)
    if name in WIDE and widest < R:
        return f"R = {R} columns, above {widest}: more than 7 times the frozen layer"
    if name == "moelora_grouped" and layer.top_k >= layer.experts:
        return "every token uses every expert"
    if name == "grouped_mm" and layer.rank * size % 16:
        return f"rows of rank {layer.rank} are no multiple of 16 bytes"
    if name == "stacked":
        # Every expert's output, their stack, and the gradients of both.
        needed = 4 * layer.experts * tokens * sum(layer.case.out_features) * size
        have = memory_of(adapter.weight.device)
        if needed > have / 2:
            return f"needs {needed / 2**30:.0f} GiB, more than half of {have / 2**30:.0f} GiB"
    return ""
