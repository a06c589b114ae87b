"""The Triton kernels of the grouped formulation: on the GPU where there is one, or interpreted."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.kernels import (
    grouped_expand,
    grouped_shrink,
    grouped_shrink_backward,
    grouped_weight_grad,
    router,
)
from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    TILE,
    Gate,
    Mixture,
    Needs,
    Routing,
    SiblingTensors,
)
from support.gpu_cases import layer_of
from support.grouped_cases import CASES, OUTPUTS, Case, Inputs, check, check_what_is_not_chosen
from support.op_cases import CASES as LAYERS
from support.op_cases import KERNEL_DEVICE as DEVICE
from support.op_cases import Inputs as LayerInputs
from support.op_cases import composed_forward
from support.selection import default_cases

# Who serves `route` on a GPU is no kernel of Triton.
LAUNCHERS = {
    "router_logits": router.launch_logits,
    "grouped_shrink": grouped_shrink.launch,
    "grouped_shrink_backward": grouped_shrink_backward.launch,
    "grouped_expand": grouped_expand.launch,
    "grouped_weight_grad": grouped_weight_grad.launch,
    "router_grad": router.launch_grad,
}
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
each_op = pytest.mark.parametrize("name", LAUNCHERS)
# Tails, empty experts and tokens, ranks and sizes past a tile, each form of an id, start and mask.
BY_DEFAULT = default_cases(
    CASES, "plain", "one_slot", "eight_slots", "mostly_one", "empty", "long", "mixed_ranks",
    "wide", "no_token", "one_token", "nothing_routed_int64", "siblings", "dropout_per_expert",
    "float32_adapters",
)  # fmt: skip
# Other dtypes take other casts and products, and no other addresses. Two passes at most: Triton's
# interpreter cuts a float32 down to bfloat16 where a GPU rounds it, in every pass.
FEW = ("mixed_ranks", "dropout_by_pair", "float32_adapters")


def test_every_op_has_a_launcher() -> None:
    assert {*LAUNCHERS, "route"} == set(OUTPUTS)


@pytest.mark.parametrize("architecture", configs.TILE_CONFIGS)
def test_programs_take_whole_tiles(architecture: str) -> None:
    for (kernel, _, _), tile in configs.TILE_CONFIGS[architecture].items():
        if kernel in ("grouped_shrink", "grouped_shrink_backward", "grouped_expand"):
            assert tile.tokens >= TILE, kernel


@each_op
@pytest.mark.parametrize("case", BY_DEFAULT)
def test_op(name: str, case: Case) -> None:
    check(name, LAUNCHERS[name], Inputs(case, FP16, device=DEVICE), FP16)


@each_op
@pytest.mark.parametrize("case", default_cases(FEW, "mixed_ranks"))
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=("bf16", "fp32"))
def test_op_in_other_dtypes(name: str, case: str, dtype: torch.dtype) -> None:
    check(name, LAUNCHERS[name], Inputs(CASES[case], dtype, device=DEVICE), dtype)


@pytest.mark.parametrize("name", ("router_logits", "router_grad"))
@pytest.mark.parametrize("case", ("plain", "float32_adapters", "wide"))
def test_router_in_parts(name: str, case: str) -> None:
    """Inner dimensions cut into parts, more of them than there are steps."""

    def in_parts(*arguments):
        return LAUNCHERS[name](*arguments, split=3)

    check(name, in_parts, Inputs(CASES[case]._replace(bias=True), FP16, device=DEVICE), FP16)


@pytest.mark.parametrize("dtype", (FP16, FP32), ids=("fp16", "fp32"))
def test_what_is_not_chosen_adds_nothing(dtype: torch.dtype) -> None:
    check_what_is_not_chosen(LAUNCHERS, dtype, DEVICE)


def test_many_slots_are_added_before_they_are_rounded() -> None:
    """Terms of 3/8 of the last place of y: rounded one by one they would all be lost."""
    case = Case(T=3, K=8, O=5, ranks=(1,) * 8, routing="all")
    routing = Inputs(case, FP16, device=DEVICE).routing()
    u, start = (
        torch.full(s, v, device=DEVICE).half() for s, v in (((24, 1), 0.75), ((5,), 2048.0))
    )
    matrix = torch.ones(5, 8, device=DEVICE).half()
    y = grouped_expand.launch(u, [matrix], start, routing, (1,) * 8, NO_DROPOUT, 3, 0, False)
    assert (y == 2048 + 8 * 0.75).all()


@each_op
def test_strides(name: str) -> None:
    """Rows at a distance, columns at a distance, one element for all, matrices transposed."""
    inputs = Inputs(Case(T=21, n=3, K=1, start="base", bias=True), FP16, device=DEVICE)
    c, R = inputs.case, sum(inputs.case.ranks)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).half()

    inputs.x = draw(c.T, c.I + 9)[:, 3 : c.I + 3]
    inputs.lora_a[1] = draw(c.I, R).div(8).t()
    inputs.lora_b[1] = draw(R, c.O).t()
    inputs.lora_b[2] = draw(c.O, R + 5)[:, :-5]
    inputs.router[1] = draw(c.I, len(c.ranks)).div(8).t()
    inputs.weights = draw(3, c.T).t()
    inputs.dlogits = torch.randn(3 * len(c.ranks), c.T, device=DEVICE).t()
    inputs.dy = [draw(c.T, c.O + 8)[:, 8:], draw(c.O, c.T).t(), draw(1, 1).expand(c.T, c.O)]
    inputs.start = [draw(c.T, c.O + 1)[:, 1:], draw(c.O, c.T).t(), draw(1, 1).expand(c.T, c.O)]
    check(name, LAUNCHERS[name], inputs, FP16)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU these pages would be real")
@pytest.mark.parametrize(
    "name", ("grouped_shrink", "grouped_shrink_backward", "grouped_weight_grad")
)
def test_offsets_past_two_to_the_31(name: str) -> None:
    """Two tokens more than 2^31 elements apart; the pages between them are never touched."""
    inputs = Inputs(Case(T=2, I=32, O=32), FP16)

    def apart(rows: Tensor) -> Tensor:
        distance = 2**31 + 16
        memory = torch.from_numpy(np.zeros(distance + rows.shape[1], dtype=np.float16))
        return memory.as_strided(rows.shape, (distance, 1)).copy_(rows)

    inputs.x, inputs.dy = apart(inputs.x), [apart(inputs.dy[0])]
    check(name, LAUNCHERS[name], inputs, FP16)


@each_op
@pytest.mark.parametrize("case", ("plain", "mixed_ranks", "siblings", "mostly_one"))
def test_launches_follow_from_shapes_alone(name: str, case: str) -> None:
    """The same kernels, grids and workspaces on tensors that hold nothing."""

    def launches(arguments: list) -> list:
        with launcher.recording() as found:
            LAUNCHERS[name](*arguments)
        return [
            (
                launch.kernel.fn.__name__,
                launch.programs,
                launch.constants,
                {name: getattr(a, "shape", None) for name, a in launch.arguments.items()},
            )
            for launch in found
        ]

    def empty(value):
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(empty, value))
        if isinstance(value, list):
            return [empty(v) for v in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    for arguments in Inputs(CASES[case], FP16, device=DEVICE).calls(name):
        assert launches(arguments) == launches(empty(arguments))


@pytest.fixture
def grouped(monkeypatch):
    """The module of the op `grouped`, made of kernels as it is on a GPU."""
    module = importlib.import_module("moelora_kernels.ops.grouped")
    for name, launch in LAUNCHERS.items():
        monkeypatch.setattr(module, name, launch)
    return module


@pytest.mark.skipif(not launcher.INTERPRET, reason="on a GPU, test_gpu_grouped.py does this")
@pytest.mark.parametrize("name", ("plain", "siblings", "sparse_int64", "dropout_per_expert"))
def test_a_layer_on_kernels_is_the_reference(name: str, grouped, monkeypatch) -> None:
    """Through the autograd Function, whose ops are made of kernels here."""
    monkeypatch.setattr(ops, "grouped", composed_forward(grouped._forward))
    monkeypatch.setattr(ops, "grouped_backward", grouped._backward)
    layer = layer_of(LayerInputs(LAYERS[name], FP16))
    truth = layer.to(torch.float64).reference()
    assert_within_budget(layer.run("grouped"), truth, layer.reference(), FP16)


# case -> sizes, kernels forward, kernels backward; products of ATen and `route` are not counted.
LAUNCHES = {
    "E=64 r=64 K=4": (
        dict(E=64, rank=64, K=4),
        {"router_logits": 1, "grouped_shrink": 1, "grouped_expand": 4},
        {
            "grouped_shrink_backward": 1,
            "grouped_expand": 4,
            "grouped_weight_grad": 2,
            "reduce_chunks": 2,
            "router_grad": 1,
            "reduce_partials": 1,
        },
    ),
    # No expert can have two whole chunks: nothing to add up.
    "T=512": (
        dict(E=64, rank=64, K=2, T=512),
        {"router_logits": 1, "reduce_partials": 1, "grouped_shrink": 1, "grouped_expand": 2},
        {
            "grouped_shrink_backward": 1,
            "grouped_expand": 2,
            "grouped_weight_grad": 2,
            "router_grad": 1,
            "reduce_partials": 1,
        },
    ),
    "qkv": (
        dict(E=8, rank=16, K=2, n=3),
        {"router_logits": 1, "grouped_shrink": 1, "grouped_expand": 3 * 2},
        {
            "grouped_shrink_backward": 1,
            "grouped_expand": 3 * 2,
            "grouped_weight_grad": 2,
            "reduce_chunks": 2,
            "router_grad": 1,
            "reduce_partials": 1,
        },
    ),
}


@pytest.mark.parametrize(("sizes", "forward", "backward"), LAUNCHES.values(), ids=LAUNCHES)
def test_launches_are_counted(sizes: dict, forward: dict, backward: dict, grouped, monkeypatch):
    """On tensors without data: grids, metadata and workspaces come from shapes alone."""
    E, rank, K = sizes["E"], sizes["rank"], sizes["K"]
    T, n = sizes.get("T", 8192), sizes.get("n", 1)
    monkeypatch.setattr(grouped, "route", grouped.route_fake)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=BF16, device="meta")

    mixture = Mixture((rank,) * E, (2.0,) * E, top_k=K)
    x, dy = empty(T, 4096), [empty(T, 4096) for _ in range(n)]
    a, b = ([empty(*s) for _ in range(n)] for s in ((E * rank, 4096), (4096, E * rank)))
    weight, routers = ([empty(rows, 4096) for _ in range(n)] for rows in (4096, E))
    tensors = SiblingTensors(weight, [], [], a, b, routers, [])

    def counted(launches) -> dict:
        return dict(Counter(x.kernel.fn.__name__.removesuffix("_kernel") for x in launches))

    with launcher.recording() as launches:
        result = grouped._forward(x, tensors, Gate(*NO_GATE), mixture, NO_DROPOUT)
    assert counted(launches) == forward
    gate, routing = mixture.router_gate(*result[2:5]), Routing(*result[5:])
    with launcher.recording() as launches:
        grouped._backward(
            dy, x, tensors, result.h, gate, None, routing, mixture, NO_DROPOUT, Needs(True, True)
        )
    assert counted(launches) == backward
