"""When the native library replays a layer op, and what a user sees when it does not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moelora_kernels import native, ops
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.plans import PlannedOp
from support.backends import needs_library
from support.cases import layer_case
from support.fake_driver import FakeDriver, fake_driver
from support.inputs import Inputs
from support.kernels_on_cpu import kernels_on_cpu

pytestmark = needs_library

INPUTS = Inputs(layer_case(T=9, I=32, O=24), torch.float16, 1)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with fake_driver("sm_90", interpret=True) as driver:
        yield driver
        assert not driver.errors


@pytest.fixture
def wide(driver: FakeDriver) -> Iterator[PlannedOp]:
    """The op `wide`, which has a plan for `INPUTS`."""
    with kernels_on_cpu(launch=driver.address) as planned:
        for _ in range(2):
            call()
        assert replays(call) == 1
        yield planned["wide"]


def call(x: Tensor = INPUTS.x) -> Any:
    gate = INPUTS.gate
    return ops.wide(x, siblings_of(INPUTS.linears), gate, INPUTS.mixture, INPUTS.dropout)


def replays(function, *arguments) -> int:
    """Return how many replays of the native library a call runs."""
    library = native.plan_library()
    assert library is not None
    before = library.count_replays()
    function(*arguments)
    return library.count_replays() - before


class Names(TorchDispatchMode):
    """Keep the names of the ops in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.name())
        return op(*args, **kwargs or {})


class Wrapper(Tensor):
    """A subclass that runs every op on the tensor inside, and keeps the names of the ops."""

    names: ClassVar[set[str]] = set()

    @staticmethod
    def __new__(cls, inner: Tensor):
        result = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        result.inner = inner
        return result

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        cls.names.add(op.name())
        args, kwargs = tree_map_only(cls, lambda wrapper: wrapper.inner, (args, kwargs or {}))
        return op(*args, **kwargs)


def test_a_mode_sees_the_layer_op(wide: PlannedOp) -> None:
    with Names() as mode:
        assert replays(call) == 0
    assert "moelora::wide" in mode.names
    assert "moelora::replay_wide" not in mode.names


def test_a_subclass_gets_the_layer_op(wide: PlannedOp) -> None:
    Wrapper.names.clear()
    call(Wrapper(INPUTS.x))
    assert "moelora::wide" in Wrapper.names
    assert "moelora::replay_wide" not in Wrapper.names


def test_a_trace_has_the_layer_op(wide: PlannedOp) -> None:
    traced = torch.jit.trace(lambda x: call(x).h, INPUTS.x, check_trace=False)
    assert "moelora::wide" in str(traced.graph)
    assert "moelora::replay_wide" not in str(traced.graph)


def test_a_compiled_graph_has_the_layer_op(wide: PlannedOp) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: call(x).h, backend=backend, fullgraph=True)(INPUTS.x)
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert "moelora.wide.default" in called
    assert not any("replay" in name for name in called)


def test_autocast_changes_no_bit(wide: PlannedOp) -> None:
    expected = call()
    results = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert replays(lambda: results.append(call())) == 1
    assert results[0].y[0].dtype == expected.y[0].dtype
    assert torch.equal(results[0].y[0], expected.y[0])
    assert torch.equal(results[0].h, expected.h)


def test_an_exception_of_python_is_raised(wide: PlannedOp) -> None:
    """The call with another key has no plan, so it runs in Python."""

    def refuse(*_):
        raise ValueError("x: expected another")

    wide.function = refuse
    with pytest.raises(ValueError, match="x: expected another"):
        call(INPUTS.x[:5])


def test_python_replays_if_a_step_fails(wide: PlannedOp, driver: FakeDriver) -> None:
    expected = call()
    failing = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    library = native.plan_library()
    assert library is not None
    library.set_cpu_launch(ctypes.cast(failing, ctypes.c_void_p).value)
    results = []
    assert replays(lambda: results.append(call())) == 0
    assert torch.equal(results[0].y[0], expected.y[0])


def test_a_replay_launches_what_python_launches(wide: PlannedOp, driver: FakeDriver) -> None:
    driver.launched.clear()
    assert replays(call) == 1
    native_launches = [*driver.launched]
    with Names():
        call()
    assert driver.launched == 2 * native_launches
