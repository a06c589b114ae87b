"""Presets of linears equal the expert loops of their papers in plain PyTorch."""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    reference,
    replace_linears,
    set_tasks,
)
from moelora_kernels.presets import PRESETS as ALL_PRESETS
from support.compare import formula_step, training_step
from support.formulas.presets import (
    ELSEWHERE,
    IN,
    OUT,
    check,
    formula_of,
    make_layer,
    tasks_of,
)

PRESETS = [name for name in ALL_PRESETS if name not in ELSEWHERE]


# Prefill and decode (one token per sequence), for one and several sequences. In (3, 3) the numbers
# of sequences and tokens are equal, which confuses the original code of MOELoRA.
SHAPES = [(1, 5), (4, 3), (1, 1), (6, 1), (3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_matches_its_formula(preset, shape):
    layer = make_layer(preset, torch.float64)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    check(preset, layer, x, tasks_of(preset, shape[0]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_in_low_precision(preset, dtype):
    """The error is within the budget, which the reference in the dtype sets."""
    layer = make_layer(preset, dtype)
    check(preset, layer, torch.randn(4, 6, IN, dtype=dtype), tasks_of(preset, 4))


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_adapters_under_a_bfloat16_base(preset):
    """The adapters and their gradients are float32, like PEFT's default."""
    layer = make_layer(preset, torch.bfloat16, adapter_dtype="float32")
    x = torch.randn(4, 6, IN, dtype=torch.bfloat16)
    check(preset, layer, x, tasks_of(preset, 4))
    assert all(q.dtype == torch.float32 for q in adapter_parameters(layer))


@pytest.mark.parametrize("top_k", (1, 8), ids=["K=1", "K=E"])
@pytest.mark.parametrize("preset", ("ming", "mola"))
def test_ends_of_top_k(preset, top_k):
    """With K = 1 the router has no gradient from y. With K = E the gate is dense."""
    options = {"top_k": top_k} | ({"aux": ()} if preset == "mola" else {})
    layer = make_layer(preset, torch.float64, **options)
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    check(preset, layer, x)
    if top_k == 1:
        grads = training_step(layer, x, torch.randn(3, 4, OUT, dtype=torch.float64))
        assert grads["router.weight"].abs().max() < 1e-12


@pytest.mark.parametrize("top_k", (1, 2, 3))
@pytest.mark.parametrize("preset", ("ming", "mola"))
def test_ties_go_to_the_lower_expert(preset, top_k):
    """Experts with equal logits, for example with a router of zero, are selected in order."""
    layer = make_layer(preset, torch.float64, top_k=top_k)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[5] = layer.router.weight[6] = torch.randn(IN)
        if layer.router.bias is not None:
            layer.router.bias.zero_()
    check(preset, layer, torch.randn(2, 5, IN, dtype=torch.float64))


@pytest.mark.parametrize("rank", (1, 3))
@pytest.mark.parametrize("preset", PRESETS)
def test_rank_one_and_odd_ranks(preset, rank):
    """Small ranks show a scale that uses R in place of r."""
    experts = {"lora": 1, "goat": 3}.get(preset, 5)
    layer = make_layer(preset, torch.float64, rank=rank, num_experts=experts)
    check(preset, layer, torch.randn(2, 3, IN, dtype=torch.float64), tasks_of(preset, 2))


@pytest.mark.parametrize("preset", ("moelora", "loramoe", "adamole"))
def test_dropout_draws_one_mask_per_expert(preset):
    """The original draws a mask per expert. Here the masks are streams of one seed."""
    layer = make_layer(preset, torch.float64, dropout=0.4).train()
    shape = (3, 4, IN)
    x, dy = torch.randn(shape, dtype=torch.float64), torch.randn(3, 4, OUT, dtype=torch.float64)
    tasks = tasks_of(preset, 3)
    if tasks is not None:
        set_tasks(layer, tasks)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,))
    ones = torch.ones(3 * 4, IN, dtype=torch.float64)
    masks = [reference.dropout(ones, 0.4, seed, stream=e).view(shape) for e in range(8)]
    assert not torch.equal(masks[0], masks[1])
    formula = formula_of(preset, layer, tasks, lambda leaf: [leaf * m for m in masks])
    truth = formula_step(formula, layer, x, dy)
    actual = training_step(layer, x, dy, seed=11)
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], rtol=1e-10, atol=1e-10, msg=name)


