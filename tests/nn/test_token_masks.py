"""Which mask belongs to which layer, and which tokens it counts."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, record_routing, replace_linears
from moelora_kernels.nn.routing_record import RoutedCall
from moelora_kernels.nn.token_masks import follow_masks, reads_encoder, token_mask, tokens_per_row

MASK = torch.tensor([[1, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("shape", "batch_dim", "expected"),
    (
        ((2, 3), 0, [1, 1, 0, 0, 1, 0]),
        ((6,), 0, [1, 1, 0, 0, 1, 0]),
        ((2, 3, 2), 0, [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]),
        ((3, 2), 1, [1, 0, 1, 1, 0, 0]),
        ((6,), 1, [1, 0, 1, 1, 0, 0]),
        # Sequence first without batch_dim, the last token alone, patches, more rows.
        ((3, 2), 0, None),
        ((2, 3), 1, None),
        ((2, 1), 0, None),
        ((2,), 0, None),
        ((2, 6), 0, None),
        ((4, 3), 0, None),
        ((12,), 0, None),
        ((0,), 0, None),
    ),
    ids=str,
)
def test_a_mask_fits_or_is_not_used(shape, batch_dim, expected):
    actual = token_mask(MASK, shape, batch_dim)
    assert (None if actual is None else actual.int().tolist()) == expected


def call_of(rows, shape, weight_rows) -> RoutedCall:
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    return RoutedCall(torch.ones(weight_rows, 4), None, None, shape, rows)


@pytest.mark.parametrize(
    ("rows", "shape", "weight_rows", "expected", "unmasked"),
    (
        (None, (2, 3), 6, [1, 1, 0, 0, 1, 0], [1] * 6),
        (None, (2, 3), 1, [3], [6]),
        ([0, 0, 0, 1, 1, 1], (2, 3), 2, [2, 1], [3, 3]),
        # Sequence first, and tokens of no sample.
        ([0, 1, 0, 1, 0, 1], (3, 2), 2, [2, 1], [3, 3]),
        ([1, -1, 1, 0, -1, 1], (2, 3), 2, [0, 1], [1, 3]),
    ),
    ids=str,
)
def test_tokens_of_each_gate_row(rows, shape, weight_rows, expected, unmasked):
    call = call_of(rows, shape, weight_rows)
    mask = token_mask(MASK, shape, batch_dim=int(shape == (3, 2)))
    assert tokens_per_row(call, mask).tolist() == expected
    assert tokens_per_row(call).tolist() == unmasked


def test_an_empty_batch():
    call = RoutedCall(torch.ones(0, 4), None, None, (0, 3))
    mask = token_mask(torch.ones(0, 3), call.shape)
    assert tokens_per_row(call, mask).tolist() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    (
        ("decoder.block.0.layer.1.EncDecAttention.k", True),
        ("decoder.block.0.layer.1.EncDecAttention.q", False),
        ("decoder.block.0.layer.0.SelfAttention.v", False),
        ("model.decoder.layers.0.encoder_attn.v_proj", True),
        ("model.decoder.layers.0.encoder_attn.v_proj.moelora_experts.default", True),
        ("model.decoder.layers.0.encoder_attn.out_proj", False),
        ("model.encoder.layers.0.self_attn.k_proj", False),
        ("bert.encoder.layer.0.crossattention.self.key", True),
        ("bert.encoder.layer.0.attention.self.key", False),
        ("transformer.h.0.crossattention.c_attn", True),
        ("transformer.h.0.attn.c_attn", False),
        ("language_model.layers.1.cross_attn.k_proj", True),
        ("lm_head", False),
        ("", False),
    ),
)
def test_names_of_linears_that_read_the_encoder(name, expected):
    assert reads_encoder(name) == expected


class Toy(nn.Module):
    """A model with a vision part and a text part of the same number of tokens."""

    def __init__(self):
        super().__init__()
        self.vision, self.projector, self.text = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, attention_mask=None, again=False):
        if again:
            self.forward_text(x)
        return self.text(x + self.projector(self.vision(x)))

    def forward_text(self, x):
        return self.text(x)


def toy():
    model = Toy()
    replace_linears(model, MoeLoraConfig(num_experts=4, rank=2, top_k=2), ".+")
    return model


def masks_of(layer):
    return [call.mask for call in layer.record.last]


@pytest.mark.parametrize("kind", ("plain", "copy", "compiled"))
def test_the_mask_of_a_forward_is_that_of_its_call(kind):
    model = toy()
    follow_masks(model)
    follow_masks(model)
    assert len(model._forward_pre_hooks) == 1
    called = model
    if kind == "copy":
        model = called = copy.deepcopy(model)
    elif kind == "compiled":
        called = torch.compile(model, backend="eager")
    x, first, second = torch.randn(2, 3, 8), torch.ones(2, 3), MASK
    with record_routing(model):
        for args, kwargs in (((x, first), {}), ((x,), {"attention_mask": second})):
            called(*args, **kwargs)
            mask = args[1] if len(args) == 2 else second
            assert [m is mask for m in masks_of(model.text)] == [True]
            assert masks_of(model.vision) == masks_of(model.projector) == [None]
        # No mask, a 4-D mask, and a forward without a call of the model have none.
        for mask in (None, torch.ones(2, 1, 3, 3), {"full": MASK}):
            called(x, mask)
            assert masks_of(model.text) == [None]
        model.forward_text(x)
        assert masks_of(model.text) == [None]


def test_a_forward_that_raises_leaves_no_mask():
    model = toy()
    follow_masks(model)
    with record_routing(model):
        with pytest.raises(ValueError, match="x: expected"):
            model(torch.randn(2, 3, 7), MASK)
        assert model.text.record.mask is None
        model.text(torch.randn(2, 3, 8))
        assert masks_of(model.text) == [None]


def test_an_inner_model_has_its_own_mask():
    """A multimodal model calls its language model with a mask of image and text tokens."""

    class PreTrainedModel(nn.Module):
        pass

    class Inner(PreTrainedModel):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

        def forward(self, x, attention_mask=None):
            return self.q_proj(x)

    class Outer(PreTrainedModel):
        def __init__(self):
            super().__init__()
            self.inner, self.score = Inner(), nn.Linear(8, 8)

        def forward(self, x, attention_mask, inner_mask):
            return self.score(self.inner(x, inner_mask) + self.inner(x))

    model = Outer()
    replace_linears(model, MoeLoraConfig(num_experts=4, rank=2, top_k=2), ["q_proj", "score"])
    follow_masks(model)
    outer, inner = torch.ones(2, 3), MASK
    with record_routing(model):
        model(torch.randn(2, 3, 8), outer, inner)
        assert [m is inner for m in masks_of(model.inner.q_proj)] == [True, False]
        assert masks_of(model.inner.q_proj)[1] is outer
        assert masks_of(model.score)[0] is outer
        # A trainer may call the inner model alone.
        model.inner(torch.randn(2, 3, 8), inner)
        assert masks_of(model.inner.q_proj)[-1] is inner


class Multimodal(nn.Module):
    """A toy whose names do not say which part reads the image."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.bridge, self.lm = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids, pixel_values, attention_mask=None):
        embeds = self.encode(pixel_values)
        hidden = nn.functional.one_hot(input_ids, 8).float() + embeds.mean(dim=1, keepdim=True)
        for layer in self.lm:
            hidden = layer(hidden)
        return hidden

    def encode(self, values):
        features = self.tower(values)
        return self.bridge(features)


