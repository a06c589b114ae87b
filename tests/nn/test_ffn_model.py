"""replace_ffns on Llama, Qwen2 and Mistral: names, training, tasks, warmup, errors."""

import copy

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    adapter_parameters,
    collect_aux_loss,
    load_adapter,
    replace_ffns,
    replace_linears,
    save_adapter,
    set_tasks,
    warmup,
)
from support.ffns import HIDDEN, INNER, GatedMlp
from support.linears import randomise
from support.models import language_model

MIXLORA = MoeLoraConfig.preset("mixlora", num_experts=4, rank=2)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(params=("Llama", "Qwen2", "Mistral"))
def model(request):
    """Return a frozen model of 2 layers, 16 wide. The MLP of Llama has biases."""
    options = {"mlp_bias": True} if request.param == "Llama" else {}
    model = language_model(request.param, attn_implementation="eager", **options)
    return model.requires_grad_(False)


IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])


MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def test_a_model_starts_as_its_base_and_keeps_its_names(model):
    """The linears keep their names, so checkpoints of the base still load."""
    before = model.state_dict().keys()
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    bases = [model.model.layers[i].mlp.up_proj for i in range(2)]
    assert replace_ffns(model, MIXLORA) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert len(replace_linears(model, MoeLoraConfig.preset("lora", rank=2), ATTENTION)) == 8
    with torch.no_grad():
        actual = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for layer, base in zip(model.model.layers, bases, strict=True):
        assert type(layer.mlp) is MoeLoraFFN
        assert layer.mlp.up_proj is base
        assert not layer.mlp.training
    assert {n for n in before if "mlp" in n} <= model.state_dict().keys()
    assert len(adapter_parameters(model)) == 2 * (7 + 4 * 2)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(IDS).logits, model(IDS).logits)


