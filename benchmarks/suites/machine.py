"""Measure rates and costs of the device, each beside the prediction of `roofline`.

The package chooses its formulations with a model of the device. These measurements test the model:

    copy          device memory, read and written. Memory and matrix rate give the R up to which
                  all experts at once are faster: 4/3 K times rate / bandwidth
    product       matrix units on random data
    addmm_        beta = 1 over beta = 0. At 1.00 the read of y is hidden: then the expand goes
                  first and the base product adds to it
    shrink        `shrink_gate` over x At in the BLAS: do gate, u and router logits cost extra?
    weight_grad   T in 1, 4, 8, 16 parts: the rule `splits.num_splits`
    host          the host's time of a call, without a wait for the device. Times the launches of a
                  layer, it gives the T below which eager execution is bound by launches
    layer         moelora over the compiled provider: all of it together

Products are named TxIxO, a shrink to R columns TxIxR. All but `host` and `layer` are times of the
device alone, with everything read cold. `host` is warm. `layer` is timed like the other suites.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines.linear import PROVIDERS
from benchmarks.measure import check, harness
from benchmarks.measure.check import Verdict
from benchmarks.measure.clocks import ColdWeights
from benchmarks.measure.comparison import (
    Bench,
    Call,
    Ratio,
    compare,
    compare_outputs,
    empty_row,
    registered,
)
from benchmarks.measure.inputs import Layer, draw_inputs, make_layer
from benchmarks.model import roofline
from benchmarks.suites.jobs import Job
from benchmarks.suites.shapes import linear_case
from benchmarks.suites.sizes import MachineSizes
from moelora_kernels.testing import draw_experts
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    NO_ROUTER,
    Gate,
    Mixture,
    RouterTensors,
)

# The mixture of every measurement but `layer`, which has the mixture of the command line.
EXPERTS, TOP_K = 8, 2

# Parts of T that `weight_grad` is measured with, beside those of its own rule.
SPLITS = (1, 4, 8, 16)

# provider -> passes over y of its expand (`roofline.layer`). Eager PyTorch makes more passes than
# the model has: `masked` has no prediction.
LAYERS = {"frozen": None, "moelora": 1, "masked": None, "masked_compiled": 2}


def copy(bench: Bench, mebibytes: int) -> list[dict]:
    """target = source: bytes read and written per second."""
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
    """x Wt: 2 T I O operations per second."""
    x, weight, y = bench.draw(T, I), bench.draw(O, I, variance=1 / I), bench.draw(T, O)
    flops = 2.0 * T * I * O
    predicted = flops / roofline.product(bench.rates, T, I, O) * 1e-6
    call = Call(
        "x Wt", lambda: torch.mm(x, weight.t(), out=y), predicted, unit="TFLOP/s", amount=flops
    )
    return compare(bench, "product", f"{T}x{I}x{O}", [call], bench.device_time)


def addmm(bench: Bench, T: int, I: int, O: int) -> list[dict]:  # noqa: E741
    """y = beta y + x Wt in place. If the read of y is hidden, beta = 1 costs nothing."""
    x, weight, y = bench.draw(T, I), bench.draw(O, I, variance=1 / I), bench.draw(T, O)
    predicted = roofline.product(bench.rates, T, I, O)
    calls = [
        Call(f"beta={beta}", partial(y.addmm_, x, weight.t(), beta=beta), predicted)
        for beta in (0, 1)
    ]
    exposed = 1 + roofline.one_pass(bench.rates, T, O) / predicted
    note = f"predicted {exposed:.3f} if the read of y is not hidden" if exposed > 1 else None
    ratios = [Ratio("beta=1", "beta=0", note)]
    return compare(bench, "addmm_", f"{T}x{I}x{O}", calls, bench.device_time, ratios)


def draw_layer(bench: Bench, I: int, O: int, R: int) -> Layer:  # noqa: E741
    """Draw a layer I -> O with EXPERTS experts of total rank R."""
    case = linear_case(I, O)
    return make_layer(case, EXPERTS, R // EXPERTS, TOP_K, bench.dtype, bench.device)


def plain_gate(logits: Tensor) -> Tensor:
    """Return the softmax over the TOP_K largest of logits [T, E], zero elsewhere: [T, E]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, experts = logits.topk(TOP_K, dim=1)
    return torch.zeros_like(logits).scatter(1, experts, top.softmax(dim=1))


