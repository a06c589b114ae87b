"""set_tasks and set_samples on a part of a model: other parts keep what they have."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    link_siblings,
    record_routing,
    replace_linears,
    set_prototypes,
    set_samples,
    set_tasks,
)
from moelora_kernels.nn import TokenTaskRouter, lora_prototypes
from support.linears import randomise

B, L, IN, D = 3, 5, 8, 4
IDENTITY = dict(num_experts=4, rank=2, score="identity", normalize="none", granularity="token")


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (nn.Linear(IN, IN, dtype=torch.float64) for _ in range(2))

    def forward(self, x, beams=1):
        return self.decoder(self.encoder(x).repeat_interleave(beams, dim=0))


class Inside(nn.Module):
    """A user's router that contains a TokenTaskRouter."""

    def __init__(self, router):
        super().__init__()
        self.gate = router

    def forward(self, x):
        return self.gate(x)


class InsideWithSamples(Inside):
    def forward(self, x, samples=None):
        return self.gate(x, samples)


def model_with(router, **options):
    torch.manual_seed(0)
    model = TwoParts()
    config = MoeLoraConfig(router=router.double(), **IDENTITY, **options)
    replace_linears(model, config, ["encoder", "decoder"])
    return randomise(model)


def inputs():
    torch.manual_seed(1)
    return torch.randn(B, L, IN, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)


def test_parts_that_share_a_router_have_their_own_task_vectors():
    model = model_with(TokenTaskRouter(IN, D, 4))
    x, vectors = inputs()
    set_tasks(model, vectors)
    expected = model(x).repeat_interleave(2, dim=0)
    set_tasks(model.decoder, vectors.repeat_interleave(2, dim=0))
    torch.testing.assert_close(model(x, 2), expected, rtol=1e-11, atol=1e-12)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x, 2), expected, rtol=1e-11, atol=1e-12)
    # The router itself, for the layers that use it: the last call counts.
    model.encoder.router.hold_tasks(vectors)
    assert torch.equal(model(x), model_output(model, x, vectors))


def model_output(model, x, vectors):
    set_tasks(model, vectors)
    return model(x)


def test_a_part_without_task_vectors_does_not_use_those_of_another_part():
    model = model_with(TokenTaskRouter(IN, D, 4))
    x, vectors = inputs()
    set_tasks(model.encoder, vectors)
    with pytest.raises(RuntimeError, match=r"^the gate has no task vectors for this layer"):
        model(x)


def test_a_user_router_around_it_has_the_same_checks():
    x, vectors = inputs()
    bare, inside = (
        model_with(TokenTaskRouter(IN, D, 4)),
        model_with(Inside(TokenTaskRouter(IN, D, 4))),
    )
    inside.encoder.router.gate.load_state_dict(bare.encoder.router.state_dict())
    for model in (bare, inside):
        with pytest.raises(RuntimeError, match="no task vectors"):
            model(x)
        set_tasks(model, vectors)
    for name in ("encoder", "decoder"):
        for tensor in ("lora_A", "lora_B"):
            getattr(getattr(inside, name), tensor).data.copy_(getattr(getattr(bare, name), tensor))
    assert torch.equal(inside(x), bare(x))
    for model in (bare, inside):
        # 15 tokens are a multiple of 3 vectors, but their order is not known.
        for flattened in (x.flatten(0, 1), x.transpose(0, 1)):
            with pytest.raises(ValueError, match=r"^tasks: 3 task vectors"):
                model(flattened)


def test_a_user_router_with_parts_or_samples_says_what_to_do():
    x, vectors = inputs()
    model = model_with(Inside(TokenTaskRouter(IN, D, 4)))
    set_tasks(model, vectors)
    set_tasks(model.decoder, vectors.repeat_interleave(2, dim=0))
    with pytest.raises(RuntimeError, match=r"^router: Inside contains .* another part"):
        model(x, 2)
    set_tasks(model, vectors)
    set_samples(model, torch.arange(B)[:, None].expand(B, L))
    with pytest.raises(ValueError, match=r"define forward\(self, x, samples=None\)"):
        model(x)
    model = model_with(InsideWithSamples(TokenTaskRouter(IN, D, 4)))
    set_tasks(model, vectors)
    expected = model(x)
    set_samples(model, torch.arange(B).repeat(L))
    flipped = model(x.transpose(0, 1).flatten(0, 1)).view(L, B, IN)
    torch.testing.assert_close(flipped.transpose(0, 1), expected, rtol=1e-11, atol=1e-12)


