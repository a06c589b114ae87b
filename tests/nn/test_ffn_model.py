"""MoeLoraFFN as a module, and replace_ffns on Llama, Qwen2 and Mistral."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    collect_aux_loss,
    load_adapter,
    record_routing,
    replace_ffns,
    replace_linears,
    save_adapter,
    set_tasks,
    warmup,
)
from moelora_kernels.autograd.ffn import TORCH
from support.compare import assert_same, training_step
from support.ffns import HIDDEN, INNER, inputs, make_ffn
from support.formulas.aux_loss import switch_loss
from support.linears import randomise
from support.selection import exhaustive

MIXLORA = MoeLoraConfig.preset("mixlora", num_experts=4, rank=2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# --- the module ---------------------------------------------------------------------------------

LIVES = [{}, dict(router="mlp"), dict(router="task", num_tasks=3), dict(recompute=True)]


def ready(layer):
    if layer.config.router == "task":
        set_tasks(layer, [2, 1])
    return layer.eval()


@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "save"))
@pytest.mark.parametrize("options", LIVES, ids=str)
def test_copies_compute_the_same(options, copier):
    """deepcopy for references, pickle for worker processes; also after a forward."""
    layer, (x, _) = ready(make_ffn(**options)), inputs(2, 3)
    y = layer(x)
    if copier == "save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copier(layer)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.down_lora_B.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("options", LIVES, ids=str)
def test_state_dict_meta_and_dtype(options):
    """Built on meta, filled from a state dict, cast: what a large model goes through."""
    source, (x, _) = ready(make_ffn(**options)), inputs(2, 3)
    with torch.device("meta"):
        layer = MoeLoraFFN(
            HIDDEN, INNER, True, config=source.config, dtype=torch.float64,
            recompute=options.get("recompute", False),
        )  # fmt: skip
        if source.config.router != "task":
            assert layer(x.to("meta")).shape == x.shape
    assert {q.device.type for q in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(ready(layer)(x), source(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_names_and_shapes_of_what_trains():
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
    """B = 0 and weights of sum 1: the frozen MLP, up to the rounding of the weighted sum."""
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
]


@pytest.mark.parametrize(
    "options", (COMPILED[0], pytest.param(COMPILED[1], marks=exhaustive)), ids=str
)
def test_compile_without_graph_breaks_or_recompiles(options):
    """fullgraph=True, gradients as eager, and one graph for every number of tokens."""
    layer = make_ffn(**options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    if TORCH < (2, 13):
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
    recomputed = step_backward(
        layer, x, dy, lambda leaf: checkpoint(layer, leaf, use_reentrant=use_reentrant)
    )
    assert_same(recomputed, step_backward(layer, x, dy, layer))


def step_backward(layer, x, dy, forward):
    torch.manual_seed(9)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    torch.randn(3)
    y.backward(dy)
    return {"y": y.detach(), "dx": leaf.grad} | {
        n: q.grad.clone() for n, q in layer.named_parameters() if q.requires_grad
    }


@pytest.mark.parametrize("options", ({}, dict(top_k=1), dict(router="mlp"), dict(impl="reference")))
def test_the_auxiliary_loss_and_its_gradient(options):
    """The balance of the routing, through the router's own Function and beside it."""
    layer = make_ffn(aux={"load_balance": 0.5}, **options)
    x = inputs(9)[0].requires_grad_()
    trained = [x, *layer.router.parameters()]
    y = layer(x).square().sum()
    loss = collect_aux_loss(layer)
    expected = 0.5 * switch_loss(layer.router(x), layer.config.top_k)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(y + loss, trained)
    of_y = torch.autograd.grad(layer(x).square().sum(), trained)
    of_aux = torch.autograd.grad(expected, trained)
    for g, a, b in zip(found, of_y, of_aux, strict=True):
        torch.testing.assert_close(g, a + b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 1e-4


def test_adapters_on_disk(tmp_path):
    """The six matrices and the router, bitwise back; what does not fit is named."""
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


# --- a whole model ------------------------------------------------------------------------------


@pytest.fixture(params=("Llama", "Qwen2", "Mistral"))
def model(request):
    """Two layers, 16 wide, with the bias that Llama's MLP may have."""
    transformers = pytest.importorskip("transformers")
    options = {"mlp_bias": True} if request.param == "Llama" else {}
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation="eager", **options,
    )  # fmt: skip
    torch.manual_seed(0)
    made = getattr(transformers, f"{request.param}ForCausalLM")(config)
    return made.eval().requires_grad_(False)


IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def test_a_model_starts_as_its_base_and_keeps_its_names(model):
    """Checkpoints of the base still fit: its linears are where they were."""
    before = model.state_dict().keys()
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    bases = [model.model.layers[i].mlp.up_proj for i in range(2)]
    assert replace_ffns(model, MIXLORA) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert len(replace_linears(model, MoeLoraConfig.preset("lora", rank=2), ATTENTION)) == 8
    with torch.no_grad():
        found = model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for layer, base in zip(model.model.layers, bases, strict=True):
        assert type(layer.mlp) is MoeLoraFFN
        assert layer.mlp.up_proj is base
        assert not layer.mlp.training
    assert {n for n in before if "mlp" in n} <= model.state_dict().keys()
    assert len(adapter_parameters(model)) == 2 * (7 + 4 * 2)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


