"""q, k, v and gate, up of a PeftModel read x once, and give what they give one by one."""

from __future__ import annotations

import json

import pytest
import torch

peft = pytest.importorskip("peft")

from moelora_kernels import collect_aux_loss  # noqa: E402
from moelora_kernels.nn import sibling_link  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.compare import FLOAT64, assert_same, training_step  # noqa: E402
from support.copies import each_copier  # noqa: E402
from support.ffns import GatedMlp  # noqa: E402
from support.models import language_model  # noqa: E402
from support.peft_models import (  # noqa: E402
    LORA,
    MING,
    TASKS,
    adapted,
    give_gates,
    randomise,
    tuner_layers,
)
from support.peft_siblings import IDS, PROJECTIONS, add, make, pair  # noqa: E402
from support.quantised import HIDDEN, INNER, GptqLinear  # noqa: E402

# One pass for q, k, v and one for gate, up in each of the two blocks.
LINKED = [3, 2] * 2


def step(model, ids=IDS):
    """Return the logits and the gradients of one training step."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.fixture
def passes(monkeypatch):
    """Return a list that gets the number of siblings of each coming pass of linked layers."""
    result = []
    run = sibling_link.run_siblings

    def counting(layers, *args):
        result.append(len(layers))
        return run(layers, *args)

    monkeypatch.setattr(sibling_link, "run_siblings", counting)
    return result


@pytest.mark.parametrize("options", (MING, TASKS, LORA), ids=("ming", "tasks", "lora"))
@pytest.mark.parametrize("family", ("Qwen2", "Llama"))
def test_outputs_gradients_and_names(family, options, passes):
    plain, linked = pair(family, options)
    expected = step(plain)
    assert passes == []
    actual = step(linked)
    assert passes == LINKED
    assert_same(actual, expected, **FLOAT64)
    assert [n for n, _ in linked.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in linked.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(linked.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_generation(mode):
    plain, linked = (m.eval() for m in pair())
    with mode():
        options = dict(input_ids=IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(linked.generate(**options), plain.generate(**options))


def test_some_siblings(passes):
    """q and v, PEFT's default for a Llama, read x once too."""
    plain, linked = pair(target_modules=["q_proj", "v_proj", "up_proj"])
    assert_same(step(linked), step(plain), **FLOAT64)
    assert passes == [2, 2]


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant, passes):
    plain, linked = pair()
    linked.gradient_checkpointing_enable({"use_reentrant": reentrant})
    linked.enable_input_require_grads()
    assert_same(step(linked), step(plain), **FLOAT64)
    assert passes == LINKED * 2


def test_switched_adapters(passes):
    """Each adapter has its links; two active adapters have none."""
    models = pair()
    for model in models:
        add(model, "other", LORA, ["q_proj", "k_proj"])
        add(model, "apart", MING, link_siblings=False)
    for names, expected in (
        ("default", LINKED),
        ("other", [2, 2]),
        ("apart", []),
        # v_proj and the MLP have only one of the two, but a group runs as a whole.
        (["default", "other"], [2] * 2),
        (["other", "default"], [2] * 2),
        ("default", LINKED),
    ):
        for model in models:
            model.base_model.set_adapter(names)
        passes.clear()
        actual = step(models[1])
        assert passes == expected, names
        assert_same(actual, step(models[0]), **FLOAT64)


def test_an_adapter_that_is_switched_between_siblings():
    """The stored output of another adapter, or of the adapter without another one, is not used."""
    plain, linked = pair()
    for model in (plain, linked):
        add(model, "other", MING)
        model.eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    blocks = [m.base_model.model.model.layers[0].self_attn for m in (plain, linked)]
    models = (plain, linked)

    def check(change, undo):
        blocks[1].q_proj(x)
        for model, block in zip(models, blocks, strict=True):
            change(model, block)
        for name in ("k_proj", "v_proj", "q_proj"):
            expected = getattr(blocks[0], name)(x)
            torch.testing.assert_close(getattr(blocks[1], name)(x), expected, msg=name)
        for model, block in zip(models, blocks, strict=True):
            undo(model, block)

    def switch(name):
        return lambda model, block: model.base_model.set_adapter(name)

    def switch_k(name):
        return lambda model, block: block.k_proj.set_adapter(name)

    def disable(value):
        return lambda model, block: block.k_proj.enable_adapters(not value)

    check(switch("other"), switch("default"))
    check(switch(["other", "default"]), switch("default"))
    check(switch_k(["other", "default"]), switch_k("default"))
    check(switch_k("other"), switch_k("default"))
    check(disable(True), disable(False))


def test_disabled_adapters(passes):
    plain, linked = (m.eval() for m in pair())
    base = language_model("Qwen2").double()
    with linked.disable_adapter():
        assert torch.equal(linked(IDS).logits, base(IDS).logits)
    assert passes == []
    torch.testing.assert_close(linked(IDS).logits, plain(IDS).logits)
    assert passes == LINKED


def test_merge_and_unmerge(passes):
    models = pair(options=TASKS)
    for model in models:
        add(model, "plain", LORA)
        give_gates(model, TASKS).eval()
        model.base_model.merge_adapter(["plain"])
    plain, linked = models
    torch.testing.assert_close(linked(IDS).logits, plain(IDS).logits)
    assert passes == LINKED
    for model in models:
        model.base_model.unmerge_adapter()
        model.set_adapter("plain")
        model.base_model.merge_adapter()
    passes.clear()
    torch.testing.assert_close(linked(IDS).logits, plain(IDS).logits)
    assert passes == []
    for model in models:
        model.base_model.unmerge_adapter()
    torch.testing.assert_close(linked(IDS).logits, plain(IDS).logits)
    assert len(passes) == 4


