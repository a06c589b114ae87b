"""The grouped formulation of the Function and the functional form: parity and contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels import moe_lora_linear, ops
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import CHUNK, TILE, count_tiles
from support.layers import assert_case, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SHAPES = {
    # name -> what it would catch
    "router": {},
    "odd sizes": {"tokens": 37, "in_features": 31, "out_features": (17,), "ranks": (3, 3, 3)},
    "more places than a tile": {"tokens": 3 * TILE + 5, "ranks": (4, 4, 4)},
    "ranks of 1": {"ranks": (1,) * 8},
    # Past every block of columns that a product is cut into.
    "wide": {"tokens": 19, "in_features": 2051, "out_features": (323,), "ranks": (3, 18, 1)},
    "rank 128": {"ranks": (128, 128, 128), "in_features": 40},
    # A running sum over all ranks would miss the budget.
    "rank 4000": {"ranks": (4000, 1), "top_k": 1, "in_features": 8, "tokens": 50},
    "ranks that differ": {"ranks": (1, 16, 3, 64, 2)},
    "one expert": {"ranks": (5,), "top_k": 1, "gate": "sparse"},
    "one token": {"tokens": 1},
    "many experts": {"ranks": (4,) * 64, "top_k": 6},
    "not renormalised": {"renormalize": False, "temperature": 0.7},
    "aux gradient on the logits": {"aux": True, "renormalize": False},
    "no biases": {"bias": False},
    "three siblings": {"out_features": (17, 5, 9), "aux": True},
    "dropout": {"dropout": 0.3, "out_features": (17, 5)},
    "dropout per expert": {"dropout": 0.3, "dropout_per_expert": True, "ranks": (1, 3, 2, 4)},
    "sparse": {"gate": "sparse"},
    "sparse, all experts": {"gate": "sparse", "top_k": 4},
    "sparse, siblings": {"gate": "sparse", "out_features": (17, 5), "bias": False},
    "sparse, dropout": {"gate": "sparse", "dropout": 0.5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_parity(name, dtype):
    assert_case(make_case(**SHAPES[name]), dtype, impl="grouped")


# A running sum of float32 over all tokens of an expert would miss the budget from about 500 on.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", (CHUNK + 77, 4 * CHUNK + 5))
def test_parity_of_sums_over_more_than_a_chunk(tokens, dtype):
    assert_case(make_case(tokens=tokens, ranks=(16, 16), top_k=1), dtype, impl="grouped")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("three siblings", "dropout per expert", "sparse, siblings"))
def test_parity_with_float32_adapters(name, dtype):
    assert_case(make_case(**SHAPES[name]), dtype, adapters=torch.float32, impl="grouped")


@pytest.mark.parametrize("name", SHAPES)
def test_float64_is_the_reference(name):
    case = make_case(**SHAPES[name])
    found, expected = case.run("grouped"), case.reference()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("routing", ("uniform", "zipf", "skewed", "one", "empty"))
def test_parity_of_every_routing_distribution(routing):
    case = make_case(tokens=200, gate="sparse", routing=routing, ranks=(4,) * 6)
    assert_case(case, torch.bfloat16, impl="grouped")


# --- experts and tokens without a route ---------------------------------------------------------


def test_an_expert_without_tokens_has_gradients_of_exactly_zero():
    """Nothing writes them but a zero: allocations are poisoned in these tests."""
    case = make_case(tokens=64, gate="sparse", routing="empty", ranks=(4,) * 6).to(torch.bfloat16)
    found = case.run("grouped")
    assert found["dA0"][20:].eq(0).all()
    assert found["dB0"][:, 20:].eq(0).all()
    assert found["dA0"][:20].ne(0).any(dim=1).all()
    assert found["dB0"][:, :20].ne(0).any(dim=0).all()


@pytest.mark.parametrize("name", ("router", "odd sizes", "three siblings", "dropout", "sparse"))
def test_no_tokens(name):
    case = make_case(**{**SHAPES[name], "tokens": 0})
    found = case.run("grouped")
    for key, value in case.reference().items():
        assert found[key].shape == value.shape, key
        assert found[key].eq(0).all(), key


IDS = {
    "-1": -1,
    "E": 4,
    "INT_MAX": 2**31 - 1,
    "INT_MIN": -(2**31),
    "2^32 + 1, which is 1 in 32 bits": 2**32 + 1,
    "2^40": 2**40,
    "-2^63": -(2**63),
}


@pytest.mark.parametrize("siblings", ((13,), (13, 5)), ids=str)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("name", IDS)
def test_ids_outside_of_the_experts_are_not_routed(name, dtype, siblings):
    if abs(IDS[name]) > 2**31 and dtype == torch.int32:
        pytest.skip("no int32")
    case = make_case(gate="sparse", tokens=12, out_features=siblings)
    indices = case.gate.experts
    indices[::3, 1] = IDS[name]
    indices[5] = IDS[name]
    case.gate = case.gate._replace(experts=indices.to(dtype))
    low = case.to(torch.float32)
    found = low.run("grouped")
    assert_within_budget(found, case.reference(), low.reference(), torch.float32)
    assert found["dgates"][::3, 1].eq(0).all()
    assert found["dgates"][5].eq(0).all()
    # A token that nobody took is its base, bit for bit what it is without an adapter.
    s = low.linears[0]
    bare = low.x @ s.weight.t() + s.bias
    torch.testing.assert_close(found["y0"][5], bare[5], rtol=1e-6, atol=1e-6)


def test_no_token_is_routed():
    case = make_case(gate="sparse", tokens=70).to(torch.float32)
    case.gate.experts[:] = -1
    found = case.run("grouped")
    for key in ("dA0", "dB0", "dgates"):
        assert found[key].eq(0).all(), key
    torch.testing.assert_close(found["dx"], case.dy[0] @ case.linears[0].weight)


@pytest.mark.parametrize("expert", (0, 3))
def test_every_token_takes_one_expert(expert):
    """Also twice: the weights of both slots add up, as they do in a loop over slots."""
    case = make_case(gate="sparse", tokens=150)
    case.gate.experts[:] = expert
    once = make_case(gate="sparse", tokens=150)
    once.x, once.linears, once.dy = case.x, case.linears, case.dy
    once.gate = once.gate._replace(weights=case.gate.weights.sum(dim=1, keepdim=True))
    once.gate = once.gate._replace(experts=torch.full((150, 1), expert))
    found, expected = case.run("grouped"), once.reference()
    expected["dgates"] = expected["dgates"].expand(150, 2)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_an_expert_nobody_chose_may_hold_anything(value):
    """The limit of the wide form does not hold here: not y, not dx, no gradient sees it."""
    case = make_case(gate="sparse", routing="empty", tokens=90, out_features=(13, 5))
    case = case.to(torch.bfloat16)
    clean = case.run("grouped")
    for s in case.linears:
        s.lora_a[12:] = value
        s.lora_b[:, 12:] = value
    found = case.run("grouped")
    for key, expected in clean.items():
        assert torch.isfinite(expected).all(), key
        assert torch.equal(found[key], expected), key


def test_nan_of_an_expert_stays_with_the_tokens_that_chose_it():
    case = make_case(gate="sparse", tokens=90, top_k=1).to(torch.float32)
    clean = case.run("grouped")
    case.linears[0].lora_a[4:8] = torch.nan
    case.linears[0].lora_b[:, 4:8] = torch.nan
    found = case.run("grouped")
    own = (case.gate.experts == 1).any(dim=1)
    assert own.any()
    assert not own.all()
    for key in ("y0", "dx", "dgates"):
        assert torch.equal(found[key][~own], clean[key][~own]), key
        assert found[key][own].isnan().all(), key
    others = [0, 1, 2, 3, *range(8, 16)]
    assert torch.equal(found["dA0"][others], clean["dA0"][others])
    assert torch.equal(found["dB0"][:, others], clean["dB0"][:, others])


def test_nan_of_a_token_stays_in_its_output():
    case = make_case(tokens=90, gate="sparse").to(torch.float32)
    clean = case.run("grouped")["y0"]
    case.x[4] = torch.nan
    found = case.run("grouped")["y0"]
    assert found[4].isnan().all()
    others = [t for t in range(90) if t != 4]
    assert torch.equal(found[others], clean[others])


# --- what comes back and what is asked for ------------------------------------------------------


@pytest.mark.parametrize("strides", ("expanded", "transposed", "narrowed", "columns"))
def test_dy_of_any_strides(strides):
    case = make_case(tokens=16, out_features=(12, 12), gate="sparse")
    low = case.to(torch.bfloat16)
    made = {
        "expanded": lambda: torch.ones((), dtype=torch.bfloat16).expand(16, 12),
        "transposed": lambda: torch.randn(12, 16).bfloat16().t(),
        "narrowed": lambda: torch.randn(18, 40).bfloat16()[2:, 5:17],
        "columns": lambda: torch.randn(16, 24).bfloat16()[:, ::2],
    }
    low.dy = [made[strides]() for _ in case.dy]
    case.dy = [g.double() for g in low.dy]
    assert_within_budget(low.run("grouped"), case.reference(), low.reference(), torch.bfloat16)


def test_a_sibling_without_gradient_counts_as_zero():
    case = make_case(out_features=(5, 7))
    x = case.x.requires_grad_()
    ys, _ = case.forward(x, impl="grouped")
    ys[0].backward(case.dy[0])
    case.dy[1] = torch.zeros_like(case.dy[1])
    torch.testing.assert_close(x.grad, case.reference()["dx"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ("router", "sparse"))
@pytest.mark.parametrize("trained", ("x", "adapters"))
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(trained, gate):
    case = make_case(gate=gate, out_features=(13, 5)).to(torch.float32)
    expected = case.run("grouped")
    x = case.x.clone().requires_grad_(trained == "x")
    siblings = [s._replace(lora_a=s.lora_a.clone(), lora_b=s.lora_b.clone()) for s in case.linears]
    if trained == "adapters":
        for s in siblings:
            s.lora_a.requires_grad_()
            s.lora_b.requires_grad_()
    ys, _ = case.forward(x, siblings, impl="grouped")
    torch.autograd.backward(ys, case.dy)
    found = {"dx": x.grad}
    for i, s in enumerate(siblings):
        found |= {f"dA{i}": s.lora_a.grad, f"dB{i}": s.lora_b.grad}
    for key, value in found.items():
        if (key == "dx") == (trained == "x"):
            assert torch.equal(value, expected[key]), key
        else:
            assert value is None, key


def test_weight_and_bias_may_train():
    case = make_case(gate="sparse").to(torch.float64)
    weight, bias = (t.clone().requires_grad_() for t in case.linears[0][:2])
    siblings = [case.linears[0]._replace(weight=weight, bias=bias)]
    (y,), _ = case.forward(case.x, siblings, impl="grouped")
    y.backward(case.dy[0])
    torch.testing.assert_close(weight.grad, case.dy[0].t() @ case.x)
    torch.testing.assert_close(bias.grad, case.dy[0].sum(dim=0))


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


@pytest.mark.parametrize("options", ({}, {"renormalize": False, "aux": True}), ids=str)
def test_gradcheck_with_a_router(options):
    case = make_case(
        tokens=3, in_features=4, out_features=(3, 2), ranks=(1, 2, 1), temperature=0.6, **options
    )
    of_siblings = [t for s in case.linears for t in s if t is not None]
    tensors = [t.requires_grad_() for t in (case.x, *of_siblings)]

    def call(x, *tensors):
        rest = iter(tensors)
        siblings = [type(s)(*(None if t is None else next(rest) for t in s)) for s in case.linears]
        ys, made = case.forward(x, siblings, impl="grouped")
        return (*ys, made.logits)

    assert torch.autograd.gradcheck(call, tensors)


# --- memory, work, bits -------------------------------------------------------------------------


def saved_bytes(case, impl="grouped") -> int:
    """Bytes of the storages saved for backward, without x, the parameters and what was given."""
    x = case.x.requires_grad_()
    siblings = [
        type(s)(*s[:3], *(None if t is None else t.requires_grad_() for t in s[3:]))
        for s in case.linears
    ]
    own = {t.untyped_storage().data_ptr() for s in siblings for t in s if t is not None}
    own |= {t.untyped_storage().data_ptr() for t in (x, *(case.gate or ())) if t is not None}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys, _ = case.forward(x, siblings, impl=impl)
    torch.autograd.backward(ys, case.dy)
    return sum(saved.values())


def expected_bytes(case, top_k) -> int:
    """h, weights, indices, order, offsets, tiles and chunks: the formula."""
    n, ranks = len(case.linears), case.mixture.ranks
    pairs, experts = len(case.x) * n * top_k, n * len(ranks)
    of_pairs = pairs * (max(ranks) * case.x.itemsize + 4)
    if case.mixture.top_k:
        of_pairs += pairs * 8
        if not case.mixture.renormalize:
            of_pairs += len(case.x) * experts * 4
    maps = sum(count_tiles(pairs, experts, size) for size in (TILE, CHUNK))
    return of_pairs + (experts + 1) * 4 + maps * 8


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(
    "options",
    ({}, {"top_k": 1}, {"out_features": (13, 5)}, {"gate": "sparse"}, {"renormalize": False}),
    ids=str,
)
def test_saved_for_backward_byte_by_byte(options, dtype):
    case = make_case(tokens=130, ranks=(3, 5, 4, 1), **options).to(dtype)
    assert saved_bytes(case) == expected_bytes(case, options.get("top_k", 2))


def test_256_experts_save_what_8_of_them_do():
    """T = 8192, top-8 of rank 16: forward and backward, and memory that grows with K alone."""
    saved = {}
    for experts, top_k in ((256, 8), (8, 8), (256, 2)):
        case = make_case(
            tokens=8192, in_features=64, out_features=(64,), ranks=(16,) * experts, top_k=top_k,
            gate="sparse",
        ).to(torch.bfloat16)  # fmt: skip
        saved[experts, top_k] = saved_bytes(case)
        assert saved[experts, top_k] == expected_bytes(case, top_k)
    # The offsets, and a tile and a chunk of two numbers for each expert more.
    assert saved[256, 8] - saved[8, 8] == (256 - 8) * (4 + 8 + 8)
    assert saved[256, 8] > 3.9 * saved[256, 2]


def test_the_work_does_not_depend_on_the_routing():
    """Tiles of one expert for all, or of all alike: the same number within one per expert."""
    tokens, experts, used = 500, 16, {}
    for routing in ("uniform", "one", "zipf", "empty"):
        case = make_case(tokens=tokens, ranks=(1,) * experts, gate="sparse", routing=routing)
        *_, tiles, chunks = ops.route(case.gate.experts, experts, 1, TILE, CHUNK)
        assert len(tiles) == count_tiles(2 * tokens, experts, TILE), routing
        assert len(chunks) == count_tiles(2 * tokens, experts, CHUNK), routing
        used[routing] = int((tiles[:, 0] < experts).sum())
    full = 2 * tokens // TILE
    assert all(full <= count <= full + experts for count in used.values()), used


@pytest.mark.parametrize("name", ("three siblings", "dropout per expert", "sparse", "many experts"))
def test_two_runs_give_the_same_bits_on_any_number_of_threads(name):
    case = make_case(**{**SHAPES[name], "tokens": 261}).to(torch.bfloat16)
    first, threads = case.run("grouped"), torch.get_num_threads()
    try:
        for count in (threads, 1, 2):
            torch.set_num_threads(count)
            for key, value in case.run("grouped").items():
                assert torch.equal(value, first[key]), (key, count)
    finally:
        torch.set_num_threads(threads)
