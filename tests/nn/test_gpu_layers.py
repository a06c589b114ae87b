"""MoeLoraLinear on a GPU: streams, devices, strides, autocast, torch.compile, launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moelora_kernels import MoeLoraLinear
from moelora_kernels.kernels import cluster_shrink
from support.gpu_cases import (
    DEVICE,
    STEPS,
    assert_equal,
    assert_module_within_budget,
    each_half,
    each_step,
    make_layer,
    module_step,
    unpoisoned,
)

pytestmark = pytest.mark.gpu

T, I, O = 300, 512, 768  # noqa: E741


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def backward_of(dy: Tensor) -> Callable[[Tensor], object]:
    """Return a function that runs backward from `dy`, with its strides, in the dtype of y."""
    return lambda y: y.backward(dy.to(y.dtype))


# name -> (rows, columns, dtype) -> a tensor [rows, columns]. The rows of "narrowed" are not aligned
# to 16 bytes.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "transposed": lambda rows, columns, dtype: draw(columns, rows, dtype=dtype).t(),
    "narrowed": lambda rows, columns, dtype: draw(rows, columns + 11, dtype=dtype)[:, 3:-8],
    "every_second_row": lambda rows, columns, dtype: draw(2 * rows, columns, dtype=dtype)[::2],
    "one_row_expanded": lambda rows, columns, dtype: draw(1, columns, dtype=dtype).expand(rows, -1),
}


@each_half
@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_and_dy_of_any_strides(layout: str, dtype: torch.dtype) -> None:
    """Kernels read rows at a stride, cuBLAS reads two layouts; other tensors must be copied."""
    layer = make_layer(I, O, dtype, top_k=2)
    x, dy = LAYOUTS[layout](T, I, dtype), LAYOUTS[layout](T, O, dtype)
    assert_module_within_budget(layer, x, backward_of(dy), dtype)


@each_half
def test_the_gradient_of_a_sum(dtype: torch.dtype) -> None:
    """dy is one number, expanded with strides 0 and 0."""
    layer = make_layer(I, O, dtype, top_k=2)
    assert_module_within_budget(layer, draw(T, I, dtype=dtype), lambda y: y.sum().backward(), dtype)


@pytest.mark.parametrize("shape", ((I,), (7, I), (3, 100, I), (2, 3, 5, I)), ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    """y and dx have the leading dimensions of x."""
    layer = make_layer(I, O, top_k=2)
    dy = draw(*shape[:-1], O)
    assert_module_within_budget(layer, draw(*shape), backward_of(dy), torch.bfloat16)


def test_no_token() -> None:
    """No kernel is launched over an empty grid, and the gradients are zero, not None."""
    layer = make_layer(I, O, top_k=2)
    actual = module_step(layer, draw(0, I), lambda y: y.sum().backward())
    assert actual["y"].shape == (0, O)
    assert actual["dx"].shape == (0, I)
    for name, gradient in actual.items():
        assert gradient is not None, name
        assert gradient.count_nonzero() == 0, name


@each_half
@pytest.mark.parametrize(
    "options",
    (
        dict(top_k=2, router_bias=True),
        # This router is not fused: its products must stay float32 under autocast.
        dict(router="mlp", top_k=2),
        dict(rank=(4, 8, 16, 4, 4, 4, 4, 4), top_k=2),
    ),
    ids=str,
)
def test_autocast_with_float32_parameters(options: dict, dtype: torch.dtype) -> None:
    """The layer computes in autocast's dtype. A gradient has the dtype of its parameter."""
    # The values fit 16 bits, so the cast of a weight rounds nothing.
    layer = make_layer(I, O, dtype, **options).float()
    x, dy = draw(T, I, dtype=dtype).float(), draw(T, O)
    assert_module_within_budget(layer, x, backward_of(dy), dtype, autocast=True)
    with torch.autocast(DEVICE.type, dtype):
        actual = module_step(layer, x, backward_of(dy))
    assert actual.pop("y").dtype == dtype
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}


