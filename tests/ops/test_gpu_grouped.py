"""The grouped formulation at real sizes, against float64: its kernels, and layers made of them."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import CHUNK, TILE
from support import grouped_cases
from support.gpu_cases import DEVICE, assert_equal, each_half, keep_apart, layer_of
from support.grouped_cases import Case, check, check_what_is_not_chosen
from support.op_cases import Case as LayerCase
from support.op_cases import Inputs as LayerInputs

pytestmark = pytest.mark.gpu

REAL = Case(T=4096, I=4096, O=4096, routing="all", tile=TILE, chunk=CHUNK)
# name -> case; the comment says what it would catch.
LARGE = {
    # What the benchmarks time: full tiles, one sum of every expert.
    "E=64 r=64 K=4": REAL._replace(ranks=(64,) * 64, K=4),
    # As many sums in float32, the last of which writes y.
    "E=256 r=16 K=8": REAL._replace(ranks=(16,) * 256, K=8),
    "qkv": REAL._replace(ranks=(16,) * 8, n=3, start="bias"),
    # All tokens to one expert: 8 parts of its sums, and zeros for all others.
    "skew": REAL._replace(ranks=(16,) * 64, routing="last"),
    # Whole feed-forwards: rows of pairs on both sides.
    "by_pair": REAL._replace(ranks=(16,) * 8, O=11008, by_pair=True),
    # Columns of B that start at no multiple of 16 bytes; tails on every side.
    "odd": REAL._replace(T=1000, I=4099, O=4097, ranks=(1, 3, 16, 33, 150), routing="some"),
    "one_token": REAL._replace(T=1, ranks=(64,) * 64),
    "dropout": REAL._replace(ranks=(16,) * 64, dropout=0.1, per_expert=True),
    "float32_adapters": REAL._replace(T=1000, ranks=(64,) * 16, adapters=torch.float32),
}
IMPLEMENTATIONS = {name: getattr(ops, name) for name in grouped_cases.OUTPUTS}


@each_half
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_op(op: str, name: str, dtype: torch.dtype) -> None:
    inputs = grouped_cases.Inputs(LARGE[name], dtype, device=DEVICE)
    check(op, IMPLEMENTATIONS[op], inputs, dtype)


@each_half
def test_what_is_not_chosen_adds_nothing(dtype: torch.dtype) -> None:
    check_what_is_not_chosen(IMPLEMENTATIONS, dtype, DEVICE)


# What a router chooses: 64 experts are above the threshold of every device with K = 2.
LAYERS = {
    "E=64 r=16": LayerCase(T=4096, I=4096, O=4096, ranks=(16,) * 64),
    "E=64 r=64 K=4": LayerCase(T=2048, I=4096, O=4096, ranks=(64,) * 64, top_k=4),
    "siblings": LayerCase(T=1000, I=4096, O=4096, ranks=(8,) * 32, n=3, chained=True, bias=True),
    "mixed_ranks": LayerCase(T=1000, I=4096, O=4096, ranks=(1, 3, 16, 128), gate="sparse"),
    "dropout": LayerCase(T=1000, I=4096, O=4096, ranks=(16,) * 64, dropout=0.1, per_expert=True),
}


@each_half
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, dtype: torch.dtype) -> None:
    """y, dx and every gradient by name; twice, the same bits."""
    layer = layer_of(keep_apart(LayerInputs(LAYERS[name], dtype, device=DEVICE)))
    found = layer.run("grouped")
    truth = layer.to(torch.float64).reference()
    assert_within_budget(found, truth, layer.reference(), dtype)
    assert_equal([*layer.run("grouped").values()], [*found.values()])


@pytest.mark.parametrize("name", ("plain", "siblings", "by_pair", "dropout", "mixed_ranks"))
def test_opcheck(name: str) -> None:
    """Schema and fake hold for the kernels: no input changed, no alias, sizes and strides."""
    inputs = grouped_cases.Inputs(grouped_cases.CASES[name], torch.bfloat16, device=DEVICE)
    for op in IMPLEMENTATIONS:
        for arguments in inputs.calls(op):
            torch.library.opcheck(
                getattr(ops, op), tuple(arguments), test_utils=("test_schema", "test_faketensor")
            )
