"""Which layers and calls decode, and that their values are those of the other forms."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import MoeLoraGroup, ops, record_routing
from moelora_kernels.dispatch import DECODE_TOKENS
from moelora_kernels.functional import run_layer
from moelora_kernels.types import NO_DROPOUT, Dropout
from support.backends import needs_library
from support.cases import LAYERS, layer_case
from support.inputs import Inputs
from support.linears import make_layer

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("name", ("router", "siblings", "sparse", "rows", "dense", "share_a"))
def test_a_layer_decodes_if_it_is_told_to(name: str) -> None:
    inputs = Inputs(LAYERS[name]._replace(T=DECODE_TOKENS), FP32)
    gate = None if inputs.has_router else inputs.gate
    arguments = inputs.mixture, inputs.x, inputs.linears, gate, NO_DROPOUT
    with torch.no_grad():
        actual, expected = run_layer(*arguments, "decode"), run_layer(*arguments, "reference")
    for y, reference_y in zip(actual.y, expected.y, strict=True):
        torch.testing.assert_close(y, reference_y, rtol=1e-5, atol=1e-5)
    for tensor, reference_tensor in zip(actual.gate, expected.gate, strict=True):
        assert (tensor is None) == (reference_tensor is None)


def test_decode_is_refused_with_the_reason() -> None:
    inputs = Inputs(layer_case(T=DECODE_TOKENS + 1), FP32)
    arguments = inputs.mixture, inputs.x, inputs.linears, None
    start = "^impl: 'decode' is not supported for this call: "
    with pytest.raises(ValueError, match=f"{start}grad mode is on; call the layer inside torch"):
        run_layer(*arguments, NO_DROPOUT, "decode")
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"{start}expected at most 64 tokens, got 65$"):
            run_layer(*arguments, NO_DROPOUT, "decode")
        with pytest.raises(ValueError, match=f"{start}it has no dropout"):
            run_layer(*arguments, Dropout(0.5, False, torch.tensor([1])), "decode")


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that a layer called."""
    names: list[str] = []

    def watch(name: str) -> None:
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a: (names.append(name), op(*a))[1])

    for name in ("wide", "grouped", "decode", "decode_flat"):
        watch(name)
    return names


OPTIONS = {
    "plain": dict(top_k=2),
    "all_experts": {},
    "share_a": dict(top_k=2, share="A"),
    "noise_in_training": dict(top_k=2, noise=0.1),
    "no_router_bias": dict(top_k=2, router_bias=False),
    "mlp": dict(router="mlp"),
    "shared_expert": dict(top_k=2, shared_expert="always"),
    "threshold": dict(select="threshold", threshold=0.2, top_k=None),
}


@needs_library
@pytest.mark.parametrize("shape", ((), (1,), (2, 3), (DECODE_TOKENS,), (0,), (2, 0)), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_auto_decodes_without_gradients(options: dict, shape: tuple, calls: list) -> None:
    layer = make_layer(FP32, **options).eval()
    specification = make_layer(FP32, impl="reference", **options).eval()
    x = torch.randn(*shape, 12)
    with torch.no_grad():
        actual, expected = layer(x), specification(x)
    assert len(calls) == 1
    assert calls[0].startswith("decode")
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@needs_library
def test_auto_does_not_decode_otherwise(calls: list) -> None:
    """With gradients, in training mode, with more tokens."""
    x = torch.randn(3, 12)
    layer = make_layer(FP32, top_k=2).train()
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
        layer.eval()(torch.randn(DECODE_TOKENS + 1, 12))
    layer(x)
    assert not any(name.startswith("decode") for name in calls)
    assert len(calls) == 4


@needs_library
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_plain_layers_decode_like_all_others(dtype: torch.dtype) -> None:
    """A hook makes a base that is not plain: the general way gives the same values."""
    layers = {name: make_layer(dtype, seed=i, top_k=2).eval() for i, name in enumerate("qkv")}
    group, x = MoeLoraGroup(**layers), torch.randn(2, 3, 12).to(dtype)
    with torch.no_grad():
        plain, singles = group(x), [layer(x) for layer in layers.values()]
        for layer in layers.values():
            layer.router.register_forward_hook(lambda *arguments: None)
        general = group(x)
    rounding = 4 * torch.finfo(dtype).eps
    for y, single, other in zip(plain, singles, general, strict=True):
        torch.testing.assert_close(y, single, rtol=rounding, atol=rounding)
        torch.testing.assert_close(y, other, rtol=rounding, atol=rounding)


def hook(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, y: 2 * y)


# name -> a change of the first of two siblings; plain layers lack what it adds.
CHANGES = {
    "hook_of_the_base": lambda layer: hook(layer.base_layer),
    "hook_of_the_router": lambda layer: hook(layer.router),
    "no_bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "no_router_bias": lambda layer: setattr(layer.router, "bias", None),
}


@needs_library
@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_is_not_plain(name: str) -> None:
    """The values are those of the reference, and every sibling keeps its own tensors."""
    decoding, expected = (
        MoeLoraGroup(
            **{key: make_layer(FP32, seed=i, top_k=2, impl=impl) for i, key in enumerate("qk")}
        ).eval()
        for impl in ("auto", "reference")
    )
    x = torch.randn(3, 12)
    for group in (decoding, expected):
        CHANGES[name](group.q)
    with torch.no_grad():
        for y, reference_y in zip(decoding(x), expected(x), strict=True):
            torch.testing.assert_close(y, reference_y, rtol=1e-5, atol=1e-5)


@needs_library
def test_autocast_the_routing_record_and_bad_input() -> None:
    layer, x = make_layer(FP32, top_k=2).eval(), torch.randn(3, 12)
    with torch.no_grad():
        with torch.autocast("cpu", BF16):
            assert layer(x).dtype == BF16
        with record_routing(layer):
            layer(x)
            logits = layer.record.logits
    torch.testing.assert_close(logits, layer.router(x))
    with pytest.raises(ValueError, match=r"^x: "), torch.no_grad():
        layer(torch.randn(3, 24))
    layer.base_layer.double()
    with pytest.raises(TypeError, match=r"^x: expected the base's dtype"), torch.no_grad():
        layer(x)