def plain_shrink(layer: Layer, x: Tensor, gate: Tensor | None) -> dict[str, Tensor]:
    """Return h = x At and u = scale gate (.) h in x's dtype.

    gate [T, E]; None: the gate of the router.
    """
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
    """Return calls of `shrink_gate` with sparse gates and with a router."""
    adapter, (T, I), E = layer.adapters[0], x.shape, layer.experts  # noqa: E741
    experts = draw_experts("uniform", T, E, TOP_K, torch.Generator().manual_seed(T))
    experts = experts.to(bench.device)
    weights = torch.rand(experts.shape, generator=bench.generator, device=bench.device)
    dense = weights.new_zeros(T, E).scatter(1, experts, weights)
    ranks, scaling = (layer.rank,) * E, (layer.scaling,) * E
    router = RouterTensors([adapter.router_weight], [adapter.router_bias])
    gate = Gate(weights, experts.int())
    sparse = [x, [adapter.lora_A], NO_ROUTER, gate, Mixture(ranks, scaling), NO_DROPOUT]
    mixture = Mixture(ranks, scaling, router_top_k=TOP_K)
    routed = [x, [adapter.lora_A], router, Gate(*NO_GATE), mixture, NO_DROPOUT]

    def verdict(arguments: list, gate: Tensor | None) -> Verdict:
        h, u, *_ = operation(*arguments)
        exact, plain = (plain_shrink(layer, rows, gate) for rows in (x.double(), x))
        return compare_outputs({"h": h, "u": u}, exact, plain, bench.dtype)

    return [
        Call(
            f"{label}, {form}",
            partial(operation, *arguments),
            roofline.product(bench.rates, T, I, layer.rank * E + logits),
            "moelora",
            verdict=partial(verdict, arguments, gate),
        )
        for form, arguments, gate, logits in (
            ("sparse gates", sparse, dense, 0),
            ("router", routed, None, E),
        )
    ]


def shrink(bench: Bench, T: int, I: int, R: int) -> list[dict]:  # noqa: E741
    """x At in the BLAS, and `shrink_gate`, which also routes, gates and writes u."""
    # O does not matter: only A and the router are used.
    layer = draw_layer(bench, I, 16, R)
    x, _ = draw_inputs(layer, T, "uniform")
    matrix, h = layer.adapters[0].lora_A.t(), bench.draw(T, R)
    predicted = roofline.product(bench.rates, T, I, R)
    blas = Call("mm", lambda: torch.mm(x, matrix, out=h), predicted)
    operation, impl = bench.operation("shrink_gate")
    calls = shrink_calls(bench, layer, x, operation, f"shrink_gate ({impl})")
    ratios = [Ratio(call.variant, "mm") for call in calls]
    return compare(bench, "shrink", f"{T}x{I}x{R}", [blas, *calls], bench.device_time, ratios)


def recorded(operation: Callable, arguments: list) -> list:
    """Return the launches that a launcher makes for these arguments."""
    from moelora_kernels.kernels.common import launcher

    with launcher.recording() as launches:
        operation(*arguments)
    return launches


