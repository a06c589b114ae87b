"""Plans: a replay computes the bits of the call that it replaces, from tensors that moved.

Every test runs on the replay in Python and on that of the native library.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moelora_kernels import native
from moelora_kernels.plans import PlannedOp
from moelora_kernels.plans import native as plans_native
from moelora_kernels.plans.native import encoded
from moelora_kernels.plans.steps import Address, Call, Launch, Plan
from support.backends import needs_library
from support.cases import GROUPED, LAYERS, WIDE, Case, layer_case
from support.fake_driver import fake_driver
from support.inputs import Inputs
from support.kernels_on_cpu import kernels_on_cpu
from support.plans import (
    BACKENDS,
    counted,
    planned_ops,
    plans_of,
    run,
    shifted,
    wide_arguments,
)
from support.selection import exhaustive

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def native_replays() -> int:
    """Return how many calls the native library has replayed."""
    library = native.plan_library()
    return 0 if library is None else library.count_replays()


def native_plans(op: PlannedOp) -> bool:
    """Return whether the native library replays all plans of an op."""
    return op.native is not None and all(encoded(plan) for plan in plans_of({"": op}))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        assert actual[name].dtype == value.dtype, name
        assert actual[name].is_contiguous() == value.is_contiguous(), name
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_replays_are_the_calls(
    case: Case,
    dtype: torch.dtype,
    impl: str,
    backend: str,
    change: Callable = lambda inputs: None,
) -> None:
    """The first call with a key computes as ever, the second records, the next two replay."""
    with planned_ops(backend) as (planned, driver):
        calls = Counter()
        for name, op in planned.items():
            op.function = counted(op.function, name, calls)
        expected, launched = {}, {}

        def step(seed: int) -> dict[str, Tensor]:
            inputs = Inputs(case, dtype, seed)
            change(inputs)
            return inputs.step(impl)

        for seed in (1, 0):
            expected[seed] = step(seed)
        called = dict(calls)
        assert called
        assert not problems(planned), problems(planned)
        compiled, replays = len(driver.compiled), native_replays()
        for seed in (1, 0):
            driver.launched.clear()
            assert_same_bits(step(seed), expected[seed])
            launched[seed] = [*driver.launched]
        assert dict(calls) == called, "a call with a plan was not replayed"
        assert len(driver.compiled) == compiled
        expected_replays = sum(calls[name] for name, op in planned.items() if native_plans(op))
        assert native_replays() - replays == expected_replays


def problems(planned: dict[str, PlannedOp]) -> list[str]:
    """Return why calls have no plan."""
    return [f"{n}: {p}" for n, op in planned.items() for p in op.problems]


# A plan has the same steps for other sizes, and the interpreter takes minutes for large ones.
MOST_TOKENS, MOST_EXPERTS, MOST_RANK, MOST_FEATURES = 10, 8, 400, 300
CASES = {
    name: case._replace(T=min(case.T, MOST_TOKENS))
    for name, case in {
        **{f"layer-{name}": case for name, case in LAYERS.items()},
        **{f"wide-{name}": case for name, case in WIDE.items() if case.start in ("", "bias")},
        **{
            f"grouped-{name}": case
            for name, case in GROUPED.items()
            if case.start in ("", "bias") and not case.per_pair and case.gate == "sparse"
        },
    }.items()
    if len(case.ranks) <= MOST_EXPERTS
    and sum(case.ranks) <= MOST_RANK
    and max(case.I, *case.out_features) <= MOST_FEATURES
}


BY_DEFAULT = (
    "layer-router",
    "layer-siblings",
    "layer-share_a",
    "layer-dropout_per_expert",
    "layer-rows",
    "layer-one_row",
    "layer-aux",
    "wide-mixed_ranks",
    "wide-float32_adapters",
    "wide-no_token",
    "grouped-plain",
    "grouped-mostly_one",
)


@pytest.mark.parametrize(
    ("case", "impl"),
    [
        pytest.param(
            case, impl, id=f"{name}-{impl}", marks=() if name in BY_DEFAULT else exhaustive
        )
        for name, case in CASES.items()
        for impl in case.impls
    ],
)
def test_a_replay_has_the_bits_of_the_call(case: Case, impl: str, backend: str) -> None:
    assert_replays_are_the_calls(case, torch.float16, impl, backend)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", ("layer-siblings", "layer-dropout_per_expert", "layer-sparse"))
def test_other_dtypes(name: str, dtype: torch.dtype, backend: str) -> None:
    assert_replays_are_the_calls(CASES[name], dtype, CASES[name].impls[-1], backend)


def unaligned(inputs: Inputs) -> None:
    """x, a weight and dy begin at an odd element of their storage."""
    inputs.x = shifted(inputs.x)
    inputs.base_weight[0] = shifted(inputs.base_weight[0])
    inputs.dy[-1] = shifted(inputs.dy[-1])


def strided(inputs: Inputs) -> None:
    """A slice of columns, the transpose of a matrix, and one number for a whole gradient."""
    columns = inputs.x.shape[1]
    inputs.x = torch.cat([inputs.x, inputs.x], dim=1)[:, :columns]
    inputs.lora_b[0] = inputs.lora_b[0].t().contiguous().t()
    inputs.dy[0] = inputs.dy[0][:1, :1].expand(inputs.dy[0].shape)


def float32_dy(inputs: Inputs) -> None:
    inputs.dy = [dy.float() for dy in inputs.dy]


def packed(inputs: Inputs) -> None:
    """The parameters of all siblings lie in one storage, and all gradients are one tensor."""
    for name in ("base_weight", "lora_a", "lora_b", "router_weight"):
        setattr(inputs, name, list(torch.stack(getattr(inputs, name))))
    inputs.dy = [inputs.dy[0]] * len(inputs.dy)


CHANGES = (unaligned, strided, float32_dy, packed)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layouts_of_tensors(change: Callable, impl: str, backend: str) -> None:
    case = layer_case(n=2, I=32, O=24)
    assert_replays_are_the_calls(case, torch.float16, impl, backend, change)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_a_plan_of_shared_storages_serves_separate_ones(impl: str, backend: str) -> None:
    """Packed tensors have the key of separate ones, so each address is that of its own input."""
    case = layer_case(n=2, I=32, O=24)
    with planned_ops(backend) as (planned, _):
        for _ in range(2):
            inputs = Inputs(case, torch.float16, 1)
            packed(inputs)
            inputs.step(impl)
        plans = plans_of(planned)
        inputs = Inputs(case, torch.float16, 2)
        actual = inputs.step(impl)
        assert plans_of(planned) == plans
    with kernels_on_cpu(plans=False), fake_driver("sm_90", interpret=True):
        assert_same_bits(actual, inputs.step(impl))


@pytest.fixture
def wide(backend: str) -> Iterator[PlannedOp]:
    """The op `wide` with plans, on a driver that computes nothing."""
    with planned_ops(backend, interpret=False) as (planned, _):
        yield planned["wide"]


def test_outputs_of_two_replays_are_separate(wide) -> None:
    arguments = wide_arguments()
    for _ in range(2):
        run(wide, arguments)
    first, second = flat_outputs(run(wide, arguments)), flat_outputs(run(wide, arguments))
    assert plans_of({"wide": wide})
    storages = [t.untyped_storage().data_ptr() for t in first + second if t.numel()]
    assert len({*storages}) == len(storages)


def flat_outputs(result) -> list[Tensor]:
    return [t for each in result for t in ([each] if isinstance(each, Tensor) else each)]


def test_a_plan_keeps_no_tensor_of_a_call(wide) -> None:
    arguments = wide_arguments()
    for _ in range(3):
        result = run(wide, arguments)
    references = [weakref.ref(t) for t in [arguments[0], *arguments[1], *flat_outputs(result)]]
    del arguments, result
    assert not any(reference() is not None for reference in references)


def test_threads_share_the_plans(backend: str) -> None:
    """Four threads call two shapes at once; each result is that of its own tensors."""
    case = layer_case(I=32, O=24)
    inputs = [Inputs(case._replace(T=T), torch.float16, T) for T in (5, 6, 7, 8)]
    with kernels_on_cpu(plans=False), fake_driver("sm_90", interpret=True):
        expected = [i.step("wide") for i in inputs]
    errors: list[Exception] = []
    # Triton's interpreter is not safe for threads.
    interpreter = threading.Lock()
    with planned_ops(backend) as (planned, driver):
        interpret = driver.run_interpreted
        driver.run_interpreted = lambda *arguments: locked(interpreter, interpret, arguments)
        barrier = threading.Barrier(len(inputs))

        def work(i: int) -> None:
            try:
                barrier.wait()
                for turn in range(4):
                    k = (i + turn) % len(inputs)
                    assert_same_bits(inputs[k].step("wide"), expected[k])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems(planned)
        assert plans_of(planned)
    assert not errors


def locked(lock: threading.Lock, function: Callable, arguments: tuple) -> None:
    with lock:
        function(*arguments)


def swap_addresses(plan: Plan) -> None:
    """h and u are exchanged in the launch."""
    launch = next(step for step in plan.steps if isinstance(step, Launch))
    (i, *h), (j, *u) = launch.single[-5:-3]
    launch.single[-5:-3] = [(i, *u), (j, *h)]
    values = [*launch.values]
    values[i], values[j] = values[j], values[i]
    launch.values = tuple(values)


def keep_an_address(plan: Plan) -> None:
    """The address of an input is that of the recorded call."""
    launch = next(step for step in plan.steps if isinstance(step, Launch))
    launch.values = tuple(STALE.data_ptr() if v.__class__ is Address else v for v in launch.values)
    launch.single = [entry for entry in launch.single if entry[1] != 0]


def launch_one_program(plan: Plan) -> None:
    launch = next(step for step in plan.steps if isinstance(step, Launch))
    launch.programs = 1


def skip_a_product(plan: Plan) -> None:
    call = [step for step in plan.steps if isinstance(step, Call)][-1]
    plan.steps = tuple(step for step in plan.steps if step is not call)


STALE = torch.zeros(1 << 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    "fault", (swap_addresses, keep_an_address, launch_one_program, skip_a_product)
)
def test_a_fault_in_a_plan_changes_bits(fault: Callable) -> None:
    """So the comparisons above would see it."""
    case = layer_case(T=200, I=32, O=24)
    with planned_ops("python") as (planned, _):
        for _ in range(2):
            expected = Inputs(case, torch.float16, 1).step("wide")
        (plan,) = plans_of({"wide": planned["wide"]})
        fault(plan)
        with pytest.raises(AssertionError):
            assert_same_bits(Inputs(case, torch.float16, 1).step("wide"), expected)


@needs_library
@pytest.mark.parametrize("fault", (swap_addresses, launch_one_program, skip_a_product))
def test_a_fault_in_a_plan_of_the_library_changes_bits(fault: Callable, monkeypatch) -> None:
    case = layer_case(T=200, I=32, O=24)
    faulty: list[Plan] = []

    def encoded_fault(plan: Plan) -> list[int] | None:
        # The first plan is that of the forward.
        if not faulty:
            fault(plan)
        faulty.append(plan)
        return encoded(plan)

    monkeypatch.setattr(plans_native, "encoded", encoded_fault)
    with planned_ops("native"):
        for _ in range(2):
            expected = Inputs(case, torch.float16, 1).step("wide")
        replays = native_replays()
        with pytest.raises(AssertionError):
            assert_same_bits(Inputs(case, torch.float16, 1).step("wide"), expected)
        assert native_replays() > replays
