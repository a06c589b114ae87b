"""Every entry of `TILE_CONFIGS` (kernels/common/configs.py) on a GPU.

An entry whose tests pass is qualified.
`python -m moelora_kernels.tune` checks the entries of given layers in the same way.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from support.backends import GPU
from support.op_checks import WIDE_OPS, compare
from support.tile_cases import VARIANTS, tile_calls, tile_entries

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def _entries() -> list:
    """(op, key of the table, dtype) for the GPU at hand; for an H200 where there is none."""
    supported = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    device = DEVICE if supported else torch.device("cpu")
    return tile_entries(configs.processors(device)[0])


def _flat(outputs) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [
        tensor
        for output in outputs
        for tensor in (output if isinstance(output, list) else [output])
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("op", "key", "dtype"), _entries())
def test_tile(
    op: str, key: tuple[str, int, int], dtype: torch.dtype, variant: str, pytestconfig
) -> None:
    """Right by float64, no NaN under poisoned allocations, and the same bits in all --repeats."""
    repeats = pytestconfig.option.repeats
    tokens = 1000 if op in WIDE_OPS else 1700
    launch, op_calls = tile_calls(GPU, op, key, dtype, variant, tokens, width=4104)
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
