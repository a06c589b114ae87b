"""routing_report equals a count by hand, costs one copy, and is the same on every process."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    collect_aux_loss,
    count_routing,
    plot_routing,
    record_routing,
    replace_linears,
    routing_report,
    set_samples,
    set_tasks,
)
from support.expert_loads import EXPERTS, HandCount, adapted

IN = 8
TASKS = MoeLoraConfig(
    num_experts=EXPERTS, rank=2, router="task", num_tasks=3, task_embedding_dim=5,
    task_gate="per_layer",
)  # fmt: skip


class Blocks(nn.Module):
    """Two linears; the second one is called a number of times that each forward says."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, IN), nn.Linear(IN, IN)

    def forward(self, x, times=1, attention_mask=None):
        x = self.a(x)
        for _ in range(times):
            x = self.b(x)
        return x


def tokens_model():
    torch.manual_seed(0)
    return adapted(Blocks(), ["a", "b"])


def loads(report):
    return {name: layer.load for name, layer in report.layers.items()}


def test_equals_a_count_by_hand():
    """Repeated calls, layers that a forward leaves out, padding, batches of several shapes."""
    model = tokens_model()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    count = HandCount(model, lambda name, inputs: inputs.get("attention_mask"))
    with count_routing(model):
        for times in (1, 3, 0):
            model(torch.randn(2, 3, IN), times=times, attention_mask=mask)
        model(torch.randn(5, IN))
        report = routing_report(model)
        count.check(loads(report))
        for layer in report.layers.values():
            shares = layer.load.tolist()
            entropy = -sum(p * math.log(p) for p in shares if p) / math.log(EXPERTS)
            assert layer.entropy == pytest.approx(entropy, abs=1e-6)
            assert layer.top1_share == max(shares)
            assert layer.unused == tuple(e for e, p in enumerate(shares) if p == 0)
            assert (layer.drift, layer.task_load) == (None, None)
        # The next report covers the forwards since this one.
        other = HandCount(model)
        model(torch.randn(7, IN), times=0)
        second = routing_report(model)
        other.check(loads(second))
        drift = (second.layers["a"].load - report.layers["a"].load).abs().sum().item() / 2
        assert second.layers["a"].drift == pytest.approx(drift)
        assert 0 < drift < 1
        assert not second.layers["b"].is_counted
        assert second.layers["b"].drift is None
    assert "a" in str(report)


def test_training_with_recomputed_activations_counts_each_forward_once():
    model = tokens_model()
    x = torch.randn(4, IN, requires_grad=True)
    count = HandCount(model)
    with count_routing(model):
        for use_reentrant in (False, True):
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
            y.sum().backward()
        report = routing_report(model)
    # The hand count leaves out forwards without autograd: the first of a reentrant checkpoint.
    count.check(loads(report))
    assert len(count.calls) > 4


@pytest.mark.parametrize("kind", ("rows", "flat", "samples", "several tasks", "one task"))
def test_tasks_by_experts(kind):
    """Row t is the gate of task t times the number of its tokens that count."""
    torch.manual_seed(0)
    model = adapted(Blocks(), ["a", "b"], TASKS).eval()
    ids = [[1, 3], [3, 0]] if kind == "several tasks" else [3, 1]
    ids = [2] if kind == "one task" else ids
    set_tasks(model, ids)
    x, mask = torch.randn(2, 5, IN), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    counts = torch.tensor([3.0, 4.0])
    if kind == "flat":
        set_samples(model, "flat")
        x = x.flatten(0, 1)
    elif kind == "samples":
        # Another order of the tokens, so the mask does not fit.
        set_samples(model, torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 1, 1]))
        x, counts = x.flatten(0, 1), torch.tensor([3.0, 7.0])
    with count_routing(model):
        model(x, attention_mask=mask)
        report = routing_report(model)
    for name, layer in report.layers.items():
        gates = model.get_submodule(name).router().softmax(dim=1).detach()
        expected = torch.zeros(4, EXPERTS)
        if kind == "one task":
            expected[2] = 7 * gates[0]
        elif kind == "several tasks":
            expected[1] = counts[0] / 2 * gates[0]
            expected[3] = counts[0] / 2 * gates[0] + counts[1] * gates[1]
        else:
            expected[3], expected[1] = counts[0] * gates[0], counts[1] * gates[1]
        torch.testing.assert_close(layer.task_load, expected)
        torch.testing.assert_close(layer.load, expected.sum(dim=0) / expected.sum())


