"""Does a layer over a quantised base compute its formula, and train its adapters only?"""

import copy
import warnings

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraLinear,
    adapter_parameters,
)
from moelora_kernels.checkpoints import load_adapter, save_adapter
from moelora_kernels.testing import assert_within_budget
from support.compare import assert_same, training_step
from support.linears import MING, make_layer
from support.quantised import (
    IN,
    KINDS,
    OUT,
    GptqLinear,
    bnb_4bit,
    inputs,
    library,
    linear_formula,
    make_base,
    trained_parameters,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*deprecated:DeprecationWarning"
)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_y_and_gradients_are_those_of_the_formula(kind, dtype, impl):
    """y = base(x) + delta in the dtype of base(x); gradients of x (both ways), A, B and router."""
    layer = make_layer(base=make_base(kind), impl=impl)
    returned = layer.base_layer(torch.zeros(1, IN, dtype=dtype)).dtype
    assert returned == (torch.float16 if kind == "gptq_fp16" else dtype)
    x, dy = inputs(2, 5, dtype=dtype, dy_dtype=returned)
    actual, clone = training_step(layer, x, dy), copy.deepcopy(layer)
    assert actual["y"].dtype == returned
    assert actual["dx"].dtype == dtype
    assert {actual[name].dtype for name in trained_parameters(layer)} == {torch.float32}
    clone.config = layer.config.replace(impl="reference")
    coarsest = max((dtype, returned), key=lambda d: torch.finfo(d).eps)
    assert_within_budget(
        actual, linear_formula(layer, x, dy), training_step(clone, x, dy), coarsest
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_is_its_base(kind):
    """B = 0 adds exactly nothing, bit for bit: the base's output is taken as it is."""
    base = make_base(kind)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert layer.base_layer is base
    assert not any(p.requires_grad for p in base.parameters())
    for shape in ((7, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN)):
        x = torch.randn(*shape)
        torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_float32_or_as_asked(kind):
    """Codes are no dtype for A and B, also where they are stored in floats.

    torchao's weight says the dtype that it stands for, and that is taken.
    """
    stands_for = torch.bfloat16 if kind == "torchao_int8" else torch.float32
    base = make_base(kind, dtype=torch.bfloat16)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert {p.dtype for p in adapter_parameters(layer)} == {stands_for}
    asked = MoeLoraLinear.from_linear(base, **MING, adapter_dtype="bfloat16")
    assert {p.dtype for p in adapter_parameters(asked)} == {torch.bfloat16}
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert torch.isfinite(asked(x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_train(kind):
    """Three steps of AdamW with dropout: every bit of the base stays, every adapter moves."""
    layer = make_layer(base=make_base(kind), dropout=0.1).train()
    # bitsandbytes casts the bias to its compute dtype in the first call.
    layer(torch.randn(2, IN))
    frozen = copy.deepcopy(layer.base_layer.state_dict())
    before = {n: p.detach().clone() for n, p in trained_parameters(layer).items()}
    optimizer = torch.optim.AdamW(adapter_parameters(layer), lr=1e-2)
    x, target = inputs(16)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (layer(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    after = layer.base_layer.state_dict()
    assert after.keys() == frozen.keys()
    assert all(torch.equal(_bits(after[n]), _bits(frozen[n])) for n in frozen)
    assert {n for n, p in trained_parameters(layer).items() if torch.equal(p, before[n])} == set()
    assert before.keys() == {"lora_A", "lora_B", "router.weight", "router.bias"}


def _bits(tensor):
    """Bytes, also of a tensor subclass; codes stored in floats may read as no numbers."""
    tensor = tensor.qdata if hasattr(tensor, "qdata") else tensor
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_made_or_kept(kind):
    """Beside what the base saves, backward keeps rank space; the adapter's file, A, B and router.

    x [T, I], h [T, R], gate and routing; a dequantised weight would be I x O floats, and an
    output of the base T x O.
    """
    features, tokens = 256, 16
    layer = make_layer(base=make_base(kind, features, features))
    x = torch.randn(tokens, features, requires_grad=True)

    saved_by_base, saved = [], {}
    inside = []
    layer.base_layer.register_forward_pre_hook(lambda *_: inside.append(True))
    layer.base_layer.register_forward_hook(lambda *_: inside.clear())

    def keep(tensor):
        if inside:
            saved_by_base.append(tensor)
        else:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    saved_by_base = [t for t in saved_by_base if type(t) in (torch.Tensor, nn.Parameter)]
    for tensor in (x, *adapter_parameters(layer), *saved_by_base):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    saved_bytes = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert y.requires_grad
    assert saved
    # h, gates and logits at most in float32, indices and routing of K slots, with room for tiles.
    total_rank, experts = sum(layer.config.ranks()), layer.config.num_experts
    assert saved_bytes <= 4 * tokens * (total_rank + 8 * experts) + 1024
    assert not [t for t in saved.values() if features in t.shape]
    assert layer.state_dict().keys() - trained_parameters(layer).keys() == {
        f"base_layer.{n}" for n in layer.base_layer.state_dict()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind, tmp_path):
    """A deep copy and a layer over a copy of the base with the adapter's file give the same y."""
    layer = make_layer(base=make_base(kind))
    x = torch.randn(4, IN)
    y = layer(x)
    clone = copy.deepcopy(layer)
    assert_same({"y": clone(x)}, {"y": y})
    with torch.no_grad():
        clone.lora_B.zero_()
    assert_same({"y": layer(x)}, {"y": y})
    save_adapter(layer, tmp_path / "adapter.safetensors")
    other = make_layer(base=copy.deepcopy(layer.base_layer), seed=1)
    assert not torch.equal(other(x), y)
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert_same({"y": other(x)}, {"y": y})
    if not kind.startswith("bnb_4bit"):
        # bitsandbytes loads its 4-bit states through transformers alone, with or without experts.
        other = make_layer(base=make_base(kind), seed=2)
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        assert not other.load_state_dict(state).missing_keys
        assert_same({"y": other(x)}, {"y": y})


def test_a_base_without_a_dense_weight_is_not_changed():
    for base in (GptqLinear(nn.Linear(IN, OUT)), make_base("fp8")):
        with pytest.raises(ValueError, match=r"init: 'svd_segments' .*plain nn\.Linear"):
            MoeLoraLinear.from_linear(base, num_experts=2, rank=2, init="svd_segments")


@pytest.mark.parametrize("kind", ("gptq", "fp8", pytest.param("torchao_int8", marks=library)))
def test_a_called_base_compiles(kind):
    layer = make_layer(base=make_base(kind))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        x, dy = inputs(tokens)
        # Fused sums of float32 in another order.
        actual = training_step(layer, x, dy, forward=compiled)
        assert_same(actual, training_step(layer, x, dy), rtol=1e-4, atol=1e-5)


@library
def test_four_bits_in_evaluation():
    """On some CPUs bitsandbytes packs a weight for evaluation and has no gradient for that form.

    A layer neither reads nor keeps the weight: it follows, to the packed form and back.
    """
    layer = make_layer(base=bnb_4bit(nn.Linear(IN, OUT)))
    x, dy = inputs(5)
    y = layer(x).detach()
    with torch.inference_mode():
        actual = layer.eval()(x)
    # That kernel computes in bf16: 64 products of size 1.
    torch.testing.assert_close(actual, y, rtol=0, atol=64 * 2**-8)
    assert not torch.equal(actual, layer.base_layer(x))

    # Reading its state unpacks it again.
    layer.train().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx = training_step(layer, x, dy)["dx"]
    torch.testing.assert_close(
        dx.double(), linear_formula(layer, x, dy)["dx"], rtol=1e-5, atol=2e-5
    )
