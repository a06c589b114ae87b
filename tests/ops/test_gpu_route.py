"""`route` on a GPU: the arrays of the reference, one launch, nothing for the host to wait for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels import native, ops, reference
from moelora_kernels.testing import ROUTINGS
from moelora_kernels.types import CHUNK, TILE
from support.route_cases import CASES, NAMES, adversarial, drawn

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.gpu
needs_cuda_part = pytest.mark.skipif(
    "route" not in native.build_info().get("cuda_ops", ()),
    reason="the native library has no CUDA part",
)
IMPLEMENTATIONS = {"op": ops.route, "reference": reference.route}
each_implementation = pytest.mark.parametrize(
    "route", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS
)


def on_gpu(indices: Tensor) -> Tensor:
    """The same values and strides on the GPU; `to` would make an expanded tensor dense."""
    size = 1 + sum((n - 1) * s for n, s in zip(indices.shape, indices.stride(), strict=True))
    if indices.numel() == 0:
        return indices.to(DEVICE)
    flat = indices.as_strided((size,), (1,)).to(DEVICE)
    return flat.as_strided(indices.shape, indices.stride())


def check(route, indices: Tensor, *arguments) -> None:
    found = route(on_gpu(indices), *arguments)
    expected = reference.route(indices, *arguments)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert one.device.type == "cuda"
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize("sizes", ((1, 3), (TILE, CHUNK)), ids=str)
@pytest.mark.parametrize("name", CASES)
@each_implementation
def test_cases(route, name: str, sizes: tuple[int, int]) -> None:
    check(route, *CASES[name], *sizes)


# (T, E, K, siblings): a decode step, a training batch, more than 64k pairs, many experts, and more
# experts than shared memory counts.
LARGE = ((1, 8, 2, 1), (8192, 8, 2, 1), (4097, 64, 6, 3), (32768, 8, 2, 1), (131072, 256, 8, 1),
         (1000, 5000, 2, 1))  # fmt: skip


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_large(routing: str, shape: tuple[int, int, int, int]) -> None:
    tokens, experts, top_k, siblings = shape
    if experts > 256 and routing != "uniform":
        pytest.skip("one distribution is enough for the counters in global memory")
    if routing == "uniform":
        indices = torch.randint(-1, experts + 1, (tokens, top_k * siblings))
    else:
        indices = drawn(routing, tokens, experts, top_k, siblings)
    check(ops.route, indices.int(), experts, siblings, TILE, CHUNK)


def test_repeats_are_bitwise_equal() -> None:
    indices = adversarial(8192, 8, 16, torch.int64).to(DEVICE)
    first = ops.route(indices, 16, 1, TILE, CHUNK)
    for _ in range(50):
        again = ops.route(indices, 16, 1, TILE, CHUNK)
        assert all(map(torch.equal, first, again))


@each_implementation
def test_a_graph_of_it_follows_its_indices(route) -> None:
    indices = drawn("uniform", 1000, 8, 2).to(DEVICE)
    arguments = (8, 1, TILE, CHUNK)
    route(indices, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = route(indices, *arguments)
    for seed in (1, 2):
        other = drawn("zipf", 1000, 8, 2, seed=seed)
        indices.copy_(other)
        graph.replay()
        for one, expected in zip(outputs, reference.route(other, *arguments), strict=True):
            assert torch.equal(one.cpu(), expected)


@each_implementation
def test_the_host_does_not_wait(route) -> None:
    indices = drawn("uniform", 1000, 8, 2).to(DEVICE)
    route(indices, 8, 1, TILE, CHUNK)
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(indices, 8, 1, TILE, CHUNK)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda_part
def test_one_launch() -> None:
    # Filling fresh memory, as the tests do, is a launch too.
    torch.utils.deterministic.fill_uninitialized_memory = False
    indices = drawn("uniform", 32768, 8, 2).to(DEVICE)
    ops.route(indices, 8, 1, TILE, CHUNK)
    with torch.profiler.profile() as profile:
        ops.route(indices, 8, 1, TILE, CHUNK)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(launched) == 1, launched
    assert "route_kernel" in launched[0]


@needs_cuda_part
def test_runs_on_the_stream_of_the_caller() -> None:
    """On torch's current stream, behind a kernel that makes its input late."""
    late = drawn("uniform", 1000, 8, 2)
    indices = torch.full((1000, 2), -1, device=DEVICE)
    source = late.to(DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        indices.copy_(source)
        found = ops.route(indices, 8, 1, TILE, CHUNK)
    stream.synchronize()
    for one, other in zip(found, reference.route(late, 8, 1, TILE, CHUNK), strict=True):
        assert torch.equal(one.cpu(), other)
