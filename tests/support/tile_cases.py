"""Calls that take a given entry of `configs.TILE_CONFIGS`, in the variants of its kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moelora_kernels.kernels import shrink_dx
from moelora_kernels.kernels.common import configs
from moelora_kernels.types import CHUNK, TILE
from support.arguments import calls
from support.backends import DTYPES, SPLIT, Backend
from support.cases import Case, grouped_case
from support.ffn_inner_cases import FfnCase, FfnInputs
from support.inputs import moved
from support.op_checks import FFN_OPS, GROUPED_OPS, WIDE_OPS

# The variants of the wide ops. name -> options of the case and parts; the comment says which
# programs it makes.
VARIANTS = {
    # Router, gate and its gradient in the epilogue: two products per step, one launch.
    "one_launch": (dict(router_bias=True), 1),
    # Sums to partials; the mask drawn beside the product.
    "split": (dict(gate="dense", dropout=0.1), 2),
}
# The widest tiles of these entries serve layers without dropout.
COLUMNS_WITH_DROPOUT = {"shrink_dx": shrink_dx.STEP, "weight_grad": 64, "ffn_inner_backward": 64}
# The ops that take the tiles of a kernel, if they are more than the op with its name.
OPS_OF = {
    "grouped_expand": ("grouped_expand", "grouped_dx"),
    "ffn_inner_weight_grad": ("ffn_inner_backward",),
}
# An op outside this list has no test of its tiles.
OPS = (*WIDE_OPS, *(op for op in GROUPED_OPS if op != "route"), *FFN_OPS)


def tile_entries(architecture: str) -> list:
    """Return parameters (op, key of the table, dtype) of an architecture."""
    return [
        pytest.param(op, key, dtype, id=f"{op}-{name}-{key[2]}{few}")
        for key in configs.TILE_CONFIGS[architecture]
        for few in [configs.FEW if key[0].endswith(configs.FEW) else ""]
        for op in OPS_OF.get(key[0], (key[0].removesuffix(few),))
        for name, dtype in DTYPES.items()
        if dtype.itemsize == key[1]
    ]


def tile_calls(
    backend: Backend,
    op: str,
    key: tuple[str, int, int],
    dtype: torch.dtype,
    variant: str,
    tokens: int,
    width: int,
) -> tuple[Callable, list[list]]:
    """Return the implementation of an op that takes a tile, and its calls.

    tokens: T. width: of both wide sides. With tails of every tile, if they are no multiples. In the
    variant "split" of a grouped op the tokens of an expert make several chunks.
    """
    columns = key[2]
    assert op in OPS, op
    few_rows = 1 << 31 if key[0].endswith(configs.FEW) else 0
    if op in WIDE_OPS:
        options, split = VARIANTS[variant]
        if columns > COLUMNS_WITH_DROPOUT.get(key[0], columns):
            options = {**options, "dropout": 0.0}
        case = Case(T=tokens, I=width, O=width, ranks=(columns // 4,) * 4, **options)
        options = {"split": split} if op in SPLIT else {}
        implementation = backend.implementation(op, few_rows=few_rows, **options)
        return implementation, calls(op, backend.inputs(case, dtype))
    if op in FFN_OPS:
        # Two experts whose rank space is aligned to 16 bytes.
        case = FfnCase(T=tokens, F=width, ranks=(columns // 2,) * 2, routing="uniform")
        if columns <= COLUMNS_WITH_DROPOUT.get(key[0], columns):
            case = case._replace(dropout=VARIANTS[variant][0].get("dropout", 0.0))
        inputs = FfnInputs(case, dtype)
        arguments = inputs.forward() if op == "ffn_inner" else inputs.backward()
        implementation = backend.implementation(op, split=VARIANTS[variant][1])
        return implementation, [moved(arguments, backend.device)]
    case = grouped_case(
        T=tokens, I=width, O=width, start="bias", router_bias=True, tile=TILE, chunk=CHUNK,
        ranks=(1,) * columns if op.startswith("router") else (columns,) * 4,
    )  # fmt: skip
    if variant == "split":
        # The experts of a token differ: `grouped_dx` reads their dlogits alone.
        case = case._replace(chunk=65, dropout=0.1, routing="uniform")
    return backend.implementation(op), calls(op, backend.inputs(case, dtype))
