"""A whole layer on the kernels: right in the interpreter, and its launches counted."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_kernels import ops
from moelora_kernels.kernels import shrink_dx, shrink_gate, shrink_gate_backward, weight_grad
from moelora_kernels.kernels.common import launcher, tables
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import NO_DROPOUT, NO_GATE, Gate, Mixture, Needs, SiblingTensors
from support.gpu_cases import layer_of
from support.op_cases import CASES, Inputs, composed_forward

KERNELS = {
    "shrink_gate": shrink_gate,
    "shrink_gate_backward": shrink_gate_backward,
    "shrink_dx": shrink_dx,
    "weight_grad": weight_grad,
}


@pytest.fixture
def wide(monkeypatch):
    """The module of the op `wide`, made of kernels as it is on a GPU."""
    module = importlib.import_module("moelora_kernels.ops.wide")
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(module, name, kernel.launch)
    return module


@pytest.mark.skipif(not launcher.INTERPRET, reason="on a GPU tests/nn/test_gpu_layers.py does this")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
@pytest.mark.parametrize("name", ("plain", "siblings", "rows", "share_a", "dropout_per_expert"))
def test_a_layer_on_kernels_is_the_reference(
    name: str, dtype: torch.dtype, wide, monkeypatch
) -> None:
    """Through the autograd Function, whose ops are made of kernels here."""
    monkeypatch.setattr(ops, "wide", composed_forward(wide._forward))
    monkeypatch.setattr(ops, "wide_backward", wide._backward)
    layer = layer_of(Inputs(CASES[name], dtype))
    truth = layer.to(torch.float64).reference()
    assert_within_budget(layer.run(), truth, layer.reference(), dtype)


class CountLaunches(TorchDispatchMode):
    """Names of ATen ops that write a tensor: neither views nor allocations nor questions."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if not op.is_view and name not in ("empty", "new_empty", "empty_like", "promote_types"):
            self.ops.append(name)
        return op(*args, **(kwargs or {}))


# case -> kernels and products forward, backward. At 8192 tokens the tiles of one linear fill an
# H200; at 1024 its inner dimension is cut into parts, which one more launch adds up. The tiles of
# the gradients fill it alone for R = 256 or three siblings; T = 1 is not worth a cut.
LAUNCHES = {
    "T=8192": (dict(tokens=8192), 3, 5),
    "T=1024": (dict(tokens=1024), 4, 6),
    "T=1": (dict(tokens=1), 4, 5),
    "T=8192 qkv": (dict(tokens=8192, siblings=3), 1 + 2 * 3, 1 + 1 + 3 + 1),
    "T=8192 R=256": (dict(tokens=8192, rank=32), 4, 5),
    "T=8192 task gates": (dict(tokens=8192, router=False), 3, 5 + 2),
}


@pytest.mark.parametrize(("sizes", "forward", "backward"), LAUNCHES.values(), ids=LAUNCHES)
def test_launches_are_counted(sizes: dict, forward: int, backward: int, wide) -> None:
    """On tensors without data: grids, metadata and workspaces come from shapes alone."""
    T, n, router = sizes["tokens"], sizes.get("siblings", 1), sizes.get("router", True)
    ranks = (sizes.get("rank", 16),) * 8

    def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mixture = Mixture(ranks, (2.0,) * 8, top_k=2 if router else 0)
    x, dy = empty(T, 4096), [empty(T, 4096) for _ in range(n)]
    weight = [empty(4096, 4096) for _ in range(n)]
    a, b = ([empty(*shape) for _ in range(n)] for shape in ((sum(ranks), 4096), (4096, sum(ranks))))
    routers = [empty(8, 4096) for _ in range(n)] if router else []
    tensors = SiblingTensors(weight, [], [], a, b, routers, [])
    gate = None
    if not router:
        weights = empty(5, n * 8, dtype=torch.float32)
        gate = Gate(weights, rows=empty(T, dtype=torch.int32))
    # These are copied to the device once.
    tables.expert_columns(ranks, x.device)
    tables.scaling_table(mixture.scaling, x.device)
    with launcher.recording() as launches, CountLaunches() as aten:
        forward_arguments = (x, tensors, gate or Gate(*NO_GATE), mixture, NO_DROPOUT)
        _, h, *made = wide._forward(*forward_arguments)
    assert (len(launches) + len(aten.ops), aten.ops) == (forward, ["mm", "addmm_"] * n)
    if router:
        gate = mixture.router_gate(*made)
    with launcher.recording() as launches, CountLaunches() as aten:
        wide._backward(dy, x, tensors, h, gate, None, mixture, NO_DROPOUT, Needs(True, True))
    assert (len(launches) + len(aten.ops), aten.ops) == (backward, ["addmm_"] * n)
