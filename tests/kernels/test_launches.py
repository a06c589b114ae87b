"""Whole layers on the Triton kernels: right in the interpreter, and their launches counted."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.model.launches import Layer, record, record_ffn
from moelora_kernels import ops
from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    TILE,
    Gate,
    LayerForward,
    Mixture,
    Needs,
    Routing,
    SiblingTensors,
)
from support.arguments import calls
from support.backends import KERNEL_DEVICE, op_launcher
from support.cases import GROUPED, WIDE, Case
from support.inputs import Inputs, assert_layer_within_budget, moved
from support.op_checks import GROUPED_OPS, WIDE_OPS

# `route` has no Triton kernel.
GROUPED_KERNELS = [op for op in GROUPED_OPS if op != "route"]
KERNELS = {"wide": [*WIDE_OPS], "grouped": GROUPED_KERNELS}


def use_kernels(impl: str, monkeypatch) -> ModuleType:
    """Return the module of the op `wide` or `grouped`, which calls the kernels as on a GPU."""
    module = importlib.import_module(f"moelora_kernels.ops.{impl}")
    for op in KERNELS[impl]:
        monkeypatch.setattr(module, op, op_launcher(op))
    return module


def with_op_signature(forward: Callable) -> Callable:
    """Return the composition behind `ops.wide` or `ops.grouped` with the signature of the op."""

    def call(x, tensors, gate, mixture, dropout):
        return LayerForward(*forward(x, tensors, gate or Gate(*NO_GATE), mixture, dropout))

    return call


@pytest.mark.skipif(
    not launcher.INTERPRET, reason="on a GPU tests/autograd/test_gpu_linear.py does this"
)
@pytest.mark.parametrize(
    ("impl", "name", "dtype"),
    [
        pytest.param(impl, name, dtype, id=f"{name}-{impl}-{str(dtype).removeprefix('torch.')}")
        for impl, names, dtypes in (
            (
                "wide",
                ("plain", "siblings", "rows", "share_a", "dropout_per_expert"),
                (torch.float32, torch.float16),
            ),
            (
                "grouped",
                ("plain", "siblings", "sparse_int64", "dropout_per_expert"),
                (torch.float16,),
            ),
        )
        for name in names
        for dtype in dtypes
    ],
)
def test_a_layer_on_kernels_is_the_reference(
    impl: str, name: str, dtype: torch.dtype, monkeypatch
) -> None:
    """Through the autograd Function, whose ops are made of kernels here."""
    module = use_kernels(impl, monkeypatch)
    monkeypatch.setattr(ops, impl, with_op_signature(module._forward))
    monkeypatch.setattr(ops, f"{impl}_backward", module._backward)
    assert_layer_within_budget(Inputs(WIDE[name], dtype), impl)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, Case(T=131, gate=name), id=f"{op}-{name}")
        for op in WIDE_OPS
        for name in ("router", "sparse", "dense", "rows", "one_row")
    ]
    + [
        pytest.param(op, GROUPED[name], id=f"{op}-{name}")
        for op in GROUPED_KERNELS
        for name in ("plain", "mixed_ranks", "siblings", "mostly_one")
    ],
)
def test_launches_follow_from_shapes_alone(op: str, case: Case) -> None:
    """The same kernels, grids and workspaces on tensors without data."""

    def launches(arguments: list) -> list:
        with launcher.recording() as recorded:
            op_launcher(op)(*arguments)
        return [
            (
                launch.kernel.fn.__name__,
                launch.programs,
                launch.constants,
                {name: getattr(a, "shape", None) for name, a in launch.arguments.items()},
            )
            for launch in recorded
        ]

    for arguments in calls(op, Inputs(case, torch.float16).to(KERNEL_DEVICE)):
        assert launches(arguments) == launches(moved(arguments, "meta"))


@pytest.mark.parametrize("architecture", configs.TILE_CONFIGS)
def test_programs_of_grouped_kernels_take_whole_tiles(architecture: str) -> None:
    for (kernel, _, _), config in configs.TILE_CONFIGS[architecture].items():
        if kernel in ("grouped_shrink", "grouped_shrink_backward", "grouped_expand"):
            assert config.tokens >= TILE, kernel


@pytest.mark.parametrize(
    ("tokens", "siblings", "features"),
    ((2047, 1, 128), (2048, 1, 256), (682, 3, 128), (683, 3, 256)),
)
def test_weight_gradients_of_few_rows_take_smaller_tiles(
    tokens: int, siblings: int, features: int
) -> None:
    """Below FEW_ROWS = 2048 tokens times siblings."""
    layer = Layer("", tokens=tokens, out_features=(4096,) * siblings, ranks=(128 // 8,) * 8)
    with configs.assume("sm_90"):
        tiles = {each.kernel.fn.__name__: each.tile_config for each in record(layer)}
    assert tiles["weight_grad_kernel"].step == features


# --- counts -------------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without data: grids, metadata and workspaces come from shapes alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_layer(
    T: int, n: int, R: int, E: int, router: bool = True, adapters: torch.dtype = torch.bfloat16
) -> tuple:
    """Return x, dy and the tensors of n siblings with 4096 features."""

    def siblings(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [empty(*shape, dtype=dtype) for _ in range(n)]

    a, b = siblings(R, 4096, dtype=adapters), siblings(4096, R, dtype=adapters)
    routers = siblings(E, 4096, dtype=adapters) if router else []
    tensors = SiblingTensors(siblings(4096, 4096), [], [], a, b, routers, [])
    return empty(T, 4096), siblings(T, 4096), tensors


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


# case -> kernels and products forward, backward. At 8192 tokens and R = 128 the tiles of one linear
# fill half of an H200, and those of three siblings fill it one and a half times: the inner
# dimension of every sum is cut into parts, which one more launch adds up. At R = 256 the shrinks
# have two launches anyway. At 1 and 1024 tokens a cut of the weight gradients would cost more than
# it saves.
WIDE_LAUNCHES = {
    "T=8192": (dict(T=8192), 4, 6),
    "T=1024": (dict(T=1024), 4, 5),
    "T=1": (dict(T=1), 4, 5),
    "T=8192 qkv": (dict(T=8192, n=3), 2 + 2 * 3, 2 + 1 + 3 + 2),
    "T=8192 R=256": (dict(T=8192, rank=32), 4, 6),
    "T=8192 task gates": (dict(T=8192, router=False), 4, 6 + 2),
}


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"), WIDE_LAUNCHES.values(), ids=WIDE_LAUNCHES
)
def test_launches_of_wide_are_counted(
    sizes: dict, forward: int, backward: int, monkeypatch
) -> None:
    wide = use_kernels("wide", monkeypatch)
    T, n, router = sizes["T"], sizes.get("n", 1), sizes.get("router", True)
    ranks = (sizes.get("rank", 16),) * 8
    mixture = Mixture(ranks, (2.0,) * 8, router_top_k=2 if router else 0)
    x, dy, tensors = empty_layer(T, n, sum(ranks), 8, router)
    gate = Gate(*NO_GATE)
    if not router:
        gate = Gate(empty(5, n * 8, dtype=torch.float32), rows=empty(T, dtype=torch.int32))
    # These are copied to the device once.
    tables.expert_columns(ranks, x.device)
    tables.scaling_table(mixture.scaling, x.device)
    with launcher.recording() as launches, CountLaunches() as aten:
        _, h, *router_gate = wide._forward(x, tensors, gate, mixture, NO_DROPOUT)
    assert (len(launches) + len(aten.ops), aten.ops) == (forward, ["mm", "addmm_"] * n)
    if router:
        gate = mixture.router_gate(*router_gate)
    with launcher.recording() as launches, CountLaunches() as aten:
        wide._backward(dy, x, tensors, h, gate, None, mixture, NO_DROPOUT, Needs(True, True))
    assert (len(launches) + len(aten.ops), aten.ops) == (backward, ["addmm_"] * n)


@pytest.mark.parametrize("n", (1, 3))
def test_the_output_of_a_called_base_costs_one_product(n: int, monkeypatch) -> None:
    """y0 goes into `addmm` without a copy by the package. Backward has no product with W."""
    wide = use_kernels("wide", monkeypatch)
    mixture = Mixture((16,) * 8, (2.0,) * 8, router_top_k=2)
    x, dy, tensors = empty_layer(8192, n, 128, 8)
    tensors = tensors._replace(weight=[], base_output=[empty(8192, 4096) for _ in range(n)])
    with CountLaunches() as aten:
        _, h, *router_gate = wide._forward(x, tensors, Gate(*NO_GATE), mixture, NO_DROPOUT)
    assert aten.ops == ["addmm"] * n
    gate = mixture.router_gate(*router_gate)
    with CountLaunches() as aten:
        wide._backward(dy, x, tensors, h, gate, None, mixture, NO_DROPOUT, Needs(True, True))
    assert not aten.ops


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("T", (2047, 2048))
def test_float32_adapters_are_cast_in_one_launch(T: int, n: int, monkeypatch) -> None:
    """From 2048 tokens on. With fewer, only the products of ATen get a cast B."""
    wide = use_kernels("wide", monkeypatch)
    ranks = (10,) * 8
    mixture = Mixture(ranks, (2.0,) * 8, router_top_k=2)
    x, dy, tensors = empty_layer(T, n, sum(ranks), 8, adapters=torch.float32)
    # These are copied to the device once.
    tables.expert_columns(ranks, x.device)
    tables.scaling_table(mixture.scaling, x.device)
    with configs.assume("sm_90"), launcher.recording() as launches:
        with CountLaunches() as forward:
            _, h, *router_gate = wide._forward(x, tensors, Gate(*NO_GATE), mixture, NO_DROPOUT)
        gate = mixture.router_gate(*router_gate)
        with CountLaunches() as backward:
            grads = wide._backward(
                dy, x, tensors, h, gate, None, mixture, NO_DROPOUT, Needs(True, True)
            )
    is_cast = T == 2048
    assert forward.ops == ["_foreach_copy_"] + ["mm", "addmm_"] * n
    assert backward.ops == ["_foreach_copy_"] * is_cast + ["addmm_"] * n
    read = {
        matrix.dtype
        for launch in launches
        for name in ("a_ptrs", "b_ptrs")
        for matrix in launch.arguments.get(name, ())
    }
    assert read == {torch.bfloat16 if is_cast else torch.float32}
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert ("resident_dx_kernel" in names) == is_cast
    # The gradients are stored in the dtype of the parameters: nothing casts them.
    assert {grads.da.dtype, grads.drouter.dtype, *(db.dtype for db in grads.db)} == {torch.float32}


@pytest.mark.parametrize("needs_x", (True, False))
def test_without_float32_adapters_nothing_is_cast(needs_x: bool, monkeypatch) -> None:
    wide = use_kernels("wide", monkeypatch)
    mixture = Mixture((16,) * 8, (2.0,) * 8, router_top_k=2)
    x, dy, tensors = empty_layer(8192, 1, 128, 8)
    with CountLaunches() as aten:
        _, h, *router_gate = wide._forward(x, tensors, Gate(*NO_GATE), mixture, NO_DROPOUT)
        gate = mixture.router_gate(*router_gate)
        needs = Needs(needs_x, True)
        wide._backward(dy, x, tensors, h, gate, None, mixture, NO_DROPOUT, needs)
    assert "_foreach_copy_" not in aten.ops


# case -> sizes, kernels forward, kernels backward; products of ATen and `route` are not counted.
GROUPED_LAUNCHES = {
    "E=64 r=64 K=4": (
        dict(E=64, rank=64, K=4),
        {"router_logits": 1, "grouped_shrink": 1, "grouped_expand": 4},
        {
            "grouped_shrink_backward": 1,
            "grouped_expand": 4,
            "grouped_weight_grad": 1,
            "reduce_chunks": 1,
            "router_grad": 1,
            "reduce_partials": 1,
        },
    ),
    # No expert can have two whole chunks, so nothing adds up dA and dB. The sums of the router are
    # cut into parts.
    "T=512": (
        dict(E=64, rank=64, K=2, T=512),
        {"router_logits": 1, "reduce_partials": 1, "grouped_shrink": 1, "grouped_expand": 2},
        {
            "grouped_shrink_backward": 1,
            "grouped_expand": 2,
            "grouped_weight_grad": 1,
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
            "grouped_weight_grad": 1,
            "reduce_chunks": 1,
            "router_grad": 1,
            "reduce_partials": 1,
        },
    ),
}


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"), GROUPED_LAUNCHES.values(), ids=GROUPED_LAUNCHES
)
def test_launches_of_grouped_are_counted(
    sizes: dict, forward: dict, backward: dict, monkeypatch
) -> None:
    grouped = use_kernels("grouped", monkeypatch)
    monkeypatch.setattr(grouped, "route", grouped.route_fake)
    E, rank, T, n = sizes["E"], sizes["rank"], sizes.get("T", 8192), sizes.get("n", 1)
    mixture = Mixture((rank,) * E, (2.0,) * E, router_top_k=sizes["K"])
    x, dy, tensors = empty_layer(T, n, E * rank, E)

    def counts(launches) -> dict:
        return dict(Counter(x.kernel.fn.__name__.removesuffix("_kernel") for x in launches))

    with launcher.recording() as launches:
        result = grouped._forward(x, tensors, Gate(*NO_GATE), mixture, NO_DROPOUT)
    assert counts(launches) == forward
    gate, routing = mixture.router_gate(*result[2:5]), Routing(*result[5:])
    with launcher.recording() as launches:
        grouped._backward(
            dy, x, tensors, result.h, gate, None, routing, mixture, NO_DROPOUT, Needs(True, True)
        )
    assert counts(launches) == backward


@pytest.mark.parametrize(
    ("renormalize", "aux", "sparse"),
    ((True, False, True), (True, True, False), (False, False, False)),
)
def test_dx_adds_the_router_without_a_pass_if_dlogits_are_sparse(
    renormalize: bool, aux: bool, sparse: bool, monkeypatch
) -> None:
    """Dense dlogits of 256 experts are multiplied by ATen, which reads and writes dx again."""
    grouped = use_kernels("grouped", monkeypatch)
    monkeypatch.setattr(grouped, "route", grouped.route_fake)
    mixture = Mixture((4,) * 256, (2.0,) * 256, router_top_k=2, renormalize=renormalize)
    x, dy, tensors = empty_layer(8192, 1, 1024, 256)
    result = grouped._forward(x, tensors, Gate(*NO_GATE), mixture, NO_DROPOUT)
    gate, routing = mixture.router_gate(*result[2:5]), Routing(*result[5:])
    dlogits = empty(8192, 256, dtype=torch.float32) if aux else None
    with launcher.recording() as launches, CountLaunches() as aten:
        grouped._backward(
            dy, x, tensors, result.h, gate, dlogits, routing, mixture, NO_DROPOUT,
            Needs(True, False),
        )  # fmt: skip
    expands = [each for each in launches if each.kernel.fn.__name__ == "grouped_expand_kernel"]
    assert [each.constants["SPARSE_DLOGITS"] for each in expands] == [sparse, sparse]
    # The product of dy and W; the other one of dlogits and Wr.
    assert aten.ops.count("addmm_") == (1 if sparse else 2)


# One sum of backward is split: that of the adapters over many tokens, or that over F of few tokens.
@pytest.mark.parametrize("tokens", (8192, 64))
def test_launches_between_the_frozen_products_of_ffns_are_counted(tokens: int) -> None:
    layer = Layer("ffn", tokens=tokens, out_features=(14336,), ranks=(16,) * 8, ffn=True)
    with configs.assume("sm_90"):
        directions = record_ffn(layer)
    forward, backward = ([each.kernel.fn.__name__ for each in part] for part in directions)
    assert forward == ["pair_table_kernel", "ffn_inner_kernel", "ffn_inner_rank_kernel"]
    kernels = ("pair_table", "ffn_inner_backward", "ffn_inner_weight_grad", "reduce_partials")
    assert sorted(backward) == sorted(f"{kernel}_kernel" for kernel in kernels)
