"""The autograd Function and the functional form: values, gradients, contract."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.config

import moelora_kernels
from moelora_kernels import moe_lora_linear, reference
from moelora_kernels.functional import run_layer
from moelora_kernels.testing import assert_within_budget, error
from moelora_kernels.types import Gate, Mixture, SiblingTensors
from support.layers import assert_case, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SHAPES = {
    # name -> what it would catch
    "odd sizes": {"tokens": 37, "in_features": 31, "out_features": (17,), "ranks": (3, 3, 3)},
    "ranks of 1": {"ranks": (1,) * 8},
    "rank 128": {"ranks": (128, 128), "in_features": 40},
    "ranks that differ": {"ranks": (1, 16, 3, 64, 2)},
    "one expert": {"ranks": (5,), "top_k": 1},
    "one token": {"tokens": 1},
    "prime tokens, several blocks": {"tokens": 257, "in_features": 67, "out_features": (71,)},
    "top 1": {"top_k": 1},
    "all experts": {"top_k": 4},
    "not renormalised": {"renormalize": False, "temperature": 0.7},
    "all experts, not renormalised": {"top_k": 4, "renormalize": False},
    "aux gradient on the logits": {"aux": True, "renormalize": False},
    "no biases": {"bias": False},
    "siblings": {"out_features": (17, 5, 9), "aux": True},
    "shared A": {"share_a": True, "out_features": (17, 5)},
    "dropout": {"dropout": 0.3, "out_features": (17, 5)},
    "dropout per expert": {"dropout": 0.3, "dropout_per_expert": True, "ranks": (1, 3, 2, 4)},
    "dense": {"gate": "dense"},
    "dense, shared A": {"gate": "dense", "share_a": True},
    "gate rows": {"gate": "rows", "out_features": (17, 5)},
    "one gate row": {"gate": "one"},
    "sparse, siblings": {"gate": "sparse", "out_features": (17, 5)},
    "sparse, dropout": {"gate": "sparse", "dropout": 0.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_parity(name, dtype):
    assert_case(make_case(**SHAPES[name]), dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("siblings", "dropout per expert", "sparse, siblings"))
def test_parity_with_float32_adapters(name, dtype):
    assert_case(make_case(**SHAPES[name]), dtype, adapters=torch.float32)


@pytest.mark.parametrize("routing", ("uniform", "zipf", "one", "empty"))
def test_parity_of_every_routing_distribution(routing):
    case = make_case(tokens=64, gate="sparse", routing=routing, ranks=(4,) * 6)
    assert_case(case, torch.bfloat16)


def test_an_expert_without_tokens_has_gradients_of_exactly_zero():
    case = make_case(tokens=64, gate="sparse", routing="empty", ranks=(4,) * 6).to(torch.bfloat16)
    found = case.run()
    assert found["dA0"][20:].eq(0).all()
    assert found["dB0"][:, 20:].eq(0).all()
    assert found["dA0"][:20].ne(0).any(dim=1).all()


@pytest.mark.parametrize(
    "name", ("odd sizes", "siblings", "dropout", "dense", "gate rows", "sparse, siblings")
)
def test_no_tokens(name):
    case = make_case(**{**SHAPES[name], "tokens": 0})
    found, expected = case.run(), case.reference()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert found[key].eq(0).all(), key


@pytest.mark.parametrize("index", (-1, 4, 2**31 - 1, -(2**31)))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_indices_out_of_range_are_not_routed(index, dtype):
    case = make_case(gate="sparse", tokens=12)
    case.gate.experts[::3, 1] = index
    case.gate.experts[5] = index
    case.gate = case.gate._replace(experts=case.gate.experts.to(dtype))
    low = case.to(torch.float32)
    found = low.run()
    assert_within_budget(found, case.reference(), low.reference(), torch.float32)
    assert found["dgates"][::3, 1].eq(0).all()
    assert found["dgates"][5].eq(0).all()


def test_int64_index_past_int32_does_not_wrap_into_range():
    case = make_case(gate="sparse", tokens=4).to(torch.float32)
    case.gate.experts[:] = 2**32 + 1
    found = case.run()
    assert found["dA0"].eq(0).all()
    assert found["dB0"].eq(0).all()


@pytest.mark.parametrize("strides", ("expanded", "transposed", "narrowed", "another dtype"))
def test_dy_of_any_strides_and_dtype(strides):
    # What sum(), a transpose, cat and an fp32 loss hand back.
    case = make_case(tokens=16, out_features=(12, 12))
    low = case.to(torch.bfloat16)
    if strides == "expanded":
        low.dy = [torch.ones((), dtype=torch.bfloat16).expand(16, 12) for _ in case.dy]
    elif strides == "transposed":
        low.dy = [torch.randn(12, 16).bfloat16().t() for _ in case.dy]
    elif strides == "narrowed":
        low.dy = [torch.randn(18, 40).bfloat16()[2:, 5:17] for _ in case.dy]
    case.dy = [g.double() for g in low.dy]
    if strides == "another dtype":
        low.dy = [g.float() for g in low.dy]
        x = low.x.clone().requires_grad_()
        ys, _ = low.forward(x)
        loss = sum((y.float() * g).sum() for y, g in zip(ys, low.dy, strict=True))
        loss.backward()
        assert error(x.grad, case.reference()["dx"]) < 0.2
        low.dy = [g.bfloat16() for g in low.dy]
    assert_within_budget(low.run(), case.reference(), low.reference(), torch.bfloat16)


def test_a_sibling_without_gradient_counts_as_zero():
    case = make_case(out_features=(5, 7)).to(torch.float64)
    x = case.x.requires_grad_()
    ys, _ = case.forward(x)
    ys[0].backward(case.dy[0])
    case.dy[1] = torch.zeros_like(case.dy[1])
    torch.testing.assert_close(x.grad, case.reference()["dx"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("siblings", "dropout per expert", "gate rows", "shared A"))
def test_two_runs_give_the_same_bits(name):
    case = make_case(**{**SHAPES[name], "tokens": 131}).to(torch.bfloat16)
    first, second = case.run(), case.run()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_nan_of_a_token_stays_in_its_output():
    case = make_case(tokens=9).to(torch.float32)
    clean = case.run()["y0"]
    case.x[4] = torch.nan
    found = case.run()["y0"]
    assert found[4].isnan().all()
    others = [t for t in range(9) if t != 4]
    assert torch.equal(found[others], clean[others])


def test_nan_of_an_expert_stays_with_the_tokens_that_chose_it():
    case = make_case(gate="sparse", routing="empty", tokens=9).to(torch.float32)
    clean = case.run()
    case.linears[0].lora_a[12:] = torch.nan
    case.linears[0].lora_b[:, 12:] = torch.nan
    found = case.run()
    for key in ("dgates", "dB0"):
        assert torch.equal(found[key][:, :2], clean[key][:, :2]), key
    assert torch.equal(found["dA0"], clean["dA0"])


def test_memory_saved_for_backward():
    # Beyond x and the parameters: h and the gate or routing, at most 2 R + 12 E bytes per token.
    for options in ({}, {"top_k": 4}, {"renormalize": False}, {"gate": "sparse"}):
        case = make_case(tokens=128, **options).to(torch.bfloat16)
        x = case.x.requires_grad_()
        siblings = [
            s._replace(lora_a=s.lora_a.requires_grad_(), lora_b=s.lora_b.requires_grad_())
            for s in case.linears
        ]
        given = [x, *(t for s in siblings for t in s if t is not None)]
        own = {t.untyped_storage().data_ptr() for t in given}
        saved = {}

        def pack(tensor, own=own, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gate = case.gate
            if gate is not None:
                gate = gate._replace(weights=gate.weights.float())
            case.forward(x, siblings, gate=gate)
        rank, experts = sum(case.mixture.ranks), len(case.mixture.ranks)
        assert 128 * 2 * rank <= sum(saved.values()) <= 128 * (2 * rank + 12 * experts), options


def test_gradcheck():
    for options in (
        {},
        {"gate": "sparse"},
        {"gate": "rows"},
        {"dropout": 0.3, "dropout_per_expert": True},
        {"share_a": True, "renormalize": False, "temperature": 0.6},
    ):
        case = make_case(tokens=3, in_features=4, out_features=(3, 2), ranks=(1, 1, 1), **options)
        tensors = [case.x, *(t for s in case.linears for t in s if t is not None)]
        tensors += [] if case.gate is None else [case.gate.weights]
        tensors = [t.clone().requires_grad_() for t in tensors]

        def call(*tensors, case=case):
            rest = iter(tensors)
            x = next(rest)
            siblings = [
                type(s)(*(None if t is None else next(rest) for t in s)) for s in case.linears
            ]
            if case.gate is None:
                ys, made = case.forward(x, siblings)
                return (*ys, made.logits)
            return tuple(case.forward(x, siblings, gate=case.gate._replace(weights=next(rest))).y)

        assert torch.autograd.gradcheck(call, tensors)


def test_second_derivatives_are_refused():
    case = make_case()
    x = case.x.requires_grad_()
    ys, _ = case.forward(x)
    (dx,) = torch.autograd.grad(ys[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def arguments(**changes):
    given = {
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
    return {**given, **changes}


def test_functional_form():
    given = arguments()
    y = moe_lora_linear(**given)
    assert y.shape == (2, 3, 5)
    tensors = SiblingTensors(
        *([given[name]] for name in ("weight", "bias")),
        [],
        *([given[name]] for name in ("lora_a", "lora_b")),
        [],
        [],
    )
    (expected,), *_ = reference.wide(
        given["x"].view(6, 8),
        tensors,
        Gate(given["gates"], given["indices"]),
        Mixture((2, 2, 2), (1.0, 1.0, 1.0)),
    )
    torch.testing.assert_close(y.view(6, 5), expected)
    torch.testing.assert_close(moe_lora_linear(**given, impl="reference"), y)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    dense = torch.rand(2, 3)
    spread = moe_lora_linear(**arguments(gates=dense[rows], indices=None) | {"x": given["x"]})
    assert spread.shape == (2, 3, 5)


def test_functional_dropout_is_a_function_of_its_seed():
    given = arguments(dropout=0.5)
    first = moe_lora_linear(**given, seed=3)
    assert torch.equal(first, moe_lora_linear(**given, seed=torch.tensor(3)))
    assert not torch.equal(first, moe_lora_linear(**given, seed=4))
    torch.manual_seed(5)
    drawn = moe_lora_linear(**given)
    torch.manual_seed(5)
    assert torch.equal(drawn, moe_lora_linear(**given))


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
    "impl: 'decode' is not available": {"impl": "decode"},
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
    given = arguments()
    leaves = [given[k].requires_grad_() for k in ("x", "weight", "lora_a", "lora_b", "gates")]
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_lora_linear(**given)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 5
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            moe_lora_linear(**arguments(x=torch.randn(2, 3, 8).bfloat16())).dtype == torch.bfloat16
        )


def test_weight_and_bias_may_train():
    given = arguments()
    given["weight"].requires_grad_()
    given["bias"].requires_grad_()
    moe_lora_linear(**given).sum().backward()
    x = given["x"].view(6, 8)
    torch.testing.assert_close(given["weight"].grad, x.sum(0).expand(5, 8))
    torch.testing.assert_close(given["bias"].grad, torch.full((5,), 6.0))


@torch._dynamo.config.patch(error_on_recompile=False)
def test_compiles_whole_and_once_for_every_number_of_tokens():
    case = make_case(tokens=32, out_features=(17, 5), dropout=0.3)
    low = case.to(torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x, seed, *tensors):
        siblings = [type(s)(*tensors[i * 7 : i * 7 + 7]) for i, s in enumerate(low.linears)]
        dropout = low.dropout._replace(seed=seed)
        ys, _ = run_layer(low.mixture, x, siblings, None, dropout)
        return tuple(ys)

    flat = [t for s in low.linears for t in s]
    for tokens in (32, 37, 101, 64):
        torch._dynamo.config.error_on_recompile = tokens != 32
        x = torch.randn(tokens, low.x.shape[1], requires_grad=True)
        ys = step(x, low.dropout.seed, *flat)
        sum(y.sum() for y in ys).backward()
        eager, _ = low.forward(x.detach())
        for y, expected in zip(ys, eager, strict=True):
            torch.testing.assert_close(y, expected)


def test_every_public_name_has_a_docstring():
    for name in moelora_kernels.__all__:
        assert getattr(moelora_kernels, name).__doc__, name


def test_siblings_must_have_the_same_tensors():
    case = make_case(out_features=(5, 7))
    first, second = case.linears
    for bad in (second._replace(bias=None), second._replace(bias=None, base_output=case.dy[1])):
        with pytest.raises(
            ValueError, match=r"^siblings: expected the same tensors for every linear"
        ):
            case.forward(case.x, [first, bad])
