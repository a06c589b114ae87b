"""Merging: one task in the weight, and the same bits back; what cannot be merged says why."""

import copy
import pickle

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_state_dict,
    link_siblings,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    set_tasks,
)
from moelora_kernels.nn.merge import delta_weight, gate_of_task
from moelora_kernels.testing import assert_within_budget
from support.linears import IN, OUT, TASK, TASKS, PackedLinear, Prototype, make_layer, task_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softmax(logits):
    powers = [2.718281828459045**v for v in logits]
    return [p / sum(powers) for p in powers]


def kept(scores, experts):
    return [s if e in experts else 0.0 for e, s in enumerate(scores)]


def two_largest(logits):
    p = softmax(logits)
    order = sorted(range(len(p)), key=lambda e: -p[e])[:2]
    return [s / sum(p[e] for e in order) for s in kept(p, order)]


def from_a_quarter(logits):
    p = softmax(logits)
    return kept(p, [e for e in range(len(p)) if p[e] >= 0.25])


# name -> options, and the gate made of the task's logits, by its formula in plain Python.
GATES = {
    "softmax": ({}, softmax),
    "temperature": ({"temperature": 2.0}, lambda g: softmax([v / 2 for v in g])),
    "sigmoid": (
        {"score": "sigmoid", "normalize": "none"},
        lambda g: [1 / (1 + 2.718281828459045**-v) for v in g],
    ),
    "topk": ({"top_k": 2}, two_largest),
    "threshold": ({"select": "threshold", "threshold": 0.25, "normalize": "none"}, from_a_quarter),
    "always": ({"shared_expert": "always"}, lambda g: [*softmax(g), 1.0]),
    "complement": (
        {"shared_expert": "complement"},
        lambda g: [*softmax(g), 1 - max(softmax(g))],
    ),
    "ranks": ({"rank": (1, 4, 2, 3), "scaling": (1.0, -2.0, 0.5, 3.0)}, softmax),
    "share A": ({"share": "A"}, softmax),
    "noise": ({"noise": 3.0, "dropout": 0.5}, softmax),
}


def expected_delta(layer, gate):
    """sum_e scale_e gate_e B_e A_e, expert by expert."""
    config, delta, start = layer.config, torch.zeros(OUT, IN, dtype=torch.float64), 0
    for rank, scale, weight in zip(config.ranks(), config.scales(IN), gate, strict=True):
        own = slice(start, start + rank)
        a = layer.lora_A if config.share == "A" else layer.lora_A[own]
        delta += scale * weight * (layer.lora_B[:, own].double() @ a.double())
        start += rank
    return delta.detach()


def logits_of(layer, task):
    embedding = layer.router.embedding.weight[task].tolist()
    rows = layer.router.gate.weight.tolist()
    return [sum(w * e for w, e in zip(row, embedding, strict=True)) for row in rows]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", GATES)
