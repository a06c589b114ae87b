"""The op `decode` on every case: native library."""

from __future__ import annotations

import copy

import pytest
import torch

from moelora_kernels import ops, reference
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.tune.check import as_float64
from moelora_kernels.types import SiblingTensors
from support.arguments import decode
from support.backends import DTYPES, NATIVE, needs_library, parameters
from support.cases import LAYERS, WIDE, Case, layer_case
from support.inputs import Inputs
from support.op_checks import check, opcheck

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Tokens and sizes around every block: 3 and 6 tokens of a task, 8 rows of A, 16 columns of y, 64
# ranks of a partial sum, 512 columns that are widened.
EDGES = {
    f"{T}_tokens": layer_case(T=T, ranks=(16,) * 8, I=33, O=50) for T in (1, 2, 3, 4, 7, 16, 61)
} | {
    "one_feature": layer_case(I=1, O=1),
    "two_columns_left": layer_case(T=5, I=1026, O=18),
    "less_than_a_block": layer_case(I=15, O=15),
    "more_than_a_strip": layer_case(T=3, I=31, O=16 * 17 + 3),
    # Eight strips, each of them enough work for a thread.
    "many_strips": layer_case(T=16, ranks=(16,) * 8, O=1000),
    "ranks_of_vectors": layer_case(ranks=(4, 8, 16, 32, 64), K=3, O=37),
    "ranks_between_vectors": layer_case(ranks=(1, 3, 5, 7, 9, 15, 17, 31, 33), K=5, O=37),
    "ranks_past_a_block": layer_case(ranks=(65, 130, 2), O=37),
    "many_pairs": layer_case(T=64, ranks=(4,) * 16, K=8),
    "siblings_that_differ": layer_case(T=4, n=3, O=(17, 5, 130)),
    "float32_adapters": layer_case(I=600, adapters=FP32),
    "float32_routers": layer_case(routers=FP32, n=2, O=(17, 5)),
    "as_many_rows_as_tokens": layer_case(T=5, gate="rows"),
}
CASES = {
    name: case
    for name, case in {**WIDE, **{f"layer_{k}": v for k, v in LAYERS.items()}, **EDGES}.items()
    if not case.dropout
}


@pytest.mark.parametrize(("backend", "case", "dtype"), parameters(NATIVE, CASES, DTYPES))
def test_op(backend, case: Case, dtype: torch.dtype) -> None:
    check("decode", backend.implementation("decode"), Inputs(case, dtype))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES.values(), ids=DTYPES)
