"""Which sample does a token belong to? The right gate, or an error that says what to pass."""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    replace_linears,
    set_samples,
    set_tasks,
)
from support.linears import randomise

B, L, IN, OUT = 3, 5, 8, 6
IDS = [1, 3, 2]


def linear(**options):
    torch.manual_seed(0)
    config = MoeLoraConfig(num_experts=4, rank=2, **options)
    return randomise(MoeLoraLinear(IN, OUT, config=config, dtype=torch.float64))


def task_layer(**options):
    return linear(router="task", num_tasks=3, **options)


def sequence_layer(**options):
    return linear(router="linear", granularity="sequence", top_k=2, **options)


def task_vector_layer(**options):
    torch.manual_seed(0)
    config = MoeLoraConfig.preset("hmora", num_experts=4, rank=2, task_embedding_dim=5, **options)
    return randomise(MoeLoraLinear(IN, OUT, config=config, dtype=torch.float64))


def ffn_layer(**options):
    torch.manual_seed(0)
    config = MoeLoraConfig.preset("mixlora", num_experts=4, rank=2, **options)
    return randomise(MoeLoraFFN(IN, 12, config=config, dtype=torch.float64))


LAYERS = {
    "task": (task_layer, torch.tensor(IDS)),
    "sequence": (sequence_layer, None),
    "task vectors": (task_vector_layer, torch.randn(B, 5, dtype=torch.float64)),
    "external": (lambda: linear(router="external"), torch.rand(B, 4, dtype=torch.float64)),
    "ffn task": (lambda: ffn_layer(router="task", num_tasks=3), torch.tensor(IDS)),
    "ffn sequence": (lambda: ffn_layer(granularity="sequence"), None),
}