@pytest.mark.parametrize("granularity", ("token", "sequence"))
def test_token_gates_by_task(granularity):
    """The tasks are said for counting alone. Tokens of a batch of other rows have no task."""
    config = MoeLoraConfig(num_experts=EXPERTS, rank=2, top_k=2, granularity=granularity)
    torch.manual_seed(0)
    model = adapted(Blocks(), ["a", "b"], config).eval()
    x, mask = torch.randn(2, 3, IN), torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = torch.zeros(4, EXPERTS)
    for row, task in enumerate((3, 1)):
        kept = x[row] if granularity == "sequence" else x[row][mask[row].bool()]
        tokens = kept if granularity == "token" else kept.mean(dim=0)[None]
        gates = HandCount.gates(model.a, tokens.double()).float()
        expected[task] = gates.sum(dim=0) * (mask[row].sum() if granularity == "sequence" else 1)
    with count_routing(model, num_tasks=3) as counter:
        counter.set_tasks([3, 1])
        model(x, attention_mask=mask)
        report = routing_report(model)
        torch.testing.assert_close(report.layers["a"].task_load, expected)
        torch.testing.assert_close(
            report.layers["a"].load, expected.sum(dim=0) / expected.sum(), atol=1e-6, rtol=0
        )
        model(torch.randn(3, 3, IN))
        load = routing_report(model).layers["a"].task_load
        assert load[0].sum() == pytest.approx(9)
        assert not load[1:].any()
        with pytest.raises(ValueError, match=r"tasks: expected ids \[batch\]"):
            counter.set_tasks([[1, 2]])
    with count_routing(model) as counter, pytest.raises(ValueError, match="num_tasks: expected"):
        counter.set_tasks([1])


def test_without_counting_it_reports_the_last_recorded_forward():
    model = tokens_model()
    model(torch.randn(9, IN))
    count = HandCount(model)
    model(torch.randn(4, IN))
    count.check(loads(routing_report(model)))
    collect_aux_loss(model)
    with pytest.raises(RuntimeError, match=r"with count_routing\(model\):"):
        routing_report(model)
    plain = Blocks()
    replace_linears(plain, MoeLoraConfig.preset("ming", num_experts=EXPERTS), ["a"])
    plain(torch.randn(4, IN))
    with pytest.raises(RuntimeError, match="no routing is counted"):
        routing_report(plain)
    with record_routing(plain):
        plain(torch.randn(4, IN))
        assert routing_report(plain).layers["a"].load.sum() == pytest.approx(1)


def test_contexts_are_independent():
    """record_routing inside count_routing, two contexts on one model, a copy, a wrapper."""
    model = tokens_model()
    count = HandCount(model)
    with count_routing(model):
        with record_routing(model):
            model(torch.randn(4, IN))
        model(torch.randn(4, IN))
        copy.deepcopy(model)(torch.randn(4, IN))
        torch.compile(model, backend="eager")(torch.randn(4, IN))
        with pytest.raises(ValueError, match="already active"), count_routing(model):
            pass
        count.calls.clear()
        report = routing_report(torch.compile(model, backend="eager"))
        assert report.layers["a"].load.sum() == pytest.approx(1)
    assert all(layer.record.on_call is None for layer in (model.a, model.b))
    model(torch.randn(4, IN))
    with count_routing(model):
        assert not routing_report(model).layers["a"].is_counted
    with pytest.raises(ValueError, match="with mixture layers"), count_routing(nn.Linear(2, 2)):
        pass


def test_a_compiled_model_is_counted():
    model = tokens_model()
    xs = [torch.randn(4, IN) for _ in range(3)]
    with count_routing(model):
        for x in xs:
            model(x)
        expected = loads(routing_report(model))
    compiled = torch.compile(model, backend="eager")
    with count_routing(model):
        for x in xs:
            compiled(x)
        actual = loads(routing_report(compiled))
    for name, load in expected.items():
        torch.testing.assert_close(actual[name], load)


def test_heat_maps(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = adapted(Blocks(), ["a"], TASKS)
    adapted(model, ["b"], MoeLoraConfig(num_experts=EXPERTS + 2, rank=2, top_k=2))
    set_tasks(model, [1, 3])
    with count_routing(model):
        model(torch.randn(2, 5, IN))
        report = routing_report(model)
    paths = plot_routing(report, tmp_path / "maps")
    assert [path.name for path in paths] == ["load.png", "tasks.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert plot_routing(report._replace(layers={"b": report.layers["b"]}), tmp_path) == [
        tmp_path / "load.png"
    ]
    with pytest.raises(ValueError, match="at least one layer"):
        plot_routing(report._replace(layers={}), tmp_path)


def test_heat_maps_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    model = tokens_model()
    with count_routing(model):
        model(torch.randn(2, IN))
        report = routing_report(model)
    with pytest.raises(ImportError, match=r"moelora_kernels\[bench\]"):
        plot_routing(report, tmp_path)
