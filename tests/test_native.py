"""The native CPU library against the reference: every op, every form of the gate, every edge."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import moelora_kernels
from moelora_kernels import native, reference
from moelora_kernels.testing import assert_within_budget

REQUIRED = os.environ.get("MOELORA_REQUIRE_NATIVE") == "1"
needs_library = pytest.mark.skipif(
    not native.available() and not REQUIRED, reason=f"native library: {native.reason()}"
)
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Computed in float32 whatever x is; every other result has passed through x.dtype.
EXACT = ("logits", "weights", "drouter", "dlogits")
ops = torch.ops.moelora


class Case(NamedTuple):
    """Sizes and options of one layer; `gate` names the form its gate takes."""

    T: int = 13
    I: int = 70  # noqa: E741
    O: int = 45  # noqa: E741
    ranks: tuple[int, ...] = (16, 16, 16, 16)
    n: int = 1
    gate: str = "router"
    top_k: int = 2
    renormalize: bool = True
    temperature: float = 1.0
    bias: bool = False
    share_a: bool = False
    dropout: float = 0.0
    per_expert: bool = False
    adapters: torch.dtype | None = None
    chained: bool = False


# name -> case; the comment says what it would catch.
CASES = {
    "plain": Case(),
    # Column blocks of the router, token tiles, tails of both, two threads.
    "long": Case(T=523, I=2100, bias=True),
    "no_token": Case(T=0),
    "no_token_dense": Case(T=0, gate="dense"),
    "one_token": Case(T=1),
    "one_expert": Case(ranks=(5,), top_k=1),
    "one_expert_dense": Case(ranks=(16,), gate="dense"),
    "all_experts": Case(top_k=4),
    "all_experts_softmax": Case(top_k=4, renormalize=False, temperature=0.7),
    "softmax_before_topk": Case(renormalize=False, temperature=1.7, chained=True),
    "many_experts": Case(T=31, ranks=(2,) * 67, top_k=6),
    "mixed_ranks": Case(ranks=(1, 3, 16, 128), bias=True, chained=True),
    "mixed_ranks_dense": Case(ranks=(1, 3, 16, 128), gate="dense"),
    "siblings": Case(n=3, bias=True, chained=True),
    "siblings_sparse": Case(n=3, gate="sparse"),
    "siblings_dense": Case(n=3, ranks=(4, 9), gate="dense"),
    "sparse_int64": Case(gate="sparse_int64"),
    "one_row": Case(T=131, gate="one_row"),
    "rows": Case(T=131, gate="rows"),
    "rows_int64": Case(T=131, gate="rows_int64", n=2),
    "share_a": Case(share_a=True, ranks=(8, 8, 8), n=2),
    "share_a_dense": Case(share_a=True, ranks=(8, 8, 8), gate="dense"),
    "dropout": Case(dropout=0.25, n=2),
    "dropout_per_expert": Case(dropout=0.25, per_expert=True, n=2, ranks=(1, 5, 16)),
    "float32_adapters": Case(n=2, adapters=torch.float32, bias=True),
}


class Inputs:
    """Random tensors of a case in one dtype; `.double()` is the same layer in float64."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of)

        T, I, O, ranks, n = case[:5]  # noqa: E741
        E, R = len(ranks), sum(ranks)
        width = ranks[0] if case.share_a else R
        of = case.adapters if case.adapters and dtype is not torch.float64 else dtype
        self.case, self.E, self.R = case, E, R
        self.scaling = [0.5 + 0.25 * e for e in range(E)]
        self.seed = torch.tensor([-5_000_000_003]) if case.dropout else None
        self.x = draw(T, I)
        # Adapters are rounded to x.dtype here: what the cast inside the op costs is no error of it.
        self.lora_a = [draw(width, I).div(I**0.5).to(dtype).to(of) for _ in range(n)]
        self.lora_b = [draw(O, R).to(dtype).to(of) for _ in range(n)]
        self.dy = [draw(T, O).div(O**0.5) for _ in range(n)]
        self.dlogits = draw(T, n * E, of=reference.compute_dtype(self.x)) if case.chained else None
        self.gates = self.indices = self.rows = None
        self.router: list[Tensor] = []
        self.bias: list[Tensor] = []
        kind = case.gate
        wide = torch.int64 if kind.endswith("int64") else torch.int32
        if kind == "router":
            self.router = [draw(E, I, of=of).div(I**0.5) for _ in range(n)]
            self.bias = [draw(E, of=of) for _ in range(n)] if case.bias else []
        elif kind.startswith("sparse"):
            self.gates = draw(T, n * 2)
            ids = torch.randint(-1, E + 1, (T, n * 2), generator=generator)
            self.indices = ids.to(wide)
        else:
            G = {"dense": T, "one_row": 1}.get(kind, 5)
            self.gates = draw(G, n * E)
            self.gates[:, 0] = 0
            if kind.startswith("rows"):
                self.rows = torch.randint(-1, G + 1, (T,), generator=generator).to(wide)

    def double(self) -> Inputs:
        copy = object.__new__(Inputs)
        copy.__dict__ = {name: _double(value) for name, value in self.__dict__.items()}
        return copy

    def shrink(self) -> list:
        c = self.case
        k = c.top_k if self.router else 0
        return [
            self.x, self.lora_a, self.gates, self.indices, self.rows, self.router, self.bias,
            list(c.ranks), self.scaling, c.share_a, k, c.renormalize, c.temperature, c.dropout,
            c.per_expert, self.seed,
        ]  # fmt: skip

    def backward(self, forward: tuple[Tensor, ...], dy: list[Tensor] | None = None) -> list:
        """The arguments of shrink_gate_backward after shrink_gate returned `forward`."""
        c = self.case
        h, _, weights, chosen, logits = forward
        gates, indices, k = self.gates, self.indices, 0
        if self.router:
            gates, k = weights, c.top_k
            indices = chosen if k < self.E else None
        return [
            self.dy if dy is None else dy, self.lora_b, h, gates, indices, self.rows,
            logits if self.router else None, self.dlogits if self.router else None,
            list(c.ranks), self.scaling, c.share_a, k, c.renormalize, c.temperature,
        ]  # fmt: skip

    def gram(
        self, forward: tuple[Tensor, ...], back: tuple[Tensor, ...], dy: list[Tensor] | None = None
    ) -> list:
        c = self.case
        return [
            self.x, back[0], back[2] if self.router else None, self.dy if dy is None else dy,
            forward[1], self.lora_a[0].dtype, (self.router or [self.x])[0].dtype, list(c.ranks),
            c.dropout, c.per_expert, self.seed,
        ]  # fmt: skip

    def shrink_dx(self, back: tuple[Tensor, ...]) -> list:
        c = self.case
        return [
            back[0], back[2] if self.router else None, self.lora_a, self.router, list(c.ranks),
            c.dropout, c.per_expert, self.seed,
        ]  # fmt: skip


