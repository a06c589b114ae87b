"""The arguments of the ops of a layer, made from its `Inputs`.

    calls("grouped_expand", inputs)         every call of the op that a training step makes

The functions below have the names of the ops. They return one list of arguments;
`grouped_expand` returns several. An op that needs the results of the ops before it gets those of
the reference, or those that a test passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.testing import ROUTINGS
from moelora_kernels.types import NO_DROPOUT, RouterTensors, Routing
from support.inputs import Inputs


def calls(op: str, inputs: Inputs) -> list[list]:
    """Return the arguments of every call of an op that a training step of this layer makes."""
    arguments = ARGUMENTS[op](inputs)
    return arguments if op == "grouped_expand" else [arguments]


def shrink_gate(inputs: Inputs) -> list:
    i = inputs
    return [i.x, i.lora_a, i.router, i.gate, i.mixture, i.dropout]


def shrink_gate_backward(inputs: Inputs, shrunk: Sequence[Tensor] | None = None) -> list:
    """shrunk: the outputs of shrink_gate."""
    h, _, *router_gate = shrunk or reference.shrink_gate(*shrink_gate(inputs))
    gate, dlogits = inputs.gate, None
    if inputs.has_router:
        gate = inputs.mixture.router_gate(*router_gate)
        dlogits = inputs.dlogits if inputs.case.aux else None
    return [inputs.dy, inputs.lora_b, h, gate, dlogits, inputs.mixture]


def weight_grad(
    inputs: Inputs, shrunk: Sequence[Tensor] | None = None, grads: Sequence[Tensor] | None = None
) -> list:
    """shrunk: the outputs of shrink_gate. grads: those of shrink_gate_backward."""
    shrunk = shrunk or reference.shrink_gate(*shrink_gate(inputs))
    dh, _, dgate = grads or reference.shrink_gate_backward(*shrink_gate_backward(inputs, shrunk))
    dlogits = dgate if inputs.has_router else None
    router = inputs.router_weight if inputs.has_router else [inputs.x]
    dtypes = inputs.lora_a[0].dtype, router[0].dtype
    ranks, dropout = inputs.case.ranks, inputs.dropout
    return [inputs.x, dh, dlogits, inputs.dy, shrunk[1], ranks, dropout, *dtypes]


def shrink_dx(inputs: Inputs, grads: Sequence[Tensor] | None = None) -> list:
    """grads: the outputs of shrink_gate_backward."""
    dh, _, dgate = grads or reference.shrink_gate_backward(*shrink_gate_backward(inputs))
    dlogits = dgate if inputs.has_router else None
    router = inputs.router.weight
    return [dh, dlogits, inputs.lora_a, list(router), inputs.case.ranks, inputs.dropout]


def decode(inputs: Inputs) -> list:
    return [inputs.x, siblings_of(inputs.linears), inputs.gate, inputs.mixture]


def router_logits(inputs: Inputs) -> list:
    """The routers of every case are called, whatever form its gate has."""
    return [inputs.x, RouterTensors(inputs.router_weight, inputs.router_bias)]


def router_grad(inputs: Inputs) -> list:
    return [inputs.dlogits, inputs.x, inputs.router_weight[0].dtype]


def route(inputs: Inputs) -> list:
    c = inputs.case
    return [inputs.experts, len(c.ranks), c.n, c.tile, c.chunk]


def routing(inputs: Inputs) -> Routing:
    """Return the routing arrays that all ops of the grouped form share."""
    return reference.route(*route(inputs))


def grouped_shrink(inputs: Inputs) -> list:
    i = inputs
    sizes = i.case.ranks, i.scaling
    return [i.x, i.lora_a, i.gate_weights, routing(i), *sizes, i.dropout]


def grouped_shrink_backward(inputs: Inputs, h: Tensor | None = None) -> list:
    """h: the first output of grouped_shrink."""
    i = inputs
    if h is None:
        h, _ = reference.grouped_shrink(*grouped_shrink(i))
    return [i.dy, i.lora_b, h, i.gate_weights, routing(i), i.case.ranks, i.scaling]


def grouped_expand(inputs: Inputs) -> list[list]:
    """The calls for y of every sibling, for dx, and for y of all siblings but the first."""
    c, arrays = inputs.case, routing(inputs)
    _, u = reference.grouped_shrink(*grouped_shrink(inputs))
    dh, *_ = reference.grouped_shrink_backward(*grouped_shrink_backward(inputs))

    def call(rows, matrices, start, first_sibling, dropout):
        sizes = c.T, first_sibling, c.per_pair
        return [rows, matrices, start, arrays, c.ranks, dropout, *sizes]

    siblings = enumerate(zip(inputs.lora_b, inputs.start, strict=True))
    result = [call(u, [b], start, i, NO_DROPOUT) for i, (b, start) in siblings]
    result.append(call(dh, [a.t() for a in inputs.lora_a], None, 0, inputs.dropout))
    if c.n > 1:
        result.append(call(u, inputs.lora_b[1:], inputs.start[1], 1, NO_DROPOUT))
    return result


def grouped_dx(inputs: Inputs) -> list:
    i = inputs
    dh, *_ = reference.grouped_shrink_backward(*grouped_shrink_backward(i))
    c = i.case
    # Rows of tokens, also if x has a row for every pair.
    dlogits = i.dlogits[: c.T]
    # The experts of a token differ in these routings.
    sparse = c.routing in ROUTINGS
    if sparse:
        routed = torch.zeros(c.T, c.n, len(c.ranks), dtype=torch.bool, device=dlogits.device)
        routed.scatter_(2, i.experts.view(c.T, c.n, c.K).long(), True)
        dlogits = torch.where(routed.view(dlogits.shape), dlogits, 0)
    sizes = c.ranks, i.dropout, c.T
    return [dh, dlogits, i.lora_a, i.router_weight, routing(i), *sizes, sparse]


def grouped_weight_grad(inputs: Inputs) -> list:
    i = inputs
    dh, u, _ = reference.grouped_shrink_backward(*grouped_shrink_backward(i))
    return [i.x, dh, i.dy, u, routing(i), i.case.ranks, i.dropout, i.lora_a[0].dtype, ()]


ARGUMENTS: dict[str, Callable] = {
    "shrink_gate": shrink_gate,
    "shrink_gate_backward": shrink_gate_backward,
    "weight_grad": weight_grad,
    "shrink_dx": shrink_dx,
    "decode": decode,
    "router_logits": router_logits,
    "route": route,
    "grouped_shrink": grouped_shrink,
    "grouped_shrink_backward": grouped_shrink_backward,
    "grouped_expand": grouped_expand,
    "grouped_dx": grouped_dx,
    "grouped_weight_grad": grouped_weight_grad,
    "router_grad": router_grad,
}