class OtherNames(Multimodal):
    def forward(self, pictures, tokens, attention_mask=None):
        return super().forward(tokens, pictures)


class Unknown(Multimodal):
    """Neither name says which is the text."""

    def forward(self, first, second, attention_mask=None):
        hidden = first
        for layer in self.lm:
            hidden = layer(hidden)
        return hidden + self.bridge(self.tower(second)).mean()


def multimodal(kind):
    model = kind()
    replace_linears(model, MoeLoraConfig(num_experts=4, rank=2, top_k=2), r"bridge|.*\d")
    return model


@pytest.mark.parametrize(
    ("kind", "text", "image"),
    ((Multimodal, "input_ids", "pixel_values"), (OtherNames, "tokens", "pictures")),
)
def test_a_tower_of_any_name_does_not_get_the_mask_of_the_text(kind, text, image):
    """Two samples of three tokens and three patches: the shapes agree."""
    model = multimodal(kind)
    follow_masks(model)
    inputs = {text: torch.zeros(2, 3, dtype=torch.int64), image: torch.randn(2, 3, 8)}
    arguments = [
        inputs[name] for name in inspect.signature(kind.forward).parameters if name in inputs
    ]
    for args, kwargs in ((arguments, {}), ([], inputs)):
        with record_routing(model):
            model(*args, **kwargs, attention_mask=MASK)
            assert masks_of(model.lm[0])[0] is MASK
            assert masks_of(model.tower[0]) == masks_of(model.tower[1]) == [None]
            assert masks_of(model.bridge) == [None]


def test_an_input_that_is_not_known_is_named():
    model = multimodal(Unknown)
    with pytest.warns(UserWarning, match=r"^attention_mask: it is taken for that of \['first'"):
        follow_masks(model)
    x = torch.randn(2, 3, 8)
    with record_routing(model):
        model(x, x, MASK)
        assert masks_of(model.lm[0])[0] is MASK
        assert masks_of(model.bridge) == [None]