def _double(value):
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and not isinstance(value, Case):
        return type(value)(_double(v) for v in value)
    return torch.float64 if isinstance(value, torch.dtype) else value


def _named(names: str, outputs) -> dict[str, Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = dict(zip(names.split(), outputs, strict=True))
    if isinstance(found.get("db"), list):
        found.update({f"db{i}": db for i, db in enumerate(found.pop("db"))})
    return found


def _compare(names: str, op, specification, arguments: list, dtype: torch.dtype) -> None:
    """`op` against `specification` on the same arguments, integers and dtypes exactly."""
    actual = _named(names, op(*arguments))
    yardstick = _named(names, specification(*arguments))
    truth = _named(names, specification(*_double(arguments)))
    for name, expected in yardstick.items():
        assert actual[name].dtype == expected.dtype, name
        assert actual[name].shape == expected.shape, name
        assert actual[name].is_contiguous(), name
        if not expected.is_floating_point():
            assert torch.equal(actual[name], expected), name
    for name, expected in truth.items():
        of = yardstick[name].dtype if name in EXACT else dtype
        if dtype is torch.float64:
            largest = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(actual[name], expected, rtol=0, atol=1e-13 * (1 + largest))
        elif expected.is_floating_point():
            assert_within_budget(actual, {name: expected}, yardstick, of)
    again = _named(names, op(*arguments))
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


def _forward(inputs: Inputs) -> tuple[Tensor, ...]:
    return reference.shrink_gate(*inputs.shrink())


def test_library_is_there_where_it_is_required() -> None:
    if REQUIRED:
        assert native.available(), native.reason()
    if native.available():
        assert native.reason() == ""
        assert native.build_info()["abi_target"] == "2.10"
    else:
        assert native.reason()
        assert native.build_info() == {}


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_shrink_gate(case: Case, dtype: torch.dtype) -> None:
    arguments = Inputs(case, dtype).shrink()
    names = "h u weights indices logits"
    _compare(names, ops.shrink_gate, reference.shrink_gate, arguments, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_shrink_gate_backward(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype)
    arguments = inputs.backward(_forward(inputs))
    _compare(
        "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward, arguments, dtype
    )


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_gram_and_shrink_dx(case: Case, dtype: torch.dtype) -> None:
    if case.share_a:
        case = case._replace(dropout=0.0)
    inputs = Inputs(case, dtype)
    forward = _forward(inputs)
    back = reference.shrink_gate_backward(*inputs.backward(forward))
    arguments = inputs.gram(forward, back)
    _compare("da drouter dbias db", ops.gram, reference.gram, arguments, dtype)
    _compare("dx", ops.shrink_dx, reference.shrink_dx, inputs.shrink_dx(back), dtype)


@needs_library
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (1, 3, 7))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_op_topk_gate(dtype: torch.dtype, top_k: int, renormalize: bool) -> None:
    logits = torch.randn(101, 7, dtype=torch.float64).to(dtype)
    arguments = [logits, top_k, renormalize, 0.8]
    _compare("weights indices", ops.topk_gate, reference.topk_gate, arguments, dtype)
    weights, indices = reference.topk_gate(*arguments)
    arguments = [torch.randn_like(weights), weights, indices, logits, renormalize, 0.8]
    _compare(
        "dlogits",
        lambda *given: [ops.topk_gate_backward(*given)],
        lambda *given: [reference.topk_gate_backward(*given)],
        arguments,
        dtype,
    )


@needs_library
@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (3, 7), (129, 131)))
@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 0.999))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_op_dropout_is_bitwise_the_reference(
    dtype: torch.dtype, p: float, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    for seed in (0, -1, 2**62 + 12345):
        for stream in (0, 3):
            arguments = (x, p, torch.tensor([seed]), stream)
            assert torch.equal(ops.dropout(*arguments), reference.dropout(*arguments))
    strided = torch.randn(shape[1], shape[0], dtype=torch.float64).to(dtype).t()
    arguments = (strided, p, torch.tensor([7]), 0)
    assert torch.equal(ops.dropout(*arguments), reference.dropout(*arguments))


@needs_library
def test_dropout_drops_a_nan() -> None:
    x = torch.full((64, 64), torch.nan)
    dropped = ops.dropout(x, 0.5, torch.tensor([1]), 0)
    expected = reference.dropout(x, 0.5, torch.tensor([1]), 0)
    assert torch.equal(dropped.isnan(), expected.isnan())
    assert (dropped[~dropped.isnan()] == 0).all()


@needs_library
@pytest.mark.parametrize("top_k", (1, 3, 5, 6))
def test_ties_go_to_the_lower_expert(top_k: int) -> None:
    logits = torch.randint(0, 3, (257, 6), generator=torch.Generator().manual_seed(1)).float()
    weights, indices = ops.topk_gate(logits, top_k, True, 1.0)
    expected_weights, expected = reference.topk_gate(logits, top_k, True, 1.0)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, expected_weights)