def siblings(kind, **options):
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(IN, IN, dtype=torch.float64) for name in "qk"})
    replace_linears(layers, MoeLoraConfig(num_experts=4, rank=2, **options), ["q", "k"])
    randomise(layers)
    if kind == "linked":
        link_siblings(layers, [("q", "k")])
        return layers, lambda x: [layers["q"](x), layers["k"](x)]
    if kind == "group":
        group = MoeLoraGroup(q=layers["q"], k=layers["k"])
        return layers, lambda x: [*group(x)]
    return layers, lambda x: [layers["q"](x), layers["k"](x)]


TASK = dict(router="task", num_tasks=3)
SEQUENCE = dict(router="linear", granularity="sequence")
ROWS = torch.arange(B)[:, None].expand(B, L)


@pytest.mark.parametrize("kind", ("linked", "group"))
@pytest.mark.parametrize(
    ("options", "tasks", "change"),
    (
        (TASK, [1, 2, 3], lambda q, k: set_tasks(k, [2])),
        (TASK, [2], lambda q, k: set_tasks(k, [1, 2, 3])),
        (TASK, [1, 2, 3], lambda q, k: set_samples(k, ROWS.flip(0))),
        (SEQUENCE, None, lambda q, k: set_samples(k, torch.tensor([0, 1, 0]))),
        (
            dict(router="external"),
            torch.rand(B, 4, dtype=torch.float64),
            lambda q, k: set_tasks(k, torch.rand(B * L, 4, dtype=torch.float64)),
        ),
    ),
    ids=("ids of k", "more ids of k", "samples of k", "sequences of k", "gates of k"),
)
def test_siblings_with_other_rows_run_one_by_one(kind, options, tasks, change):
    x = inputs()[0]
    outputs = []
    for each in ("alone", kind):
        layers, run = siblings(each, **options)
        if tasks is not None:
            set_tasks(layers, tasks)
        torch.manual_seed(2)
        change(layers["q"], layers["k"])
        with record_routing(layers):
            outputs.append([*run(x), layers["q"].record.weights, layers["k"].record.weights])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    (
        ("rows", ValueError, r"^samples: expected numbers, 'flat' or None"),
        ([True, False], ValueError, r"^samples: expected whole numbers .*got torch.bool \[2\]"),
        ([0.0, 1.0], ValueError, r"^samples: expected whole numbers .*got torch.float32 \[2\]"),
        (1, ValueError, r"^samples: expected whole numbers .*got torch.int64 \[\]"),
        ([], ValueError, r"^samples: expected at least one entry"),
        ([[0, 1], [0]], TypeError, r"^samples: expected whole numbers"),
        (nn.Linear(1, 1), TypeError, r"^samples: expected whole numbers"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, r"^samples: .*meta device"),
    ),
    ids=("word", "bool", "float", "number", "empty", "ragged", "module", "meta"),
)
def test_samples_that_are_not_numbers(samples, error, message):
    layers, _ = siblings("alone", **TASK)
    with pytest.raises(error, match=message):
        set_samples(layers, samples)


def test_samples_on_something_else_than_a_model():
    with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got <class 'list'>"):
        set_samples([nn.Linear(2, 2)], [0])


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32))
def test_small_whole_numbers_are_samples(dtype):
    layers, run = siblings("alone", **TASK)
    set_tasks(layers, [1, 2, 3])
    x = inputs()[0]
    expected = run(x)[0]
    set_samples(layers, ROWS.to(dtype))
    assert torch.equal(run(x)[0], expected)


def test_prototypes_of_pruned_layers():
    """The mask of a pruning hook counts before the next forward, which writes `lora_A`."""
    layers, _ = siblings("alone", router="prototype")
    layer = layers["q"]
    for name in ("lora_A", "lora_B"):
        prune.random_unstructured(layer, name, amount=0.5)
        getattr(layer, f"{name}_orig").data.normal_()
    set_prototypes(layers)
    a, b = (getattr(layer, f"{n}_orig") * getattr(layer, f"{n}_mask") for n in ("lora_A", "lora_B"))
    expected = lora_prototypes(a, b, [2] * 4)
    torch.testing.assert_close(layer.router.prototypes, expected, rtol=1e-11, atol=1e-12)
