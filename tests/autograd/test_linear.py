"""A layer of linears through the autograd Function, in the wide and in the grouped form."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.config
from torch import Tensor

from moelora_kernels.functional import run_layer
from moelora_kernels.testing import error
from moelora_kernels.types import CHUNK, LinearTensors
from support.cases import LAYERS, Case, layer_case
from support.inputs import Inputs, assert_layer_within_budget

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
each_dtype = pytest.mark.parametrize(
    "dtype", (FP32, BF16, torch.float16), ids=("fp32", "bf16", "fp16")
)
each_impl = pytest.mark.parametrize("impl", ("wide", "grouped"))


def each_case_and_impl(*names: str):
    """Parametrize a test with the named cases of LAYERS, or all, in every form that they have."""
    return pytest.mark.parametrize(
        ("case", "impl"),
        [
            pytest.param(LAYERS[name], impl, id=f"{name}-{impl}")
            for name in names or LAYERS
            for impl in LAYERS[name].impls
        ],
    )


# --- values -------------------------------------------------------------------------------------


@each_dtype
@each_case_and_impl()
def test_outputs_and_gradients(case: Case, impl: str, dtype: torch.dtype) -> None:
    assert_layer_within_budget(Inputs(case, dtype), impl)


@each_case_and_impl()
def test_float64_is_the_reference(case: Case, impl: str) -> None:
    inputs = Inputs(case, FP64)
    result = inputs.step(impl)
    for key, expected in inputs.reference_step().items():
        torch.testing.assert_close(result[key], expected, rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=("bf16", "fp16"))
@each_case_and_impl("siblings", "dropout_per_expert", "sparse_siblings")
def test_float32_adapters(case: Case, impl: str, dtype: torch.dtype) -> None:
    assert_layer_within_budget(Inputs(case._replace(adapters=FP32), dtype), impl)


@each_impl
@pytest.mark.parametrize("routing", ("uniform", "zipf", "skewed", "one", "empty"))
def test_routings(routing: str, impl: str) -> None:
    case = layer_case(T=200, gate="sparse", routing=routing, ranks=(4,) * 6)
    assert_layer_within_budget(Inputs(case, BF16), impl)


# A running sum of float32 over all tokens of an expert would miss the budget from about 500 on.
@each_dtype
@pytest.mark.parametrize("T", (CHUNK + 77, 4 * CHUNK + 5))
def test_sums_over_more_than_a_chunk(T: int, dtype: torch.dtype) -> None:
    """Only the grouped form has chunks."""
    assert_layer_within_budget(Inputs(layer_case(T=T, ranks=(16, 16), K=1), dtype), "grouped")


@each_case_and_impl("siblings", "dropout_per_expert", "sparse", "many_experts", "rows", "share_a")
def test_the_same_bits_on_any_number_of_threads(case: Case, impl: str) -> None:
    inputs = Inputs(case._replace(T=261), BF16)
    first, threads = inputs.step(impl), torch.get_num_threads()
    try:
        for count in (threads, 1, 2):
            torch.set_num_threads(count)
            for key, value in inputs.step(impl).items():
                assert torch.equal(value, first[key]), (key, count)
    finally:
        torch.set_num_threads(threads)


# --- experts and tokens without a route ---------------------------------------------------------


@each_impl
def test_an_expert_without_tokens_has_gradients_of_exactly_zero(impl: str) -> None:
    """Allocations are poisoned in these tests: a gradient that is not written is NaN."""
    case = layer_case(T=64, gate="sparse", routing="empty", ranks=(4,) * 6)
    result = Inputs(case, BF16).step(impl)
    assert result["dA0"][20:].eq(0).all()
    assert result["dB0"][:, 20:].eq(0).all()
    assert result["dA0"][:20].ne(0).any(dim=1).all()
    assert result["dB0"][:, :20].ne(0).any(dim=0).all()


@each_case_and_impl("router", "odd_sizes", "siblings", "dropout", "dense", "rows", "sparse",
                    "sparse_siblings")  # fmt: skip
def test_no_token(case: Case, impl: str) -> None:
    inputs = Inputs(case._replace(T=0), FP64)
    result = inputs.step(impl)
    for key, expected in inputs.reference_step().items():
        assert result[key].shape == expected.shape, key
        assert result[key].eq(0).all(), key


OUTSIDE = {
    "-1": -1,
    "E": 4,
    "INT_MAX": 2**31 - 1,
    "INT_MIN": -(2**31),
    "2^32 + 1, which is 1 in 32 bits": 2**32 + 1,
    "2^40": 2**40,
    "-2^63": -(2**63),
}


@each_impl
@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize(
    ("ids", "name"),
    [(torch.int32, name) for name, e in OUTSIDE.items() if abs(e) <= 2**31]
    + [(torch.int64, name) for name in OUTSIDE],
    ids=str,
)
def test_experts_outside_of_the_mixture_are_not_routed(
    ids: torch.dtype, name: str, n: int, impl: str
) -> None:
    inputs = Inputs(layer_case(gate="sparse", T=12, n=n, ids=ids), FP32)
    inputs.experts[::3, 1] = OUTSIDE[name]
    inputs.experts[5] = OUTSIDE[name]
    result = assert_layer_within_budget(inputs, impl)
    assert result["dgates"][::3, 1].eq(0).all()
    assert result["dgates"][5].eq(0).all()
    # A token without experts gets the output of its base.
    s = inputs.linears[0]
    base = inputs.x @ s.weight.t() + s.bias
    torch.testing.assert_close(result["y0"][5], base[5], rtol=1e-6, atol=1e-6)


@each_impl
def test_no_token_is_routed(impl: str) -> None:
    inputs = Inputs(layer_case(gate="sparse", T=70), FP32)
    inputs.experts[:] = -1
    result = inputs.step(impl)
    for key in ("dA0", "dB0", "dgates"):
        assert result[key].eq(0).all(), key
    torch.testing.assert_close(result["dx"], inputs.dy[0] @ inputs.base_weight[0])


@each_impl
@pytest.mark.parametrize("expert", (0, 3))
def test_an_expert_in_both_slots_gets_the_sum_of_the_weights(expert: int, impl: str) -> None:
    inputs = Inputs(layer_case(gate="sparse", T=150), FP64)
    inputs.experts[:] = expert
    once = Inputs(inputs.case._replace(K=1), FP64)
    once.__dict__ |= {name: getattr(inputs, name) for name in ("x", "lora_a", "lora_b", "dy")}
    once.base_weight, once.start = inputs.base_weight, inputs.start
    once.gate_weights = inputs.gate_weights.sum(dim=1, keepdim=True)
    once.experts = inputs.experts[:, :1]
    result, expected = inputs.step(impl), once.reference_step()
    expected["dgates"] = expected["dgates"].expand(150, 2)
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-10, msg=key)


# --- NaN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_an_expert_that_is_not_selected_may_hold_anything_in_the_grouped_form(
    value: float,
) -> None:
    """Neither y nor dx nor any gradient sees it. In the wide form dx does."""
    case = layer_case(gate="sparse", routing="empty", T=90, n=2, O=(13, 5))
    inputs = Inputs(case, BF16)
    clean = inputs.step("grouped")
    for a, b in zip(inputs.lora_a, inputs.lora_b, strict=True):
        a[12:] = value
        b[:, 12:] = value
    result = inputs.step("grouped")
    for key, expected in clean.items():
        assert torch.isfinite(expected).all(), key
        assert torch.equal(result[key], expected), key


def test_nan_of_an_expert_that_is_not_selected_in_the_wide_form() -> None:
    """It reaches no gradient of A, B or the gate of another expert."""
    inputs = Inputs(layer_case(gate="sparse", routing="empty", T=9), FP32)
    clean = inputs.step("wide")
    inputs.lora_a[0][12:] = torch.nan
    inputs.lora_b[0][:, 12:] = torch.nan
    result = inputs.step("wide")
    for key in ("dgates", "dB0", "dA0"):
        assert torch.equal(result[key], clean[key]), key


def test_nan_of_an_expert_stays_with_the_tokens_that_selected_it() -> None:
    """In the grouped form. In the wide form it is in dx of all tokens."""
    inputs = Inputs(layer_case(gate="sparse", T=90, K=1), FP32)
    inputs.gate_weights[inputs.gate_weights == 0] = 0.5
    clean = inputs.step("grouped")
    inputs.lora_a[0][4:8] = torch.nan
    inputs.lora_b[0][:, 4:8] = torch.nan
    result = inputs.step("grouped")
    selected = (inputs.experts == 1).any(dim=1)
    assert selected.any()
    assert not selected.all()
    for key in ("y0", "dx", "dgates"):
        assert torch.equal(result[key][~selected], clean[key][~selected]), key
        assert result[key][selected].isnan().all(), key
    others = [0, 1, 2, 3, *range(8, 16)]
    assert torch.equal(result["dA0"][others], clean["dA0"][others])
    assert torch.equal(result["dB0"][:, others], clean["dB0"][:, others])


@pytest.mark.parametrize(
    ("case", "impl"),
    ((layer_case(T=9), "wide"), (layer_case(T=90, gate="sparse"), "grouped")),
    ids=("wide", "grouped"),
)
def test_nan_of_a_token_stays_in_its_output(case: Case, impl: str) -> None:
    inputs = Inputs(case, FP32)
    clean = inputs.step(impl)["y0"]
    inputs.x[4] = torch.nan
    result = inputs.step(impl)["y0"]
    assert result[4].isnan().all()
    others = [t for t in range(case.T) if t != 4]
    assert torch.equal(result[others], clean[others])


# --- gradients that come in and go out ----------------------------------------------------------


LAYOUTS = {
    # The gradients of sum(), of a transpose, of cat and of a slice.
    "expanded": lambda dy: torch.ones((), dtype=dy.dtype).expand(dy.shape),
    "transposed": lambda dy: dy.t().contiguous().t(),
    "narrowed": lambda dy: torch.nn.functional.pad(dy, (5, 23, 2, 0))[2:, 5:-23],
    "columns": lambda dy: dy.repeat_interleave(2, dim=1)[:, ::2],
}


@each_impl
@pytest.mark.parametrize("gate", ("router", "sparse"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dy_of_any_strides(layout: str, gate: str, impl: str) -> None:
    inputs = Inputs(layer_case(T=16, n=2, O=12, gate=gate), BF16)
    inputs.dy = [LAYOUTS[layout](dy) for dy in inputs.dy]
    assert_layer_within_budget(inputs, impl)


@each_impl
def test_a_loss_in_float32(impl: str) -> None:
    inputs = Inputs(layer_case(T=16, n=2, O=12), BF16)
    x = inputs.x.clone().requires_grad_()
    ys, _ = inputs.forward(x, impl=impl)
    sum((y.float() * dy.float()).sum() for y, dy in zip(ys, inputs.dy, strict=True)).backward()
    assert x.grad.dtype == BF16
    assert error(x.grad, inputs.double().reference_step()["dx"]) < 0.2


@each_impl
def test_a_sibling_without_gradient_counts_as_zero(impl: str) -> None:
    inputs = Inputs(layer_case(n=2, O=(5, 7)), FP64)
    x = inputs.x.clone().requires_grad_()
    ys, _ = inputs.forward(x, impl=impl)
    ys[0].backward(inputs.dy[0])
    inputs.dy[1] = torch.zeros_like(inputs.dy[1])
    expected = inputs.reference_step()["dx"]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@each_impl
@pytest.mark.parametrize("gate", ("router", "sparse"))
@pytest.mark.parametrize("trained", ("x", "adapters"))
def test_a_frozen_tensor_gets_no_gradient_and_changes_no_other(
    trained: str, gate: str, impl: str
) -> None:
    inputs = Inputs(layer_case(gate=gate, n=2, O=(13, 5)), FP32)
    expected = inputs.step(impl)
    x = inputs.x.clone().requires_grad_(trained == "x")
    linears = [s._replace(lora_a=s.lora_a.clone(), lora_b=s.lora_b.clone()) for s in inputs.linears]
    if trained == "adapters":
        for s in linears:
            s.lora_a.requires_grad_()
            s.lora_b.requires_grad_()
    ys, _ = inputs.forward(x, linears, impl)
    torch.autograd.backward(ys, inputs.dy)
    result = {"dx": x.grad}
    for i, s in enumerate(linears):
        result |= {f"dA{i}": s.lora_a.grad, f"dB{i}": s.lora_b.grad}
    for key, value in result.items():
        if (key == "dx") == (trained == "x"):
            assert torch.equal(value, expected[key]), key
        else:
            assert value is None, key


@each_impl
def test_weight_and_bias_of_the_base_may_train(impl: str) -> None:
    inputs = Inputs(layer_case(gate="sparse"), FP64)
    weight, bias = (t.clone().requires_grad_() for t in inputs.linears[0][:2])
    linears = [inputs.linears[0]._replace(weight=weight, bias=bias)]
    (y,), _ = inputs.forward(inputs.x, linears, impl)
    y.backward(inputs.dy[0])
    torch.testing.assert_close(weight.grad, inputs.dy[0].t() @ inputs.x)
    torch.testing.assert_close(bias.grad, inputs.dy[0].sum(dim=0))


GRADCHECKS = {
    "router": layer_case(ranks=(1, 2, 1)),
    "router_temperature": layer_case(ranks=(1, 2, 1), temperature=0.6),
    "router_softmax": layer_case(ranks=(1, 2, 1), temperature=0.6, renormalize=False),
    "sparse": layer_case(ranks=(1, 1, 1), gate="sparse"),
    "rows": layer_case(ranks=(1, 1, 1), gate="rows"),
    "dropout_per_expert": layer_case(ranks=(1, 1, 1), dropout=0.3, per_expert=True),
    "share_a": layer_case(ranks=(1, 1, 1), share_a=True, renormalize=False, temperature=0.6),
}


@pytest.mark.parametrize(
    ("case", "impl"),
    [
        pytest.param(case, impl, id=f"{name}-{impl}")
        for name, case in GRADCHECKS.items()
        for impl in case.impls
    ],
)
def test_gradcheck(case: Case, impl: str) -> None:
    inputs = Inputs(case._replace(T=3, I=4, O=(3, 2), n=2), FP64)
    tensors = [inputs.x, *(t for s in inputs.linears for t in s if t is not None)]
    tensors += [] if inputs.has_router else [inputs.gate_weights]

    def step(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        linears = [
            LinearTensors(*(None if t is None else next(rest) for t in s)) for s in inputs.linears
        ]
        if inputs.has_router:
            ys, gate = inputs.forward(x, linears, impl)
            return (*ys, gate.logits)
        gate = inputs.gate._replace(weights=next(rest))
        return tuple(inputs.forward(x, linears, impl, gate).y)

    assert torch.autograd.gradcheck(step, [t.clone().requires_grad_() for t in tensors])


@each_impl
def test_second_derivatives_are_refused(impl: str) -> None:
    inputs = Inputs(layer_case(), FP32)
    x = inputs.x.clone().requires_grad_()
    ys, _ = inputs.forward(x, impl=impl)
    (dx,) = torch.autograd.grad(ys[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- compile, errors ----------------------------------------------------------------------------


@torch._dynamo.config.patch(error_on_recompile=False)
def test_compiles_whole_and_once_for_every_number_of_tokens() -> None:
    inputs = Inputs(layer_case(T=32, n=2, O=(17, 5), dropout=0.3), FP32)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x, seed, *tensors):
        linears = [LinearTensors(*tensors[i * 7 : i * 7 + 7]) for i in range(2)]
        dropout = inputs.dropout._replace(seed=seed)
        ys, _ = run_layer(inputs.mixture, x, linears, None, dropout)
        return tuple(ys)

    tensors = [t for s in inputs.linears for t in s]
    for T in (32, 37, 101, 64):
        torch._dynamo.config.error_on_recompile = T != 32
        x = torch.randn(T, inputs.case.I, requires_grad=True)
        ys = step(x, inputs.seed, *tensors)
        sum(y.sum() for y in ys).backward()
        eager, _ = inputs.forward(x.detach())
        for y, expected in zip(ys, eager, strict=True):
            torch.testing.assert_close(y, expected)


def test_siblings_must_have_the_same_tensors() -> None:
    inputs = Inputs(layer_case(n=2, O=(5, 7)), FP32)
    first, second = inputs.linears
    for bad in (second._replace(bias=None), second._replace(bias=None, base_output=inputs.dy[1])):
        with pytest.raises(
            ValueError, match=r"^siblings: expected the same tensors for every linear"
        ):
            inputs.forward(inputs.x, [first, bad])
