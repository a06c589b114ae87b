"""Linked siblings under torch.compile: one pass in one graph, with the values of eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import set_tasks
from moelora_kernels.nn.sibling_calls import are_called_in_a_row
from support.compare import FLOAT64, assert_same, training_step
from support.graphs import Graphs
from support.siblings import NAMES, linked_too, random_x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, o) for o in (12, 6, 6))

    def forward(self, x):
        q = self.q_proj(x).sin()
        k = self.k_proj(x)
        return torch.cat([q, k, self.v_proj(x)], dim=-1)


class Block(nn.Module):
    """Its attention reads a tensor that the block computes."""

    def __init__(self, attention=Attention):
        super().__init__()
        self.norm, self.attention, self.out = nn.LayerNorm(12), attention(), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.out(self.attention(self.norm(x)))


def pair(attention=Attention, **options):
    """Return a block with unlinked layers and a linked copy."""
    torch.manual_seed(0)
    return linked_too(Block(attention).double(), **{"top_k": 2, **options})


OPTIONS = {
    "linear": {},
    "grouped": dict(impl="grouped"),
    "mlp": dict(router="mlp"),
    "task": dict(router="task", num_tasks=4, top_k=None),
    "external": dict(router="external", top_k=None),
    "reference": dict(impl="reference"),
    "dropout": dict(dropout=0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_pass_in_one_graph(options):
    torch._dynamo.reset()
    plain, linked = pair(**options)
    if "router" in options and options["router"] != "mlp":
        gates = torch.rand(2, 3, dtype=torch.float64)
        for model in (plain, linked):
            set_tasks(model, [1, 3] if options["router"] == "task" else gates)
    if options.get("dropout"):
        # The masks of siblings are equal only if they are linked.
        plain = linked
    x = random_x(2, 5)
    graphs = {}
    for name, model in (("plain", plain), ("linked", linked)):
        graphs[name] = Graphs()
        compiled = torch.compile(model, fullgraph=True, backend=graphs[name])
        actual = training_step(model, x, forward=compiled)
        expected = training_step(plain, x)
        assert_same(actual, expected, **FLOAT64)
    if options.get("impl") != "reference" and plain is not linked:
        assert (graphs["plain"].passes(), graphs["linked"].passes()) == (3, 1)
    compiled = torch.compile(linked, fullgraph=True, backend="aot_eager")
    assert_same(training_step(linked, x, forward=compiled), training_step(plain, x), **FLOAT64)
    linked.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


def test_new_inputs_do_not_recompile():
    torch._dynamo.reset()
    plain, linked = pair()
    compiled = torch.compile(linked, fullgraph=True, backend="eager", dynamic=True)
    for size in (3, 4, 7):
        x = random_x(2, size)
        with torch._dynamo.config.patch(error_on_recompile=size != 3):
            actual = training_step(linked, x, forward=compiled)
        assert_same(actual, training_step(plain, x), **FLOAT64)


def test_the_parent_alone():
    """x is an input of the graph; the outputs of an earlier call with it are not used again."""
    torch._dynamo.reset()
    plain, linked = (model.attention for model in pair())
    graphs = Graphs()
    compiled = torch.compile(linked, fullgraph=True, backend=graphs)
    x = random_x(2, 5)
    torch.testing.assert_close(compiled(x), plain(x))
    assert graphs.passes() == 1
    with torch.no_grad():
        for model in (plain, linked):
            model.k_proj.lora_B.mul_(2)
    torch.testing.assert_close(compiled(x), plain(x))
    with torch.no_grad():
        x.mul_(2)
    torch.testing.assert_close(compiled(x), plain(x))


def test_one_sibling_alone():
    """No output outlives the graph that has computed it."""
    torch._dynamo.reset()
    plain, linked = (model.attention for model in pair())
    x = random_x(2, 5)
    compiled = {name: torch.compile(getattr(linked, name), backend="aot_eager") for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(compiled[name](x), getattr(plain, name)(x))
        with torch.no_grad():
            for model in (plain, linked):
                for other in NAMES:
                    getattr(model, other).lora_B.mul_(2)


@pytest.mark.parametrize("place", ("block", "attention"))
def test_activation_checkpointing(place):
    """Dynamo makes no graph of a checkpoint around the parent: x is not computed inside it."""
    torch._dynamo.reset()

    plain, linked = pair()
    x = random_x(2, 5)
    graphs = Graphs()

    def run(leaf):
        if place == "block":
            return checkpoint(linked, leaf, use_reentrant=False)
        y = checkpoint(linked.attention, linked.norm(leaf), use_reentrant=False)
        return leaf + linked.out(y)

    compiled = torch.compile(run, fullgraph=place == "block", backend=graphs)
    assert_same(training_step(linked, x, forward=compiled), training_step(plain, x), **FLOAT64)
    assert graphs.passes() == (place == "block")


class Broken(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        torch._dynamo.graph_break()
        k = self.k_proj(x)
        return torch.cat([q, k, self.v_proj(x)], dim=-1)


def test_a_graph_break_between_siblings():
    torch._dynamo.reset()
    plain, linked = pair(Broken)
    compiled = torch.compile(linked, backend="aot_eager")
    x = random_x(2, 5)
    for _ in range(2):
        assert_same(training_step(linked, x, forward=compiled), training_step(plain, x), **FLOAT64)


class InPlace(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        k = self.k_proj(x.mul_(2))
        return torch.cat([q, k, self.v_proj(x)], dim=-1)


class Helper(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        torch.relu_(x)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Indexed(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        x[..., 0] = 3.0
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Rebound(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        x = x + 1
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Added(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        x += 1
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Branch(Attention):
    def forward(self, x):
        q = self.q_proj(x)
        if x.shape[0] > 100:
            return q
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Nested(Attention):
    def forward(self, x):
        if x.dim() > 0:
            q = self.q_proj(x)
        k = self.k_proj(x) if x.dim() > 0 else x
        return torch.cat([q, k, self.v_proj(x)], dim=-1)


class Twice(Attention):
    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        return torch.cat([self.q_proj(x) + q - q, k, self.v_proj(x)], dim=-1)


class View(Attention):
    def forward(self, x):
        rows = x.view(-1)
        q = self.q_proj(x).sin()
        rows.mul_(2)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class AddedView(Attention):
    def forward(self, x):
        rows = x.view(-1)
        q = self.q_proj(x).sin()
        rows += 1
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Out(Attention):
    def forward(self, x):
        rows = x.view(-1)
        q = self.q_proj(x).sin()
        torch.mul(rows, 2, out=rows)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class PassedPart(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        double(x[0])
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


def double(x):
    x.mul_(2)


class Weight(Attention):
    def forward(self, x):
        q = self.q_proj(x).sin()
        self.k_proj.lora_B.data.mul_(1.5)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Short(Attention):
    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


class Shape(Attention):
    def forward(self, x):
        q = self.q_proj(x).view(-1, x.size(-1)).view(x.shape)
        k = self.k_proj(x).reshape(*x.shape[:-1], -1)
        return torch.cat([q, k, self.v_proj(x)], -1)


class Else(Attention):
    def forward(self, x):
        shape = x.shape
        if x.dim() > 9:
            return x
        else:
            q = self.q_proj(x).view(shape)
            k, v = self.k_proj(x), self.v_proj(input=x)
        return torch.cat([q, k, v], -1)


IN_A_ROW = (Attention, Broken, Short, Shape, Else)
APART = (
    InPlace, Helper, Indexed, Rebound, Added, Branch, Nested, Twice, View, AddedView, Out,
    PassedPart, Weight,
)  # fmt: skip


@pytest.mark.parametrize("kind", (*IN_A_ROW, *APART))
def test_the_source_tells_whether_siblings_are_called_in_a_row(kind):
    assert are_called_in_a_row(kind(), NAMES) == (kind in IN_A_ROW)


@pytest.mark.parametrize("kind", (*APART, Shape, Else))
def test_a_forward_that_changes_x(kind):
    torch._dynamo.reset()
    plain, linked = pair(kind)
    graphs = Graphs()
    compiled = torch.compile(linked, fullgraph=True, backend=graphs)
    x = random_x(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.clone()), plain(x.clone()))
    assert (graphs.passes() == 1) == (kind in IN_A_ROW)


class GradMode(Attention):
    def forward(self, x):
        torch.set_grad_enabled(False)
        q = self.q_proj(x).sin()
        torch.set_grad_enabled(True)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


def test_another_mode_of_autograd_between_siblings():
    torch._dynamo.reset()
    plain, linked = pair(GradMode)
    compiled = torch.compile(linked, backend="aot_eager")
    x = random_x(2, 5)
    assert_same(training_step(linked, x, forward=compiled), training_step(plain, x), **FLOAT64)


@pytest.mark.parametrize("hook", ("before", "after"))
def test_hooks_of_a_sibling(hook):
    """A hook after the call may change x."""
    torch._dynamo.reset()
    plain, linked = pair()
    for model in (plain, linked):
        layer = model.attention.q_proj
        if hook == "before":
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            layer.register_forward_hook(lambda module, args, y: args[0].mul_(2).sum() + y)
    compiled = torch.compile(linked, fullgraph=True, backend="aot_eager")
    x = random_x(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


def test_one_changed_sibling():
    torch._dynamo.reset()
    plain, linked = pair()
    x = random_x(2, 5)
    graphs = Graphs()
    compiled = torch.compile(linked, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(x), plain(x))
    for model in (plain, linked):
        model.attention.k_proj.config = model.attention.k_proj.config.replace(alpha=3.0)
    torch.testing.assert_close(compiled(x), plain(x))
    assert graphs.passes() == 1 + 3


def test_export():
    plain, linked = pair()
    x = random_x(2, 5)
    for strict in (True, False):
        program = torch.export.export(linked.eval(), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), plain.eval()(x))