def test_a_merge_between_siblings():
    """It changes the base through `.data`, which no version counter tells."""
    plain, linked = pair()
    for model in (plain, linked):
        add(model, "plain", LORA)
        model.eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    blocks = [m.base_model.model.model.layers[0].self_attn for m in (plain, linked)]
    for change in ("merge", "unmerge"):
        blocks[1].q_proj(x)
        for block in blocks:
            getattr(block.k_proj, change)(*([False, ["plain"]] if change == "merge" else []))
        torch.testing.assert_close(blocks[1].k_proj(x), blocks[0].k_proj(x))


def test_deleted_and_added_again(passes):
    plain, linked = pair()
    for model in (plain, linked):
        for options in (LORA, MING):
            add(model, "other", options)
            model.set_adapter("other")
            passes.clear()
            model(IDS)
            assert passes == (LINKED if model is linked else [])
            with pytest.warns(UserWarning, match="other was active"):
                model.delete_adapter("other")
    passes.clear()
    assert_same(step(linked), step(plain), **FLOAT64)
    assert passes == LINKED


def test_one_layer_without_the_adapter(passes):
    """PEFT can delete an adapter from one layer."""
    plain, linked = pair()
    for model in (plain, linked):
        model.base_model.model.model.layers[0].self_attn.k_proj.delete_adapter("default")
    assert_same(step(linked), step(plain), **FLOAT64)
    assert passes == [2, 3, 2]


@pytest.mark.parametrize("link", (True, False))
def test_save_and_load(link, tmp_path, passes):
    model = make(link_siblings=link)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.get("link_siblings") is (None if link else False)
    loaded = peft.PeftModel.from_pretrained(language_model("Qwen2").double(), tmp_path).eval()
    assert loaded.peft_config["default"].link_siblings is link
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)
    assert passes == (LINKED * 2 if link else [])
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    passes.clear()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert passes == (LINKED * 2 if link else [])


def test_link_siblings_is_true_or_false():
    with pytest.raises(ValueError, match=r"^link_siblings: expected True or False, got 'auto'"):
        MoeLoraPeftConfig(link_siblings="auto")


@each_copier
def test_copies_are_linked_to_each_other(copier, passes):
    model = make().eval()
    expected = model(IDS).logits
    clone = copier(model)
    passes.clear()
    assert torch.equal(clone(IDS).logits, expected)
    assert passes == LINKED
    ours, theirs = (
        {e for m in tuner_layers(each) for e in m.moelora_experts.values()}
        for each in (model, clone)
    )
    for experts in theirs:
        assert experts.link is None or {*experts.link.layers} <= theirs
    randomise(clone, seed=5)
    assert torch.equal(model(IDS).logits, expected)
    assert not ours & theirs


def test_hooks_before_a_call(passes):
    """They can load the tensors of one layer, so siblings with such hooks run one by one."""
    plain, linked = pair()
    attention, mlp = (
        getattr(linked.base_model.model.model.layers[0], name) for name in ("self_attn", "mlp")
    )
    seen = []
    attention.k_proj.register_forward_pre_hook(lambda module, args: seen.append("k"))
    experts = mlp.up_proj.moelora_experts["default"]
    experts.register_forward_pre_hook(lambda module, args: seen.append("up"))
    assert_same(step(linked), step(plain), **FLOAT64)
    assert passes == [3, 2]
    assert seen == ["k", "up"]


def test_hooks_after_a_call(passes):
    plain, linked = pair()
    for model in (plain, linked):
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        layer.register_forward_hook(lambda module, args, y: 2 * y)
        layer.moelora_experts["default"].register_forward_hook(lambda module, args, y: y.sin())
    assert_same(step(linked), step(plain), **FLOAT64)
    assert passes == LINKED


def test_a_quantised_base(passes):
    """As for bare layers, the bases are called and the adapters run together."""
    models = []
    for link in (False, True):
        torch.manual_seed(0)
        base = GatedMlp(HIDDEN, INNER)
        for name in ("gate_proj", "up_proj"):
            setattr(base, name, GptqLinear(getattr(base, name)))
        targets = ["gate_proj", "up_proj"]
        config = MoeLoraPeftConfig(target_modules=targets, link_siblings=link, **MING)
        models.append(randomise(peft.get_peft_model(base, config)).eval())
    x = torch.randn(6, HIDDEN)
    expected, actual = (training_step(model, x) for model in models)
    assert_same(actual, expected, rtol=1e-4, atol=2e-5)
    assert passes == [2]


def test_encoder_and_decoder(passes):
    """q of a cross-attention reads another x than k and v: the source of its forward tells."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_position_embeddings=32,
        attention_dropout=0.0, dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip

    def build(**options):
        torch.manual_seed(0)
        base = transformers.BartForConditionalGeneration(config).double()
        return adapted(MING, base, target_modules=PROJECTIONS[:3], **options).train()

    actual = step(build())
    # Two self-attentions and one cross-attention.
    assert passes == [2, 2, 2]
    assert_same(actual, step(build(link_siblings=False)), **FLOAT64)


def test_dropout_in_training(passes):
    """Siblings share the dropout mask of x, like bare linked layers."""
    model = make(dropout=0.5)
    model(IDS)
    assert passes == LINKED
    plain = make(link_siblings=False).eval()
    torch.testing.assert_close(model.eval()(IDS).logits, plain(IDS).logits)


def test_auxiliary_losses():
    losses = []
    aux = {"load_balance": 1.0, "z": 0.1}
    for model in pair(options=dict(num_experts=3, rank=2, top_k=2, aux=aux)):
        model(IDS)
        losses.append(collect_aux_loss(model))
    torch.testing.assert_close(*losses)
