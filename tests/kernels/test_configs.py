"""Which table of tiles serves a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moelora_kernels.kernels.common import configs


@pytest.fixture
def query(monkeypatch):
    """The table for a GPU of some compute capability."""

    def query(capability: tuple[int, int]) -> tuple[str, int]:
        properties = SimpleNamespace(
            name="GPU", major=capability[0], minor=capability[1], multi_processor_count=100
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        return configs._query_gpu.__wrapped__(0)

    return query


@pytest.mark.parametrize(
    ("capability", "table"),
    (
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((11, 0), "sm_89"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ),
)
def test_table_of_a_gpu(query, capability, table):
    assert query(capability) == (table, 100)


def test_old_gpus_are_refused(query):
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5"):
        query((7, 5))