def test_the_delta_is_that_of_the_formula(name, training):
    """Every kind of task gate, in training mode too: noise and dropout are no part of a weight."""
    options, formula = GATES[name]
    layer = task_layer(**options).train(training)
    for task in (1, 2, TASKS):
        gate = formula(logits_of(layer, task))
        torch.testing.assert_close(
            gate_of_task(layer, task), torch.tensor(gate, dtype=torch.float64), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            delta_weight(layer, task), expected_delta(layer, gate), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("experts", (1, 3))
def test_without_a_router_every_gate_is_1(experts):
    """Plain LoRA, one expert or several; it is the same for every task, so that none is needed."""
    layer = make_layer(router=None, num_experts=experts, router_bias=False)
    expected = expected_delta(layer, [1.0] * experts)
    for task in (None, 5):
        torch.testing.assert_close(delta_weight(layer, task), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ((4,), (1, 4)), ids=str)
def test_an_external_gate_is_the_task(shape):
    layer = make_layer(router="external", router_bias=False).eval()
    gate = torch.rand(shape, dtype=torch.float64)
    x = torch.randn(5, IN, dtype=torch.float64)
    y = layer(x, gate.view(1, 4))
    layer.merge(gate)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.weight, layer.base_layer.weight + expected_delta(layer, gate.flatten().tolist())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_sixteen_tasks_within_one_rounding(dtype):
    """W + delta W is rounded once, and y is as good as that of the unmerged layer."""
    layer = task_layer(dtype, nn.Linear(IN, OUT, dtype=dtype))
    x = torch.randn(9, IN).to(dtype)
    seen = []
    for task in range(1, TASKS + 1):
        set_tasks(layer, [task])
        unmerged = layer(x).detach()
        gate = gate_of_task(layer, task).double()
        by_formula = torch.tensor(softmax(logits_of(layer, task)), dtype=torch.float64)
        torch.testing.assert_close(gate, by_formula, rtol=1e-5, atol=0)
        exact = layer.base_layer.weight.double() + expected_delta(layer, gate.tolist())
        layer.merge(task)
        # Half a unit in the last place; the sums in float64, and the step through float32 on the
        # way to 16 bits, add little to it.
        band = torch.finfo(dtype).eps / 2 * exact.abs() * (1 + 1e-3)
        band += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((layer.weight.double() - exact).abs() <= band).all(), task
        truth = x.double() @ exact.t() + layer.bias.double()
        assert_within_budget({"y": layer(x)}, {"y": truth}, {"y": unmerged}, dtype)
        seen.append(layer.weight.clone())
        layer.unmerge()
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_gives_the_bits_back_and_merge_repeats(dtype):
    """A subtracted delta would leave roundings behind, task after task."""
    layer = task_layer(dtype, nn.Linear(IN, OUT, dtype=dtype))
    x = torch.randn(4, IN).to(dtype)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    parameter = layer.weight
    set_tasks(layer, [1])
    y = layer(x)
    first = {}
    for task in [*range(1, TASKS + 1)] * 2:
        layer.merge(task=task)
        assert not torch.equal(layer.weight, parameter)
        assert torch.equal(first.setdefault(task, layer.weight.clone()), layer.weight)
        layer.unmerge()
        assert layer.weight is parameter
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(layer(x), y)


def test_a_merged_layer_is_one_linear():
    """No adapter in its forward: x has the gradient of W + delta W, A and B have none."""
    layer = task_layer()
    layer.merge(3)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, OUT, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    dx, da, db = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy, allow_unused=True)
    torch.testing.assert_close(dx, dy @ layer.weight)
    assert da is None
    assert db is None
    assert "merged_task=3" in repr(layer)


def test_a_state_dict_never_counts_an_adapter_twice():
    """Saved while merged, the base is the base; nothing is loaded under an old merged weight."""
    layer = task_layer()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.merge(3)
    assert layer.state_dict().keys() == before.keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    other = {n: torch.zeros_like(t) for n, t in before.items()}
    with pytest.raises(RuntimeError, match=r"merged with task 3; unmerge\(\) before other values"):
        layer.load_state_dict(other)
    adapter = {n: torch.zeros_like(t) for n, t in adapter_state_dict(layer).items()}
    with pytest.raises(ValueError, match=r"model: the layer is merged with task 3, unmerge first"):
        load_adapter_state_dict(layer, adapter)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_and_casts_of_a_merged_layer(copied):
    layer = task_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    layer.merge(3)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    other.unmerge()
    assert layer.merged
    assert torch.equal(other.weight, layer.base_layer.weight)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.unmerge()
    assert torch.equal(layer.weight, other.weight.bfloat16())


def test_merging_twice_or_unmerging_nothing_raises():
    layer = task_layer()
    with pytest.raises(RuntimeError, match="the layer is not merged"):
        layer.unmerge()
    layer.merge(3)
    weight = layer.weight
    with pytest.raises(RuntimeError, match=r"merged with task 3 already; unmerge\(\) first"):
        layer.merge(4)
    assert layer.weight is weight


@pytest.mark.parametrize(
    ("task", "match"),
    (
        (None, "task: router='task' needs a task id, 1 to 16"),
        (0, r"expected 1 to 16, got \[0\]"),
        (17, r"expected 1 to 16, got \[17\]"),
        (True, "task: expected a task id, 1 to 16, got True"),
        (1.0, "task: expected a task id, 1 to 16, got 1.0"),
    ),
    ids=str,
)
def test_a_task_that_is_none_is_named(task, match):
    """0 is padding: the original has an embedding for it that was never trained."""
    layer = task_layer()
    set_tasks(layer, [5])
    for call in (layer.merge, layer.export_lora):
        with pytest.raises(ValueError, match=match):
            call(task)
    assert not layer.merged
    assert layer.router.task_ids.tolist() == [5]


