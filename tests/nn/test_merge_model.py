"""merge_adapter, unmerge_adapter and merge_and_unload on whole models."""

import weakref

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    MoeLoraLinear,
    merge_adapter,
    merge_and_unload,
    replace_linears,
    set_tasks,
    unmerge_adapter,
)
from support.ffns import make_ffn
from support.linears import IN, make_layer, randomise, task_layer
from support.models import adapt, two_blocks

MOELORA = MoeLoraConfig.preset("moelora", num_experts=4, num_tasks=3, task_embedding_dim=5)
LORA = MoeLoraConfig.preset("lora", rank=2)


def two_kinds(config=MOELORA):
    """Return two blocks whose first linear has `config`, and whose second has plain LoRA."""
    return adapt(two_blocks(), (config, r"\d\.0"), (LORA, r"\d\.2")).eval()


def test_a_model_merges_and_unmerges():
    """Layers with plain LoRA merge together with layers with a task gate."""
    model = two_kinds()
    x = torch.randn(5, 6, dtype=torch.float64)
    for task in (1, 2, 3):
        set_tasks(model, [task])
        y = model(x)
        merge_adapter(model, task)
        assert all(m.merged for m in model.modules() if isinstance(m, MoeLoraLinear))
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        unmerge_adapter(model)
        assert torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="model: no layer is merged"):
        unmerge_adapter(model)


def test_a_model_merges_as_a_whole_or_not_at_all():
    model = two_kinds()
    model[1][0].lora_B.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="is not finite"):
        merge_adapter(model, 2)
    assert not any(m.merged for m in model.modules() if isinstance(m, MoeLoraLinear))


@pytest.mark.parametrize("call", (merge_adapter, merge_and_unload))
def test_every_layer_that_cannot_be_merged_is_named(call):
    model = two_kinds(MoeLoraConfig.preset("ming", num_experts=4, rank=2))
    model.mlp = make_ffn()
    model[0][2].merge()
    model[1][2].base_layer.register_forward_hook(lambda module, args, y: y)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="model: cannot be merged") as error:
        call(model)
    for problem in (
        "0.0: task: its gate depends on x (router='linear', one gate per token)",
        "0.2: the layer is merged already",
        "1.0: task: its gate depends on x",
        "1.2: base_layer: merging needs a plain nn.Linear",
        "mlp: the experts of a MoeLoraFFN are not linear",
    ):
        assert problem in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_task_without_a_task_gate_and_a_model_without_layers():
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(
        ValueError, match="model: expected a model with MoeLoraLinear layers, got none"
    ):
        merge_adapter(model, 1)
    replace_linears(model, LORA, "0")
    with pytest.raises(ValueError, match="task: no layer of the model has a task gate"):
        merge_adapter(model, 1)
    merge_adapter(model)


def test_merge_and_unload_returns_the_plain_model():
    """Each layer becomes an nn.Linear of the same name, frozen, with its mode and bias."""
    model = two_kinds()
    x = torch.randn(5, 6, dtype=torch.float64)
    set_tasks(model, [2])
    with torch.no_grad():
        y = model(x)
    old = weakref.ref(model[0][0].base_layer.weight)
    bias = model[0][0].bias
    assert merge_and_unload(model, 2) is model
    for name in ("0.0", "0.2", "1.0", "1.2"):
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert not linear.training
        assert not linear.weight.requires_grad
    assert model[0][0].bias is bias
    assert old() is None
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    plain = nn.Sequential(
        *[nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)) for _ in range(2)]
    ).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_unloading_frees_each_layer_before_the_next():
    """Two copies of a model may not fit into memory: the first base weight is freed already."""
    model = two_kinds()
    model[1][2].lora_B.data.fill_(torch.inf)
    old = weakref.ref(model[0][0].base_layer.weight)
    with pytest.raises(ValueError, match="is not finite") as error:
        merge_and_unload(model, 2)
    assert type(model[0][0]) is nn.Linear
    assert old() is None
    assert error.tb is not None


def test_a_single_layer_is_unloaded_to_a_linear():
    layer = task_layer()
    x = torch.randn(5, IN, dtype=torch.float64)
    set_tasks(layer, [2])
    linear = merge_and_unload(layer, 2)
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-12, atol=1e-12)


def test_tied_weights_and_shared_layers():
    """A tied embedding keeps its weight. A layer with two names becomes one linear."""
    model = nn.Module()
    model.embedding = nn.Embedding(8, 6, dtype=torch.float64)
    model.head = nn.Linear(6, 8, bias=False, dtype=torch.float64)
    model.head.weight = model.embedding.weight
    model.again = model.head
    replace_linears(model, MOELORA, ["head", "again"])
    randomise(model)
    assert model.again is model.head
    original = model.embedding.weight.clone()
    merge_adapter(model, 1)
    assert torch.equal(model.embedding.weight, original)
    assert not torch.equal(model.head.weight, original)
    unmerge_adapter(model)
    assert model.head.weight is model.embedding.weight
    merge_and_unload(model, 1)
    assert torch.equal(model.embedding.weight, original)
    assert not torch.equal(model.head.weight, original)
    assert model.again is model.head


def test_siblings_of_a_group_cannot_be_unloaded():
    group = MoeLoraGroup(q=make_layer(router=None, router_bias=False))
    with pytest.raises(
        ValueError, match=r"model: a MoeLoraGroup cannot run plain linears; .*: group$"
    ):
        merge_and_unload(nn.ModuleDict({"group": group}))
    assert isinstance(group.q, MoeLoraLinear)
