"""When the native library replays a layer op, and what a user sees when it does not."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moelora_kernels import info, native, ops
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.plans import PlannedOp
from moelora_kernels.plans import native as plans_native
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


def call(x: Tensor | None = None, inputs: Inputs = INPUTS) -> Any:
    x = inputs.x if x is None else x
    linears = siblings_of(inputs.linears)
    return ops.wide(x, linears, inputs.gate, inputs.mixture, inputs.dropout)


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


def test_python_replays_if_a_step_fails(wide: PlannedOp, driver: FakeDriver, capsys) -> None:
    """The plan is dropped for good. The first failure warns, and `info` prints its reason."""
    # It stays true after the test.
    plans_native._warned = False
    expected = call()
    failures, _ = native.replay_failures()
    failing = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)
    library = native.plan_library()
    assert library is not None
    library.set_cpu_launch(ctypes.cast(failing, ctypes.c_void_p).value)
    results = []
    reason = r"wide: .*cuLaunchKernel failed with error 1"
    with pytest.warns(RuntimeWarning, match=f"cannot replay a plan: {reason}"):
        assert replays(lambda: results.append(call())) == 0
    assert torch.equal(results[0].y[0], expected.y[0])

    library.set_cpu_launch(driver.address)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert replays(call) == 0
        # The next calls record the key again.
        wide.plans.clear()
        assert [replays(call) for _ in range(3)] == [0, 0, 0]
    info.main(["--json"])
    report = json.loads(capsys.readouterr().out)["native"]
    assert report["failed replays"] == failures + 1
    assert re.fullmatch(reason, report["last failed replay"])


@contextmanager
def limited_memory(extra: int) -> Iterator[None]:
    """Let the process map at most `extra` bytes more in the context."""
    # Garbage that is freed in the context would add to `extra`.
    gc.collect()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fill_memory(size: int) -> list[torch.Tensor]:
    """Allocate blocks of `size` bytes until that fails, and return them.

    Memory that was freed before is still of the process, so no limit takes it away.
    """
    blocks = []
    try:
        while True:
            blocks.append(torch.empty(size, dtype=torch.uint8))
    except RuntimeError:
        return blocks


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as on Linux")
def test_an_allocation_that_fails_keeps_the_plan() -> None:
    """The exception is that of torch in Python."""
    # y has 64 MiB.
    inputs = Inputs(layer_case(T=1 << 15, I=16, O=1 << 10), torch.float16, 1)
    with fake_driver("sm_90") as driver, kernels_on_cpu(launch=driver.address):
        for _ in range(2):
            call(inputs=inputs)
        assert replays(call, None, inputs) == 1
        failures = native.replay_failures()
        with limited_memory(16 << 20):
            blocks = fill_memory(32 << 20)
            with pytest.raises(RuntimeError, match="allocate memory"):
                call(inputs=inputs)
            del blocks
        assert native.replay_failures() == failures
        assert replays(call, None, inputs) == 1


def test_threads_that_make_the_first_call_share_the_replay(monkeypatch) -> None:
    """torch refuses to define an op twice."""
    library = torch.library.Library("moelora", "FRAGMENT")
    define = library.define

    def define_slowly(name: str, schema: str) -> None:
        time.sleep(0.05)
        define(name.removeprefix("moelora::") + schema)

    monkeypatch.setattr(torch.library, "define", define_slowly)
    monkeypatch.setattr(plans_native, "_replays", {})
    results: list[Any] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        barrier.wait()
        try:
            results.append(plans_native.native_replay("shared"))
        except Exception as error:
            results.append(error)

    try:
        define("shared(Tensor x) -> Tensor[]")
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        library._destroy()
    assert isinstance(results[0], plans_native.NativeReplay), results
    assert results[0] is results[1]


def test_a_replay_launches_what_python_launches(wide: PlannedOp, driver: FakeDriver) -> None:
    driver.launched.clear()
    assert replays(call) == 1
    native_launches = [*driver.launched]
    with Names():
        call()
    assert driver.launched == 2 * native_launches
