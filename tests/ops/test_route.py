"""`route` on the CPU and as an op: the routing arrays are those of the reference, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_kernels import native, ops, reference
from moelora_kernels.types import CHUNK, TILE
from support.backends import REQUIRED, needs_library
from support.route_cases import CASES, NAMES, adversarial, check_properties, drawn

each_case = pytest.mark.parametrize("name", CASES)
# tile and chunk: one place, one that divides nothing, a power of two, the shipped sizes.
each_size = pytest.mark.parametrize("sizes", ((1, 3), (3, 64), (64, 1), (TILE, CHUNK)), ids=str)


class Recorder(TorchDispatchMode):
    """The names of the ops that run, and how many do."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.count = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        self.count += 1
        return func(*args, **(kwargs or {}))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert one.dtype == other.dtype == torch.int32, name
        assert torch.equal(one.cpu(), other.cpu()), name


def test_the_library_has_the_op() -> None:
    if native.available() or REQUIRED:
        assert "route" in native.build_info()["ops"]
        assert torch._C._dispatch_has_kernel_for_dispatch_key("moelora::route", "CPU")


@each_size
@each_case
def test_equals_the_reference(name: str, sizes: tuple[int, int]) -> None:
    indices, experts, siblings = CASES[name]
    arguments = (indices, experts, siblings, *sizes)
    assert_same(ops.route(*arguments), reference.route(*arguments))


@each_size
@each_case
@pytest.mark.parametrize("route", (ops.route, reference.route), ids=("op", "reference"))
def test_properties(route, name: str, sizes: tuple[int, int]) -> None:
    """Also of the reference, which everything else is compared with."""
    indices, experts, siblings = CASES[name]
    found = route(indices, experts, siblings, *sizes)
    check_properties(found, indices, experts, siblings, sizes)


@pytest.mark.parametrize("tokens", (40_000, 100_003))
def test_parts_of_the_tokens_that_threads_share(tokens: int) -> None:
    """Several counters per expert and slot, the last part shorter."""
    indices = drawn("zipf", tokens, 7, 2, siblings=2)
    indices[::13, 1] = -1
    arguments = (indices, 7, 2, TILE, CHUNK)
    assert_same(ops.route(*arguments), reference.route(*arguments))


@each_case
def test_fake_agrees(name: str) -> None:
    indices, experts, siblings = CASES[name]
    arguments = (experts, siblings, TILE, CHUNK)
    for one, other in zip(
        ops.route(indices, *arguments), ops.route(indices.to("meta"), *arguments), strict=True
    ):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("tokens", (0, 37))
def test_opcheck(tokens: int) -> None:
    indices = adversarial(tokens, 4, 5, torch.int64)
    torch.library.opcheck(torch.ops.moelora.route.default, (indices, 5, 2, TILE, CHUNK))


def test_one_graph_for_any_number_of_tokens() -> None:
    compiled = torch.compile(ops.route, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (17, 64, 401):
        arguments = (drawn("uniform", tokens, 5, 2), 5, 1, TILE, CHUNK)
        assert_same(compiled(*arguments), reference.route(*arguments))


@pytest.mark.parametrize("siblings", (1, 2))
def test_the_fallback_asks_nothing_of_the_device(siblings: int) -> None:
    """Without the native library it runs on CUDA: no value may be needed on the host."""
    with Recorder() as recorder:
        indices = torch.empty(37, 4, dtype=torch.int64, device="meta")
        found = reference.route(indices, 5, siblings, TILE, CHUNK)
    assert all(t.device.type == "meta" for t in found)
    synchronous = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2"}
    assert not recorder.names & synchronous
    # Each is a launch or two.
    assert recorder.count < 70, recorder.count


def test_too_many_pairs_for_the_fallback() -> None:
    with pytest.raises(ValueError, match=r"experts: expected less than 2\^31 pairs"):
        reference.route(PAIR.expand(2**30, 2), 1, 1, 64, 64)


PAIR = torch.zeros(1, 1, dtype=torch.int32)


@needs_library
@pytest.mark.parametrize(
    ("arguments", "named"),
    (
        ((torch.zeros(4, dtype=torch.int32), 3, 1, 1, 1), "experts: expected 2 dimensions, got 1"),
        ((torch.zeros(4, 2), 3, 1, 1, 1), "experts: expected int32 or int64, got Float"),
        (
            (torch.zeros(4, 5, dtype=torch.int32), 3, 2, 1, 1),
            "experts: expected the same number of columns for each of 2 siblings, got 5",
        ),
        ((PAIR, 0, 1, 1, 1), "num_experts: expected at least 1, got 0"),
        ((PAIR, 1, 0, 1, 1), "siblings: expected at least 1, got 0"),
        ((PAIR, 1, 1, 0, 1), "tile: expected at least 1, got 0"),
        ((PAIR, 1, 1, 1, -1), "chunk: expected at least 1, got -1"),
        ((PAIR, 2**31 - 1, 1, 1, 1), "num_experts: expected less than 2.31 experts of all"),
        ((PAIR.expand(2**30, 2), 1, 1, 64, 64), "experts: expected less than 2.31 pairs, got"),
    ),
)
def test_bad_arguments_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        ops.route(*arguments)