def train(model, recompute):
    """Three steps of Adam with the balance loss; the losses, and the gradients of the last."""
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
    again, recomputed = train(model, True)
    assert losses == again
    assert losses[-1] < losses[0]
    for a, b in zip(grads, recomputed, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_a_saved_adapter_fits_the_next_model(model, tmp_path):
    """Whole-FFN experts and the LoRA on attention in one file."""
    source, target = copy.deepcopy(model), copy.deepcopy(model)
    for each in (source, target):
        replace_ffns(each, MIXLORA)
        replace_linears(each, MoeLoraConfig.preset("lora", rank=2), ATTENTION)
    randomise(source)
    save_adapter(source, tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    assert torch.equal(target(IDS).logits, source(IDS).logits)


class Mlp(nn.Module):
    """A gated MLP, whatever it is called."""

    def __init__(self, hidden=HIDDEN, inner=INNER):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.down_proj, self.act_fn = nn.Linear(inner, hidden), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def blocks(*mlps):
    return nn.ModuleList([nn.ModuleDict({"mlp": m}) for m in mlps])


def without(name):
    mlp = Mlp()
    delattr(mlp, name)
    return mlp


def hooked():
    mlp = Mlp()
    mlp.register_forward_hook(lambda *_: None)
    return mlp


def of_other_size():
    mlp = Mlp()
    mlp.down_proj = nn.Linear(INNER, HIDDEN + 1)
    return mlp


def adapted_linear():
    mlp = Mlp()
    mlp.up_proj = MoeLoraLinear.from_linear(mlp.up_proj, num_experts=4)
    return mlp


def normed():
    mlp = Mlp()
    mlp.up_proj = nn.LayerNorm(HIDDEN)
    return mlp


NO_FFN = [
    (lambda: without("up_proj"), "Mlp, expected a gated MLP with up_proj"),
    (lambda: without("act_fn"), "Mlp, expected a gated MLP with act_fn"),
    (normed, "whose up_proj has in_features, got LayerNorm"),
    (of_other_size, r"got \(in_features, out_features\)"),
    (hooked, "has hooks or a patched forward"),
    (adapted_linear, "its up_proj has experts already"),
    (lambda: MoeLoraFFN.from_mlp(Mlp(), MIXLORA), "it has whole-FFN experts already"),
]


@pytest.mark.parametrize(("make", "message"), NO_FFN, ids=[m[1] for m in NO_FFN])
def test_what_is_no_mlp_is_named_and_nothing_is_replaced(make, message):
    model = blocks(Mlp(), make())
    with pytest.raises(TypeError, match=rf"target_modules: 1\.mlp: .*{message}"):
        replace_ffns(model, MIXLORA)
    assert type(model[0]["mlp"]) is Mlp
    assert model[0]["mlp"].up_proj.weight.requires_grad
    with pytest.raises(TypeError, match=f"mlp: .*{message}"):
        MoeLoraFFN.from_mlp(model[1]["mlp"], MIXLORA)


def test_bad_targets_and_options_are_named():
    model = blocks(Mlp())
    with pytest.raises(ValueError, match=r"target_modules: no module matches \['ffn'\]"):
        replace_ffns(model, MIXLORA, ["ffn"])
    with pytest.raises(ValueError, match="share: 'A'"):
        replace_ffns(model, MoeLoraConfig.preset("hydralora"))
    with pytest.raises(TypeError, match="config: expected a MoeLoraConfig"):
        replace_ffns(model, "mixlora")
    assert type(model[0]["mlp"]) is Mlp


def test_tied_mlps_stay_tied_and_linears_inside_are_left_alone():
    shared = Mlp()
    model = blocks(shared, shared, Mlp())
    assert replace_ffns(model, MIXLORA, ["mlp"]) == ["0.mlp", "1.mlp", "2.mlp"]
    assert model[0]["mlp"] is model[1]["mlp"]
    assert len(adapter_parameters(model)) == 2 * 7
    with pytest.raises(ValueError, match="no module matches"):
        replace_linears(model, MIXLORA, ["up_proj"])


def test_tasks_and_gates_reach_ffns_and_linears():
    """One task gate for the model, whatever its layers are; external gates as well."""
    for config, tasks in (
        (MoeLoraConfig.preset("moelora", num_tasks=3, num_experts=4, dropout=0.0), [3, 1]),
        (MoeLoraConfig(num_experts=4, rank=2, router="external"), torch.rand(2, 4)),
    ):
        model = blocks(Mlp(), Mlp())
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


def test_warmup_runs_ffns_and_leaves_no_trace():
    model = blocks(Mlp())
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


def test_routing_is_recorded():
    layer, (x, _) = make_ffn(), inputs(2, 3)
    with record_routing(layer):
        layer(x)
        assert layer.record.weights.shape == layer.record.indices.shape == (6, 2)
        assert layer.record.logits.shape == (6, 4)
    assert layer.record.weights is None