def test_hydralora_draws_one_mask_for_all_heads():
    """The heads share A, so they share its mask. The original draws a mask per head."""
    layer = make_layer("hydralora", torch.float64, dropout=0.4).train()
    x = torch.randn(6, IN, dtype=torch.float64)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,))
    mask = reference.dropout(torch.ones_like(x), 0.4, seed)
    torch.manual_seed(11)
    actual = layer(x)
    c, w = layer.config, (x @ layer.router.weight.t()).softmax(dim=-1)
    expected = layer.base_layer(x)
    for e, b in enumerate(layer.lora_B.chunk(c.num_experts, dim=1)):
        h = (x * mask) @ layer.lora_A.t()
        expected = expected + c.alpha / c.rank * w[:, e : e + 1] * (h @ b.t())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", (1, 3, 4))
def test_task_gates_follow_the_sequence(batch):
    """A permutation of the batch and its tasks permutes y."""
    layer = make_layer("moelora", torch.float64)
    x = torch.randn(batch, batch, IN, dtype=torch.float64)
    tasks = torch.arange(batch) + 1
    set_tasks(layer, tasks)
    y = layer(x)
    order = torch.arange(batch).flip(0)
    set_tasks(layer, tasks[order])
    torch.testing.assert_close(layer(x[order]), y[order], rtol=1e-12, atol=1e-12)
    for i in range(batch):
        set_tasks(layer, [i + 1])
        torch.testing.assert_close(layer(x[i : i + 1]), y[i : i + 1], rtol=1e-12, atol=1e-12)


def test_parameters_of_moelora_on_chatglm_6b():
    """The paper's count: that of a plain LoRA of rank 16, plus one gate."""
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query_key_value": nn.Linear(4096, 12288),
                    "dense": nn.Linear(4096, 4096),
                    "dense_h_to_4h": nn.Linear(4096, 16384),
                    "dense_4h_to_h": nn.Linear(16384, 4096),
                }
            )
            for _ in range(28)
        )
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    replaced = replace_linears(blocks, MoeLoraConfig.preset("moelora"), names)
    assert len(replaced) == 28 * 4
    trained = {n: q for n, q in blocks.named_parameters() if q.requires_grad}
    assert sum(q.numel() for n, q in trained.items() if "lora_" in n) == 29_360_128
    assert sum(q.numel() for n, q in trained.items() if "lora_" not in n) == 1_600
    assert sum(q.numel() for q in adapter_parameters(blocks)) == 29_360_128 + 1_600


def test_parameters_of_ming_on_qwen_7b():
    """185.6 M in the experts, 4.9 M in the routers with their biases."""
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(4096, 11008, bias=False),
                    "up_proj": nn.Linear(4096, 11008, bias=False),
                    "down_proj": nn.Linear(11008, 4096, bias=False),
                }
            )
            for _ in range(32)
        )
    replace_linears(blocks, MoeLoraConfig.preset("ming"), r"\d+\.(gate|up|down)_proj")
    trained = {n: q for n, q in blocks.named_parameters() if q.requires_grad}
    assert sum(q.numel() for n, q in trained.items() if "lora_" in n) == 185_597_952
    assert sum(q.numel() for n, q in trained.items() if ".router." in n) == 4_915_968


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "goat"])
def test_initialisation(preset):
    """B = 0 and A as published: normal(0, 0.01) for MOELoRA, kaiming_uniform(sqrt 5) elsewhere."""
    torch.manual_seed(0)
    layer = MoeLoraLinear(400, 8, config=MoeLoraConfig.preset(preset))
    assert layer.lora_B.abs().max() == 0
    if preset == "moelora":
        assert 0.0095 < layer.lora_A.std().item() < 0.0105
        assert abs(layer.router.embedding.weight.std().item() - 1.0) < 0.1
    else:
        bound = 1 / 400**0.5
        assert 0.98 * bound < layer.lora_A.abs().max().item() <= bound
        assert abs(layer.lora_A.std().item() - bound / 3**0.5) < 0.03 * bound


def test_an_unknown_preset_raises():
    with pytest.raises(ValueError, match=r"preset: expected one of .*ming.*'mingmoe'"):
        MoeLoraConfig.preset("mingmoe")