@pytest.mark.parametrize("router", ("task", "external"))
@pytest.mark.parametrize("task", ("ner", {3}, 2**70), ids=str)
def test_what_is_no_task_at_all_is_named(router, task):
    layer = task_layer() if router == "task" else make_layer(router=router, router_bias=False)
    with pytest.raises(TypeError, match="task: expected a task id, or a gate of floats, got "):
        layer.merge(task)
    assert not layer.merged


def test_adapters_without_values_are_named():
    """The base is there and its experts are not: a merge that was never loaded."""
    layer = task_layer()
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).to("meta")))
    with pytest.raises(ValueError, match="lora_A: it is on the meta device and has no values"):
        layer.merge(3)
    assert not layer.merged


def test_an_external_gate_that_does_not_fit_is_named():
    layer = make_layer(router="external", router_bias=False)
    for task, match in (
        (None, r"task: router='external' needs the gate to merge, floats \[4\]"),
        (3, r"gates: expected floats \[..., 4\]"),
        (torch.rand(5), r"gates: expected floats \[..., 4\]"),
        (torch.rand(2, 4), r"task: expected one gate \[4\], got 2 rows"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.merge(task)


@pytest.mark.parametrize(
    ("options", "match"),
    (
        ({}, "router='linear', one gate per token"),
        ({"granularity": "sequence"}, "router='linear', one gate per sequence"),
        ({"router": "mlp", "router_bias": False}, "router='mlp', one gate per token"),
        ({"router": Prototype(4), "router_bias": False}, "router=a module, one gate per token"),
    ),
    ids=str,
)
def test_gates_that_depend_on_x_refuse_with_the_reason(options, match):
    layer = make_layer(**options)
    for call in (layer.merge, layer.export_lora):
        with pytest.raises(ValueError, match=f"task: its gate depends on x .{match}.*no single"):
            call(3)


def test_a_gate_that_is_drawn_has_no_weight():
    """Experts sampled in evaluation: one draw would be frozen into the weight."""
    layer = task_layer(top_k=2, select="sampling")
    with pytest.raises(ValueError, match="task: its experts are sampled in every forward"):
        layer.merge(3)


class Activated(MoeLoraLinear):
    """A layer whose experts are not linear: what it inherits would serve another function."""

    def forward(self, x, gates=None):
        return super().forward(x, gates).relu()


def test_a_layer_with_a_forward_of_its_own_refuses():
    layer = Activated.from_linear(nn.Linear(IN, OUT), num_experts=4, **TASK)
    for call in (layer.merge, layer.export_lora):
        with pytest.raises(ValueError, match="layer: Activated overrides forward"):
            call(3)
    with pytest.raises(ValueError, match="0: the experts of a Activated are not linear"):
        merge_adapter(nn.Sequential(layer), 3)


def refused_bases():
    hooked = nn.Linear(IN, OUT)
    hooked.register_forward_hook(lambda module, args, y: y)
    eight_bits = nn.Linear(IN, OUT)
    eight_bits.weight = nn.Parameter(
        eight_bits.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    gathered = nn.Linear(IN, OUT)
    gathered.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return {
        # What ZeRO-3 leaves of a weight outside of its forward.
        "gathered": (gathered, "a Linear with a weight of Parameter"),
        "packed": (PackedLinear(nn.Linear(IN, OUT)), "a PackedLinear with .*int8"),
        "hooked": (hooked, "hooked .*a Linear with a weight of Parameter, torch.float32"),
        "float8": (eight_bits, "a Linear with .*float8"),
        "subclass": (type("Mine", (nn.Linear,), {})(IN, OUT), "a Mine with"),
        "meta": (nn.Linear(IN, OUT, device="meta"), "on the meta device"),
    }


@pytest.mark.parametrize("name", refused_bases())
def test_a_base_that_is_no_plain_weight_refuses(name):
    """Nothing can be added to codes or under a hook; the LoRA of a task does not need the base."""
    base, match = refused_bases()[name]
    options = {**TASK, "adapter_dtype": "float32"}
    layer = MoeLoraLinear.from_linear(base, num_experts=4, **options)
    with pytest.raises(ValueError, match=f"base_layer: .*{match}"):
        layer.merge(3)
    assert not layer.merged
    assert [tuple(t.shape) for t in layer.export_lora(3)] == [(12, IN), (OUT, 12)]


def test_a_sum_beyond_the_dtype_raises_and_changes_nothing():
    layer = task_layer(torch.float16, nn.Linear(IN, OUT, dtype=torch.float16))
    with torch.no_grad():
        layer.lora_A.fill_(6e4)
        layer.lora_B.fill_(6e4)
    with pytest.raises(
        ValueError, match=r"task: W \+ delta W of task 3 is not finite in .*float16"
    ):
        layer.merge(3)
    assert not layer.merged


def test_an_expert_that_is_off_adds_nothing_whatever_it_holds():
    """A gate of zero is a select: NaN * 0 would be NaN in the whole weight."""
    layer = task_layer(top_k=2)
    gate = gate_of_task(layer, 3)
    expected = delta_weight(layer, 3)
    off = [e for e in range(4) if gate[e] == 0]
    assert len(off) == 2
    with torch.no_grad():
        for e in off:
            layer.lora_A[3 * e : 3 * e + 3] = float("nan")
            layer.lora_B[:, 3 * e : 3 * e + 3] = float("inf")
    assert torch.equal(delta_weight(layer, 3), expected)
    a, b = layer.export_lora(3)
    torch.testing.assert_close(b @ a, expected, rtol=1e-12, atol=1e-12)


def test_tasks_set_to_others_raise_instead_of_being_served_wrong():
    """A merged layer has one task: whatever is set for the batch, it would answer with its own."""
    layer = task_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    set_tasks(layer, [5, 3])
    layer.merge(3)
    set_tasks(layer, [3, 3])
    set_tasks(layer, torch.tensor([3]))
    for tasks in ([3, 5], [5], [5, 5]):
        with pytest.raises(ValueError, match=r"tasks: the layer is merged with task 3, got \["):
            set_tasks(layer, tasks)
    assert layer.router.task_ids.tolist() == [3]
    layer(x)
    layer.unmerge()
    set_tasks(layer, [5, 3])


def test_merged_layers_of_others_take_no_part():
    """PEFT's LoRA layers have a `merged` of their own, and no task."""
    model = nn.ModuleDict({"own": task_layer(), "plain": make_layer(router=None)})
    model["other"] = nn.Linear(IN, OUT)
    model["other"].merged = True
    model["plain"].merge()
    set_tasks(model, [5, 3])
    model["plain"].unmerge()
    load_adapter_state_dict(model, adapter_state_dict(model))


def test_gates_are_not_compared_with_a_merged_task():
    """Set for another layer of the same model, and ids beside a merged gate just so."""
    gated = make_layer(router="external", router_bias=False)
    model = nn.ModuleList([task_layer(), gated]).eval()
    gates = torch.rand(2, 4)
    model[0].merge(3)
    set_tasks(model, gates)
    assert torch.equal(gated.external_gates, gates)
    model[0].unmerge()
    gated.merge(gates[0])
    set_tasks(model, [3, 5])
    assert model[0].router.task_ids.tolist() == [3, 5]


def test_several_tasks_of_one_sequence_are_one_gate():
    """The mean of their embeddings; in any order, and whatever padding stands between them."""
    layer = task_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    set_tasks(layer, [[5, 3, 0], [3, 5, 0]])
    y = layer(x)
    layer.merge([3, 5])
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    set_tasks(layer, [[0, 3, 5], [5, 0, 3]])
    for tasks in ([3, 5], [[3, 0], [3, 5]], [[3, 3, 5]]):
        with pytest.raises(ValueError, match=r"tasks: the layer is merged with task \[3, 5\]"):
            set_tasks(layer, tasks)
    layer.unmerge()
    layer.merge(3)
    set_tasks(layer, [[3, 0], [0, 3]])


def test_gates_other_than_the_merged_raise():
    layer = make_layer(router="external", router_bias=False).eval()
    gate = torch.tensor([0.5, 0.25, 0.0, 2.0])
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    layer.merge(gate)
    set_tasks(layer, gate.expand(2, 4))
    with pytest.raises(ValueError, match="tasks: the layer is merged, got"):
        set_tasks(layer, torch.stack([gate, gate + 1]))
    with pytest.raises(ValueError, match=r"gates: the layer is merged; unmerge\(\) before"):
        layer(x, gate[None])


@pytest.mark.parametrize("kind", ("gate", "task"))
def test_what_the_caller_writes_later_is_not_the_merged_task(kind):
    """A buffer of gates that is filled anew for every batch."""
    if kind == "gate":
        layer = make_layer(router="external", router_bias=False).eval()
        held, other = torch.tensor([0.5, 0.25, 0.0, 2.0]), 1.0
    else:
        layer, held, other = task_layer(), [3, 0], 5
    first = held.clone() if kind == "gate" else [*held]
    layer.merge(held)
    held[0] = other
    set_tasks(layer, torch.as_tensor(first)[None])
    with pytest.raises(ValueError, match="tasks: the layer is merged"):
        set_tasks(layer, torch.as_tensor(held)[None])


def test_a_base_that_is_hooked_after_the_merge_is_not_left_out():
    layer = task_layer().eval()
    layer.merge(3)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    hook = layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(RuntimeError, match=r"merged with task 3\. Since then the base got hooks"):
        layer(x)
    hook.remove()
    assert torch.equal(layer(x), y)


def test_a_merged_layer_does_not_train():
    """Its experts have no part in y: a step would look fine and teach nothing."""
    layer = task_layer()
    layer.merge(3)
    x = torch.randn(4, IN, dtype=torch.float64)
    layer.train()
    with pytest.raises(RuntimeError, match=r"merged with task 3 and does not train; unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        y = layer(x)
    layer.eval()
    assert torch.equal(layer(x), y)
    layer.lora_A.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not train"):
        layer.train()(x)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), y)


def test_a_merged_layer_checks_its_input():
    layer = task_layer()
    layer.merge(3)
    with pytest.raises(ValueError, match=r"x: expected \[..., 12\]"):
        layer(torch.randn(4, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x: expected the base's dtype torch.float64"):
        layer(torch.randn(4, IN))


def test_under_autocast_and_compiled():
    torch.manual_seed(0)
    layer = task_layer(torch.float32, nn.Linear(IN, OUT))
    layer.merge(3)
    x = torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    layer.unmerge()
    set_tasks(layer, [5])
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("linked", (True, False))
def test_a_sibling_can_be_merged_and_the_others_not(linked):
    """Linked siblings compute each other's outputs: those kept from before a merge are old."""
    siblings = {n: task_layer(seed=i) for i, n in enumerate(("q_proj", "k_proj"))}
    siblings["k_proj"].router = siblings["q_proj"].router
    block = nn.Module()
    for name, layer in siblings.items():
        block.add_module(name, layer)
    group = MoeLoraGroup(**siblings)
    set_tasks(block, [3])
    x = torch.randn(4, IN, dtype=torch.float64)
    q, k = group(x)
    if linked:
        link_siblings(block, [("q_proj", "k_proj")])
        siblings["q_proj"](x)
    siblings["k_proj"].merge(3)
    merged = nn.functional.linear(x, siblings["k_proj"].weight, siblings["k_proj"].bias)
    for found_q, found_k in (group(x), (siblings["q_proj"](x), siblings["k_proj"](x))):
        torch.testing.assert_close(found_q, q, rtol=1e-12, atol=1e-12)
        assert torch.equal(found_k, merged)
    torch.testing.assert_close(merged, k, rtol=1e-12, atol=1e-12)
    siblings["q_proj"](x)
    siblings["k_proj"].unmerge()
    assert torch.equal(siblings["k_proj"](x), k)


def test_svd_segments_merge_into_the_reduced_base():
    """Its experts and its base belong together, so that there is a weight but no LoRA."""
    options = dict(TASK, init="svd_segments", rank=2)
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = MoeLoraLinear.from_linear(base, num_experts=4, **options).eval()
    x = torch.randn(5, IN, dtype=torch.float64)
    set_tasks(layer, [2])
    y = layer(x)
    with pytest.raises(ValueError, match="init='svd_segments' reduced the base"):
        layer.export_lora(2)
    linear = merge_and_unload(layer, 2)
    torch.testing.assert_close(linear(x), y, rtol=1e-12, atol=1e-12)
    assert not hasattr(linear, "is_reduced")
