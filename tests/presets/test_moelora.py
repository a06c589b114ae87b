"""Options of MOELoRA: batch_dim, several tasks per sequence, a gate per layer, dropout masks."""

import copy

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    adapter_state_dict,
    collect_aux_loss,
    replace_ffns,
    replace_linears,
    set_tasks,
)
from moelora_kernels.numerics import keep_probability
from support.ffns import HIDDEN, GatedMlp, make_ffn
from support.linears import IN, OUT, make_layer, randomise

TASK = dict(
    num_experts=4, rank=2, alpha=16.0, scaling="alpha/R", router="task", num_tasks=5,
    task_embedding_dim=3, router_bias=False, top_k=None, normalize="none",
)  # fmt: skip


def batch_first(layer):
    """Return a copy of the layer for x [B, L, I]."""
    clone = copy.deepcopy(layer)
    clone.config = layer.config.replace(batch_dim=0)
    return clone


def test_the_total_rank_is_split_and_scaled_as_a_whole():
    """A total rank of 16 over 8 experts gives experts of rank 2, with the scale alpha / 16."""
    config = MoeLoraConfig.preset("moelora")
    assert config.ranks() == (2,) * 8
    assert config.scales() == (32.0 / 16,) * 8


@pytest.mark.parametrize("shape", ((5, 3), (3, 3), (1, 3), (5, 1), (4, 3, 2), (0, 3)), ids=str)
@pytest.mark.parametrize("gate", ("task", "external", "sequence"))
def test_sequence_first_equals_batch_first_transposed(gate, shape):
    """Also for as many steps as sequences, which the original computes wrongly."""
    options = {
        "task": TASK,
        "external": dict(router="external"),
        "sequence": dict(granularity="sequence", top_k=None),
    }[gate]
    layer = make_layer(**options, batch_dim=1)
    x = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)
    if gate == "task":
        set_tasks(layer, [1, 5, 2][: shape[1]])
    elif gate == "external":
        set_tasks(layer, torch.rand(shape[1], 4))
    clone = batch_first(layer)
    y, expected = layer(x), clone(x.transpose(0, 1).contiguous()).transpose(0, 1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)
    expected_grads = torch.autograd.grad(expected, (x, clone.lora_A, clone.lora_B), dy)
    for a, b in zip(actual, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gate_rows_follow_batch_dim_if_steps_equal_sequences():
    """x [L, B, I] with L = B = 2 matches the formula, element by element."""
    layer = make_layer(router="external", batch_dim=1)
    x = torch.randn(2, 2, IN, dtype=torch.float64)
    gates = torch.rand(2, 4, dtype=torch.float64)
    y = layer(x, gates)
    for step in range(2):
        for sample in range(2):
            h = layer.lora_A @ x[step, sample]
            u = 2.0 * gates[sample].repeat_interleave(3) * h
            expected = layer.base_layer(x[step, sample]) + layer.lora_B @ u
            torch.testing.assert_close(y[step, sample], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, batch_first(layer)(x, gates))


@pytest.mark.parametrize("batch_dim", (0, 1))
def test_x_in_the_other_order_raises(batch_dim):
    layer = make_layer(**TASK, batch_dim=batch_dim)
    set_tasks(layer, [1, 2, 3])
    shape = (5, 3, IN) if batch_dim == 0 else (3, 5, IN)
    with pytest.raises(ValueError, match=rf"3 gate rows for x .*batch_dim={batch_dim}"):
        layer(torch.randn(shape, dtype=torch.float64))


def test_batch_dim_of_whole_ffn_experts():
    ffn = make_ffn(router="external", top_k=None, batch_dim=1)
    clone = batch_first(ffn)
    for shape in ((5, 2), (2, 2), (1, 2), (5, 1), (4, 2, 3), (0, 2)):
        x = torch.randn(*shape, HIDDEN, dtype=torch.float64)
        gates = torch.rand(shape[1], 4)
        expected = clone(x.transpose(0, 1).contiguous(), gates).transpose(0, 1)
        torch.testing.assert_close(ffn(x, gates), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", ("token", "sequence"))
def test_the_mask_of_the_aux_loss_is_batch_first(granularity):
    """The mask is [batch, sequence], also for x [sequence, batch, I]."""
    options = dict(granularity=granularity, aux={"load_balance": 1.0, "z": 0.1})
    layer = make_layer(batch_dim=1, **options)
    clone = batch_first(layer)
    x = torch.randn(5, 3, IN, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    layer(x)
    clone(x.transpose(0, 1).contiguous())
    actual, expected = collect_aux_loss(layer, mask), collect_aux_loss(clone, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    layer(x)
    assert not torch.allclose(collect_aux_loss(layer, torch.ones(3, 5)), expected)


def test_several_tasks_average_their_embeddings():
    """gate = softmax(W mean(emb[t] for t in the row if t != 0)); padding has no gradient."""
    layer = make_layer(**TASK)
    rows = [[2, 0, 5], [0, 0, 3], [1, 1, 4]]
    set_tasks(layer, rows)
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    y = layer(x)

    table, gate = layer.router.embedding.weight, layer.router.gate.weight
    expected = layer.base_layer(x)
    for b, row in enumerate(rows):
        tasks = [t for t in row if t != 0]
        w = (gate @ (sum(table[t] for t in tasks) / len(tasks))).softmax(dim=0)
        for e in range(4):
            columns = slice(2 * e, 2 * e + 2)
            delta = 2.0 * w[e] * (x[b] @ layer.lora_A[columns].t()) @ layer.lora_B[:, columns].t()
            expected = expected + torch.nn.functional.pad(delta[None], (0, 0, 0, 0, b, 2 - b))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    for q in (table, gate):
        actual, expected_grads = (
            torch.autograd.grad(o, q, dy, retain_graph=True)[0] for o in (y, expected)
        )
        torch.testing.assert_close(actual, expected_grads, rtol=1e-10, atol=1e-12)
    (actual,) = torch.autograd.grad(y, table, dy)
    # Row 0 is padding.
    assert not actual[0].any()


def test_one_task_in_a_row_is_that_task():
    layer = make_layer(**TASK)
    x = torch.randn(2, 4, IN, dtype=torch.float64)
    set_tasks(layer, [3, 5])
    y = layer(x)
    for rows in ([[3], [5]], [[3, 0], [0, 5]], torch.tensor([[3, 3], [5, 0]], dtype=torch.int32)):
        set_tasks(layer, rows)
        torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


def test_rows_without_a_task_and_ids_out_of_range_raise():
    """A row must have a task, because the mean divides by their number."""
    layer = make_layer(**TASK)
    for rows in ([[1, 2], [0, 0]], [[1, 6]], [[-1, 2]]):
        with pytest.raises(ValueError, match="ids: expected 1 to 5, with 0 as padding"):
            set_tasks(layer, rows)
    with pytest.raises(ValueError, match="ids: expected 1 to 5, got"):
        set_tasks(layer, [1, 0])


def test_low_precision_embeddings_are_averaged_in_float32():
    """The mean of bfloat16 embeddings is not rounded to bfloat16."""
    layer = make_layer(**TASK, base=nn.Linear(IN, OUT, dtype=torch.bfloat16))
    set_tasks(layer, [[1, 2, 3]])
    router = layer.router
    exact = router.gate.weight.double() @ router.embedding.weight.double()[[1, 2, 3]].mean(dim=0)
    assert router().dtype == torch.float32
    torch.testing.assert_close(router()[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_sequence_first_with_several_tasks_compiles_once():
    """No graph break, and one graph for all numbers of steps."""
    layer = make_layer(**TASK, batch_dim=1).eval()
    set_tasks(layer, [[1, 2], [3, 0]])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(5, 2, IN, dtype=torch.float64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (2, 7):
            x = torch.randn(steps, 2, IN, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


def test_a_task_gate_per_layer():
    """set_tasks reaches all gates, and each gate is saved. The shared gate is a third one."""
    config = MoeLoraConfig(**{**TASK, "task_gate": "per_layer"})
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    replace_linears(model, config, ["0", "1"])
    replace_linears(model, config.replace(task_gate="shared"), ["2"])
    assert len({id(layer.router) for layer in model}) == 3
    randomise(model)
    x = torch.randn(2, 4, 6)
    set_tasks(model, [1, 2])
    first = model(x)
    set_tasks(model, [1, 3])
    second = model(x)
    torch.testing.assert_close(second[0], first[0])
    assert not torch.allclose(second[1], first[1])
    assert sum("router.gate.weight" in key for key in adapter_state_dict(model)) == 3


@pytest.mark.parametrize(("task_gate", "gates"), (("per_layer", 2), ("shared", 1)))
def test_a_task_gate_per_ffn(task_gate, gates):
    model = nn.ModuleDict({"a": GatedMlp(), "b": GatedMlp()})
    replace_ffns(model, MoeLoraConfig(**{**TASK, "task_gate": task_gate}), ["a", "b"])
    assert len({id(ffn.router) for ffn in model.values()}) == gates


def test_options_that_do_not_go_together_raise():
    with pytest.raises(
        ValueError, match=r"task_gate: .* only with router='task', got router='linear'"
    ):
        MoeLoraConfig(task_gate="per_layer")
    with pytest.raises(ValueError, match="task_gate: expected one of"):
        MoeLoraConfig(**{**TASK, "task_gate": "layer"})
    with pytest.raises(ValueError, match="batch_dim: expected one of 0, 1, got -1"):
        MoeLoraConfig(batch_dim=-1)


@pytest.mark.parametrize("mask", ("per_expert", "shared"))
def test_masks_of_experts_are_independent_or_shared(mask):
    """With x = 1 and unit vectors in A and B, y_e is the mask of expert e: 0 or 1 / keep."""
    tokens, experts, p = 20_000, 4, 0.3
    layer = make_layer(
        base=nn.Linear(IN, experts, bias=False, dtype=torch.float64), router="external", rank=1,
        alpha=1.0, dropout=p, dropout_mask=mask, router_bias=False,
    )  # fmt: skip
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.zero_()[:, 0] = 1.0
        layer.lora_B.copy_(torch.eye(experts))
    y = layer(torch.ones(tokens, IN, dtype=torch.float64), torch.ones(1, experts)).detach()
    keep = keep_probability(p)
    kept = y * keep
    assert torch.equal(kept.round(), kept.round().clamp(0, 1))
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-12)
    # Five standard deviations of a mean, and of a correlation, of that many draws.
    assert (y.mean(dim=0) - 1).abs().max() < 5 * ((1 - keep) / keep / tokens) ** 0.5
    correlation = torch.corrcoef(y.t())
    if mask == "shared":
        assert correlation.min() > 1 - 1e-9
    else:
        off_diagonal = correlation - torch.eye(experts)
        assert off_diagonal.abs().max() < 5 / tokens**0.5
