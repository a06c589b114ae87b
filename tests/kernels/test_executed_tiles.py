"""Every entry of `TILE_CONFIGS` (kernels/common/configs.py), executed on the CPU as compiled."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels.kernels.common import configs, launcher
from support.backends import PTX, Backend
from support.op_checks import compare
from support.selection import exhaustive
from support.tile_cases import VARIANTS, tile_calls, tile_entries

# Three tiles of tokens; several steps and tiles of a wide side; tails of all of them. Copies are
# asynchronous only if the width is a multiple of 16.
TOKENS, WIDTH = 150, {"one_launch": 304, "split": 560}
# A tile of 16-bit operands runs each variant in another dtype: the addresses of both are the same.
DTYPES_OF = {
    "one_launch": (torch.bfloat16, torch.float32),
    "split": (torch.float16, torch.float32),
}


def test_info_names_the_executed_architectures() -> None:
    assert tuple(backend.ptx for backend in PTX) == configs.EXECUTED


@exhaustive
@pytest.mark.parametrize(
    ("backend", "op", "key", "dtype", "variant"),
    [
        pytest.param(
            backend, *entry.values, variant, id=f"{backend.name}-{entry.id}-{variant}",
            marks=backend.marks,
        )
        for backend in PTX
        for variant in VARIANTS
        for entry in tile_entries(backend.ptx)
        if entry.values[2] in DTYPES_OF[variant]
    ],
)  # fmt: skip
def test_tile(
    backend: Backend, op: str, key: tuple[str, int, int], dtype: torch.dtype, variant: str
) -> None:
    """Right by float64, and the same bits with early and with late copies and products."""
    launch, op_calls = tile_calls(backend, op, key, dtype, variant, TOKENS, WIDTH[variant])
    for arguments in op_calls:
        with launcher.recording() as launches:
            compare(op, launch, arguments, dtype)
        tile = configs.TILE_CONFIGS[backend.ptx][key]
        assert any(recorded.tile_config is tile for recorded in launches)
