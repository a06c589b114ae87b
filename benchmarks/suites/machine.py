"""What the GPU at hand allows, each rate and cost beside what `roofline` predicted for it.

The choices in the package were made on a model; every measurement here decides one of them.

    copy       device memory, read and written         the two rates make the threshold in R up to
    product    matrix units on random data             which all experts at once win: 4/3 K times
                                                       rate / bandwidth
    addmm_     beta = 1 against beta = 0               1.00: the read of y is hidden, so the expand
                                                       goes first and the base product adds to it
    shrink     x At in the BLAS against `shrink_gate`  whether gate, u and router logits are free in
                                                       the read of x
    weight_grad       T in 1, 4, 8, 16 parts                  the rule `kernels.configs.splits`
    host       a call that nobody waits for            times the launches of a layer: below the T
                                                       that takes the device as long, eager is
                                                       bound by launches
    layer      moelora against the compiled rival      whether all of it together is worth it

Products are named TxIxO, a shrink to R columns TxIxR. All but `host` and `layer` is time of the
device alone, everything read cold. `host` is warm; `layer` is timed as in the other suites.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines.linear import PROVIDERS
from benchmarks.measure import check, harness
from benchmarks.measure.comparison import Bench, Call, compare, empty_row, judge, registered
from benchmarks.measure.inputs import Layer, draw_inputs, make_layer
from benchmarks.model import roofline
from benchmarks.suites.shapes import MACHINE, linear_case
from moelora_kernels.testing import draw_experts

# The mixture of every measurement but `layer`, which takes that of the command line.
EXPERTS, TOP_K = 8, 2

# Parts of T that `weight_grad` is measured with, beside what its own rule takes.
SPLITS = (1, 4, 8, 16)

# provider -> passes over y of its expand (`roofline.layer`). Eager PyTorch makes more of them than
# the model knows: no prediction.
LAYERS = {"frozen": None, "moelora": 1, "masked": None, "masked_compiled": 2}


def copy(bench: Bench, mebibytes: int) -> list[dict]:
    """target = source: bytes read and bytes written over the time."""
    source = bench.draw(mebibytes * 2**20 // bench.dtype.itemsize)
    target = torch.empty_like(source)
    call = Call(
        "read + write",
        lambda: target.copy_(source),
        bench.rates.tbytes,
        unit="TB/s",
        amount=2.0 * source.nbytes,
    )
    return compare(bench, "copy", f"{mebibytes} MiB", [call], bench.device_time)


def product(bench: Bench, T: int, I: int, O: int) -> list[dict]:  # noqa: E741
    """x Wt: 2 T I O operations over the time."""
    x, weight, y = bench.draw(T, I), bench.draw(O, I, variance=1 / I), bench.draw(T, O)
    flops = 2.0 * T * I * O
    predicted = flops / roofline.product(bench.rates, T, I, O) * 1e-6
    call = Call(
        "x Wt", lambda: torch.mm(x, weight.t(), out=y), predicted, unit="TFLOP/s", amount=flops
    )
    return compare(bench, "product", f"{T}x{I}x{O}", [call], bench.device_time)


def addmm(bench: Bench, T: int, I: int, O: int) -> list[dict]:  # noqa: E741
    """y = beta y + x Wt in place; where the read of y is hidden, beta = 1 costs nothing."""
    x, weight, y = bench.draw(T, I), bench.draw(O, I, variance=1 / I), bench.draw(T, O)
    predicted = roofline.product(bench.rates, T, I, O)
    calls = [
        Call(f"beta={beta}", partial(y.addmm_, x, weight.t(), beta=beta), predicted)
        for beta in (0, 1)
    ]
    exposed = 1 + roofline.one_pass(bench.rates, T, O) / predicted
    note = f"predicted {exposed:.3f} if the read of y is not hidden" if exposed > 1 else None
    ratios = [("beta=1", "beta=0", note)]
    return compare(bench, "addmm_", f"{T}x{I}x{O}", calls, bench.device_time, ratios)


def draw_layer(bench: Bench, I: int, O: int, R: int) -> Layer:  # noqa: E741
    """EXPERTS of total rank R over a linear I -> O."""
    case = linear_case(I, O)
    return make_layer(case, EXPERTS, R // EXPERTS, TOP_K, bench.dtype, bench.device)


def plain_gate(logits: Tensor) -> Tensor:
    """Softmax over the largest TOP_K of logits [T, E], zero elsewhere: [T, E]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, chosen = logits.topk(TOP_K, dim=1)
    return torch.zeros_like(logits).scatter(1, chosen, top.softmax(dim=1))