def test_a_called_base(dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    """y has the base's dtype, and the base's output keeps its values."""
    inputs = Inputs(layer_case(n=2, O=(37, 5)), dtype)
    # Columns apart, and rows apart.
    wider = [torch.randn(23, 2 * out).to(base_dtype) for out in (37, 5)]
    outputs = [wider[0][:, ::2], wider[1][:, :5]]
    linears = [
        s._replace(weight=None, bias=None, base_output=output)
        for s, output in zip(inputs.linears, outputs, strict=True)
    ]
    copies = [output.clone() for output in outputs]
    arguments = [inputs.x, siblings_of(linears), inputs.gate, inputs.mixture]
    actual, baseline = ops.decode(*arguments), reference.decode(*arguments)
    truth = reference.decode(*as_float64(arguments))
    # The dtype with the larger rounding errors has the budget.
    coarse = max(dtype, base_dtype, key=lambda t: torch.finfo(t).eps)
    for i, y in enumerate(actual.y):
        assert y.dtype == base_dtype
        assert torch.equal(outputs[i], copies[i])
        if coarse is torch.float64:
            torch.testing.assert_close(y, truth.y[i], rtol=0, atol=1e-12)
            continue
        values = {"y": y}, {"y": truth.y[i]}, {"y": baseline.y[i]}
        assert_within_budget(*values, coarse)


@needs_library
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_strides(dtype: torch.dtype) -> None:
    inputs = Inputs(layer_case(ranks=(16, 16, 16)), dtype)
    inputs.x = inputs.x.t().contiguous().t()
    inputs.lora_a = [torch.cat([a, a], dim=1)[:, : a.shape[1]] for a in inputs.lora_a]
    inputs.lora_b = [b.t().contiguous().t() for b in inputs.lora_b]
    inputs.router_weight = [w.t().contiguous().t() for w in inputs.router_weight]
    inputs.router_bias = [torch.stack([b, b], dim=1)[:, 0] for b in inputs.router_bias]
    inputs.base_weight = [w.t().contiguous().t() for w in inputs.base_weight]
    inputs.start = [torch.stack([b, b], dim=1)[:, 0] for b in inputs.start]
    check("decode", ops.decode, inputs)


# The tokens up to which the op computes the base product itself: csrc/cpu/decode.h.
BASE_TOKENS = 16


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("T", range(1, BASE_TOKENS + 2))
def test_the_base_product_of_few_tokens(T: int, dtype: torch.dtype) -> None:
    """Tails of the vectors of W, of its blocks of 8 and 16 rows, and of the strips of y."""
    check("decode", ops.decode, Inputs(layer_case(T=T, I=75, n=2, O=(37, 130)), dtype))


WEIGHTS = {
    # Neither the numbers behind a row nor the rows behind the last one are read.
    "row_stride": lambda w, nan: torch.cat([w, w * nan], dim=1)[:, : w.shape[1]],
    "more_rows": lambda w, nan: torch.cat([w, w * nan])[: w.shape[0]],
    "odd_address": lambda w, nan: torch.cat([w[0, :1] * nan, w.flatten()])[1:].view_as(w),
    "dense_columns": lambda w, nan: w.t().contiguous().t(),
    "every_second_column": lambda w, nan: torch.stack([w, w * nan], dim=2)[:, :, 0],
}


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("T", (2, 4, BASE_TOKENS + 1))
@pytest.mark.parametrize("name", WEIGHTS)
def test_strides_of_the_base_weight(name: str, T: int, dtype: torch.dtype) -> None:
    inputs = Inputs(layer_case(T=T, I=75, n=2, O=(37, 130)), dtype)
    for both in (False, True):
        weights = [WEIGHTS[name](w, torch.nan) for w in inputs.base_weight]
        assert all(map(torch.equal, weights, inputs.base_weight))
        changed = copy.copy(inputs)
        changed.base_weight = weights if both else [inputs.base_weight[0], weights[1]]
        check("decode", ops.decode, changed)


@needs_library
@pytest.mark.parametrize("dtype", (FP32, torch.float64), ids=str)
def test_few_other_tokens_do_not_change_the_bits_of_a_row(dtype: torch.dtype) -> None:
    case = layer_case(T=BASE_TOKENS, ranks=(16,) * 6, I=1003, n=2, O=(70, 9))
    x, *rest = decode(Inputs(case, dtype))
    whole = ops.decode(x, *rest)
    for t in range(BASE_TOKENS):
        for tokens in (slice(t, t + 1), slice(t, None), slice(None, t + 1)):
            for y, expected in zip(ops.decode(x[tokens], *rest).y, whole.y, strict=True):
                assert torch.equal(y, expected[tokens]), (t, tokens)


@needs_library
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_siblings_with_adapters_of_different_dtypes(dtype: torch.dtype) -> None:
    inputs = Inputs(layer_case(n=2, O=(37, 5), I=40), dtype)
    inputs.lora_a[1], inputs.lora_b[1] = inputs.lora_a[1].float(), inputs.lora_b[1].float()
    check("decode", ops.decode, inputs)


@needs_library
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_every_number_of_b_is_widened_right(dtype: torch.dtype) -> None:
    """All numbers of 16 bits that are normal in float32; then infinities and NaN, apart."""
    ranks, O = 32, 2048  # noqa: E741
    inputs = Inputs(layer_case(T=ranks, I=ranks, O=O, ranks=(ranks,), gate="dense"), dtype)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(O, ranks)
    inputs.x = inputs.lora_a[0] = torch.eye(ranks, dtype=dtype)
    inputs.gate_weights, inputs.scaling = torch.ones(ranks, 1, dtype=dtype), (1.0,)
    inputs.base_weight, inputs.start = [torch.zeros(O, ranks, dtype=dtype)], [None]
    is_normal = numbers.isfinite() & (numbers.float().abs() >= torch.finfo(FP32).tiny)
    inputs.lora_b = [numbers.where(is_normal, 0)]
    assert torch.equal(ops.decode(*decode(inputs)).y[0], inputs.lora_b[0].t())
    special = torch.zeros(O, ranks, dtype=dtype)
    special[0, 3], special[17, 20], special[40, 31] = torch.inf, -torch.inf, torch.nan
    inputs.lora_b = [special]
    arguments = decode(inputs)
    actual, expected = ops.decode(*arguments).y[0], reference.decode(*arguments).y[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("name", ("router", "siblings", "many_experts", "float32_routers"))
def test_the_routing_is_that_of_the_other_forms(name: str, dtype: torch.dtype) -> None:
    """The same bits of logits and weights as in training, so the same experts."""
    case = {**LAYERS, **EDGES}[name]._replace(T=11)
    arguments = decode(Inputs(case, dtype))
    actual = ops.decode(*arguments)
    for form in (ops.wide, ops.grouped):
        expected = form(*arguments)
        assert torch.equal(actual.logits, expected.logits)
        assert torch.equal(actual.experts, expected.experts)
        assert torch.equal(actual.weights, expected.weights)


@needs_library
def test_equal_logits_take_the_lower_expert() -> None:
    inputs = Inputs(layer_case(T=5, router_bias=False), BF16)
    inputs.router_weight = [w.zero_() for w in inputs.router_weight]
    assert ops.decode(*decode(inputs)).experts.tolist() == [[0, 1]] * 5


@needs_library
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("dtype", (BF16, FP32, torch.float64), ids=str)
def test_experts_of_logits_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    """NaN counts as the largest number, like in the other forms."""
    inputs = Inputs(layer_case(T=5), dtype)
    inputs.router_bias[0][1] = value
    arguments = decode(inputs)
    actual, expected = ops.decode(*arguments), reference.decode(*arguments)
    assert torch.equal(actual.experts, expected.experts)
    assert (actual.experts == 1).any(dim=1).all() == (value != -torch.inf)


@needs_library
@pytest.mark.parametrize("is_called", (False, True))
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_y_is_rounded_once(dtype: torch.dtype, is_called: bool) -> None:
    """1 + e and e, each half a unit from a number of 16 bits, add up to one: 1 + 2 e."""
    e = torch.finfo(dtype).eps / 2
    inputs = Inputs(layer_case(T=2, I=2, O=3, ranks=(1,), gate="dense"), dtype)
    inputs.x = torch.tensor([[1.0, e]] * 2, dtype=dtype)
    inputs.lora_a, inputs.lora_b = [torch.ones(1, 2, dtype=dtype)], [torch.ones(3, 1, dtype=dtype)]
    inputs.gate_weights, inputs.scaling = torch.ones(2, 1, dtype=dtype), (1.0,)
    inputs.base_weight, inputs.start = [torch.zeros(3, 2, dtype=dtype)], [torch.full((3,), e)]
    inputs.start = [start.to(dtype) for start in inputs.start]
    x, tensors, *rest = decode(inputs)
    if is_called:
        output = torch.full((2, 3), e, dtype=dtype)
        tensors = tensors._replace(weight=[], bias=[], base_output=[output])
    assert (ops.decode(x, tensors, *rest).y[0] == 1 + 2 * e).all()


@needs_library
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_every_row_has_its_own_experts(dtype: torch.dtype) -> None:
    """A row in a batch gets what it gets alone."""
    inputs = Inputs(layer_case(T=19, ranks=(16,) * 6, I=64, O=40, router_bias=False), dtype)
    x, tensors, gate, mixture = decode(inputs)
    whole = ops.decode(x, tensors, gate, mixture)
    assert len({tuple(row) for row in whole.experts.tolist()}) > 5
    for t in range(19):
        alone = ops.decode(x[t : t + 1], tensors, gate, mixture)
        assert torch.equal(alone.experts, whole.experts[t : t + 1])
        rounding = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            alone.y[0], whole.y[0][t : t + 1], rtol=rounding, atol=rounding * 4
        )


@needs_library
@pytest.mark.parametrize("share_a", (False, True))
@pytest.mark.parametrize("tensor", ("lora_a", "lora_b"))
def test_a_nan_stays_in_the_tokens_that_use_its_expert(tensor: str, share_a: bool) -> None:
    if share_a and tensor == "lora_a":
        pytest.skip("every expert has this A")
    inputs = Inputs(layer_case(T=30, share_a=share_a), BF16)
    expected = ops.decode(*decode(inputs))
    values = getattr(inputs, tensor)[0]
    (values[4:8] if tensor == "lora_a" else values[:, 4:8]).fill_(torch.nan)
    actual = ops.decode(*decode(inputs))
    uses = (actual.experts == 1).any(dim=1)
    assert 0 < uses.sum() < 30
    assert actual.y[0][uses].isnan().all()
    assert torch.equal(actual.y[0][~uses], expected.y[0][~uses])


@needs_library
@pytest.mark.parametrize(
    "name",
    ("2_tokens", "16_tokens", "many_strips", "siblings_that_differ", "ranks_past_a_block"),
)
def test_fifty_calls_and_any_number_of_threads_give_the_same_bits(name: str) -> None:
    case = EDGES[name]._replace(I=2000)
    arguments, threads = decode(Inputs(case, BF16)), torch.get_num_threads()
    first = ops.decode(*arguments)
    try:
        for call in range(50):
            torch.set_num_threads(1 + call % 3)
            again = ops.decode(*arguments)
            assert all(map(torch.equal, first.y, again.y)), call
            assert all(map(torch.equal, first[1:], again[1:])), call
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ("router", "siblings", "all_experts", "sparse", "rows", "share_a"))
def test_opcheck(name: str) -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_dynamic")  # fmt: skip
    opcheck("decode", decode(Inputs(LAYERS[name], FP32)), test_utils=utils)


