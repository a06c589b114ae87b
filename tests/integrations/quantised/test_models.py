"""Models with quantised linears: replacing, linking, quantising afterwards, training."""

import copy

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    adapter_parameters,
    link_siblings,
    replace_ffns,
    replace_linears,
)
from support.compare import assert_same
from support.ffns import GatedMlp
from support.linears import MING, make_layer
from support.quantised import (
    HIDDEN,
    IN,
    INNER,
    KINDS,
    OUT,
    library,
    make_base,
    quantised_mlp,
    torchao_quantise,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*deprecated:DeprecationWarning"
)


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_quantised_linears(kind):
    """replace_linears selects by name, not by class, and changes only matches."""
    model = nn.ModuleDict({"mlp": quantised_mlp(kind), "head": nn.Linear(HIDDEN, 3)})
    x = torch.randn(5, HIDDEN)
    before = model["mlp"](x)
    head, down = model["head"], model["mlp"].down_proj
    names = replace_linears(model, MoeLoraConfig(**MING), ["gate_proj", "up_proj"])
    assert names == ["mlp.gate_proj", "mlp.up_proj"]
    assert model["head"] is head
    assert model["mlp"].down_proj is down
    assert head.weight.requires_grad
    assert_same({"y": model["mlp"](x)}, {"y": before})


@pytest.mark.parametrize("linked", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_and_a_dense_sibling(kind, linked):
    """A group of a quantised and a dense linear equals its layers one by one."""
    model = nn.Module()
    model.q_proj, model.k_proj = (
        make_layer(base=make_base(kind), seed=0),
        make_layer(base=nn.Linear(IN, 24), seed=1),
    )
    alone = copy.deepcopy(model)
    x, dy = torch.randn(6, IN), (torch.randn(6, OUT), torch.randn(6, 24))
    if linked:
        assert link_siblings(model, [("q_proj", "k_proj")]) == ["{q_proj,k_proj}"]
    group = MoeLoraGroup(q_proj=model.q_proj, k_proj=model.k_proj)

    def run(model, forward):
        leaf = x.clone().requires_grad_()
        ys = forward(leaf) if forward else (model.q_proj(leaf), model.k_proj(leaf))
        torch.autograd.backward(ys, [g.to(y.dtype) for g, y in zip(dy, ys, strict=True)])
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"q": ys[0].detach(), "k": ys[1].detach(), "dx": leaf.grad, **grads}

    actual, expected = run(model, None if linked else group), run(alone, None)
    assert actual["q"].dtype == expected["q"].dtype
    # The same sums in another order; fp16 outputs up to 4 may differ by one rounding.
    tolerance = 4e-3 if kind == "gptq_fp16" else 2e-5
    assert_same(actual, expected, rtol=1e-4, atol=tolerance)


@library
@pytest.mark.filterwarnings("ignore")
def test_quantising_a_model_with_experts():
    """torchao quantises every nn.Linear, routers included. The layer then calls the router."""
    model = nn.Sequential(nn.Linear(IN, IN))
    replace_linears(model, MoeLoraConfig(**MING), ["0"])
    replace = nn.Sequential(GatedMlp(HIDDEN, INNER))
    replace_ffns(replace, MoeLoraConfig(**MING), ["0"])
    x = torch.randn(4, IN)
    for each in (model, replace):
        for parameter in adapter_parameters(each):
            nn.init.normal_(parameter, std=0.2)
        before = each(x)
        torchao_quantise(each)
        assert type(each[0].router.weight) is not nn.Parameter
        after = each(x)
        # A weight changes by at most 1 / 254 of the largest, which changes no routing here.
        assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
        after.sum().backward()


@library
@pytest.mark.parametrize("bits", (4, 8))
def test_a_model_quantised_by_transformers(bits, tmp_path):
    """from_pretrained with a BitsAndBytesConfig, then experts, then three training steps."""
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sizes = dict(hidden_size=64, intermediate_size=128, vocab_size=32, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    ).train()
    tokens = torch.randint(0, 32, (2, 7))
    base = model(tokens).logits
    frozen = {n for n, _ in model.named_parameters()}
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(replace_linears(model, MoeLoraConfig(**MING), targets)) == 12
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer.base_layer).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert layer.base_layer.weight.dtype in (torch.uint8, torch.int8)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert_same({"logits": model(tokens).logits}, {"logits": base})

    for parameter in frozen & {n for n, _ in model.named_parameters()}:
        model.get_parameter(parameter).requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    # B is zero in the first step only, so now all adapters have gradients.
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model))
