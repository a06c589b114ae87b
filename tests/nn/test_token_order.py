"""Layers in models that reorder tokens: the right gate, or an error that says what to do."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    replace_linears,
    set_samples,
    set_tasks,
    warmup,
)
from moelora_kernels.nn.token_order import SELECTED, SWAPPED, passed_changes, token_order
from support.linears import randomise

IN = 8
TASK = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=4)
SEQUENCE = MoeLoraConfig(num_experts=4, rank=2, router="linear", granularity="sequence", top_k=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(IN, IN, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.down(self.up(x).relu())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(IN, IN, dtype=torch.float64)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Swaps(Plain):
    def forward(self, x):
        x = x.transpose(0, 1).contiguous()
        for index, block in enumerate(self.blocks):
            x = x + block(x) * index
        x = torch.transpose(x, 0, 1)
        return self.head(x)


class SwapsInMethod(Plain):
    def forward(self, x):
        x = self.run(x.permute(1, 0, 2))
        return self.head(x.swapaxes(0, 1))

    def run(self, hidden):
        y = hidden + 1
        for block in self.blocks:
            y = checkpoint(block, y, use_reentrant=False)
        return y


class SwapsTwice(Plain):
    """The block swaps back, so its linears get [batch, sequence, features]."""

    class Block(Block):
        def forward(self, x):
            return super().forward(x.transpose(1, 0)).transpose(0, 1)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block()])

    def forward(self, x):
        return self.head(self.blocks[0](x.transpose(0, 1)).transpose(0, 1))


class Experts(Plain):
    """A mixture of experts: each block gets the tokens that are routed to it."""

    def forward(self, x):
        flat = x.flatten(0, 1)
        y = torch.zeros_like(flat)
        choice = (flat[:, 0] > 0).long()
        for index in range(2):
            (tokens,) = torch.where(choice == index)
            y[tokens] = self.blocks[index](flat[tokens])
        return self.head(y.view_as(x))


class Attention(Plain):
    """Swaps tensors that it does not pass to a linear."""

    def forward(self, x):
        scores = x @ self.blocks[0](x).transpose(1, 2)
        keys = x.transpose(0, 1)
        return self.head(x) + keys.transpose(0, 1) + scores.mean(dim=(1, 2), keepdim=True)


@pytest.mark.parametrize(
    ("kind", "expected"),
    (
        (Plain, {}),
        (Swaps, {"blocks": SWAPPED}),
        (SwapsInMethod, {"blocks": SWAPPED}),
        (SwapsTwice, {"blocks": SWAPPED}),
        (SwapsTwice.Block, {"up": SWAPPED, "down": SWAPPED}),
        (Experts, {"blocks": SELECTED}),
        (Attention, {}),
        (nn.Linear, {}),
    ),
)
def test_the_source_tells_which_children_get_tokens_in_another_order(kind, expected):
    assert passed_changes(kind) == expected


def test_two_swaps_are_none():
    model = SwapsTwice()
    modules = dict(model.named_modules())
    assert token_order("blocks.0.up", modules) is None
    assert token_order("head", modules) is None
    modules = dict(Swaps().named_modules())
    assert token_order("blocks.1.up", modules) == ("blocks.1.up", "Swaps", SWAPPED)


def adapted(kind, config, names=("up", "down", "head")):
    torch.manual_seed(0)
    model = kind().eval()
    replace_linears(model, config, names)
    return randomise(model)


def one_by_one(model, x, tasks):
    rows = []
    for b in range(len(x)):
        if tasks is not None:
            set_tasks(model, tasks[b : b + 1])
        rows.append(model(x[b : b + 1]))
    if tasks is not None:
        set_tasks(model, tasks)
    return torch.cat(rows)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


CONFIGS = {"task": (TASK, torch.tensor([1, 3, 2])), "sequence": (SEQUENCE, None)}


@pytest.mark.parametrize("length", (3, 5, 6))
@pytest.mark.parametrize("gate", CONFIGS)
@pytest.mark.parametrize("kind", (Plain, SwapsTwice, Attention))
def test_models_whose_layers_get_batch_first(kind, gate, length):
    """Also if the shape is square, and if a part of the model swaps twice."""
    config, tasks = CONFIGS[gate]
    model = adapted(kind, config)
    x = torch.randn(3, length, IN, dtype=torch.float64)
    close(call(model, x, tasks), one_by_one(model, x, tasks))


@pytest.mark.parametrize("length", (1, 3, 5, 6))
@pytest.mark.parametrize("gate", CONFIGS)
@pytest.mark.parametrize("kind", (Swaps, SwapsInMethod))
def test_sequence_first_layers_raise_and_say_what_to_do(kind, gate, length):
    config, tasks = CONFIGS[gate]
    model = adapted(kind, config)
    x = torch.randn(3, length, IN, dtype=torch.float64)
    if tasks is not None:
        set_tasks(model, tasks)
    with pytest.raises(ValueError, match=r"batch_dim=1|batch_dim=0"):
        model(x)
    # What the error says: the layers of the part with the other layout get batch_dim=1.
    torch.manual_seed(0)
    model = kind().eval()
    replace_linears(model, config.replace(batch_dim=1), ["up", "down"])
    replace_linears(model, config, ["head"])
    randomise(model)
    close(call(model, x, tasks), one_by_one(model, x, tasks))


def call(model, x, tasks):
    if tasks is not None:
        set_tasks(model, tasks)
    return model(x)


@pytest.mark.parametrize("gate", CONFIGS)
def test_samples_say_the_layout(gate):
    config, tasks = CONFIGS[gate]
    model = adapted(Swaps, config, ["up", "down"])
    x = torch.randn(3, 3, IN, dtype=torch.float64)
    if tasks is not None:
        set_tasks(model, tasks)
    set_samples(model, torch.arange(3).repeat(3))
    actual = model(x)
    set_samples(model, None)
    torch.manual_seed(0)
    expected = Swaps().eval()
    replace_linears(expected, config.replace(batch_dim=1), ["up", "down"])
    close(actual, one_by_one(randomise(expected), x, tasks))


def test_a_wrong_hint_is_dropped_by_a_call_that_shows_the_layout():
    model = adapted(Swaps, TASK, ["up"])
    layer = model.blocks[0].up
    set_tasks(layer, [1, 2, 3])
    square, long = (torch.randn(3, n, IN, dtype=torch.float64) for n in (3, 5))
    with pytest.raises(ValueError, match=r"call set_samples\(model, torch.arange\(3\)\)"):
        layer(square)
    set_samples(layer, torch.arange(3))
    expected = layer(square)
    set_samples(layer, None)
    layer(long)
    assert torch.equal(layer(square), expected)


def test_experts_of_a_mixture_do_not_know_the_samples_of_their_tokens():
    """Three tokens for three samples: their number fits, their order does not."""
    model = adapted(Experts, TASK, ["up"])
    set_tasks(model, [1, 2, 3])
    x = torch.randn(3, 2, IN, dtype=torch.float64)
    x[..., 0] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    for samples in (None, "flat"):
        set_samples(model, samples)
        with pytest.raises(ValueError, match=r"^x: \[3, 8\] for blocks.0.up: Experts selects its"):
            model(x)
    set_tasks(model, [2])
    model(x)


def test_rows_that_a_model_packs_raise():
    class Packs(Plain):
        def forward(self, x):
            return self.head(x.reshape(1, -1, IN)).view_as(x)

    model = adapted(Packs, SEQUENCE, ["head"])
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"called with 3 rows, so several samples may be packed"):
        model(x)
    expected = one_by_one(model, x, None)
    set_samples(model, torch.arange(3).repeat_interleave(4))
    close(model(x), expected)


class NotedReads(TorchDispatchMode):
    """Counts the values of tensors that the host reads. On a GPU it waits for each of them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("length", "is_known", "count"),
    ((5, False, 1), (5, True, 0), (1, False, 0)),
    ids=("row", "samples", "token"),
)
def test_position_ids_are_read_once_if_a_gate_needs_them(length, is_known, count):
    class WithPositions(Plain):
        def forward(self, x, position_ids):
            return super().forward(x)

    model = adapted(WithPositions, SEQUENCE, ["up", "down", "head"])
    x, positions = torch.randn(1, length, IN, dtype=torch.float64), torch.arange(length)[None]
    if is_known:
        set_samples(model, torch.zeros(length, dtype=torch.int64))
    with NotedReads() as reads:
        model(x, position_ids=positions)
    assert reads.count == count
    if count:
        with pytest.raises(ValueError, match="several samples are packed"):
            model(x, position_ids=positions % 3)


