"""Float32 adapters under a 16-bit x on the kernels: a call casts them, so no value is stale."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_kernels import MoeLoraConfig, MoeLoraGroup, MoeLoraLinear
from support.cases import LAYERS, WIDE, Case, layer_case
from support.inputs import Inputs, assert_layer_within_budget
from support.plans import BACKENDS, planned_ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The module, and not the function.
wide = importlib.import_module("moelora_kernels.ops.wide")


@pytest.fixture
def casts(monkeypatch) -> None:
    """A and B are cast at any number of tokens."""
    monkeypatch.setattr(wide, "CAST_TOKENS", 1)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Iterator[str]:
    with planned_ops(request.param):
        yield request.param


def float32_case(case: Case) -> Case:
    return case._replace(adapters=FP32)


CASES = {
    "plain": float32_case(layer_case(T=70, I=64, O=40, ranks=(24,) * 4)),
    "siblings": WIDE["float32_adapters"],
    "aux": float32_case(LAYERS["aux"]),
    "share_a": float32_case(LAYERS["share_a"]),
    "dropout": float32_case(LAYERS["dropout"]),
    "dropout_per_expert": float32_case(LAYERS["dropout_per_expert"]),
    "rows": float32_case(LAYERS["rows"]),
}


def rounded_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Return inputs whose A and B are not values of `dtype`: a cast rounds them."""
    inputs = Inputs(case, dtype)
    for matrices in (inputs.lora_a, inputs.lora_b):
        for matrix in matrices:
            matrix.mul_(1.0 + 2.0**-12)
    return inputs


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", CASES)
def test_within_the_budget(name: str, dtype: torch.dtype, casts, backend: str) -> None:
    inputs = Inputs(CASES[name], dtype)
    for _ in range(3):
        assert_layer_within_budget(inputs, "wide")


@pytest.mark.parametrize("name", CASES)
def test_a_cast_changes_no_bit(name: str, monkeypatch) -> None:
    """The kernels round A and B like the cast. In bfloat16 the cast rounds the router for dx."""
    inputs = rounded_inputs(CASES[name], FP16)
    results = []
    for tokens in (1, 2048):
        monkeypatch.setattr(wide, "CAST_TOKENS", tokens)
        with planned_ops("python"):
            results.append(inputs.step("wide"))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


# --- a changed parameter ------------------------------------------------------------------------


def assign_data(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.data = values


def copy_to_data(parameter: nn.Parameter, values: Tensor) -> None:
    """Autograd does not see it: the version stays."""
    parameter.data.copy_(values)


def swap_storage(parameter: nn.Parameter, values: Tensor) -> None:
    """FSDP2 frees the memory of a parameter, and fills it again under the same version."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
        parameter.copy_(values)


@torch.no_grad()
def copy_in_place(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.copy_(values)


CHANGES = (assign_data, copy_to_data, swap_storage, copy_in_place)


def float32_layer() -> MoeLoraLinear:
    config = MoeLoraConfig(num_experts=4, rank=24, top_k=2, impl="wide", adapter_dtype="float32")
    layer = MoeLoraLinear(48, 32, config=config, dtype=BF16)
    nn.init.normal_(layer.lora_B)
    return layer


def layer_and_input() -> tuple[MoeLoraLinear, Tensor]:
    torch.manual_seed(0)
    return float32_layer(), torch.randn(5, 48, dtype=BF16)


def trained(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output of a training step, and its gradients."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert {grad.dtype for grad in grads.values()} == {FP32}
    return {"y": y.detach(), "dx": leaf.grad, **grads}


def assert_fresh(layer: nn.Module, x: Tensor) -> None:
    """The results of `layer` are those of another layer with the same values."""
    results, expected = trained(layer, x), trained(copy.deepcopy(layer), x)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ("lora_A", "lora_B", "router.weight"))
def test_the_next_call_reads_the_new_values(
    name: str, change: Callable, casts, backend: str
) -> None:
    layer, x = layer_and_input()
    before = [trained(layer, x)["y"] for _ in range(3)][-1]
    parameter = layer.get_parameter(name)
    change(parameter, parameter.detach().roll(1, 0) * 1.5)
    assert_fresh(layer, x)
    assert not torch.equal(trained(layer, x)["y"], before)


@pytest.mark.parametrize("options", (dict(foreach=True), dict(fused=True)), ids=str)
def test_a_step_of_an_optimizer(options: dict, casts, backend: str) -> None:
    layer, x = layer_and_input()
    optimizer = torch.optim.AdamW(
        [p for p in layer.parameters() if p.requires_grad], lr=0.1, **options
    )
    before = [trained(layer, x)["y"] for _ in range(3)][-1]
    optimizer.step()
    assert_fresh(layer, x)
    assert not torch.equal(trained(layer, x)["y"], before)


def test_loaded_values(casts, backend: str) -> None:
    layer, x = layer_and_input()
    state = {name: value * 0.5 for name, value in layer.state_dict().items()}
    before = [trained(layer, x)["y"] for _ in range(3)][-1]
    layer.load_state_dict(state)
    assert_fresh(layer, x)
    assert not torch.equal(trained(layer, x)["y"], before)


# --- gradients ----------------------------------------------------------------------------------


class Names(TorchDispatchMode):
    """The names of the ops in the context, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", (1, 3))
def test_gradients_are_neither_cast_nor_copied(n: int) -> None:
    """The first gradient becomes `.grad` itself; a later one is added in place."""
    layer = MoeLoraGroup(**{f"sibling_{i}": float32_layer() for i in range(n)})
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(5, 48, dtype=BF16)
    for names in ([], ["add_"] * len(parameters)):
        ys = layer(x)
        with Names() as mode:
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        assert mode.names == ["ones_like"] * n + ["wide_backward", *names]
    assert {p.grad.dtype for p in parameters} == {FP32}
