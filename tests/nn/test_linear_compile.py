"""MoeLoraLinear under torch.compile: no graph break, no recompile, the values of eager."""

import pytest
import torch

from moelora_kernels import set_tasks
from support.compare import assert_same, training_step
from support.linears import IN, OUT, make_layer

COMPILED = [
    {},
    dict(normalize="none", top_k=None, dropout=0.3, dropout_mask="per_expert"),
    dict(router="task", num_tasks=3),
    dict(granularity="sequence", shared_expert="always"),
    dict(impl="grouped"),
    dict(impl="grouped", router="mlp", shared_expert="always", bias=False),
    dict(impl="grouped", dropout=0.3, normalize="none"),
]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compile_without_graph_breaks_or_recompiles(options):
    """fullgraph=True, the gradients of eager, and one graph for all numbers of tokens."""
    torch._dynamo.reset()
    layer = make_layer(**options)
    if layer.config.router == "task":
        set_tasks(layer, [3, 1])
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager", dynamic=True)
    # The numbers of tokens are on both sides of a tile of the grouped form.
    for sequence in (20, 12, 65, 150):
        x = torch.randn(2, sequence, IN, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=sequence != 20):
            actual = training_step(layer, x, forward=compiled)
        assert_same(actual, training_step(layer, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_a_frozen_layer_compiles(impl):
    """Autograd is on, but no tensor needs a gradient, like in evaluation without no_grad."""
    layer = make_layer(impl=impl).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, IN, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))


def test_new_tasks_do_not_recompile():
    """The tasks are inputs of the graph, not constants, so each batch can have others."""
    layer = make_layer(router="task", num_tasks=3).eval()
    set_tasks(layer, [1, 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in ([2, 3], [3, 1]):
            set_tasks(layer, ids)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", ({}, dict(router="mlp", noise=0.1)), ids=str)
def test_compile_under_autocast(options):
    """The compiled layer gives the bits of eager autocast."""
    layer = make_layer(torch.float32, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        actual = compiled(x)
        torch.manual_seed(1)
        expected = layer(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dropout_mask", ("shared", "per_expert"))
def test_training_with_dropout_compiles(dropout_mask):
    """Every step draws a new seed in the graph; backward computes the mask from the seed."""
    torch._dynamo.reset()
    layer = make_layer(dropout=0.5, dropout_mask=dropout_mask)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    # The same seed gives the same mask.
    torch.manual_seed(1)
    eager = layer(x)
    torch.testing.assert_close(first, eager, rtol=1e-11, atol=1e-11)
    dy = torch.randn(6, OUT, dtype=torch.float64)
    trained = (x, layer.lora_A, layer.lora_B, layer.router.weight)
    for actual, expected in zip(
        torch.autograd.grad(first, trained, dy),
        torch.autograd.grad(eager, trained, dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
