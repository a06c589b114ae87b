"""The shrink for clusters of sm_90a on a GPU: the values of the reference, and its bits repeat."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels.kernels import cluster_shrink
from support.arguments import calls
from support.cases import Case
from support.inputs import Inputs
from support.op_checks import compare
from support.shrink_ptx import CASES, R128

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        cluster_shrink.op() is None
        or not torch.cuda.is_available()
        or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0, and the native library with CUDA for it",
    ),
]


def arguments_of(case: Case) -> list:
    (arguments,) = calls("shrink_gate", Inputs(case, torch.bfloat16).to("cuda"))
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    arguments = arguments_of(CASES[name])
    compare("shrink_gate", cluster_shrink.launch_op, arguments, torch.bfloat16, truncates=True)


def test_a_graph_replays_it() -> None:
    arguments = arguments_of(CASES["tails"])
    expected = cluster_shrink.launch_op(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = cluster_shrink.launch_op(*arguments)
    graph.replay()
    assert all(map(torch.equal, results, expected))


def test_the_launcher_takes_it_at_8192_tokens() -> None:
    """And 50 runs have the same bits."""
    arguments = arguments_of(Case(T=8192, I=4096, ranks=R128))
    x, lora_a, router, _, mixture, dropout = arguments
    assert cluster_shrink.is_faster(x, lora_a, router, mixture, dropout)
    compare("shrink_gate", cluster_shrink.launch, arguments, torch.bfloat16, truncates=True)
    first = cluster_shrink.launch(*arguments)
    for _ in range(50):
        assert all(map(torch.equal, first, cluster_shrink.launch(*arguments)))
