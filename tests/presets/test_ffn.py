"""Presets of whole-FFN experts equal the loops of their papers, over the MLPs of transformers."""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    adapter_parameters,
    collect_aux_loss,
    replace_ffns,
)
from moelora_kernels.presets import FFN_PRESETS
from support.compare import check_formula
from support.ffns import GatedMlp, check, make_ffn

HIDDEN, INNER = 12, 18
MLPS = ("Llama", "Qwen2", "Mistral")


def transformers_mlp(family, dtype):
    """Return the MLP of a model of transformers. Only that of Llama can have biases, and has."""
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, family.lower())
    module = getattr(module, f"modeling_{family.lower()}")
    options = {"mlp_bias": True} if family == "Llama" else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=2, **options
    )
    return getattr(module, f"{family}MLP")(config).to(dtype)


def preset_ffn(preset, family="Llama", dtype=torch.float64, **options):
    """Return a layer in evaluation over the MLP of a model family."""
    return make_ffn(dtype, transformers_mlp(family, dtype), preset=preset, **options).eval()


def experts_of(p, name, experts):
    """Return A_e [r, in] and B_e [out, r] of every expert of one of the three linears."""
    a, b = p[f"{name}_lora_A"].chunk(experts), p[f"{name}_lora_B"].chunk(experts, dim=1)
    return list(zip(a, b, strict=True))


def frozen(p, name, rows):
    return nn.functional.linear(rows, p[f"{name}_proj.weight"], p.get(f"{name}_proj.bias"))


def loop_mixlora(x, p, c):
    """Return y = sum_j p_j FFN_j(x), p the two largest of softmax(W_g x) over their sum.

    FFN_j has LoRA j in all three linears. Each expert computes the frozen products itself.
    """
    tokens = x.reshape(-1, HIDDEN)
    weights, expert_ids = (tokens @ p["router.weight"].t()).softmax(dim=1).topk(c.top_k, dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    experts = {name: experts_of(p, name, c.num_experts) for name in ("gate", "up", "down")}
    y = torch.zeros_like(tokens)
    products = 0

    def adapted(name, e, rows):
        nonlocal products
        products += rows.shape[0]
        a, b = experts[name][e]
        return frozen(p, name, rows) + c.alpha / c.rank * ((rows @ a.t()) @ b.t())

    for e in range(c.num_experts):
        token, slot = (expert_ids == e).nonzero(as_tuple=True)
        rows = tokens[token]
        inner = nn.functional.silu(adapted("gate", e, rows)) * adapted("up", e, rows)
        y = y.index_add(0, token, weights[token, slot][:, None] * adapted("down", e, inner))
    assert products == 3 * c.top_k * tokens.shape[0]
    return y.view(x.shape)


def loop_llava_mole(x, p, c):
    """Return y of the FFN whose linears are W v + b + alpha/r B_i A_i v, i = argmax(W_g x + b_g).

    The gate does not scale the expert.
    """
    logits = nn.functional.linear(x, p["router.weight"], p["router.bias"])
    expert_ids = logits.softmax(dim=-1).argmax(dim=-1)

    def adapted(name, rows):
        delta = torch.zeros_like(frozen(p, name, rows))
        for e, (a, b) in enumerate(experts_of(p, name, c.num_experts)):
            routed = (expert_ids == e)[..., None]
            delta = delta + routed * (c.alpha / c.rank * (rows @ a.t()) @ b.t())
        return frozen(p, name, rows) + delta

    return adapted("down", nn.functional.silu(adapted("gate", x)) * adapted("up", x))


LOOPS = {"mixlora": loop_mixlora, "llava-mole": loop_llava_mole}


def check_preset(preset, layer, x):
    """Assert that the layer computes the preset's loop."""
    dy = torch.randn(x.shape).to(x.dtype)
    check_formula(lambda leaf, p: LOOPS[preset](leaf, p, layer.config), layer, x, dy)


def test_every_ffn_preset_has_a_loop():
    assert tuple(LOOPS) == FFN_PRESETS


@pytest.mark.parametrize("family", MLPS)
@pytest.mark.parametrize("shape", ((1, 5), (4, 3), (6, 1)), ids=str)
@pytest.mark.parametrize("preset", FFN_PRESETS)
def test_preset_matches_its_formula(preset, shape, family):
    layer = preset_ffn(preset, family)
    check_preset(preset, layer, torch.randn(*shape, HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("adapters", (None, "float32"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("preset", FFN_PRESETS)
def test_preset_in_low_precision(preset, dtype, adapters):
    """The error is within the budget, which the reference in the dtype sets."""
    layer = preset_ffn(preset, dtype=dtype, adapter_dtype=adapters)
    check_preset(preset, layer, torch.randn(4, 6, HIDDEN).to(dtype))


@pytest.mark.parametrize("preset", FFN_PRESETS)
def test_rank_one_and_ends_of_top_k(preset):
    for options in (dict(rank=1, num_experts=5), dict(top_k=1), dict(num_experts=2)):
        layer = preset_ffn(preset, **options)
        check_preset(preset, layer, torch.randn(2, 3, HIDDEN, dtype=torch.float64))


def test_only_the_balance_loss_trains_the_router_of_llava_mole():
    """The gate weight is exactly 1 in every dtype, so only the balance loss trains the router."""
    for dtype in (torch.float64, torch.bfloat16):
        layer = preset_ffn("llava-mole", dtype=dtype)
        x = torch.randn(9, HIDDEN).to(dtype)
        weights = layer.token_slots(x, x).weights
        assert (weights == 1).all()
        y = layer(x)
        (y_grad,) = torch.autograd.grad(y.square().sum(), layer.router.weight)
        assert not y_grad.any()
        layer(x)
        (balance_grad,) = torch.autograd.grad(collect_aux_loss(layer), layer.router.weight)
        assert balance_grad.any()


def test_one_expert_per_token():
    """With K = 1 the gate weight is 1: the MLP with the LoRA of the selected expert."""
    layer = preset_ffn("mixlora", top_k=1)
    check(layer, *(torch.randn(5, HIDDEN, dtype=torch.float64) for _ in range(2)))


def test_parameters_of_mixlora_on_llama_7b():
    """Each of 32 FFNs has 8 experts of rank 16 in three linears [4096, 11008], and a router."""
    with torch.device("meta"):
        model = nn.ModuleList(
            nn.ModuleDict({"mlp": GatedMlp(4096, 11008, False)}) for _ in range(32)
        )
    replace_ffns(model, MoeLoraConfig.preset("mixlora"))
    assert sum(q.numel() for q in adapter_parameters(model)) == 32 * (
        8 * 16 * 3 * (4096 + 11008) + 8 * 4096
    )