@each_step
def test_another_stream(form: str) -> None:
    """Kernels run on the current stream. On another they would read the previous inputs."""
    step = STEPS[form](64)
    step.redraw(1)
    expected = step.train()
    step.redraw(2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        step.redraw(1)
        actual = step.train()
    stream.synchronize()
    assert_equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current() -> None:
    """Kernels run on the device of x, with the tiles of that device."""
    layer = make_layer(I, O, top_k=2)
    x, dy = draw(T, I), draw(T, O)
    expected = module_step(layer, x, backward_of(dy))
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() != other.index
    actual = module_step(layer.to(other), x.to(other), backward_of(dy.to(other)))
    assert {tensor.device for tensor in actual.values()} == {other}
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_equal([t.to(DEVICE) for t in actual.values()], [*expected.values()])


@each_step
def test_nothing_waits_for_the_gpu(form: str) -> None:
    """No `.item()`, no copy to the host, no size that depends on the routing."""
    step = STEPS[form](64)
    step.redraw(1)
    step.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.infer()
        step.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def device_kernels(work: Callable[[], object]) -> list[str]:
    """Return the names of the kernels that the second run of `work` launches."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert names, "the profiler saw no kernel: is CUPTI there?"
    # cuBLAS may clear a workspace or add partial products with launches of its own.
    return [n for n in names if "splitk" not in n.lower() and not n.startswith("Mem")]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the counts hold where 64 token tiles fill half of the chip",
)
def test_launches_of_a_layer() -> None:
    """4 forward: shrink, gate, expand, base. 6 backward: shrink, gate, dx twice, weight_grad twice.

    The second launch of a gate or of weight_grad adds partial sums; the shrink for clusters, if the
    library has it, needs none. A cast, a copy or a fill would add a launch.
    """
    takes_clusters = cluster_shrink.op() is not None
    shrink = "void moelora::shrink_gate_kernel" if takes_clusters else "shrink_gate_kernel"
    with unpoisoned():
        layer = make_layer(4096, 4096, bias=False, top_k=2)
        x = draw(8192, 4096).requires_grad_()
        dy = draw(8192, 4096)
        trained = [x, layer.lora_A, layer.lora_B, layer.router.weight]
        forward = device_kernels(lambda: layer(x))
        assert len(forward) == (3 if takes_clusters else 4), forward
        assert any(name.startswith(shrink) for name in forward), forward
        y = layer(x)
        backward = device_kernels(lambda: torch.autograd.grad(y, trained, dy, retain_graph=True))
        assert len(backward) == 6, backward
        for kernel in ("shrink_gate_backward", "_dx", "weight_grad", "reduce_partials"):
            assert any(f"{kernel}_kernel" in name for name in backward), backward


@pytest.mark.parametrize(
    "options",
    (
        dict(top_k=2),
        dict(),
        dict(top_k=2, rank=(4, 8) * 4, router_bias=True),
        dict(top_k=2, impl="grouped"),
    ),
    ids=str,
)
def test_compiled(options: dict) -> None:
    """One graph for all numbers of tokens. It calls the kernels of eager, so the bits are equal."""
    layer = make_layer(I, O, **options)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def step(forward: Callable, x: Tensor, dy: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *trained], dy)]

    for tokens, recompiles in ((40, True), (300, False), (1000, False)):
        x, dy = draw(2, tokens, I), draw(2, tokens, O)
        with torch._dynamo.config.patch(error_on_recompile=not recompiles):
            actual = step(compiled, x, dy)
        assert_equal(actual, step(layer, x, dy))


def test_device_and_dtype_of_the_constructor() -> None:
    """The arguments device and dtype of the constructor reach base, adapters and router."""
    layer = MoeLoraLinear(64, 32, device=DEVICE, dtype=torch.float16, router="mlp", top_k=2)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("cuda", torch.float16)}
