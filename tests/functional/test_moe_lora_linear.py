"""moe_lora_linear: values, dropout, autocast, gradients, and errors that name the argument."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import moe_lora_linear, reference
from moelora_kernels.types import Gate, Mixture, SiblingTensors


def arguments(**changes):
    args = {
        "x": torch.randn(2, 3, 8),
        "weight": torch.randn(5, 8),
        "bias": torch.randn(5),
        "lora_a": torch.randn(6, 8),
        "lora_b": torch.randn(5, 6),
        "gates": torch.rand(6, 2),
        "indices": torch.randint(0, 3, (6, 2)),
        "ranks": 2,
        "scaling": 1.0,
    }
    return {**args, **changes}


def test_functional_form():
    args = arguments()
    y = moe_lora_linear(**args)
    assert y.shape == (2, 3, 5)
    tensors = SiblingTensors(
        *([args[name]] for name in ("weight", "bias")),
        [],
        *([args[name]] for name in ("lora_a", "lora_b")),
        [],
        [],
    )
    (expected,), *_ = reference.wide(
        args["x"].view(6, 8),
        tensors,
        Gate(args["gates"], args["indices"]),
        Mixture((2, 2, 2), (1.0, 1.0, 1.0)),
    )
    torch.testing.assert_close(y.view(6, 5), expected)
    torch.testing.assert_close(moe_lora_linear(**args, impl="reference"), y)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    dense = torch.rand(2, 3)
    spread = moe_lora_linear(**arguments(gates=dense[rows], indices=None) | {"x": args["x"]})
    assert spread.shape == (2, 3, 5)


def test_functional_dropout_is_a_function_of_its_seed():
    args = arguments(dropout=0.5)
    first = moe_lora_linear(**args, seed=3)
    assert torch.equal(first, moe_lora_linear(**args, seed=torch.tensor(3)))
    assert not torch.equal(first, moe_lora_linear(**args, seed=4))
    torch.manual_seed(5)
    drawn = moe_lora_linear(**args)
    torch.manual_seed(5)
    assert torch.equal(drawn, moe_lora_linear(**args))


BAD = {
    "x": {"x": torch.tensor(1.0)},
    "weight": {"weight": torch.randn(5, 9)},
    "bias": {"bias": torch.randn(4)},
    "lora_a": {"lora_a": torch.randn(6, 9)},
    "lora_b": {"lora_b": torch.randn(5, 7)},
    "ranks": {"ranks": (2, 2, 3)},
    "ranks: expected a divisor": {"ranks": 4},
    "ranks: expected ranks of at least 1": {"ranks": (3, 3, 0)},
    "scaling": {"scaling": (1.0, 2.0)},
    "scaling: expected finite": {"scaling": float("nan")},
    "gates": {"gates": torch.rand(5, 2)},
    "gates: expected at most E = 3": {
        "gates": torch.rand(6, 4),
        "indices": torch.zeros(6, 4, dtype=torch.int32),
    },
    "gates: expected 1 or 6 rows": {"gates": torch.rand(2, 3), "indices": None},
    "indices": {"indices": torch.zeros(6, 3, dtype=torch.int64)},
    "rows": {"gates": torch.rand(2, 3), "indices": None, "rows": torch.zeros(5, dtype=torch.int64)},
    "rows: expected None": {"rows": torch.zeros(6, dtype=torch.int64)},
    "dropout": {"dropout": 1.0},
    "impl: expected one of": {"impl": "fast"},
    "impl: 'grouped' is not supported": {
        "impl": "grouped",
        "gates": torch.rand(6, 3),
        "indices": None,
    },
    "impl: 'decode' is not supported for this call: grad mode is on": {"impl": "decode"},
    "lora_b: expected x's device": {"lora_b": torch.empty(5, 6, device="meta")},
}
BAD_TYPES = {
    "x": {"x": torch.ones(2, 3, 8, dtype=torch.int64)},
    "weight": {"weight": torch.randn(5, 8).bfloat16()},
    "lora_a": {"lora_a": torch.randn(6, 8).bfloat16(), "lora_b": torch.randn(5, 6).bfloat16()},
    "lora_b": {"lora_b": torch.randn(5, 6).double()},
    "gates": {"gates": torch.ones(6, 2, dtype=torch.int64)},
    "indices": {"indices": torch.zeros(6, 2)},
    "rows": {"gates": torch.rand(2, 3), "indices": None, "rows": torch.zeros(6)},
    "seed: expected one int64": {"dropout": 0.5, "seed": torch.tensor(1.0)},
    "seed: expected an int": {"dropout": 0.5, "seed": 1.5},
    "ranks": {"ranks": 2.0},
    "scaling": {"scaling": None},
    "dropout": {"dropout": "0.1"},
    "gates: expected a tensor": {"gates": None},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_name_the_argument(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        moe_lora_linear(**arguments(**BAD[message]))


@pytest.mark.parametrize("message", BAD_TYPES)
def test_bad_types_name_the_argument(message):
    with pytest.raises(TypeError, match=f"^{message}"):
        moe_lora_linear(**arguments(**BAD_TYPES[message]))


def test_autocast_computes_and_returns_its_dtype():
    args = arguments()
    leaves = [args[k].requires_grad_() for k in ("x", "weight", "lora_a", "lora_b", "gates")]
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_lora_linear(**args)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 5
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            moe_lora_linear(**arguments(x=torch.randn(2, 3, 8).bfloat16())).dtype == torch.bfloat16
        )


def test_weight_and_bias_may_train():
    args = arguments()
    args["weight"].requires_grad_()
    args["bias"].requires_grad_()
    moe_lora_linear(**args).sum().backward()
    x = args["x"].view(6, 8)
    torch.testing.assert_close(args["weight"].grad, x.sum(0).expand(5, 8))
    torch.testing.assert_close(args["bias"].grad, torch.full((5,), 6.0))


GRADCHECKS = {
    "sparse": {},
    "ids outside": {"outside": True},
    "dropout": {"dropout": 0.3},
    "mixed ranks": {"ranks": (1, 3, 2)},
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck_of_the_functional_form(name):
    options = dict(GRADCHECKS[name])
    outside = options.pop("outside", False)
    ranks = options.pop("ranks", (2, 2, 2))
    indices = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1]])
    if outside:
        indices[1, 0], indices[2] = -1, 3
    shapes = ((4, 5), (3, 5), (3,), (6, 5), (3, 6), (4, 2))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(*tensors):
        return moe_lora_linear(
            *tensors, indices, ranks=ranks, scaling=(0.5, 1.0, 2.0), seed=7, impl="grouped",
            **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, tensors)
