"""MoeLoraAdapter: gated adapters after a module, with an activation in rank space."""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_state_dict,
    collect_aux_loss,
    warmup,
)
from support.formulas.family import (
    IN,
    OUT,
    balanced_layer,
    ffn,
)

PESC = MoeLoraConfig.preset("pesc")


def test_a_new_adapter_is_its_base():
    """The plain LoRA inside the FFN trains as well, like in PESC."""
    base = ffn().train()
    base[2] = MoeLoraLinear.from_linear(base[2], MoeLoraConfig.preset("lora"))
    layer = MoeLoraAdapter(base, IN, MoeLoraConfig.preset("pesc"))
    x = torch.randn(2, 3, IN)
    assert torch.equal(layer(x), base(x))
    trained = {n for n, q in layer.named_parameters() if q.requires_grad}
    assert trained == {
        "lora_A", "lora_B", "router.weight", "base_layer.2.lora_A", "base_layer.2.lora_B",
    }  # fmt: skip


def test_the_state_dict_and_the_auxiliary_loss():
    layer = MoeLoraAdapter(ffn(), IN, MoeLoraConfig.preset("pesc", num_experts=3, rank=2))
    assert set(adapter_state_dict(layer)) == {"lora_A", "lora_B", "router.weight"}
    layer(torch.randn(2, 3, IN))
    loss = collect_aux_loss(layer)
    loss.backward()
    assert loss > 0
    assert layer.router.weight.grad.abs().max() > 0


def test_warmup_does_not_count_loads():
    model = nn.ModuleList([balanced_layer().float(), MoeLoraAdapter(ffn(torch.bfloat16), IN, PESC)])
    model[0](torch.randn(5, IN))
    load = model[0].router.balance.load.clone()
    warmup(model, tokens=(2,))
    assert torch.equal(model[0].router.balance.load, load)


def test_backward_saves_rank_space_only():
    """Besides the output of the FFN, backward saves no tensor of size T x I or T x K x I."""
    layer = MoeLoraAdapter(nn.Identity(), 400, MoeLoraConfig.preset("pesc", num_experts=4, rank=2))
    x, sizes = torch.randn(50, 400, requires_grad=True), {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    parameters = {q.untyped_storage().data_ptr() for q in (x, *layer.parameters())}
    others = [size for pointer, size in sizes.items() if pointer not in parameters]
    assert max(others) <= 50 * 8


def test_a_nan_in_an_unrouted_adapter_does_not_reach_y():
    layer = MoeLoraAdapter(ffn(), IN, MoeLoraConfig.preset("pesc", num_experts=3, rank=2))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.lora_A[4:] = torch.nan
    assert layer(torch.randn(3, IN)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    (
        ("rank_activation", dict(rank_activation=None)),
        ("router", dict(router=None, top_k=None, aux=())),
        ("router", dict(router="task", num_tasks=2)),
        ("share", dict(share="A")),
        ("grad_gate", dict(grad_gate="sqrt")),
        ("dropout", dict(dropout=0.1)),
        ("impl", dict(impl="grouped")),
        ("init", dict(init="svd_segments")),
    ),
    ids=str,
)
def test_an_option_that_adapters_do_not_support_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraAdapter(ffn(), IN, MoeLoraConfig.preset("pesc", **options))


def test_only_adapters_have_an_activation():
    config = MoeLoraConfig.preset("pesc")
    for make in (MoeLoraLinear, MoeLoraFFN):
        with pytest.raises(ValueError, match=r"^rank_activation\b"):
            make(IN, IN, config=config)
    with pytest.raises(ValueError, match=r"^rank_activation\b"):
        MoeLoraConfig(rank_activation="tanh")
    layer = MoeLoraAdapter(ffn(), IN, config)
    with pytest.raises(TypeError, match=r"^a: expected a MoeLoraLinear, got .*MoeLoraAdapter"):
        MoeLoraGroup(a=layer)
    with pytest.raises(ValueError, match=r"^base: expected an output"):
        MoeLoraAdapter(nn.Linear(IN, OUT), IN, config)(torch.randn(2, IN))
