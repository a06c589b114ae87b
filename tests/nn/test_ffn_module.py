"""MoeLoraFFN as a module: copies, state dicts, compile, checkpointing, auxiliary losses, files."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraFFN,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    collect_aux_loss,
    dispatch,
    load_adapter,
    record_routing,
    save_adapter,
    set_tasks,
)
from moelora_kernels.autograd.ffn import TORCH
from support.compare import assert_same, backward_step, training_step
from support.copies import each_copier
from support.ffns import HIDDEN, INNER, inputs, make_ffn
from support.formulas.aux_loss import switch_loss
from support.selection import exhaustive

OPTIONS = [{}, dict(router="mlp"), dict(router="task", num_tasks=3), dict(recompute=True)]


def with_tasks(layer):
    if layer.config.router == "task":
        set_tasks(layer, [2, 1])
    return layer.eval()


@each_copier
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_compute_the_same(options, copier):
    """Copies after a forward, by deepcopy, pickle and torch.save."""
    layer, (x, _) = with_tasks(make_ffn(**options)), inputs(2, 3)
    y = layer(x)
    clone = copier(layer)
    assert torch.equal(clone(x), y)
    with torch.no_grad():
        clone.down_lora_B.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_meta_and_dtype(options):
    """A layer is built on meta, filled from a state dict, and cast, like a large model."""
    source, (x, _) = with_tasks(make_ffn(**options)), inputs(2, 3)
    with torch.device("meta"):
        layer = MoeLoraFFN(
            HIDDEN, INNER, True, config=source.config, dtype=torch.float64,
            recompute=options.get("recompute", False),
        )  # fmt: skip
        if source.config.router != "task":
            assert layer(x.to("meta")).shape == x.shape
    assert {q.device.type for q in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(with_tasks(layer)(x), source(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_names_and_shapes_of_trained_parameters():
    layer = make_ffn(bias=False)
    trained = {n: [*q.shape] for n, q in layer.named_parameters() if q.requires_grad}
    assert trained == {
        "gate_lora_A": [8, HIDDEN], "gate_lora_B": [INNER, 8],
        "up_lora_A": [8, HIDDEN], "up_lora_B": [INNER, 8],
        "down_lora_A": [8, INNER], "down_lora_B": [HIDDEN, 8],
        "router.weight": [4, HIDDEN],
    }  # fmt: skip
    assert adapter_parameters(layer) == [q for q in layer.parameters() if q.requires_grad]
    text = repr(make_ffn(recompute=True))
    for part in ("hidden_size=6", "intermediate_size=10", "num_experts=4", "top_k=2", "recompute"):
        assert part in text


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_a_new_layer_is_its_base(dtype):
    """B = 0 and the weights sum to 1: y is the MLP, up to the rounding of the weighted sum."""
    torch.manual_seed(0)
    layer = MoeLoraFFN(HIDDEN, INNER, True, num_experts=4, rank=2, top_k=2, dtype=dtype)
    x, _ = inputs(7, dtype=dtype)
    gate, up, down = (copy.deepcopy(m).double() for m in list(layer.children())[:3])
    expected = down(nn.functional.silu(gate(x.double())) * up(x.double()))
    band = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=band)
    changed = make_ffn(dtype)
    changed.reset_parameters()
    assert not any(q.any() for n, q in changed.named_parameters() if "lora_B" in n)


COMPILED = [
    dict(dropout=0.3, dropout_mask="per_expert"),
    dict(recompute=True, activation="gelu", granularity="sequence"),
    dict(impl="grouped"),
]


@pytest.mark.parametrize(
    "options",
    (COMPILED[0], pytest.param(COMPILED[1], marks=exhaustive), COMPILED[2]),
    ids=str,
)
def test_compile_without_graph_breaks_or_recompiles(options):
    """fullgraph=True, the gradients of eager, and one graph for all numbers of tokens."""
    layer = make_ffn(**options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    sizes = dict(dtype=torch.float64, total_rank=8, top_k=2)
    is_fused = layer.config.impl == "auto" and dispatch.choose_ffn("cpu", **sizes) == "fused"
    if TORCH < (2, 13) and not is_fused:
        with pytest.raises(Exception, match=r"needs torch 2\.13"):
            compiled(inputs(2, 5)[0])
        loose = torch.compile(layer, backend="aot_eager")
        x, _ = inputs(2, 5)
        return assert_same(training_step(layer, x, forward=loose), training_step(layer, x))
    tolerance = dict(rtol=1e-11, atol=1e-11)
    x, _ = inputs(2, 5)
    assert_same(training_step(layer, x, forward=compiled), training_step(layer, x), **tolerance)
    with torch._dynamo.config.patch(error_on_recompile=True):
        x, _ = inputs(2, 12)
        assert_same(training_step(layer, x, forward=compiled), training_step(layer, x), **tolerance)


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("options", (dict(dropout=0.4), dict(noise=0.5), dict(recompute=True)))
def test_checkpointing_gives_the_same_bits(options, use_reentrant):
    layer = make_ffn(**options)
    x, dy = inputs(2, 5)
    recomputed = backward_step(
        layer, x, dy, lambda leaf: checkpoint(layer, leaf, use_reentrant=use_reentrant)
    )
    assert_same(recomputed, backward_step(layer, x, dy))


@pytest.mark.parametrize("options", ({}, dict(top_k=1), dict(router="mlp"), dict(impl="reference")))
def test_the_auxiliary_loss_and_its_gradient(options):
    """Gradients of the router and of x, of a loss on y plus the balance loss."""
    layer = make_ffn(aux={"load_balance": 0.5}, **options)
    x = inputs(9)[0].requires_grad_()
    trained = [x, *layer.router.parameters()]
    y = layer(x).square().sum()
    loss = collect_aux_loss(layer)
    expected = 0.5 * switch_loss(layer.router(x), layer.config.top_k)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    actual = torch.autograd.grad(y + loss, trained)
    y_grads = torch.autograd.grad(layer(x).square().sum(), trained)
    aux_grads = torch.autograd.grad(expected, trained)
    for g, a, b in zip(actual, y_grads, aux_grads, strict=True):
        torch.testing.assert_close(g, a + b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 1e-4


def test_adapters_on_disk(tmp_path):
    """The six matrices and the router come back bit by bit; a wrong layer raises an error."""
    source, target = make_ffn(seed=1), make_ffn(seed=2)
    save_adapter(source, tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    assert list(adapter_state_dict(target)) == [
        *(f"{linear}_lora_{m}" for linear in ("gate", "up", "down") for m in "AB"),
        "router.weight",
    ]
    for name, tensor in adapter_state_dict(source).items():
        assert torch.equal(adapter_state_dict(target)[name], tensor)
    with pytest.raises(ValueError, match="unexpected: gate_lora_A"):
        load_adapter(MoeLoraLinear(6, 6, num_experts=4), tmp_path / "a.safetensors")


def test_routing_is_recorded():
    layer, (x, _) = make_ffn(), inputs(2, 3)
    with record_routing(layer):
        layer(x)
        assert layer.record.weights.shape == layer.record.indices.shape == (6, 2)
        assert layer.record.logits.shape == (6, 4)
    assert layer.record.weights is None
