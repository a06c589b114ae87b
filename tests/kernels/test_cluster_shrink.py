"""When `shrink_gate` takes the kernel for clusters of sm_90a, and how plans replay it.

The op of the native library has no code for a CPU, so here the reference stands in for it.
`test_executed_shrink.py` tests the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from moelora_kernels import native, reference
from moelora_kernels.kernels import cluster_shrink
from moelora_kernels.kernels.common import configs
from moelora_kernels.types import NO_ROUTER, Mixture, RouterTensors
from support.arguments import calls
from support.cases import Case
from support.inputs import Inputs
from support.plans import BACKENDS, planned_ops, plans_of

CASE = Case(T=40, I=64, O=24, ranks=(16,) * 4, router_bias=True, temperature=0.5)


def as_reference(
    x: Tensor, a: Tensor, router: Tensor, bias: Tensor, ranks, scaling, top_k, renormalize, t
) -> tuple[Tensor, ...]:
    """The op of the library, computed by the reference."""
    mixture = Mixture(tuple(ranks), tuple(scaling), False, top_k, renormalize, t)
    routers = RouterTensors([router], [bias] if bias.numel() else [])
    return tuple(reference.shrink_gate(x, [a], routers, None, mixture))


@pytest.fixture
def calls_of_op() -> Iterator[list]:
    """Yield the arguments of every call of the op. It computes on CPU tensors, as on an H200."""
    arguments: list = []

    def record(*args) -> tuple[Tensor, ...]:
        arguments.append(args)
        return as_reference(*args)

    library = torch.library.Library("moelora", "IMPL")
    library.impl("cluster_shrink", record, "CPU")
    op = torch.ops.moelora.cluster_shrink.default
    with (
        mock.patch.object(cluster_shrink, "op", return_value=op),
        mock.patch.object(cluster_shrink, "_is_on_gpu", return_value=True),
        configs.assume("sm_90"),
    ):
        yield arguments
    library._destroy()


def test_the_op_needs_a_library_with_cuda() -> None:
    assert (cluster_shrink.op() is None) == (
        "cluster_shrink" not in native.build_info().get("cuda_ops", ())
    )


# Tokens on an H200: too few blocks for the multiprocessors, and a second wave that is too empty.
TOKENS = {5056: False, 5120: True, 8192: True, 8193: False, 10240: True, 16385: True}


@pytest.mark.parametrize("tokens", TOKENS)
def test_blocks_fill_their_waves(tokens: int) -> None:
    assert cluster_shrink.fills_waves(tokens, configs.PROCESSORS["sm_90"]) == TOKENS[tokens]


def is_faster(inputs: Inputs, T: int = 8192, **changes) -> bool:
    x = changes.pop("x", inputs.x)[:1].expand(T, -1)
    arguments = {
        "lora_a": inputs.lora_a, "router": inputs.router, "mixture": inputs.mixture,
        "dropout": inputs.dropout, **changes,
    }  # fmt: skip
    with mock.patch.object(cluster_shrink, "_is_matrix", lambda t: t.dtype == torch.bfloat16):
        return cluster_shrink.is_faster(x, *arguments.values())


def test_calls_that_the_op_computes(calls_of_op: list) -> None:
    inputs = Inputs(CASE, torch.bfloat16)
    assert is_faster(inputs)
    assert is_faster(Inputs(CASE._replace(ranks=(8,) * 16), torch.bfloat16))
    assert not is_faster(inputs, T=1024)
    for case in (
        CASE._replace(ranks=(16,) * 3),
        CASE._replace(ranks=(4,) * 17),
        CASE._replace(n=2),
        CASE._replace(dropout=0.1),
        CASE._replace(share_a=True),
        CASE._replace(adapters=torch.float32),
    ):
        assert not is_faster(Inputs(case, torch.bfloat16)), case
    assert not is_faster(Inputs(CASE, torch.float16))
    assert not is_faster(inputs, router=NO_ROUTER)
    with configs.assume("sm_100"):
        assert not is_faster(inputs)
    with mock.patch.object(cluster_shrink, "_is_on_gpu", return_value=False):
        assert not is_faster(inputs)
    with mock.patch.object(cluster_shrink, "op", return_value=None):
        assert not is_faster(inputs)


def test_matrices_that_a_tensor_map_describes() -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert cluster_shrink._is_matrix(x)
    assert cluster_shrink._is_matrix(x[:, 8:])
    odd = torch.zeros(4, 60, dtype=x.dtype)
    for other in (x[:, 1:], x.t(), x[:, ::2], x[:1].expand(4, -1), x.float(), odd):
        assert not cluster_shrink._is_matrix(other)


@pytest.mark.parametrize("case", (CASE, CASE._replace(router_bias=False, K=4)), ids=("bias", "all"))
def test_the_launcher_takes_the_op(
    case: Case, calls_of_op: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_shrink, "FILL", 0.0)
    (arguments,) = calls("shrink_gate", Inputs(case, torch.bfloat16))
    results = cluster_shrink.launch(*arguments)
    assert len(calls_of_op) == 1
    for actual, expected in zip(results, reference.shrink_gate(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_the_launcher_takes_triton(calls_of_op: list) -> None:
    (arguments,) = calls("shrink_gate", Inputs(CASE, torch.bfloat16))
    with mock.patch.object(cluster_shrink.shrink_gate, "launch", lambda *given: given):
        assert all(
            a is b for a, b in zip(cluster_shrink.launch(*arguments), arguments, strict=True)
        )
    assert not calls_of_op


def test_triton_takes_the_place_of_an_op_that_fails(
    calls_of_op: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_shrink, "FILL", 0.0)
    (arguments,) = calls("shrink_gate", Inputs(CASE, torch.bfloat16))
    failing = mock.Mock(side_effect=RuntimeError("no tensor map"))
    monkeypatch.setattr(cluster_shrink, "op", lambda: failing)
    with (
        mock.patch.object(cluster_shrink.shrink_gate, "launch") as launch,
        pytest.warns(RuntimeWarning, match="no tensor map"),
    ):
        assert cluster_shrink.launch(*arguments) is launch.return_value


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_replay_the_op(
    backend: str, calls_of_op: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call computes, the second records, and the next ones replay its bits."""
    monkeypatch.setattr(cluster_shrink, "FILL", 0.0)
    with planned_ops(backend) as (planned, _):
        results = [Inputs(CASE, torch.bfloat16, seed).step("wide") for seed in (0, 1, 0, 1)]
        assert not planned["wide"].problems
        assert plans_of({"": planned["wide"]})
    assert len(calls_of_op) == 4
    assert [len(arguments) for arguments in calls_of_op] == [9] * 4
    for arguments in calls_of_op:
        assert [*arguments[4]] == [*CASE.ranks]
        assert [*arguments[5]] == [*calls_of_op[0][5]]
        assert arguments[6:] == (2, True, 0.5)
    for first, replayed in ((0, 2), (1, 3)):
        for name, value in results[first].items():
            assert torch.equal(value, results[replayed][name]), name