def weight_grad(bench: Bench, T: int, I: int, O: int, R: int) -> list[dict]:  # noqa: E741
    """dh^T x, dlogits^T x and dy^T u in one op. More parts of T fill the chip and add traffic.

    The prediction has only the bytes of the inputs and the results: partial sums should stay in the
    cache.
    """
    x, dh, dy, u = (bench.draw(T, width) for width in (I, R, O, R))
    dlogits = bench.draw(T, EXPERTS).float()
    ranks = (R // EXPERTS,) * EXPERTS
    arguments = [x, dh, dlogits, [dy], u, ranks, NO_DROPOUT, x.dtype, x.dtype]
    predicted = roofline.weight_grad(bench.rates, T, I, R) + roofline.weight_grad(
        bench.rates, T, O, R
    )

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "dA": dh.to(dtype).t() @ x.to(dtype),
            "dB": dy.to(dtype).t() @ u.to(dtype),
            "drouter": dlogits.to(dtype).t() @ x.to(dtype),
            "dbias": dlogits.to(dtype).sum(dim=0),
        }

    def verdict(call: Callable) -> Verdict:
        dA, drouter, dbias, (dB,) = call()
        outputs = {"dA": dA, "dB": dB, "drouter": drouter, "dbias": dbias}
        return compare_outputs(outputs, plain(torch.float64), plain(x.dtype), x.dtype)

    operation, impl = bench.operation("weight_grad")
    variants = {f"weight_grad ({impl})": operation}
    if bench.launchers:
        from benchmarks.model import sizes, traffic

        rule = traffic.weight_grad_split(sizes.Sizes(recorded(operation, arguments)[0]))
        variants = {
            f"split={split}{' (rule)' if split == rule else ''}": partial(operation, split=split)
            for split in sorted({*SPLITS, rule})
        }
    calls = [Call("mm, mm", lambda: (torch.mm(dh.t(), x), torch.mm(dy.t(), u)), predicted)]
    for variant, function in variants.items():
        call = partial(function, *arguments)
        calls.append(Call(variant, call, predicted, "moelora", verdict=partial(verdict, call)))
    ratios = [Ratio(variant, "mm, mm") for variant in variants]
    return compare(bench, "weight_grad", f"{T}x{I}x{O}, R={R}", calls, bench.device_time, ratios)


def layer_calls(
    bench: Bench, layer: Layer, x: Tensor, dys: list[Tensor], mode: str, cold_bytes: int
) -> Iterator[Call]:
    """Yield a call for each provider of LAYERS that this run measures."""
    checker = check.Checker(layer, x, dys)
    weights = ColdWeights(layer, cold_bytes)
    for name in LAYERS:
        if name in bench.options.providers:
            build, formula = PROVIDERS[name]
            provider = build(layer)
            timed = harness.Timed(provider, weights, x, dys, mode)
            verdict = partial(checker.verdict, provider, formula, mode)
            yield Call(name, timed.call, provider=name, reset=timed.reset, verdict=verdict)


def bare_launch(bench: Bench, call: Call, name: str) -> Call:
    """Return a call with only the Triton launches of a launcher's call."""
    from moelora_kernels.kernels.common import launcher

    launches = recorded(call.call, [])

    def launch() -> None:
        for record in launches:
            options = launcher.options(record.tile_config)
            record.kernel[(record.programs,)](**record.arguments, **record.constants, **options)

    predicted = len(launches) * roofline.launch(bench.rates, "triton")
    return Call(name, launch, predicted, "moelora", verdict=call.verdict)


def gate_call(operation: Callable, label: str, device: torch.device) -> Call:
    """Return a call of `topk_gate` on a few float32 logits without ties."""
    logits = torch.randn(16, EXPERTS, generator=torch.Generator().manual_seed(0)).to(device)
    call = partial(operation, logits, TOP_K, True, 1.0)

    def verdict() -> Verdict:
        weights, experts = call()
        gate = torch.zeros_like(logits).scatter(1, experts.long(), weights)
        exact, plain = ({"gate": plain_gate(values)} for values in (logits.double(), logits))
        return compare_outputs({"gate": gate}, exact, plain, logits.dtype)

    return Call(f"topk_gate, {label}", call, provider="moelora", verdict=verdict)


