"""A layer over a quantised linear: values, dtypes, training, memory, copies, compile."""

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
def test_y_and_gradients_match_the_formula(kind, dtype, impl):
    """y = base(x) + delta, in the dtype of base(x), and the gradients of x, A, B and router."""
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
    """With B = 0, y has the bits of the base's output."""
    base = make_base(kind)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert layer.base_layer is base
    assert not any(p.requires_grad for p in base.parameters())
    for shape in ((7, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN)):
        x = torch.randn(*shape)
        torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_of_adapters(kind):
    """A and B are float32, because the dtype of codes says nothing; or adapter_dtype.

    The weight of torchao names the dtype that it had before. A and B get that dtype.
    """
    weight_dtype = torch.bfloat16 if kind == "torchao_int8" else torch.float32
    base = make_base(kind, dtype=torch.bfloat16)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert {p.dtype for p in adapter_parameters(layer)} == {weight_dtype}
    explicit = MoeLoraLinear.from_linear(base, **MING, adapter_dtype="bfloat16")
    assert {p.dtype for p in adapter_parameters(explicit)} == {torch.bfloat16}
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert torch.isfinite(explicit(x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_train(kind):
    """Three steps of AdamW with dropout change every adapter and no bit of the base."""
    layer = make_layer(base=make_base(kind), dropout=0.1).train()
    # The first call of bitsandbytes casts the bias to its compute dtype.
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
    assert all(torch.equal(byte_values(after[n]), byte_values(frozen[n])) for n in frozen)
    assert {n for n, p in trained_parameters(layer).items() if torch.equal(p, before[n])} == set()
    assert before.keys() == {"lora_A", "lora_B", "router.weight", "router.bias"}


def byte_values(tensor):
    """Return the bytes of a tensor. Codes that are stored as floats may read as NaN."""
    tensor = tensor.qdata if hasattr(tensor, "qdata") else tensor
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_saves_no_dequantised_weight(kind):
    """Besides the base's own tensors, backward saves x [T, I], h [T, R], the gate and the routing.

    It saves no dequantised weight [O, I] and no output of the base [T, O]. The state dict has the
    adapters and the tensors of the base.
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
    # h, gates and logits in float32; experts and routing of K slots; room for the tiles.
    total_rank, experts = sum(layer.config.ranks()), layer.config.num_experts
    assert saved_bytes <= 4 * tokens * (total_rank + 8 * experts) + 1024
    assert not [t for t in saved.values() if features in t.shape]
    assert layer.state_dict().keys() - trained_parameters(layer).keys() == {
        f"base_layer.{n}" for n in layer.base_layer.state_dict()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_adapter_files(kind, tmp_path):
    """A deep copy, and a layer over a copy of the base with the saved adapter, give the same y."""
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
        # Only transformers can load 4-bit state dicts of bitsandbytes, with or without experts.
        other = make_layer(base=make_base(kind), seed=2)
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        assert not other.load_state_dict(state).missing_keys
        assert_same({"y": other(x)}, {"y": y})


def test_svd_segments_need_a_dense_weight():
    for base in (GptqLinear(nn.Linear(IN, OUT)), make_base("fp8")):
        with pytest.raises(ValueError, match=r"init: 'svd_segments' .*plain nn\.Linear"):
            MoeLoraLinear.from_linear(base, num_experts=2, rank=2, init="svd_segments")


@pytest.mark.parametrize("kind", ("gptq", "fp8", pytest.param("torchao_int8", marks=library)))
def test_a_layer_compiles(kind):
    layer = make_layer(base=make_base(kind))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        x, dy = inputs(tokens)
        # float32 sums in another order.
        actual = training_step(layer, x, dy, forward=compiled)
        assert_same(actual, training_step(layer, x, dy), rtol=1e-4, atol=1e-5)


@library
def test_four_bits_in_evaluation():
    """On some CPUs bitsandbytes packs the weight in evaluation; the packed form has no gradient.

    A layer does not keep the weight, so it works with the packed form and after unpacking.
    """
    layer = make_layer(base=bnb_4bit(nn.Linear(IN, OUT)))
    x, dy = inputs(5)
    y = layer(x).detach()
    with torch.inference_mode():
        actual = layer.eval()(x)
    # The packed kernel sums 64 products of size 1 in bfloat16.
    torch.testing.assert_close(actual, y, rtol=0, atol=64 * 2**-8)
    assert not torch.equal(actual, layer.base_layer(x))

    # state_dict() unpacks the weight again.
    layer.train().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx = training_step(layer, x, dy)["dx"]
    torch.testing.assert_close(
        dx.double(), linear_formula(layer, x, dy)["dx"], rtol=1e-5, atol=2e-5
    )
