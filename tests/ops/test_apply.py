"""`ops.apply` calls an autograd Function: the same results in every mode, without a signature."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import ops
from moelora_kernels.autograd.linear import MoeLora, SqrtGateMoeLora
from moelora_kernels.autograd.router import RouterLogits
from moelora_kernels.ops.apply import apply
from moelora_kernels.ops.topk_gate import TopkGate
from support.compare import FLOAT64, assert_same, backward_step, training_step
from support.fake_driver import called_code
from support.ffns import make_ffn
from support.linears import IN, make_layer


def logits() -> torch.Tensor:
    return torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


def router_inputs() -> list[torch.Tensor]:
    return [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6), (3, 6), (3,))
    ]


# Function -> its inputs.
FUNCTIONS = {
    TopkGate: lambda: (logits(), 2, True, 1.0),
    RouterLogits: router_inputs,
}
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
# Modules whose forward calls `apply`: together they use every Function of the package.
MODULES = {
    "wide": lambda: make_layer(impl="wide"),
    "grouped": lambda: make_layer(impl="grouped"),
    "one gate per sequence": lambda: make_layer(granularity="sequence"),
    "square root of the gate": lambda: make_layer(grad_gate="sqrt"),
    "ffn": make_ffn,
}
each_module = pytest.mark.parametrize("name", MODULES)


def features(layer: nn.Module) -> int:
    return getattr(layer, "in_features", None) or layer.hidden_size


@each_module
def test_a_call_reads_no_signature(name: str) -> None:
    """torch binds the inputs of a Function with `setup_context` to a signature: up to 25 us."""
    layer = MODULES[name]()
    x = torch.randn(2, 3, features(layer), dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    codes = called_code(lambda: layer(x).sum().backward())
    assert any("moelora_kernels" in code.co_filename for code in codes)
    assert not [code.co_name for code in codes if code.co_filename == inspect.__file__]


@each_function
def test_outputs_and_gradients_are_those_of_the_function(function: type) -> None:
    inputs = FUNCTIONS[function]()
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    results = []
    for call in (apply, lambda function, *inputs: function.apply(*inputs)):
        output = call(function, *inputs)
        first, *others = output if isinstance(output, tuple) else (output,)
        assert type(first.grad_fn).__name__ == f"{function.__name__}Backward"
        assert not any(t.requires_grad for t in others)
        grads = torch.autograd.grad(first.square().sum(), tensors)
        results.append(dict(enumerate((first.detach(), *others, *grads))))
    assert_same(*results)


@each_function
def test_without_grad_mode_nothing_is_recorded(function: type) -> None:
    inputs = FUNCTIONS[function]()
    with torch.no_grad():
        output = apply(function, *inputs)
    first = output[0] if isinstance(output, tuple) else output
    assert not first.requires_grad
    assert first.grad_fn is None


@pytest.mark.parametrize("function", (MoeLora, SqrtGateMoeLora))
def test_the_function_of_a_layer_keeps_its_name(function: type) -> None:
    layer = make_layer(grad_gate="sqrt" if function is SqrtGateMoeLora else "gate")
    y = layer(torch.randn(3, IN, dtype=torch.float64))
    assert type(y.grad_fn).__name__ == f"{function.__name__}Backward"


@each_module
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing_and_saved_tensor_hooks(name: str, use_reentrant: bool) -> None:
    layer = MODULES[name]()
    x = torch.randn(2, 3, features(layer), dtype=torch.float64)
    expected = training_step(layer, x)

    def packed(leaf):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return layer(leaf)

    def recomputed(leaf):
        return checkpoint(layer, leaf, use_reentrant=use_reentrant)

    assert_same(training_step(layer, x, forward=packed), expected)
    assert_same(backward_step(layer, x, forward=recomputed), expected)


@each_module
def test_second_derivatives_are_refused(name: str) -> None:
    layer = MODULES[name]()
    x = torch.randn(2, 3, features(layer), dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_functorch_takes_the_gradient_and_refuses_vmap() -> None:
    """`Function.apply` handles functorch transforms, and needs `setup_context` for it."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return ops.topk_gate(logits, 2)[0].square().sum()

    x = logits()
    (expected,) = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.func.grad(loss)(x.detach()), expected)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError, match="vmap support"):
            torch.vmap(loss)(torch.randn(3, 5, 4))


@each_module
@pytest.mark.filterwarnings("ignore")
def test_jit_trace_is_refused_in_grad_mode(name: str) -> None:
    layer = MODULES[name]()
    x = torch.randn(2, 3, features(layer), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^torch.jit.trace: trace the layer inside"):
        torch.jit.trace(layer, x)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(x), layer(x))


@each_module
def test_a_layer_in_a_function_that_the_compiler_cannot_compile(name: str) -> None:
    """The compiler then compiles the functions that the layer calls, one by one."""
    layer = MODULES[name]()
    x = torch.randn(2, 3, features(layer), dtype=torch.float64)

    def forward(leaf):
        with contextlib.ExitStack():
            torch._dynamo.graph_break()
            return layer(leaf)

    compiled = torch.compile(forward, backend="aot_eager")
    assert_same(training_step(layer, x, forward=compiled), training_step(layer, x), **FLOAT64)
