"""The modelled cost of a layer: the model's parts, and the committed report as a bound."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import budget as command
from benchmarks.model import budget, budget_ffn
from benchmarks.model.budget import Cell, Modelled
from benchmarks.model.gpus import GPUS, blocks_per_multiprocessor
from benchmarks.model.launches import FP32, Layer, record, record_directions
from benchmarks.model.machine_code import MachineCode
from benchmarks.model.work import work
from benchmarks.output import limits
from moelora_kernels.kernels.common import configs
from support.selection import exhaustive

CODE = MachineCode(
    threads=256, registers=128, shared=0, spills=0, stack=0, instructions=1000, loop=100,
    tensor_core={}, accesses={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "gpu", "blocks"),
    (
        # 65536 registers hold 16 warps of 128 registers: two blocks of 8 warps.
        ({}, "H200", 2),
        # One register more, and a warp takes 17 units of 256.
        ({"registers": 129}, "H200", 1),
        ({"registers": 32}, "H200", 8),
        ({"registers": 32, "threads": 128}, "H200", 16),
        ({"registers": 16, "threads": 32}, "H200", 32),
        ({"registers": 16, "threads": 32}, "L40S", 24),
        ({"registers": 32}, "L40S", 6),
        # Every block takes 1 KiB beside its own.
        ({"registers": 32, "shared": 113 << 10}, "H200", 2),
        ({"registers": 32, "shared": 114 << 10}, "H200", 1),
        ({"registers": 32, "shared": 82 << 10}, "A100", 1),
    ),
)
def test_blocks_per_multiprocessor(change, gpu, blocks):
    assert blocks_per_multiprocessor(CODE._replace(**change), GPUS[gpu]) == blocks


@pytest.mark.parametrize(
    ("waves", "longer"), ((0.5, 1.0), (1.0, 1.0), (1.25, 1.3), (2.0, 1.0), (5.0, 1.0), (7.3, 1.0))
)
def test_tail(waves, longer):
    assert budget.tail(waves) == pytest.approx(longer)


def launch_of(kernel: str, layer: Layer):
    with configs.assume("sm_90"):
        launches = record(layer)
    return next(each for each in launches if each.kernel.fn.__name__ == kernel)


@pytest.mark.parametrize(
    ("kernel", "layer", "flops"),
    (
        # 128 columns of A, and 16 for the router of 8 experts.
        ("shrink_gate_kernel", Layer("x"), 2 * 8192 * 4096 * (128 + 16)),
        ("shrink_gate_backward_kernel", Layer("x"), 2 * 8192 * 4096 * 128),
        ("resident_dx_kernel", Layer("x", gate="dense"), 2 * 8192 * 4096 * 128),
        # dlogits are two bfloat16.
        ("resident_dx_kernel", Layer("x"), 2 * 8192 * 4096 * (128 + 2 * 16)),
        ("shrink_dx_kernel", Layer("x", dtype=FP32), 6 * 2 * 8192 * 4096 * (128 + 16)),
        # 64 experts of rank 16: each multiplies its pairs.
        (
            "grouped_expand_kernel",
            Layer("x", ranks=(16,) * 64, grouped=True),
            2 * 8192 * 4096 * 16,
        ),
        ("reduce_partials_kernel", Layer("x"), 0),
        # Every pair multiplies with B of gate and up and A of down, over the ranks of all experts.
        ("ffn_inner_kernel", command.FFN, 3 * 2 * 16384 * 14336 * 128),
        ("ffn_inner_backward_kernel", command.FFN, 5 * 2 * 16384 * 14336 * 128),
        ("ffn_inner_weight_grad_kernel", command.FFN, 6 * 2 * 16384 * 14336 * 128),
    ),
)
def test_operations_of_a_launch(kernel, layer, flops):
    counted = work(launch_of(kernel, layer)).flops
    # A grouped launch has some tiles more than full ones.
    assert flops <= counted <= 1.3 * flops


def test_the_largest_limit_is_the_time():
    launch = launch_of("shrink_gate_kernel", Layer("x"))
    fast = budget.kernel(launch, CODE, GPUS["H200"], "forward")
    assert fast.limit == "L2"
    assert fast.us == pytest.approx(fast.limits["L2"] + budget.START)
    slow = budget.kernel(launch, CODE._replace(loop=10_000), GPUS["H200"], "forward")
    assert slow.limit == "issue"
    assert slow.us > 5 * fast.us


@pytest.mark.parametrize(
    ("sizes", "skinny"),
    (
        # Base products: of gate/up at 1024 tokens, and of many tokens.
        ((1024, 4096, 11008), False),
        ((1024, 11008, 4096), False),
        ((65536, 4096, 4096), False),
        # The wide form of 64 experts of rank 16.
        ((8192, 4096, 1024), False),
        # Shrink, expand, the gradient of B, a router, and few tokens.
        ((8192, 4096, 128), True),
        ((8192, 128, 4096), True),
        ((4096, 8192, 128), True),
        ((8192, 4096, 8), True),
        ((128, 4096, 4096), True),
    ),
)
def test_a_product_with_a_short_side_reads_its_operands_again_from_l2(sizes, skinny):
    product = budget.product(GPUS["H200"], "product", "forward", sizes)
    assert ("L2" in product.limits) == skinny
    if not skinny:
        assert product.limit == "matrix"
        assert product.us == product.limits["matrix"] + budget.LARGE_START


def test_launches_have_the_direction_in_which_they_ran():
    """At 1024 tokens the logits are a sum of parts, and their sum is a launch of the forward."""
    layer = Layer("x", tokens=1024, ranks=(16,) * 64, grouped=True)
    with configs.assume("sm_90"):
        forward, backward = (
            [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches]
            for launches in record_directions(layer)
        )
    assert forward[:3] == ["router_logits", "reduce_partials", "topk_gate"]
    assert forward.count("grouped_expand") == backward.count("grouped_expand") == 2
    assert backward[0] == "grouped_shrink_backward"


@pytest.mark.parametrize(
    ("tokens", "loads"),
    (
        # One pass of counting, and two of sorting.
        (1024, 1 + 2),
        # A thread counts 16 ids, 4 at a time, and a warp sorts 256 tokens in 2 passes.
        (8192, 4 + 2 * 2),
        (65536, 32 + 2 * 16),
    ),
)
def test_route_is_a_launch_of_the_grouped_form(tokens, loads):
    layer = Layer("x", tokens=tokens, ranks=(16,) * 64, grouped=True)
    route, *products = budget.other_launches(layer, GPUS["H200"])
    assert (route.name, route.direction, route.limit) == ("route", "forward", "latency")
    assert route.us == pytest.approx(budget.START + loads * budget.LOAD)
    assert [product.name for product in products] == ["y += x Wt", "dx += dy W"]
    wide = budget.other_launches(layer._replace(grouped=False), GPUS["H200"])
    assert not any(launch.name == "route" for launch in wide)


def test_the_shrink_for_clusters():
    gpu, layer = GPUS["H200"], Layer("x", clusters=True)
    shrink = budget.cluster_shrink(layer, gpu)
    # x and the results once, A and Wr once for 256 tokens, on 128 of 132 multiprocessors.
    moved = 2 * 8192 * 4096 + 32 * 2 * 136 * 4096 + 8192 * (4 * 128 + 8 * 2 + 4 * 8)
    assert shrink.limit == "L2"
    assert (shrink.programs, shrink.waves) == (128, 1.0)
    assert shrink.us == pytest.approx(budget.START + moved / (6e6 * 128 / 132))
    others = [modelled(), modelled(name="gate_partials"), modelled(name="weight_grad")]
    assert budget.with_cluster_shrink(others, layer, gpu) == [shrink, others[2]]
    few = layer._replace(tokens=1024)
    assert budget.with_cluster_shrink(others, few, gpu) == others


def names_of(launches) -> list[str]:
    return [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches]


def test_the_launches_of_whole_ffn_experts():
    with configs.assume("sm_90"):
        forward, backward = record_directions(command.FFN)
    assert names_of(forward) == [
        "router_logits", "topk_gate", "grouped_shrink", "grouped_shrink", "pair_table",
        "ffn_inner", "ffn_inner_rank", "grouped_expand", "grouped_expand",
    ]  # fmt: skip
    found = names_of(backward)
    assert found[:2] == ["grouped_shrink_backward", "grouped_weight_grad"]
    assert found.index("ffn_inner_backward") < found.index("ffn_inner_weight_grad")
    # dx of gate and of up, for two slots each.
    assert found.count("grouped_expand") == 4
    assert found.count("grouped_weight_grad") == 3
    assert found[-3:-1] == ["topk_gate_backward", "router_grad"]


def test_the_products_of_whole_ffn_experts_are_those_of_the_frozen_network():
    gpu = GPUS["H200"]
    frozen, ours = budget_ffn.frozen(command.FFN, gpu), budget_ffn.other_launches(command.FFN, gpu)
    products = [launch for launch in frozen if launch.name in limits.BASE]
    assert len(products) == 6
    assert [launch for launch in ours if limits.is_base(launch)] == products
    for product in products:
        assert product.limits["matrix"] == pytest.approx(2 * 8192 * 4096 * 14336 / 790e6)
    # 3 passes over [T, F] forward and 5 backward.
    passes = [launch.limits["memory"] for launch in frozen if "_out" in launch.name][-2:]
    assert passes == pytest.approx([n * 2 * 8192 * 14336 / 4.3e6 for n in (3, 5)])
    # The loop over the experts has their products too, and takes longer.
    rival = budget_ffn.compiled_rival(command.FFN, gpu)
    assert [launch for launch in rival if limits.is_base(launch)] == products
    assert budget.total(rival) > budget.total(ours)


def test_decode_has_no_backward(monkeypatch):
    # Interpreted kernels have no signature.
    monkeypatch.setattr(command, "key_of", lambda launch: launch.kernel.fn.__name__)
    layer = command.DECODE._replace(tokens=1)
    with configs.assume("sm_90"):
        forward, backward = record_directions(layer)
    assert names_of(forward) == ["shrink_gate", "gate_partials"]
    assert backward == []
    codes = {("sm_90", launch.kernel.fn.__name__): CODE for launch in forward}
    cell = command.cell("H200", layer, codes)
    for launches in (cell.launches, cell.frozen, cell.rival):
        assert {launch.direction for launch in launches} == {"forward"}
    assert [launch.name for launch in cell.launches[2:]] == ["u Bt", "y += x Wt"]
    assert [launch.name for launch in cell.frozen] == ["x Wt"]


@pytest.mark.parametrize(
    ("change", "passes"),
    (
        # Softmax over the experts of a token: `grouped_dx` adds their rows of Wr.
        (dict(ranks=(4,) * 256), 0),
        # Softmax over all experts: up to 64 logits are in the first launch of `grouped_dx`.
        (dict(renormalize=False), 0),
        (dict(renormalize=False, ranks=(4,) * 256), 1),
    ),
)
def test_dense_dlogits_of_many_experts_take_another_pass(change, passes):
    layer = Layer("x", ranks=(16,) * 64, grouped=True)._replace(**change)
    names = [launch.name for launch in budget.other_launches(layer, GPUS["H200"])]
    assert names.count("dx += dlogits Wr") == passes


def modelled(**change) -> Modelled:
    limits = {"memory": 20.0, "L2": 25.0, "matrix": 5.0}
    return Modelled("shrink_gate", "forward", limits, 4.0, 128, 1, 0.97)._replace(**change)


@pytest.mark.parametrize(
    ("change", "rules"),
    (
        ({}, []),
        ({"waves": 1.2}, ["waves"]),
        ({"waves": 1.7}, []),
        ({"limits": {"memory": 20.0, "L2": 31.0}}, ["L2"]),
        ({"limits": {"memory": 20.0, "L2": 31.0, "matrix": 40.0}}, []),
        ({"waves": 1.2, "limits": {"memory": 1.0, "L2": 2.0}}, []),
        ({"waves": 1.2, "programs": 0}, []),
    ),
)
def test_broken_rules(change, rules):
    assert command.broken_rules(modelled(**change)) == rules


def test_a_layer_that_costs_more_is_a_problem():
    report = json.loads(command.REPORT.read_text())
    assert command.problems(report, report) == []
    worse = copy.deepcopy(report)
    worse["rows"][0]["ratio"] *= 1.06
    worse["rows"][1]["broken"]["forward new_kernel"] = ["waves"]
    worse["rows"].append({**worse["rows"][2], "layer": "another"})
    texts = command.problems(worse, report)
    assert len(texts) == 3
    assert "is allowed" in texts[0]
    assert "new_kernel breaks waves" in texts[1]
    assert "no bound" in texts[2]
    # Another version of Triton compiles to other registers: what costs more still shows.
    texts = command.problems({**worse, "triton": "3.6.0"}, report)
    assert len(texts) == 2
    assert not any("breaks" in text for text in texts)


def test_the_report_has_every_cell_and_says_modelled():
    report = json.loads(command.REPORT.read_text())
    cells = {(row["gpu"], row["layer"], row["tokens"]) for row in report["rows"]}
    assert cells == {(gpu, layer.name, layer.tokens) for gpu, layer in command.cells_of(GPUS)}
    assert report["modelled"] is True
    assert "**Modelled, not measured.**" in command.REPORT.with_suffix(".md").read_text()


# Limit -> the ratio that the committed report may have. Lower a number when a layer gets faster.
REACHED = {
    ("router", 8192): 1.27,
    ("router, CUDA C++ shrink", 8192): 1.25,
    ("router", 1024): 1.705,
    ("given gates", 8192): 0.98,
    ("q/k/v, R=64", 8192): 1.168,
    ("gate/up", 8192): 1.15,
    ("grouped, 64 experts", 8192): 1.47,
    ("whole-FFN experts, F=14336", 8192): 1.26,
    ("decode", 1): 2.34,
    ("decode", 16): 2.50,
}


def test_the_report_keeps_what_was_reached():
    rows = {
        (row["layer"], row["tokens"]): row
        for row in json.loads(command.REPORT.read_text())["rows"]
        if row["gpu"] == limits.GPU
    }
    assert {(limit.layer, limit.tokens) for limit in limits.LIMITS} == set(REACHED)
    for limit in limits.LIMITS:
        name = limit.layer, limit.tokens
        row = rows[name]
        ratio = row["ratio"] / row["rival"] if limit.over_rival else row["ratio"]
        assert ratio <= REACHED[name], name


@pytest.mark.parametrize("limit", limits.LIMITS, ids=lambda limit: f"{limit.layer} {limit.tokens}")
def test_every_launch_of_a_limit_is_explained(limit):
    known = (*command.LAYERS, *command.ON_H200)
    layer = next(layer for layer in known if layer.name == limit.layer)
    layer = layer._replace(tokens=limit.tokens)
    with configs.assume(GPUS[limits.GPU].architecture):
        names = {launch.kernel.fn.__name__.removesuffix("_kernel") for launch in record(layer)}
    names |= {
        launch.name
        for launch in command.model_of(layer).other_launches(layer, GPUS[limits.GPU])
        if not limits.is_base(launch)
    }
    if layer.clusters:
        names.add("cluster_shrink")
    assert names <= set(limits.READ_AGAIN)


def test_the_page_explains_what_is_left_to_each_limit():
    launches = [
        modelled(),
        modelled(),
        modelled(name="route", limits={"memory": 1.0, "L2": 2.0, "latency": 3.0}, waves=0.0),
        modelled(name="grouped_expand", direction="backward", limits={"memory": 9.0}, waves=1.25),
        modelled(name="y += x Wt", limits={"memory": 30.0, "matrix": 100.0}),
    ]
    frozen = [modelled(limits={"memory": 1.0, "matrix": 96.0})]
    lines = limits.section([Cell("H200", "grouped, 64 experts", 8192, launches, frozen, frozen)])
    total = 2 * 29.0 + 7.0 + (9.0 * 1.3 + 4.0) + 104.0
    head = f"### grouped, 64 experts, T=8192: {total / 100:.3f} of frozen, at most 1.47: "
    assert f"{head}{total - 147:.0f} us too many" in lines
    # 20 + 4 twice, 1 + 4, 9 + 4, and the base product as it is.
    assert (
        f"If every launch took its floor and its start: {(48 + 5 + 13 + 104) / 100:.2f}." in lines
    )
    tables = "\n".join(lines)
    assert (
        "| 2 x shrink_gate | forward | 29.0 | 20.0 | L2: every tile of tokens reads A and Wr"
        in tables
    )
    assert "| route | forward | 7.0 | 1.0 | latency: loads that wait for each other;" in tables
    assert "| memory: every tensor once; 1.25 waves; the start takes 4.0 |" in tables
    assert "| y += x Wt | forward | 104.0 | 30.0 | the frozen product, and a part of" in tables
    # A report without the GPU or the layer of a limit has no table for it.
    assert not any("q/k/v" in line for line in lines)


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        command.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_unknown_gpus_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--gpus", "V100"])
    assert "V100" in capsys.readouterr().err


@pytest.mark.ptx
@exhaustive
def test_no_layer_costs_more_than_its_bound(run_compiling):
    run_compiling("benchmarks/budget.py", "--check")
