"""The tables of the kernels are filled on the CPU, whatever torch's default device is."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels.kernels.common import tables
from support.arguments import calls
from support.backends import KERNEL_DEVICE, op_launcher
from support.cases import GROUPED, WIDE
from support.inputs import Inputs
from support.op_checks import GROUPED_OPS, WIDE_OPS

RANKS = (2, 3, 4)
# Table -> its arguments before the device.
TABLES = {
    tables.rank_table: (RANKS,),
    tables.expert_columns: (RANKS,),
    tables.scaling_table: ((0.5, 2.0),),
    tables.column_tile_table: (RANKS, 2, 16),
}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_table_has_its_values_under_a_default_device(table) -> None:
    """Under a default device "cuda" it would be in the memory pool of the caller's thread."""
    # The function behind the cache.
    make = table.__wrapped__
    device = torch.device("cpu")
    expected = make(*TABLES[table], device)
    with torch.device("meta"):
        actual = make(*TABLES[table], device)
    assert actual.device == device
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("op", [op for op in {**WIDE_OPS, **GROUPED_OPS} if op != "route"])
def test_a_launcher_makes_its_tensors_where_x_is(op: str) -> None:
    for table in TABLES:
        table.cache_clear()
    case = WIDE["mixed_ranks"] if op in WIDE_OPS else GROUPED["mixed_ranks"]
    for arguments in calls(op, Inputs(case, torch.float32).to(KERNEL_DEVICE)):
        with torch.device("meta"):
            outputs = op_launcher(op)(*arguments)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]
        assert not any(t.is_meta for t in outputs if isinstance(t, torch.Tensor))