def train(model, recompute):
    """Return the losses of three steps of Adam with the balance loss, and the last gradients."""
    torch.manual_seed(3)
    model = copy.deepcopy(model).train()
    replace_ffns(model, MIXLORA)
    replace_linears(model, MoeLoraConfig.preset("lora", rank=2), ATTENTION)
    parameters = adapter_parameters(model)
    assert {id(q) for q in model.parameters() if q.requires_grad} == {id(q) for q in parameters}
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    labels, losses = IDS.masked_fill(MASK == 0, -100), []
    for _ in range(3):
        loss = model(IDS, attention_mask=MASK, labels=labels, use_cache=False).loss
        aux = collect_aux_loss(model, MASK.bool())
        assert aux > 0
        optimizer.zero_grad()
        (loss + aux).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [q.grad for q in parameters]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_model_trains_with_the_same_bits_under_checkpointing(model):
    losses, grads = train(model, False)
    recomputed_losses, recomputed = train(model, True)
    assert losses == recomputed_losses
    assert losses[-1] < losses[0]
    for a, b in zip(grads, recomputed, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_a_saved_adapter_loads_into_another_model(model, tmp_path):
    """Whole-FFN experts and the LoRA on attention in one file."""
    source, target = copy.deepcopy(model), copy.deepcopy(model)
    for each in (source, target):
        replace_ffns(each, MIXLORA)
        replace_linears(each, MoeLoraConfig.preset("lora", rank=2), ATTENTION)
    randomise(source)
    save_adapter(source, tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    assert torch.equal(target(IDS).logits, source(IDS).logits)


def blocks(*mlps):
    return nn.ModuleList([nn.ModuleDict({"mlp": m}) for m in mlps])


def without(name):
    mlp = GatedMlp()
    delattr(mlp, name)
    return mlp


def with_hook():
    mlp = GatedMlp()
    mlp.register_forward_hook(lambda *_: None)
    return mlp


def other_size():
    mlp = GatedMlp()
    mlp.down_proj = nn.Linear(INNER, HIDDEN + 1)
    return mlp


def with_adapted_linear():
    mlp = GatedMlp()
    mlp.up_proj = MoeLoraLinear.from_linear(mlp.up_proj, num_experts=4)
    return mlp


def with_norm():
    mlp = GatedMlp()
    mlp.up_proj = nn.LayerNorm(HIDDEN)
    return mlp


REFUSED = [
    (lambda: without("up_proj"), "Mlp, expected a gated MLP with up_proj"),
    (lambda: without("act_fn"), "Mlp, expected a gated MLP with act_fn"),
    (with_norm, "whose up_proj has in_features, got LayerNorm"),
    (other_size, r"got \(in_features, out_features\)"),
    (with_hook, "has hooks or a patched forward"),
    (with_adapted_linear, "its up_proj has experts already"),
    (lambda: MoeLoraFFN.from_mlp(GatedMlp(), MIXLORA), "it has whole-FFN experts already"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m[1] for m in REFUSED])
def test_a_module_that_is_not_a_gated_mlp_is_named_and_nothing_is_replaced(make, message):
    model = blocks(GatedMlp(), make())
    with pytest.raises(TypeError, match=rf"target_modules: 1\.mlp: .*{message}"):
        replace_ffns(model, MIXLORA)
    assert type(model[0]["mlp"]) is GatedMlp
    assert model[0]["mlp"].up_proj.weight.requires_grad
    with pytest.raises(TypeError, match=f"mlp: .*{message}"):
        MoeLoraFFN.from_mlp(model[1]["mlp"], MIXLORA)


def test_bad_targets_and_options_are_named():
    model = blocks(GatedMlp())
    with pytest.raises(ValueError, match=r"target_modules: no module matches \['ffn'\]"):
        replace_ffns(model, MIXLORA, ["ffn"])
    with pytest.raises(ValueError, match="share: 'A'"):
        replace_ffns(model, MoeLoraConfig.preset("hydralora"))
    with pytest.raises(TypeError, match="config: expected a MoeLoraConfig"):
        replace_ffns(model, "mixlora")
    assert type(model[0]["mlp"]) is GatedMlp


def test_tied_mlps_stay_tied_and_their_linears_cannot_be_replaced():
    shared = GatedMlp()
    model = blocks(shared, shared, GatedMlp())
    assert replace_ffns(model, MIXLORA, ["mlp"]) == ["0.mlp", "1.mlp", "2.mlp"]
    assert model[0]["mlp"] is model[1]["mlp"]
    assert len(adapter_parameters(model)) == 2 * 7
    with pytest.raises(ValueError, match="no module matches"):
        replace_linears(model, MIXLORA, ["up_proj"])


def test_tasks_and_gates_reach_ffns_and_linears():
    """FFNs and linears share one task gate; external gates reach both."""
    for config, tasks in (
        (MoeLoraConfig.preset("moelora", num_tasks=3, num_experts=4, dropout=0.0), [3, 1]),
        (MoeLoraConfig(num_experts=4, rank=2, router="external"), torch.rand(2, 4)),
    ):
        model = blocks(GatedMlp(), GatedMlp())
        model.append(nn.Linear(HIDDEN, HIDDEN))
        replace_linears(model, config, ["2"])
        replace_ffns(model, config, recompute=True)
        layers = [model[0]["mlp"], model[1]["mlp"], model[2]]
        assert all(layer.mixture.recompute for layer in layers[:2])
        assert len({id(layer.router) for layer in layers}) == 1
        randomise(model)
        x = torch.randn(2, 3, HIDDEN)
        set_tasks(model, tasks)
        first = [layer(x) for layer in layers]
        set_tasks(model, [1, 3] if isinstance(tasks, list) else tasks.flip(0))
        for layer, y in zip(layers, first, strict=True):
            assert not torch.equal(layer(x), y)


def test_warmup_runs_ffns_and_changes_no_state():
    model = blocks(GatedMlp())
    replace_ffns(model, MIXLORA)
    calls = []
    layer = model[0]["mlp"]
    layer.down_proj.register_forward_hook(lambda m, args, y: calls.append(args[0].shape[:-1]))
    state = torch.get_rng_state()
    warmup(model, tokens=(1, 5), batch=2)
    assert calls == [(2, 1), (2, 5)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(q.grad is None for q in model.parameters())
    assert layer.record.logits is None
