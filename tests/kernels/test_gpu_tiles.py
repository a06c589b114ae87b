"""Every entry of `TILE_CONFIGS` (kernels/common/configs.py) on a GPU. They pass: it is qualified.

`python tests/tools/qualify.py --commit SHA` runs this file and prints what to write into the table.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.types import CHUNK, TILE
from support.arguments import calls
from support.backends import DTYPES, GPU, SPLIT, in_parts, op_launcher
from support.cases import Case, grouped_case
from support.op_checks import GROUPED_OPS, WIDE_OPS, compare

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")

# The variants of the wide ops. name -> case and parts, with tails of every tile; the comment says
# which programs it makes.
VARIANTS = {
    # Router, gate and its gradient in the epilogue: two products per step, one launch.
    "one_launch": (Case(T=1000, I=4104, O=4104, router_bias=True), 1),
    # Sums to partials; the mask drawn beside the product.
    "split": (Case(T=1000, I=4104, O=4104, gate="dense", dropout=0.1), 2),
}
# An op that is not in this list has nothing to qualify its tiles: `test_tile` fails.
OPS = (*WIDE_OPS, *(op for op in GROUPED_OPS if op != "route"))


def _wide_calls(op: str, columns: int, dtype: torch.dtype, variant: str) -> tuple:
    """Return the launcher of a wide op and its calls with so many columns of rank space."""
    case, split = VARIANTS[variant]
    inputs = GPU.inputs(case._replace(ranks=(columns // 4,) * 4), dtype)
    launch = op_launcher(op)
    return in_parts(launch, split) if op in SPLIT else launch, calls(op, inputs)


def _grouped_calls(op: str, columns: int, dtype: torch.dtype, variant: str) -> tuple:
    """Return the launcher of a grouped op and its calls with experts of so many columns.

    Tiles have tails. In the variant "split" the tokens of an expert make several chunks.
    """
    case = grouped_case(
        T=1700, I=4104, O=4104, start="bias", router_bias=True, tile=TILE, chunk=CHUNK,
        ranks=(1,) * columns if op.startswith("router") else (columns,) * 4,
    )  # fmt: skip
    if variant == "split":
        case = case._replace(chunk=65, dropout=0.1)
    return op_launcher(op), calls(op, GPU.inputs(case, dtype))


def _entries() -> list:
    """(key of the table, dtype) for the GPU at hand; for an H200 where there is none."""
    supported = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    device = DEVICE if supported else torch.device("cpu")
    keys = configs.TILE_CONFIGS[configs.processors(device)[0]]
    return [
        pytest.param(key, dtype, id=f"{key[0]}-{name}-{key[2]}")
        for key in keys
        for name, dtype in DTYPES.items()
        if dtype.itemsize == key[1]
    ]


def _flat(outputs) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [
        tensor
        for output in outputs
        for tensor in (output if isinstance(output, list) else [output])
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("key", "dtype"), _entries())
def test_tile(key: tuple[str, int, int], dtype: torch.dtype, variant: str, pytestconfig) -> None:
    """Right by float64, no NaN under poisoned allocations, and the same bits in all --repeats."""
    repeats = pytestconfig.option.repeats
    op, _, columns = key
    assert op in OPS, op
    draw = _wide_calls if op in WIDE_OPS else _grouped_calls
    launch, op_calls = draw(op, columns, dtype, variant)
    for arguments in op_calls:
        with launcher.recording() as launches:
            first = _flat(launch(*arguments))
        tile = configs.TILE_CONFIGS[configs.processors(DEVICE)[0]][key]
        assert any(recorded.tile_config is tile for recorded in launches), (
            f"no launch takes the tile of {key}"
        )
        compare(op, launch, arguments, dtype)

        differing = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
        for _ in range(repeats - 1):
            for i, again in enumerate(_flat(launch(*arguments))):
                differing[i] += (again != first[i]).any()
        assert differing.tolist() == [0] * len(first), f"runs of {repeats} that differ, by output"