# The gate of a sequence is the mean of the tokens that the layer sees.
BY_TOKEN = [name for name in LAYERS if "sequence" not in name]


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer, x [B, L, I], and y of every sample on its own."""
    make, tasks = LAYERS[request.param]
    layer = make().eval()
    torch.manual_seed(1)
    x = torch.randn(B, L, IN, dtype=torch.float64)
    expected = []
    for b in range(B):
        if tasks is not None:
            set_tasks(layer, tasks[b : b + 1])
        expected.append(layer(x[b : b + 1])[0])
    if tasks is not None:
        set_tasks(layer, tasks)
    return layer, x, torch.stack(expected).detach()


def close(found, expected):
    # The products of other tokens stand beside, so sums of float64 are taken in another order.
    atol = 1e-11 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=atol)


def test_rows_of_a_batch_are_samples(case):
    layer, x, expected = case
    close(layer(x), expected)


def test_flattened_tokens_raise_and_say_what_to_call(case):
    """[B L, I] looks like B L samples, or like one long sequence."""
    layer, x, _ = case
    with pytest.raises(ValueError, match=r"set_samples\(model, "):
        layer(x.flatten(0, 1))


def test_flattened_tokens_with_their_samples(case):
    layer, x, expected = case
    set_samples(layer, torch.arange(B).repeat_interleave(L))
    close(layer(x.flatten(0, 1)), expected.flatten(0, 1))
    # The same numbers as [B, L], for both shapes of x.
    set_samples(layer, torch.arange(B)[:, None].expand(B, L))
    close(layer(x.flatten(0, 1)), expected.flatten(0, 1))
    close(layer(x), expected)


def test_flattened_sequence_first_tokens(case):
    """The order that a guess by the number of tokens would mix up."""
    layer, x, expected = case
    set_samples(layer, torch.arange(B).repeat(L))
    close(layer(x.transpose(0, 1).flatten(0, 1)), expected.transpose(0, 1).flatten(0, 1))


@pytest.mark.parametrize("case", BY_TOKEN, indirect=True)
def test_a_part_of_the_tokens(case):
    """Tokens that a mixture of experts has sent to one place: any order, any number."""
    layer, x, expected = case
    order = torch.tensor([14, 2, 7, 7, 0])
    set_samples(layer, order // L)
    close(layer(x.flatten(0, 1)[order]), expected.flatten(0, 1)[order])


@pytest.mark.parametrize("case", BY_TOKEN, indirect=True)
def test_the_sample_of_each_row(case):
    """Windows of an image: several rows of x belong to one sample."""
    layer, x, expected = case
    windows = torch.cat([x[:, :2], x[:, 2:4]])
    set_samples(layer, torch.arange(B).repeat(2))
    close(layer(windows), torch.cat([expected[:, :2], expected[:, 2:4]]))


def test_tokens_of_no_sample_get_the_base(case):
    layer, x, expected = case
    samples = torch.arange(B)[:, None].repeat(1, L)
    samples[1, 3:] = -1
    set_samples(layer, samples)
    y = layer(x)
    close(y[0], expected[0])
    close(y[2], expected[2])
    if isinstance(layer, MoeLoraLinear) and layer.config.router in ("task", "linear", "external"):
        close(y[1, 3:], layer.base_layer(x[1, 3:]))


def test_gradients_of_flattened_tokens(case):
    layer, x, _ = case
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def gradients(x):
        return torch.autograd.grad(layer(x).square().sum(), parameters, allow_unused=True)

    expected = gradients(x)
    set_samples(layer, torch.arange(B).repeat_interleave(L))
    for found, gradient in zip(gradients(x.flatten(0, 1)), expected, strict=True):
        assert (found is None) == (gradient is None)
        if gradient is not None:
            close(found, gradient)


@pytest.mark.parametrize("length", (5, 1))
def test_flat_follows_the_batch(length):
    """Prefill and cached steps of a model that flattens: no call between them."""
    layer = task_layer()
    set_samples(layer, "flat")
    set_tasks(layer, IDS)
    x = torch.randn(B, length, IN, dtype=torch.float64)
    close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
    with pytest.raises(ValueError, match="set_tasks: 3 gate rows for x"):
        layer(torch.randn(B * length + 1, IN, dtype=torch.float64))


def test_flat_is_batch_first():
    """Tokens of [L, B, I] are flattened in another order, which "flat" would mix up."""
    layer = task_layer(batch_dim=1)
    set_samples(layer, "flat")
    set_tasks(layer, IDS)
    with pytest.raises(ValueError, match=r"set_tasks: 3 gate rows for x \[15, 8\]"):
        layer(torch.randn(B * L, IN, dtype=torch.float64))


def test_flat_does_not_tell_the_sequences_of_a_router():
    layer = sequence_layer()
    set_samples(layer, "flat")
    with pytest.raises(ValueError, match=r"set_samples\(model, samples\)"):
        layer(torch.randn(B * L, IN, dtype=torch.float64))


@pytest.mark.parametrize("batch_dim", (0, 1))
def test_sequence_first(batch_dim):
    layer, first = task_layer(batch_dim=batch_dim), task_layer()
    set_tasks(layer, IDS)
    set_tasks(first, IDS)
    x = torch.randn(B, L, IN, dtype=torch.float64)
    if batch_dim == 0:
        with pytest.raises(ValueError, match="batch_dim=0"):
            layer(x.transpose(0, 1))
    else:
        close(layer(x.transpose(0, 1)).transpose(0, 1), first(x))
        samples = torch.arange(B)[:, None].expand(B, L).contiguous()
        set_samples(layer, samples)
        close(layer(x.transpose(0, 1)).transpose(0, 1), first(x))


def test_errors_name_how_rows_repeat():
    layer = task_layer()
    set_tasks(layer, IDS)
    with pytest.raises(ValueError, match=r"ids.repeat_interleave\(2\).*ids.repeat\(2\)"):
        layer(torch.randn(2 * B, L, IN, dtype=torch.float64))


def test_errors_name_ids_that_are_repeated_too_often():
    """The encoder of a model that generates with beams has one row for each prompt."""
    layer = task_layer()
    set_tasks(layer, torch.tensor(IDS).repeat_interleave(2))
    with pytest.raises(ValueError, match=r"call set_tasks on it with the ids before the repeat"):
        layer(torch.randn(B, L, IN, dtype=torch.float64))


def test_errors_for_one_row_name_packing_and_shared_rows():
    """x [1, L, I] is a packed row, or the embeddings of positions that all samples share."""
    layer = task_layer()
    set_tasks(layer, IDS)
    with pytest.raises(ValueError, match=r"packed into the row, call set_samples.*leave this"):
        layer(torch.randn(1, L, IN, dtype=torch.float64))


def test_one_task_for_all_needs_no_samples():
    layer = task_layer()
    set_tasks(layer, [2])
    x = torch.randn(B, L, IN, dtype=torch.float64)
    close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))


@pytest.mark.parametrize(
    "samples",
    ("rows", 1.5, [[[0]]], torch.full((3,), 0.5), torch.zeros(0, dtype=torch.int64)),
    ids=str,
)
def test_samples_that_are_none_are_named(samples):
    with pytest.raises(ValueError, match=r"^samples: expected"):
        set_samples(task_layer(), samples)


def test_samples_that_do_not_fit_are_named():
    layer = task_layer()
    set_tasks(layer, IDS)
    x = torch.randn(B, L, IN, dtype=torch.float64)
    set_samples(layer, torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^samples: \[7\] for x \[3, 5, 8\]"):
        layer(x)
    set_samples(layer, [0, 1, 3])
    with pytest.raises(ValueError, match=r"^samples: 4 samples, but set_tasks has 3 rows"):
        layer(x)
    set_samples(layer, None)
    layer(x)
    with pytest.raises(ValueError, match=r"^model: expected a model with mixture layers"):
        set_samples(nn.Linear(2, 2), None)


class EncoderDecoder(nn.Module):
    """The decoder's batch has other rows than the encoder's."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (nn.Linear(IN, IN, dtype=torch.float64) for _ in range(2))

    def forward(self, x, beams):
        return self.decoder(self.encoder(x).repeat_interleave(beams, dim=0))