def plain_shrink(layer: Layer, x: Tensor, gate: Tensor | None) -> dict[str, Tensor]:
    """h = x At and u = scale gate (.) h in x's dtype; gate [T, E], None: that of the router."""
    adapter = layer.adapters[0]
    h = x @ adapter.lora_A.to(x.dtype).t()
    if gate is None:
        logits = x @ adapter.router_weight.to(x.dtype).t() + adapter.router_bias.to(x.dtype)
        gate = plain_gate(logits)
    scaled = (layer.scaling * gate).to(x.dtype)
    return {"h": h, "u": h * scaled.repeat_interleave(layer.rank, dim=1)}


def shrink_calls(
    bench: Bench, layer: Layer, x: Tensor, operation: Callable, label: str
) -> list[Call]:
    """`shrink_gate` with gates given as weights and indices, and with a router."""
    adapter, (T, I), E = layer.adapters[0], x.shape, layer.experts  # noqa: E741
    chosen = draw_experts("uniform", T, E, TOP_K, torch.Generator().manual_seed(T))
    chosen = chosen.to(bench.device)
    weights = torch.rand(chosen.shape, generator=bench.generator, device=bench.device)
    given = weights.new_zeros(T, E).scatter(1, chosen, weights)
    tail = [[layer.rank] * E, [layer.scaling] * E, False]
    options = [True, 1.0, 0.0, False, None]
    router = [[adapter.router_weight], [adapter.router_bias]]
    sparse = [x, [adapter.lora_A], weights, chosen.int(), None, [], [], *tail, 0, *options]
    routed = [x, [adapter.lora_A], None, None, None, *router, *tail, TOP_K, *options]

    def verdict(arguments: list, gate: Tensor | None) -> tuple[str, float, float]:
        h, u, *_ = operation(*arguments)
        truth, plain = (plain_shrink(layer, each, gate) for each in (x.double(), x))
        return judge({"h": h, "u": u}, truth, plain, bench.dtype)

    return [
        Call(
            f"{label}, {form}",
            partial(operation, *arguments),
            roofline.product(bench.rates, T, I, layer.rank * E + logits),
            "moelora",
            verdict=partial(verdict, arguments, gate),
        )
        for form, arguments, gate, logits in (
            ("sparse gates", sparse, given, 0),
            ("router", routed, None, E),
        )
    ]


def shrink(bench: Bench, T: int, I: int, R: int) -> list[dict]:  # noqa: E741
    """The BLAS reads x for x At alone; `shrink_gate` also routes, gates and writes u."""
    # O is of no concern here.
    layer = draw_layer(bench, I, 16, R)
    x, _ = draw_inputs(layer, T, "uniform")
    matrix, h = layer.adapters[0].lora_A.t(), bench.draw(T, R)
    predicted = roofline.product(bench.rates, T, I, R)
    blas = Call("mm", lambda: torch.mm(x, matrix, out=h), predicted)
    operation, impl = bench.operation("shrink_gate")
    ours = shrink_calls(bench, layer, x, operation, f"shrink_gate ({impl})")
    ratios = [(each.variant, "mm", None) for each in ours]
    return compare(bench, "shrink", f"{T}x{I}x{R}", [blas, *ours], bench.device_time, ratios)


def recorded(operation: Callable, arguments: list) -> list:
    """The launches that a launcher makes of these arguments."""
    from moelora_kernels.kernels.common import launcher

    with launcher.recording() as launches:
        operation(*arguments)
    return launches