def called(tensors: SiblingTensors, *sizes: int) -> SiblingTensors:
    """Return the tensors with a base's output of these sizes, not its weight."""
    return tensors._replace(weight=[], bias=[], base_output=[torch.zeros(sizes)])


BAD = {
    "lora_a, ranks": lambda t: t._replace(lora_a=[t.lora_a[0][1:]]),
    "lora_b, ranks": lambda t: t._replace(lora_b=[t.lora_b[0][:, 1:]]),
    "lora_b, siblings": lambda t: t._replace(lora_b=[*t.lora_b, *t.lora_b]),
    "base_weight: expected either": lambda t: t._replace(weight=[]),
    "base_weight, out_features": lambda t: t._replace(weight=[t.weight[0][1:]]),
    "base_weight, in_features": lambda t: t._replace(weight=[t.weight[0][:, 1:]]),
    "base_output, tokens": lambda t: called(t, 22, 13),
    "base_output, out_features": lambda t: called(t, 23, 12),
    "base_bias": lambda t: t._replace(bias=[t.bias[0][1:]]),
    "gate_weights: expected": lambda t: t._replace(router_weight=[], router_bias=[]),
    "router_weight, experts": lambda t: t._replace(router_weight=[t.router_weight[0][1:]]),
    "router_bias": lambda t: t._replace(router_bias=[t.router_bias[0][1:]]),
}


@needs_library
@pytest.mark.parametrize("name", BAD)
def test_wrong_shapes_are_refused(name: str) -> None:
    x, tensors, gate, mixture = decode(Inputs(LAYERS["router"], FP32))
    with pytest.raises(RuntimeError, match=name):
        ops.decode(x, BAD[name](tensors), gate, mixture)