def test_positions_are_one_row_for_all_samples():
    class Positions(Plain):
        def forward(self, x):
            return x + self.head(torch.arange(6 * IN, dtype=x.dtype).view(1, 6, IN)).mean()

    model = adapted(Positions, SEQUENCE, ["head"])
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    close(model(x), one_by_one(model, x, None))


def test_copies_and_warmup():
    model = adapted(Swaps, TASK, ["up"])
    set_tasks(model, [1, 2, 3])
    x = torch.randn(3, 3, IN, dtype=torch.float64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="Swaps seems to swap"):
            copied(x)
    warmup(model, tokens=(1, 8), batch=3)


def test_a_forward_that_raised_leaves_no_rows_behind():
    model = adapted(Plain, SEQUENCE)
    with pytest.raises(ValueError, match="expected"):
        model(torch.randn(3, 4, IN + 1, dtype=torch.float64))
    # A layer on its own: every row is a sequence, also beside a model that was called before.
    layer = model.head
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    close(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_a_compiled_model_computes_the_same():
    for config, tasks in CONFIGS.values():
        model = adapted(Plain, config)
        if tasks is not None:
            set_tasks(model, tasks)
        x = torch.randn(3, 5, IN, dtype=torch.float64)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(x), model(x))


def test_a_layer_outside_of_a_model_has_no_hint():
    assert MoeLoraLinear(8, 8, config=TASK).token_order is None
