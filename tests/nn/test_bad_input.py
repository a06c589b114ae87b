"""Input that a layer cannot use: it works as in nn.Linear, or the error names the argument."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    link_siblings,
    merge_adapter,
    merge_and_unload,
    replace_linears,
    set_tasks,
)
from support import linears

OPTIONS = {"num_experts": 4, "rank": 2}


def linked_layer():
    model = nn.ModuleDict({"gate_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)})
    replace_linears(model, MoeLoraConfig(top_k=2, **OPTIONS), [*model])
    link_siblings(model)
    return model["gate_proj"]


def peft_layer():
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    config = MoeLoraPeftConfig(preset="ming", target_modules=["0"], **OPTIONS)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]


LAYERS = {
    "linear": lambda: MoeLoraLinear(8, 8, top_k=2, **OPTIONS),
    "linked": linked_layer,
    "group": lambda: MoeLoraGroup(q=MoeLoraLinear(8, 8, **OPTIONS)),
    "ffn": lambda: MoeLoraFFN(8, 16, config=MoeLoraConfig.preset("mixlora", **OPTIONS)),
    "adapter": lambda: MoeLoraAdapter(nn.Linear(8, 8), 8, MoeLoraConfig.preset("pesc", **OPTIONS)),
    "peft": peft_layer,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def jagged():
    return torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)


INPUTS = {
    "list": lambda: [[1.0] * 8],
    "None": lambda: None,
    "numpy": lambda: np.ones((3, 8), dtype=np.float32),
    "int": lambda: torch.ones(3, 8, dtype=torch.int64),
    "bool": lambda: torch.ones(3, 8, dtype=torch.bool),
    "complex": lambda: torch.ones(3, 8, dtype=torch.complex64),
    "no_dimension": lambda: torch.tensor(1.0),
    "wrong_width": lambda: torch.randn(3, 9),
    "no_width": lambda: torch.randn(3, 0),
    "half": lambda: torch.randn(3, 8).half(),
    "double": lambda: torch.randn(3, 8).double(),
    "float8": lambda: torch.randn(3, 8).to(torch.float8_e4m3fn),
    "tuple": lambda: (torch.randn(3, 8),),
    "string": lambda: "x",
    "mkldnn": lambda: torch.randn(3, 8).to_mkldnn(),
    "sparse_3d": lambda: torch.randn(2, 3, 8).to_sparse(),
    "meta": lambda: torch.randn(3, 8, device="meta"),
    "csr": lambda: torch.randn(3, 8).to_sparse_csr(),
    "jagged": jagged,
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)]),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:Sparse CSR")
@pytest.mark.parametrize("x", INPUTS)
def test_an_input_that_no_layer_takes(layer, x):
    with pytest.raises((TypeError, ValueError), match=r"^x: expected"):
        layer(INPUTS[x]())


def test_no_input(layer):
    with pytest.raises(TypeError, match=r"x: expected one tensor"):
        layer()


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_input_is_another_name_of_x(layer):
    x = torch.randn(3, 8)
    assert torch.equal(first(layer(input=x)), first(layer(x)))
    with pytest.raises(TypeError, match=r"x: expected one tensor"):
        layer(x, input=x)
    compiled = torch.compile(LAYERS["linear"](), backend="eager", fullgraph=True)
    assert compiled(input=x).shape == (3, 8)


@pytest.mark.parametrize("shape", ((0, 8), (2, 0, 8), (0, 5, 8), (8,)))
def test_a_batch_without_tokens_and_a_single_token(layer, shape):
    assert first(layer(torch.randn(shape))).shape == shape


@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_matrix_works_over_one_linear(name):
    """nn.Linear takes it too."""
    layer, x = LAYERS[name](), torch.randn(3, 8).relu()
    if name in ("ffn", "adapter"):
        with pytest.raises(TypeError, match=r"x: expected a dense tensor.*pass x\.to_dense\(\)"):
            layer(x.to_sparse())
    else:
        torch.testing.assert_close(first(layer(x.to_sparse())), first(layer(x)))


GATED = {
    "linear": lambda: MoeLoraLinear(8, 8, router="external", **OPTIONS),
    "group": lambda: MoeLoraGroup(q=MoeLoraLinear(8, 8, router="external", **OPTIONS)),
    "ffn": lambda: MoeLoraFFN(8, 16, router="external", **OPTIONS),
}
GATES = {
    "list": lambda: [[1.0, 0.0, 0.0, 0.0]],
    "string": lambda: "a",
    "ids": lambda: torch.tensor([1, 2]),
    "bool": lambda: torch.ones(2, 4, dtype=torch.bool),
    "complex": lambda: torch.ones(2, 4, dtype=torch.complex64),
    "no_dimension": lambda: torch.tensor(1.0),
    "one_dimension": lambda: torch.rand(4),
    "wrong_experts": lambda: torch.rand(2, 3),
    "transposed": lambda: torch.rand(4, 2),
    "wrong_rows": lambda: torch.rand(5, 4),
    "no_rows": lambda: torch.rand(0, 4),
    "sparse": lambda: torch.rand(2, 4).to_sparse(),
    "csr": lambda: torch.rand(2, 4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(4), torch.rand(4)]),
    # The output would be memory without values.
    "meta": lambda: torch.rand(2, 4, device="meta"),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:Sparse CSR")
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", GATED)
def test_gates_that_no_layer_takes(name, gates):
    with pytest.raises((TypeError, ValueError), match=r"^gates: "):
        GATED[name]()(torch.randn(2, 3, 8), GATES[gates]())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", ((3,), (2, 3)))
@pytest.mark.parametrize("sizes", ((0, 8), (8, 0), (0, 0)))
@pytest.mark.parametrize("init", ("kaiming", "normal", "sparse"))
def test_no_features(sizes, shape, init):
    layer = MoeLoraLinear(*sizes, top_k=2, init=init, **OPTIONS)
    x = torch.randn(*shape, sizes[0], requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer.base_layer(x))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", ((0, 8), (8, 0)))
def test_no_features_in_an_ffn(sizes):
    layer = MoeLoraFFN(*sizes, config=MoeLoraConfig.preset("mixlora", **OPTIONS))
    assert layer(torch.randn(2, 3, sizes[0])).shape == (2, 3, sizes[0])


def test_a_sparse_x_works_as_in_linear():
    layer, x = MoeLoraLinear(8, 8, top_k=2, **OPTIONS), torch.randn(3, 8).relu()
    linears.randomise(layer)
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))


def test_jit_trace():
    layer, x = MoeLoraLinear(8, 8, top_k=2, **OPTIONS), torch.randn(3, 8)
    linears.randomise(layer)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace: .* torch\.no_grad\(\)"):
        torch.jit.trace(layer, x)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        other = torch.randn(5, 8)
        torch.testing.assert_close(traced(other), layer(other))


def test_jit_script(layer):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script is not supported; use"):
        torch.jit.script(layer)


def test_fx(layer):
    if isinstance(layer, MoeLoraAdapter):
        layer = nn.Sequential(layer)
    with pytest.raises(TypeError, match=r"^x: .*torch\.export\.export"):
        torch.fx.symbolic_trace(layer)


def test_vmap(layer):
    with pytest.raises(TypeError, match=r"^x: .*vmap; pass the whole batch"):
        torch.func.vmap(layer)(torch.randn(2, 3, 8))


@pytest.mark.parametrize("gates", ("a", [[1.0, 0, 0, 0]], np.ones((1, 4)), torch.ones(1, 4).long()))
def test_gates_that_are_no_floats(gates):
    layer = MoeLoraLinear(8, 8, router="external", **OPTIONS)
    with pytest.raises((TypeError, ValueError), match=r"^gates: expected"):
        layer(torch.randn(3, 8), gates)


TASKS = {
    "empty": [],
    "empty_tensor": torch.empty(0, dtype=torch.int64),
    "None": None,
    "string": "1",
    "strings": ["a", "b"],
    "unequal_rows": [[1, 2], [1]],
    "dict": {"a": 1},
    "set": {1, 2},
    "objects": [object()],
    "meta": torch.ones(1, dtype=torch.int64, device="meta"),
    "meta_floats": torch.ones(1, 4, device="meta"),
}


@pytest.mark.parametrize("router", ("task", "external", "linear"))
@pytest.mark.parametrize("tasks", TASKS)
def test_tasks_that_are_no_numbers(router, tasks):
    layer = MoeLoraLinear(8, 8, router=router, num_tasks=3, **OPTIONS)
    with pytest.raises((TypeError, ValueError), match=r"^tasks: expected"):
        set_tasks(layer, TASKS[tasks])


@pytest.mark.parametrize(
    "tasks", ([-1], [0], [9], [True], torch.ones(1, 1, 1).long(), torch.ones(1, 4).cfloat())
)
def test_ids_out_of_range(tasks):
    layer = MoeLoraLinear(8, 8, router="task", num_tasks=3, **OPTIONS)
    with pytest.raises(ValueError, match=r"^ids: expected"):
        set_tasks(layer, tasks)


@pytest.mark.parametrize("router", ("task", "external", "linear"))
@pytest.mark.parametrize("task", (2, True, torch.tensor(2)), ids=str)
def test_a_task_that_is_not_in_a_list(task, router):
    layer = MoeLoraLinear(8, 8, router=router, num_tasks=3, **OPTIONS)
    text = re.escape(f"tasks: expected one entry per sample, got {task!r}; pass [{task!r}]")
    with pytest.raises(ValueError, match=f"^{text}"):
        set_tasks(layer, task)


@pytest.mark.parametrize("gates", (1.5, [1.0, 2.0], torch.rand(4), torch.rand(1, 3)))
def test_gates_of_another_size(gates):
    layer = MoeLoraLinear(8, 8, router="external", **OPTIONS)
    with pytest.raises(ValueError, match=r"^gates: expected floats \[\.\.\., 4\]"):
        set_tasks(layer, gates)


@pytest.mark.parametrize(
    "tasks",
    (
        np.array([1, 2]),
        np.array([1, 2], dtype=np.uint8),
        torch.tensor([1, 2], dtype=torch.int16),
        [torch.tensor(1), torch.tensor(2)],
        (1, 2),
        range(1, 3),
    ),
)
def test_every_kind_of_whole_number(tasks):
    layer = MoeLoraLinear(8, 8, router="task", num_tasks=3, **OPTIONS)
    linears.randomise(layer)
    x = torch.randn(2, 3, 8)
    set_tasks(layer, [1, 2])
    expected = layer(x)
    set_tasks(layer, tasks)
    assert torch.equal(layer(x), expected)


def test_a_model_that_is_no_module():
    with pytest.raises(TypeError, match=r"^model: expected an nn.Module"):
        set_tasks([], [1])


ROUTERS = {
    "task": (dict(router="task", num_tasks=3), [1, 2]),
    "mlp": (dict(router="mlp", top_k=2), None),
    "token_task": (
        dict(router="token_task", task_embedding_dim=5, score="identity", top_k=2,
             normalize="softmax"),
        torch.randn(2, 5),
    ),
    "learned_threshold": (dict(select="learned_threshold"), None),
    "balanced": (dict(top_k=2, balance_rate=0.1), None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("router", ROUTERS)
def test_quantize_dynamic(router):
    options, tasks = ROUTERS[router]
    layer = MoeLoraLinear(8, 8, **options, **OPTIONS)
    linears.randomise(layer)
    model = nn.Sequential(layer).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model)
    x = torch.randn(2, 3, 8)
    if tasks is not None:
        set_tasks(model, tasks)
        set_tasks(quantised, tasks)
    # 8-bit weights: near, not equal.
    assert (quantised(x) - model(x)).norm() < 0.2 * model(x).norm()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantize_dynamic_of_an_ffn():
    layer = MoeLoraFFN(8, 16, True, config=MoeLoraConfig.preset("mixlora", **OPTIONS))
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer).eval())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(quantised(x), layer.eval()(x), atol=0.05, rtol=0.1)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    ("options", "task", "message"),
    (
        (
            dict(router=None, num_experts=1),
            None,
            r"0: base_layer: merging needs a plain nn\.Linear",
        ),
        (dict(router="task", num_tasks=3), 1, r"router\.gate\..*before its routers are quantised"),
    ),
    ids=("lora", "task"),
)
def test_a_merge_after_quantize_dynamic(options, task, message):
    model = nn.Sequential(MoeLoraLinear(8, 8, **{**OPTIONS, **options})).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model)
    for merge in (merge_adapter, merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge(quantised, task=task)
    with pytest.raises(ValueError, match=r"base_layer: .* got a Linear with a weight that is not"):
        quantised[0].merge(task)
