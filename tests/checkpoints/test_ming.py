"""Checkpoints of MING-MOE: the original's outputs, gradients, keys and bits, or an error."""

import copy
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    adapter_parameters,
    replace_linears,
)
from moelora_kernels.checkpoints import export_ming, load_ming
from moelora_kernels.testing import assert_within_budget
from support.models import language_model
from support.originals import (
    MoLora,
    PlainLora,
    adapters,
    assert_bits,
    of_gradients,
    put,
    qwen,
    snapshot,
)

EXPERTS, RANK, ALPHA = 4, 3, 6.0
MLP, ATTENTION = ["up_proj", "down_proj"], ["q_proj", "o_proj"]
CONFIG = MoeLoraConfig.preset("ming", num_experts=EXPERTS, rank=RANK, alpha=ALPHA)
# Two shared experts in one of twice the rank, with the factor of the others.
SHARED = CONFIG.replace(shared_expert="always", shared_rank=2 * RANK, scaling=ALPHA / RANK)
VARIANTS = {
    "public": (CONFIG, {}),
    "shared": (SHARED, {"shared": 2}),
    "rslora": (CONFIG.replace(scaling="alpha/sqrt(r)"), {"rs": True}),
}
LORA = MoeLoraConfig.preset("lora", rank=RANK, alpha=ALPHA)
FIRST = "model.layers.0.mlp.up_proj"


def original(variant="public", attention=False):
    """The original over a small Qwen: mixtures in the MLP, plain LoRA in attention if asked."""
    model = qwen()
    torch.manual_seed(1)
    put(model, lambda base: MoLora(base, EXPERTS, RANK, ALPHA, **VARIANTS[variant][1]), ".mlp.")
    if attention:
        put(model, lambda base: PlainLora(base, RANK, ALPHA), "_attn.")
    return model.requires_grad_(True)


def ours(config=CONFIG, attention=False, dtype=torch.float32):
    model = qwen().to(dtype)
    replace_linears(model, config, MLP)
    if attention:
        replace_linears(model, LORA, ATTENTION)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_()
    return model


def state_of(model, infix="", **options):
    """What the original saves: every tensor of an adapter, none of the frozen linears."""
    state = adapters(model, infix, **options)
    return {k: t for k, t in state.items() if "lora_" in k or "switch" in k}