@pytest.mark.parametrize("task_gate", ("shared", "per_layer"))
def test_parts_with_other_numbers_of_rows(task_gate):
    model = EncoderDecoder()
    config = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=3, task_gate=task_gate)
    replace_linears(model, config, ["encoder", "decoder"])
    randomise(model)
    x = torch.randn(B, L, IN, dtype=torch.float64)
    set_tasks(model, IDS)
    expected = model(x, 1).repeat_interleave(4, dim=0)
    with pytest.raises(ValueError, match=r"ids.repeat_interleave\(4\)"):
        model(x, 4)
    set_tasks(model.decoder, torch.tensor(IDS).repeat_interleave(4))
    close(model(x, 4), expected)
    # The whole model again: both parts follow.
    set_tasks(model, IDS[::-1])
    set_tasks(model.decoder, torch.tensor(IDS[::-1]).repeat_interleave(2))
    close(model(x.flip(0), 2), expected[::4].flip(0).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("batch_first", (True, False))
def test_a_module_of_torch_says_its_layout(batch_first):
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first)
    options = dict(num_experts=4, rank=2, router="task", num_tasks=3)
    if not batch_first:
        with pytest.raises(ValueError, match=r"^batch_dim: 0.linear1 is part of a Transformer"):
            replace_linears(nn.Sequential(decoder), MoeLoraConfig(**options), ["linear1"])
        options["batch_dim"] = 1
    model = nn.Sequential(decoder)
    assert replace_linears(model, MoeLoraConfig(**options), ["linear1"]) == ["0.linear1"]
    # Two samples as long as the batch is large: the shape alone does not tell.
    set_tasks(model, [1, 2])
    x = torch.randn(2, 2, 8)
    randomise(model).eval()
    y = decoder(x, x)
    set_tasks(model, [1])
    first = decoder(x[:1], x[:1]) if batch_first else decoder(x[:, :1], x[:, :1])
    torch.testing.assert_close(y[:1] if batch_first else y[:, :1], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("task", "sequence", "task vectors", "ffn task", "ffn sequence"))
def test_a_token_of_no_sample_has_no_gate_if_there_is_one_sample(name):
    make, tasks = LAYERS[name]
    layer = make().eval()
    if tasks is not None:
        set_tasks(layer, tasks[:1])
    x = torch.randn(4, IN, dtype=torch.float64)
    set_samples(layer, [0, 0, 0, -1])
    y = layer(x)
    set_samples(layer, [0, 0, 0])
    close(y[:3], layer(x[:3]))
    if name in ("task", "sequence"):
        close(y[3], layer.base_layer(x[3]))


def test_one_task_is_for_all_samples():
    layer = task_layer()
    set_tasks(layer, [2])
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = layer(x)
    set_samples(layer, [0, 1, 2, 0])
    close(layer(x), expected)


def test_passed_gates_are_of_samples_if_their_number_is_that_of_the_tokens():
    layer = linear(router="external")
    gates, x = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, IN, dtype=torch.float64)
    expected = layer(x, gates.flip(0))
    set_samples(layer, [2, 1, 0])
    close(layer(x, gates), expected)


def test_a_part_without_tasks_does_not_use_those_of_another_part():
    model = EncoderDecoder()
    config = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=3)
    replace_linears(model, config, ["encoder", "decoder"])
    set_tasks(model.encoder, IDS)
    with pytest.raises(RuntimeError, match=r"^the task gate has no tasks for this layer"):
        model(torch.randn(B, L, IN, dtype=torch.float64), 1)


def test_a_router_with_task_vectors_knows_sequence_first():
    layer, first = task_vector_layer(), task_vector_layer()
    router = layer.router
    options = dict(score="identity", normalize="none", batch_dim=1)
    config = MoeLoraConfig(num_experts=4, rank=2, router=router, **options)
    layer = MoeLoraLinear.from_linear(first.base_layer, config).double().eval()
    randomise(layer)
    set_tasks(layer, torch.randn(2, 5, dtype=torch.float64))
    vectors, x = router.task_vectors, torch.randn(3, 2, IN, dtype=torch.float64)
    y = layer(x)
    set_tasks(layer, vectors[:1])
    close(y[:, :1], layer(x[:, :1]))


def test_tasks_of_inference_mode_train():
    layer = task_layer()
    with torch.inference_mode():
        set_tasks(layer, torch.tensor(IDS))
        set_samples(layer, torch.arange(B).repeat_interleave(L))
    layer(torch.randn(B * L, IN, dtype=torch.float64)).sum().backward()