def host(bench: Bench) -> list[dict]:
    """The host's time of tiny calls. On a CPU the time includes their arithmetic."""
    layer = draw_layer(bench, 64, 64, 32)
    x, dys = draw_inputs(layer, 16, "uniform")
    weight, y = layer.adapters[0].weight.t(), bench.draw(16, 64)
    calls = [Call("ATen mm", partial(torch.mm, x, weight))]
    calls.append(Call("ATen addmm_", partial(y.addmm_, x, weight)))
    for name in ("topk_gate", "shrink_gate"):
        entries = [("registered op", *registered(name, bench.device.type))]
        if bench.launchers:
            entries.append(("launcher", *bench.operation(name)))
        for entry, operation, impl in entries:
            label = f"{entry} ({impl})"
            if name == "topk_gate":
                call = gate_call(operation, label, bench.device)
            else:
                call = shrink_calls(bench, layer, x, operation, f"shrink_gate, {label}")[1]
                call.predicted = math.nan
            calls.append(call)
            if entry == "launcher":
                calls.append(bare_launch(bench, call, f"{name}, bare JIT launch"))
    if bench.device.type == "cuda":
        operation, impl = registered("topk_gate", "cpu")
        cpu = torch.device("cpu")
        calls.append(gate_call(operation, f"registered op on CPU tensors ({impl})", cpu))
        predicted = roofline.launch(bench.rates, "native")
        reason = "the package has no native op for GPUs"
        calls.append(Call("native GPU op", None, predicted, note=reason))
    for call in layer_calls(bench, layer, x, dys, "fwd", cold_bytes=0):
        if call.variant != "masked_compiled":
            call.variant = f"layer forward, {call.variant}"
            calls.append(call)
    return compare(bench, "host", "T=16", calls, bench.host_time)


def layer(bench: Bench, I: int, O: int, T: int, mode: str) -> list[dict]:  # noqa: E741
    """moelora, masked and masked_compiled, and their ratios to the frozen layer."""
    case, options = linear_case(I, O), bench.options
    mixture = (options.experts, options.rank, options.top_k)
    subject = make_layer(case, *mixture, bench.dtype, bench.device)
    x, dys = draw_inputs(subject, T, options.routing)
    calls = list(layer_calls(bench, subject, x, dys, mode, bench.clock.weight_bytes))
    for call in calls:
        if call.variant != "masked":
            sizes, passes = (T, I, O, options.experts * options.rank), LAYERS[call.variant]
            call.predicted = roofline.layer(bench.rates, *sizes, mode, passes)
    ratios = [Ratio(name, "frozen") for name in LAYERS if name != "frozen"]
    ratios.append(Ratio("moelora", "masked_compiled"))
    return compare(bench, "layer", f"{case.name} T={T} {mode}", calls, bench.call_time, ratios)


def comparisons(bench: Bench, sizes: MachineSizes) -> dict[str, list[partial]]:
    """Return the comparisons of a run by their measurement; a call of one returns its rows."""
    return {
        "copy": [partial(copy, bench, mebibytes) for mebibytes in sizes.copy],
        "product": [partial(product, bench, *shape) for shape in sizes.product],
        "addmm_": [partial(addmm, bench, *shape) for shape in sizes.addmm],
        "shrink": [partial(shrink, bench, *shape) for shape in sizes.shrink],
        "weight_grad": [partial(weight_grad, bench, *shape) for shape in sizes.weight_grad],
        "host": [partial(host, bench)],
        "layer": [
            partial(layer, bench, *sizes.layer, T, mode)
            for T in sizes.layer_tokens
            for mode in bench.options.modes
        ],
    }


def run_measurement(
    bench: Bench, measurement: str, calls: list[partial], progress: harness.Progress
) -> list[dict]:
    """Run the comparisons of a measurement and return the rows."""
    rows = []
    for comparison in calls:
        try:
            rows += comparison()
        except Exception as error:  # one comparison that cannot be set up must not end the run
            case = "x".join(map(str, comparison.args[1:]))
            row = empty_row(bench, measurement, case, "all", "moelora")
            rows.append(row | {"status": "failed", "reason": harness.first_line(error)})
        progress(f"machine {measurement}")
    return rows


def jobs(bench: Bench, sizes: MachineSizes) -> list[Job]:
    """Return a job for each measurement."""
    return [
        Job(len(calls), partial(run_measurement, bench, measurement, calls))
        for measurement, calls in comparisons(bench, sizes).items()
    ]