@pytest.mark.parametrize("attention", (False, True), ids=("mlp", "attention"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_a_step_are_the_originals(variant, attention):
    """Load, compare, train a step on both, write back: float32, a batch of three."""
    source, model = original(variant, attention), ours(VARIANTS[variant][0], attention)
    load_ming(model, state_of(source))
    x, target = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for net in (source, model):
        nn.functional.mse_loss(net(x), target).backward()
    torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)
    # Autograd of the loop has no gradient for an expert without tokens.
    expected = state_of(source, of=lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    found = export_ming(of_gradients(model))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    assert all(g.abs().max() > 0 for k, g in expected.items() if "switch" in k)

    named = {f"base_model.model.{n}": p for n, p in source.named_parameters()}
    for parameters in ([named[k] for k in expected], adapter_parameters(model)):
        torch.optim.SGD(parameters, lr=0.5).step()
    after, found = state_of(source), export_ming(model)
    assert found.keys() == after.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_within_the_budget(variant):
    """Every layer in bfloat16 against the original in float64, measured by it in bfloat16."""
    low = original(variant).to(torch.bfloat16)
    truth = copy.deepcopy(low).double()
    model = ours(VARIANTS[variant][0], dtype=torch.bfloat16)
    load_ming(model, state_of(low))
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLinear):
            x = torch.randn(3, 5, layer.in_features, dtype=torch.bfloat16)
            assert_within_budget(
                {name: layer(x)},
                {name: truth.get_submodule(name)(x.double())},
                {name: low.get_submodule(name)(x)},
                torch.bfloat16,
            )


@pytest.mark.parametrize("shape", ((1, 1), (3, 1), (1, 5), (3, 5)), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_in_prefill_and_decode(variant, shape):
    """Public MING fails at decode with a batch, its dev branch at prefill without one."""
    source, model = original(variant), ours(VARIANTS[variant][0]).eval()
    load_ming(model, state_of(source))
    x = torch.randn(*shape, 8)
    with torch.no_grad():
        y = model(x)
        one_by_one = torch.stack([
            torch.cat([source(token[None, None])[0] for token in sample]) for sample in x
        ])  # fmt: skip
    torch.testing.assert_close(y, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefixed", (True, False))
@pytest.mark.parametrize("infix", ("", ".default"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_is_written_back_to_the_same_keys_and_bits(variant, infix, prefixed):
    source = original(variant, attention=True)
    state = state_of(source, infix)
    if not prefixed:
        state = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    model = ours(VARIANTS[variant][0], attention=True)
    load_ming(model, state)
    assert_bits(export_ming(model, like=state), state)
    assert_bits(export_ming(model), state_of(source))
    assert f"base_model.model.{FIRST}.experts.3.lora_A_3.weight" in export_ming(model)


@pytest.mark.parametrize("kind", ("bin", "safetensors"))
def test_a_folder_holds_attention_and_mixtures_apart(kind, tmp_path):
    """adapter_model.* of stock PEFT, non_lora_trainables.bin of MING; or both files in a list."""
    state = {k: t.to(torch.float16) for k, t in state_of(original(attention=True)).items()}
    attention = {k: t for k, t in state.items() if "self_attn" in k}
    mixtures = {k: t for k, t in state.items() if "self_attn" not in k}
    if kind == "bin":
        torch.save(attention, tmp_path / "adapter_model.bin")
    else:
        save_file(attention, tmp_path / "adapter_model.safetensors")
    torch.save(mixtures, tmp_path / "non_lora_trainables.bin")
    files = [tmp_path / f"adapter_model.{kind}", tmp_path / "non_lora_trainables.bin"]
    for given in (tmp_path, files):
        model = ours(attention=True, dtype=torch.float16)
        load_ming(model, given)
        assert_bits(export_ming(model, like=given), state)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight, .*: in more than one part"):
        load_ming(model, [attention, tmp_path])


def test_a_qwen2_generates_what_the_original_does():
    """Names of the real model; a batch of three in prefill and, with a KV cache, in decode."""
    model = language_model(hidden_size=32, intermediate_size=48)
    source = copy.deepcopy(model)
    put(source, lambda base: MoLora(base, EXPERTS, RANK, ALPHA), ".mlp.")
    put(source, lambda base: PlainLora(base, RANK, ALPHA), "_attn.")
    replace_linears(model, CONFIG, ["gate_proj", "up_proj", "down_proj"])
    replace_linears(model, LORA, ["q_proj", "k_proj", "v_proj", "o_proj"])
    state = state_of(source)
    load_ming(model, state)
    assert_bits(export_ming(model), state)
    ids = torch.randint(0, 40, (3, 6))
    with torch.no_grad():
        found, expected = model(ids).logits, source(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (
        net.generate(ids, max_new_tokens=4, do_sample=False) for net in (model, source)
    )
    assert torch.equal(found, expected)


def test_lora_of_a_linear_without_a_layer_is_named():
    """Dropping attention's LoRA would leave a model that answers worse, without a word."""
    state = state_of(original(attention=True))
    with pytest.raises(
        ValueError, match=r"unexpected: .*q_proj\.lora_A\.weight \(a plain LoRA: replace"
    ):
        load_ming(ours(), state)
    with pytest.raises(
        ValueError, match=r"missing: .*layers\.1\.self_attn\.o_proj\.lora_B\.weight"
    ):
        load_ming(ours(attention=True), state_of(original()))


def test_frozen_weights_are_checked_and_not_copied(caplog):
    """The layer of the original is its linear, whose weight may be saved with the rest."""
    state = state_of(original())
    weight = qwen().get_submodule(FIRST).weight.detach()
    key = f"base_model.model.{FIRST}.weight"
    with caplog.at_level(logging.WARNING, logger="moelora_kernels"):
        load_ming(ours(), {**state, key: weight})
    assert f"1 keys not used, frozen weights that equal the model's: {key}" in caplog.text
    for wrong in (weight + 1e-3, weight.half(), weight[:-1]):
        with pytest.raises(ValueError, match=r"up_proj\.weight: this frozen weight differs"):
            load_ming(ours(), {**state, key: wrong})


A0 = f"base_model.model.{FIRST}.experts.0.lora_A_0.weight"
BROKEN = {
    "renamed": (
        lambda s: {k.replace("switch.bias", "gate.bias"): t for k, t in s.items()},
        r"unexpected: .*up_proj\.gate\.bias",
    ),
    "misses routers": (
        # As molora.bin of the original's intermediate checkpoints does.
        lambda s: {k: t for k, t in s.items() if "switch" not in k},
        rf"missing: {FIRST}\.switch\.weight",
    ),
    "misses an expert": (
        lambda s: {k: t for k, t in s.items() if ".experts.3." not in k},
        rf"missing: {FIRST}\.experts\.3\.lora_A_3\.weight",
    ),
    "one expert more": (
        lambda s: {**s, A0.replace("0.lora_A_0", "4.lora_A_4"): s[A0]},
        r"unexpected: .*experts\.4\.lora_A_4\.weight",
    ),
    "expert in the wrong place": (
        lambda s: {k.replace("experts.1.lora_A_1", "experts.1.lora_A_2"): t for k, t in s.items()},
        r"unexpected: .*experts\.1\.lora_A_2\.weight",
    ),
    "wrong shape": (
        lambda s: {**s, A0: torch.zeros(RANK, 9)},
        r"shape of .*experts\.0\.lora_A_0\.weight: expected \[3, 8\], got \[3, 9\]",
    ),
    "shared experts": (
        lambda s: {**s, A0.replace("experts.0.lora_A_0", "share_experts.lora_A"): s[A0]},
        r"unexpected: .*share_experts\.lora_A\.weight",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_changes_nothing(case):
    change, message = BROKEN[case]
    model = ours()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_ming(model, change(state_of(original())))
    assert_bits(snapshot(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"router_bias": False}, "router_bias=True"),
        ({"router": "mlp"}, "linear router"),
        ({"share": "A"}, "share='none' and equal ranks"),
        ({"shared_expert": "complement"}, "'always', got 'complement'"),
    ),
    ids=str,
)
def test_layers_that_the_layout_has_no_place_for_are_refused(options, message):
    """A router without its bias would be read by the original with a random one."""
    model = ours(CONFIG.replace(**options))
    for call in (lambda: load_ming(model, {}), lambda: export_ming(model)):
        with pytest.raises(ValueError, match=rf"up_proj: the layout of MING needs .*{message}"):
            call()


def test_models_without_such_layers_are_refused():
    with pytest.raises(ValueError, match="model: expected MoeLoraLinear layers, got none"):
        export_ming(qwen())
    model = nn.ModuleDict({"mlp": MoeLoraFFN(8, 12, config=MoeLoraConfig.preset("mixlora"))})
    with pytest.raises(ValueError, match="mlp: the layout of MING cannot store whole-FFN experts"):
        export_ming(model)


def test_trainable_parameters_at_the_original_size():
    """MLPs of Qwen1.5-7B: 32 layers of three linears, 8 experts of rank 16 and a router each."""
    with torch.device("meta"):
        mlps = [
            nn.ModuleDict({
                "gate_proj": nn.Linear(4096, 11008, bias=False),
                "up_proj": nn.Linear(4096, 11008, bias=False),
                "down_proj": nn.Linear(11008, 4096, bias=False),
            })
            for _ in range(32)
        ]  # fmt: skip
    model = nn.ModuleList(mlps)
    replace_linears(model, MoeLoraConfig.preset("ming"), ["gate_proj", "up_proj", "down_proj"])
    sizes = {key: tensor.numel() for key, tensor in export_ming(model).items()}
    experts = sum(n for key, n in sizes.items() if ".experts." in key)
    routers = sum(n for key, n in sizes.items() if ".switch." in key)
    # 32 * 3 * 8 * 16 * (4096 + 11008) and 32 * 8 * (2 * 4096 + 11008 + 3): 185.6 M and 4.9 M.
    assert (experts, routers) == (185_597_952, 4_915_968)
    assert sum(p.numel() for p in adapter_parameters(model)) == experts + routers