@needs_library
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_bad_logits_choose_valid_and_different_experts(bad: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 9, generator=generator)
    logits[torch.rand(200, 9, generator=generator) < 0.4] = bad
    logits[0] = bad
    for top_k in (1, 4, 9):
        for renormalize in (True, False):
            weights, indices = ops.topk_gate(logits, top_k, renormalize, 1.0)
            expected = reference.topk_gate(logits, top_k, renormalize, 1.0)
            assert torch.equal(indices, expected[1])
            assert all(len(set(row)) == top_k for row in indices.tolist())
            torch.testing.assert_close(weights, expected[0], equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_experts_out_of_range_and_repeated(dtype: torch.dtype) -> None:
    inputs = Inputs(Case(T=6, gate="sparse"), torch.float32)
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.indices = torch.tensor(
        [[-1, 4], [far, 0], [-far, 2], [2, 2], [2**31 - 1, -1], [1, 3]], dtype=dtype
    )
    forward = _forward(inputs)
    _compare(
        "h u weights indices logits", ops.shrink_gate, reference.shrink_gate, inputs.shrink(),
        torch.float32,
    )  # fmt: skip
    _compare(
        "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward,
        inputs.backward(forward), torch.float32,
    )  # fmt: skip
    _, u, *_ = ops.shrink_gate(*inputs.shrink())
    assert (u[0] == 0).all()
    dgate = ops.shrink_gate_backward(*inputs.backward(forward))[2]
    assert (dgate[0] == 0).all()
    assert dgate[1, 0] == 0


@needs_library
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("gate_rows", (0, 1, 3))
def test_rows_out_of_range(gate_rows: int, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(T=6, gate="rows"), torch.float32)
    inputs.gates = torch.randn(gate_rows, inputs.E)
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.rows = torch.tensor([-1, gate_rows, far, -far, 0, gate_rows - 1], dtype=dtype)
    if gate_rows:
        forward = _forward(inputs)
        _compare(
            "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward,
            inputs.backward(forward), torch.float32,
        )  # fmt: skip
    _, u, *_ = ops.shrink_gate(*inputs.shrink())
    assert (u[:4] == 0).all()
    if gate_rows:
        assert (u[4] != 0).any()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gate", ("sparse", "dense"))
def test_nan_of_an_expert_nobody_chose_stays_there(gate: str, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(gate=gate), dtype)
    poisoned = slice(32, 48)
    inputs.lora_a[0][poisoned] = torch.nan
    inputs.lora_b[0][:, poisoned] = torch.inf
    if gate == "sparse":
        inputs.indices = torch.tensor([[0, 3]], dtype=torch.int32).repeat(13, 1)
    else:
        inputs.gates[:, 2] = 0
    forward = ops.shrink_gate(*inputs.shrink())
    assert forward[1].isfinite().all()
    assert (forward[1][:, poisoned] == 0).all()
    dh, u, _ = ops.shrink_gate_backward(*inputs.backward(forward))
    assert dh.isfinite().all()
    assert u.isfinite().all()


def _layouts(dy: Tensor) -> dict[str, Tensor]:
    """The same sizes under the strides that autograd hands out."""
    T, O = dy.shape  # noqa: E741
    return {
        "sum": torch.ones((), dtype=dy.dtype).expand(T, O),
        "mean over tokens": dy[:1].expand(T, O),
        "one column": dy[:, :1].expand(T, O),
        "transposed": dy.t().contiguous().t(),
        "cat": torch.cat([dy + 1, dy, dy - 1], dim=1)[:, O : 2 * O],
        "every other": dy.repeat_interleave(2, dim=1)[:, ::2],
        "float32": dy.float(),
        "float64": dy.double(),
    }


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", _layouts(torch.zeros(1, 1)))
def test_any_strides_of_dy(layout: str, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(n=2), dtype)
    forward = _forward(inputs)
    dy = [_layouts(g)[layout] for g in inputs.dy]
    _compare(
        "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward,
        inputs.backward(forward, dy), dtype,
    )  # fmt: skip
    back = reference.shrink_gate_backward(*inputs.backward(forward, dy))
    _compare("da drouter dbias db", ops.gram, reference.gram, inputs.gram(forward, back, dy), dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    inputs = Inputs(Case(gate="dense"), dtype)
    inputs.x = torch.cat([inputs.x, inputs.x], dim=1)[:, : inputs.case.I]
    inputs.lora_a = [a.t().contiguous().t() for a in inputs.lora_a]
    inputs.lora_b = [b.t().contiguous().t() for b in inputs.lora_b]
    inputs.gates = inputs.gates.t().contiguous().t()
    names = "h u weights indices logits"
    _compare(names, ops.shrink_gate, reference.shrink_gate, inputs.shrink(), dtype)
    arguments = inputs.backward(_forward(inputs))
    names = "dh u dgate"
    _compare(names, ops.shrink_gate_backward, reference.shrink_gate_backward, arguments, dtype)


@needs_library
def test_wrong_shapes_raise() -> None:
    inputs = Inputs(Case(), torch.float32)
    arguments = inputs.shrink()
    arguments[1] = [inputs.lora_a[0][:, :-1]]
    with pytest.raises(RuntimeError, match="lora_a, in_features: expected size 70, got 69"):
        ops.shrink_gate(*arguments)
    arguments = inputs.backward(_forward(inputs))
    arguments[0] = [inputs.dy[0][:-1]]
    with pytest.raises(RuntimeError, match="dy, tokens: expected size 13, got 12"):
        ops.shrink_gate_backward(*arguments)


def _run(
    code: list[str], folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    # OMP_NUM_THREADS: the child must not fight the parent's threads for the cores.
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *code], env=given, cwd=folder, capture_output=True, text=True, timeout=600
    )


@needs_library
@pytest.mark.parametrize("level", ("portable", "avx2"))
def test_every_vector_width(level: str) -> None:
    if level not in native.build_info()["simd"]:
        pytest.skip(f"this library has no {level} code")
    result = _run(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "test_op"],
        MOELORA_SIMD=level,
    )
    assert result.returncode == 0, result.stdout[-3000:]


REPORT = """
import torch, moelora_kernels
from moelora_kernels import native, reference
logits = torch.randn(3, 4)
weights, indices = torch.ops.moelora.topk_gate(logits, 2, True, 1.0)
torch.testing.assert_close(weights, reference.topk_gate(logits, 2, True, 1.0)[0])
print(native.available(), "|", native.reason(), "|", native.build_info())
"""


def test_the_library_can_be_ignored() -> None:
    result = _run(["-W", "error", "-c", REPORT], MOELORA_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False | ignored: MOELORA_NATIVE=0 | {}"


def test_a_missing_library_is_silent(tmp_path: Path) -> None:
    _copy_package(tmp_path)
    result = _run(["-W", "error", "-c", REPORT], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "False | not built" in result.stdout


def test_a_broken_library_warns_once_and_falls_back(tmp_path: Path) -> None:
    package = _copy_package(tmp_path)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / f"_C{suffix}").write_bytes(b"not a library")
    result = _run(["-c", REPORT], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False | built, but it does not load:")
    assert result.stderr.count("RuntimeWarning") == 1


def _copy_package(target: Path) -> Path:
    source = Path(moelora_kernels.__file__).parent
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    return Path(shutil.copytree(source, target / "moelora_kernels", ignore=ignore))