def weight_grad(bench: Bench, T: int, I: int, O: int, R: int) -> list[dict]:  # noqa: E741
    """dh^T x, dlogits^T x and dy^T u in one op; its parts of T fill the chip or add traffic.

    Predicted are the bytes of the inputs and results alone: parts are meant to stay in the cache.
    """
    x, dh, dy, u = (bench.draw(T, width) for width in (I, R, O, R))
    dlogits = bench.draw(T, EXPERTS).float()
    ranks = [R // EXPERTS] * EXPERTS
    arguments = [x, dh, dlogits, [dy], u, x.dtype, x.dtype, ranks, 0.0, False, None]
    predicted = roofline.weight_grad(bench.rates, T, I, R) + roofline.weight_grad(
        bench.rates, T, O, R
    )

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        of_x, of_dy = x.to(dtype), dy.to(dtype).t()
        dA, drouter = dh.to(dtype).t() @ of_x, dlogits.to(dtype).t() @ of_x
        dbias = dlogits.to(dtype).sum(dim=0)
        return {"dA": dA, "dB": of_dy @ u.to(dtype), "drouter": drouter, "dbias": dbias}

    def verdict(call: Callable) -> tuple[str, float, float]:
        dA, drouter, dbias, (dB,) = call()
        found = {"dA": dA, "dB": dB, "drouter": drouter, "dbias": dbias}
        return judge(found, plain(torch.float64), plain(x.dtype), x.dtype)

    operation, impl = bench.operation("weight_grad")
    variants = {f"weight_grad ({impl})": operation}
    if bench.launchers:
        from benchmarks.model import traffic

        rule = traffic.weight_grad_split(traffic.Sizes(recorded(operation, arguments)[0]))
        variants = {
            f"split={split}{' (rule)' if split == rule else ''}": partial(operation, split=split)
            for split in sorted({*SPLITS, rule})
        }
    calls = [Call("mm, mm", lambda: (torch.mm(dh.t(), x), torch.mm(dy.t(), u)), predicted)]
    for variant, function in variants.items():
        call = partial(function, *arguments)
        calls.append(Call(variant, call, predicted, "moelora", verdict=partial(verdict, call)))
    ratios = [(variant, "mm, mm", None) for variant in variants]
    return compare(bench, "weight_grad", f"{T}x{I}x{O}, R={R}", calls, bench.device_time, ratios)


def layer_calls(
    bench: Bench, layer: Layer, x: Tensor, dys: list[Tensor], mode: str, cold_bytes: int
) -> Iterator[Call]:
    """The providers of LAYERS that this run has."""
    checker = check.Checker(layer, x, dys)
    weights = harness.ColdWeights(layer, cold_bytes)
    for name in LAYERS:
        if name in bench.options.providers:
            build, formula = PROVIDERS[name]
            provider = build(layer)
            timed = harness.Timed(provider, weights, x, dys, mode)
            verdict = partial(checker.verdict, provider, formula, mode)
            yield Call(name, timed.call, provider=name, reset=timed.reset, verdict=verdict)


def bare_launch(bench: Bench, call: Call, name: str) -> Call:
    """What remains of a launcher's call without the launcher: Triton's own launches."""
    from moelora_kernels.kernels.common import launcher

    launches = recorded(call.call, [])

    def launch() -> None:
        for each in launches:
            options = launcher.options(each.tile)
            each.kernel[(each.programs,)](**each.arguments, **each.constants, **options)

    predicted = len(launches) * roofline.launch(bench.rates, "triton")
    return Call(name, launch, predicted, "moelora", verdict=call.verdict)


def gate_call(operation: Callable, label: str, device: torch.device) -> Call:
    """`topk_gate` of a few logits in float32, which do not tie."""
    logits = torch.randn(16, EXPERTS, generator=torch.Generator().manual_seed(0)).to(device)
    call = partial(operation, logits, TOP_K, True, 1.0)

    def verdict() -> tuple[str, float, float]:
        weights, indices = call()
        found = torch.zeros_like(logits).scatter(1, indices.long(), weights)
        truth, plain = ({"gate": plain_gate(each)} for each in (logits.double(), logits))
        return judge({"gate": found}, truth, plain, logits.dtype)

    return Call(f"topk_gate, {label}", call, provider="moelora", verdict=verdict)


def host(bench: Bench) -> list[dict]:
    """The way of a tiny call through the host. On a CPU its arithmetic is in the time."""
    layer = draw_layer(bench, 64, 64, 32)
    x, dys = draw_inputs(layer, 16, "uniform")
    weight, y = layer.adapters[0].weight.t(), bench.draw(16, 64)
    calls = [Call("ATen mm", partial(torch.mm, x, weight))]
    calls.append(Call("ATen addmm_", partial(y.addmm_, x, weight)))
    for name in ("topk_gate", "shrink_gate"):
        ways = [("registered op", *registered(name, bench.device.type))]
        if bench.launchers:
            ways.append(("launcher", *bench.operation(name)))
        for way, operation, impl in ways:
            label = f"{way} ({impl})"
            if name == "topk_gate":
                call = gate_call(operation, label, bench.device)
            else:
                call = shrink_calls(bench, layer, x, operation, f"shrink_gate, {label}")[1]
                call.predicted = math.nan
            calls.append(call)
            if way == "launcher":
                calls.append(bare_launch(bench, call, f"{name}, bare JIT launch"))
    if bench.device.type == "cuda":
        operation, impl = registered("topk_gate", "cpu")
        cpu = torch.device("cpu")
        calls.append(gate_call(operation, f"registered op on CPU tensors ({impl})", cpu))
        predicted = roofline.launch(bench.rates, "native")
        why = "the package has no native op for GPUs"
        calls.append(Call("native GPU op", None, predicted, note=why))
    for call in layer_calls(bench, layer, x, dys, "fwd", cold_bytes=0):
        if call.variant != "masked_compiled":
            call.variant = f"layer forward, {call.variant}"
            calls.append(call)
    return compare(bench, "host", "T=16", calls, bench.host_time)


def layer(bench: Bench, I: int, O: int, T: int, mode: str) -> list[dict]:  # noqa: E741
    """moelora, the compiled rival and both over the frozen layer."""
    case, options = linear_case(I, O), bench.options
    mixture = (options.experts, options.rank, options.top_k)
    drawn = make_layer(case, *mixture, bench.dtype, bench.device)
    x, dys = draw_inputs(drawn, T, options.routing)
    calls = list(layer_calls(bench, drawn, x, dys, mode, bench.clock.weight_bytes))
    for call in calls:
        if call.variant != "masked":
            sizes, passes = (T, I, O, options.experts * options.rank), LAYERS[call.variant]
            call.predicted = roofline.layer(bench.rates, *sizes, mode, passes)
    ratios = [(name, "frozen", None) for name in LAYERS if name != "frozen"]
    ratios.append(("moelora", "masked_compiled", None))
    return compare(bench, "layer", f"{case.name} T={T} {mode}", calls, bench.call_time, ratios)


def plan(bench: Bench, size: str) -> dict[str, list[Callable[[], list[dict]]]]:
    """Every comparison of a run by the measurement it belongs to."""
    shapes = MACHINE[size]
    of_layer = [
        partial(layer, bench, *shapes.layer, T, mode)
        for T in shapes.layer_tokens
        for mode in bench.options.modes
    ]
    return {
        "copy": [partial(copy, bench, mebibytes) for mebibytes in shapes.copy],
        "product": [partial(product, bench, *sizes) for sizes in shapes.product],
        "addmm_": [partial(addmm, bench, *sizes) for sizes in shapes.addmm],
        "shrink": [partial(shrink, bench, *sizes) for sizes in shapes.shrink],
        "weight_grad": [partial(weight_grad, bench, *sizes) for sizes in shapes.weight_grad],
        "host": [partial(host, bench)],
        "layer": of_layer,
    }


def run(bench: Bench, size: str, progress: Callable[[str], None]) -> Iterator[list[dict]]:
    """The rows of each measurement in turn; `progress(text)` is called after each comparison."""
    for measurement, comparisons in plan(bench, size).items():
        rows = []
        for comparison in comparisons:
            try:
                rows += comparison()
            except Exception as error:  # one comparison that cannot be set up must not end the run
                case = "x".join(map(str, comparison.args[1:]))
                row = empty_row(bench, measurement, case, "all", "moelora")
                rows.append(row | {"status": "failed", "reason": harness.first_line(error)})
            progress(f"machine {measurement}")
        yield rows
