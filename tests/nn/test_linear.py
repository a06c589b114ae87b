"""Which inputs and dtypes does MoeLoraLinear take, compared with nn.Linear?"""

import copy

import pytest
import torch

from moelora_kernels import MoeLoraConfig, record_routing, set_tasks
from support.compare import assert_same, training_step
from support.linears import IN, OUT, formulations, make_layer


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("shape", ((), (5,), (2, 3), (2, 3, 2)), ids=str)
def test_any_number_of_leading_dimensions(shape, impl):
    """nn.Linear accepts them all. Each token has the output of the token alone."""
    layer = make_layer(impl=impl)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape, OUT)
    one_by_one = torch.stack([layer(t) for t in x.reshape(-1, IN)]).view(y.shape)
    torch.testing.assert_close(y, one_by_one, rtol=1e-12, atol=1e-12)


EMPTY = [
    {},
    dict(router="mlp"),
    dict(router="external"),
    dict(select="topp", top_p=0.5, top_k=None),
    dict(shared_expert="complement"),
    dict(dropout=0.5),
    dict(dropout=0.5, dropout_mask="per_expert"),
    dict(granularity="sequence"),
]


@pytest.mark.parametrize(("impl", "options"), formulations(EMPTY), ids=str)
@pytest.mark.parametrize("shape", ((0,), (0, 3), (2, 0)), ids=str)
def test_an_empty_batch_has_zero_gradients(shape, impl, options):
    """A process without tokens still takes part in the all-reduce: zeros, never None."""
    layer = make_layer(impl=impl, **options)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    if options.get("router") == "external":
        set_tasks(layer, torch.rand(1, 4, dtype=torch.float64))
    actual = training_step(layer, x)
    assert actual["y"].shape == (*shape, OUT)
    for name, gradient in actual.items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_strides_of_x_and_dy():
    """x is a slice of a wider tensor. dy is expanded, transposed or a slice."""
    layer = make_layer()
    wide = torch.randn(4, 2 * IN, dtype=torch.float64)
    strided = wide[:, ::2]
    for dy in (
        torch.ones((), dtype=torch.float64).expand(4, OUT),
        torch.randn(OUT, 4, dtype=torch.float64).t(),
        torch.randn(4, 2 * OUT, dtype=torch.float64)[:, ::2],
        torch.randn(1, OUT, dtype=torch.float64).expand(4, OUT),
    ):
        expected = training_step(layer, strided.contiguous(), dy.contiguous())
        torch.manual_seed(3)
        leaf = wide.clone().requires_grad_()
        y = layer(leaf[:, ::2])
        trained = [q for q in layer.parameters() if q.requires_grad]
        dwide, *grads = torch.autograd.grad(y, (leaf, *trained), dy)
        torch.testing.assert_close(y, expected["y"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dwide[:, ::2], expected["dx"], rtol=1e-12, atol=1e-12)
        assert not dwide[:, 1::2].any()
        for g, e in zip(grads, list(expected.values())[2:], strict=True):
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_a_bad_x_is_named():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 12\], got \[3, 11\]"):
        layer(torch.randn(3, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x: expected"):
        layer(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x: expected a float dtype, got torch.int64"):
        layer(torch.ones(3, IN, dtype=torch.int64))


@pytest.mark.parametrize("options", ({}, dict(router="mlp")), ids=str)
@pytest.mark.parametrize("x_dtype", (torch.float64, torch.bfloat16), ids=str)
def test_an_x_of_another_dtype_than_the_base_is_named(x_dtype, options):
    """nn.Linear raises too, without the name of the argument. Autocast converts x."""
    layer = make_layer(torch.float32, **options)
    x = torch.randn(3, IN, dtype=x_dtype)
    with pytest.raises(
        TypeError, match=f"x: expected the base's dtype torch.float32, got {x_dtype}"
    ):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        if x_dtype != torch.float64:
            assert layer(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="x: expected the base's device cpu, got meta"):
        layer(torch.randn(3, IN, device="meta"))


def test_a_nan_token_reaches_only_its_own_output():
    """A NaN in one sequence of a batch does not reach the outputs of the others."""
    layer = make_layer(dropout=0.3)
    for training in (True, False):
        layer.train(training)
        x = torch.randn(3, 4, IN, dtype=torch.float64)
        torch.manual_seed(1)
        expected = layer(x)
        x[1, 2, 0] = torch.nan
        torch.manual_seed(1)
        y = layer(x)
        assert y[1, 2].isnan().any()
        poisoned = torch.zeros(3, 4, dtype=torch.bool)
        poisoned[1, 2] = True
        torch.testing.assert_close(y[~poisoned], expected[~poisoned], rtol=1e-12, atol=1e-12)


GATES = [
    {},
    dict(normalize="none"),
    dict(router="mlp"),
    dict(select="topp", top_p=0.5, top_k=None),
    dict(select="threshold", threshold=0.2, score="identity", normalize="softmax", top_k=None),
    dict(router="external"),
    dict(granularity="sequence"),
]


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("poison", ("A", "B"))
@pytest.mark.parametrize(("impl", "options"), formulations(GATES), ids=str)
def test_an_unrouted_expert_that_is_not_finite(impl, options, poison, value):
    """An expert without tokens changes no output and no gradient of another parameter.

    The wide products read every expert, and 0 * NaN is NaN. There a NaN in A reaches dx, and a NaN
    in B reaches y.
    """
    layer, columns = make_layer(impl=impl, **options), slice(6, 9)
    if options.get("router") == "external":
        set_tasks(layer, torch.tensor([[0.5, 0.2, 0.0, 0.3]], dtype=torch.float64))
    else:
        last = layer.router.fc2 if options.get("router") == "mlp" else layer.router
        with torch.no_grad():
            last.bias[2] = -1e4
    broken = copy.deepcopy(layer)
    with torch.no_grad():
        block = broken.lora_A[columns] if poison == "A" else broken.lora_B[:, columns]
        block.fill_(value)
    x = torch.randn(2, 40, IN, dtype=torch.float64)
    expected, actual = training_step(layer, x), training_step(broken, x)
    # The grouped products do not read the expert, so there every bit is equal.
    reached = {"dx" if poison == "A" else "y"} if impl == "wide" else set()
    tolerance = 1e-12 if impl == "wide" else 0
    for name in expected.keys() - reached:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name
        )
    assert not actual["lora_A"][columns].any()
    assert not actual["lora_B"][:, columns].any()


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_float32_adapters_under_a_low_precision_base(low):
    """y has the base's dtype, a gradient that of its parameter, like PEFT's default expects."""
    layer = make_layer(low, adapter_dtype="float32")
    actual = training_step(layer, torch.randn(5, IN, dtype=low))
    assert actual["y"].dtype == actual["dx"].dtype == low
    for name in ("lora_A", "lora_B", "router.weight", "router.bias"):
        assert actual[name].dtype == torch.float32
        if "router" in name:
            # A router gradient is computed in float32, so it has more bits than x.
            assert not torch.equal(actual[name], actual[name].to(low).float()), name


AUTOCAST = [
    {},
    dict(router="mlp"),
    dict(select="all", top_k=None, noise=0.1),
    dict(granularity="sequence"),
    dict(dropout=0.2),
    dict(dropout=0.2, dropout_mask="per_expert"),
    dict(shared_expert="always"),
]


@pytest.mark.parametrize("backward_inside", (True, False))
@pytest.mark.parametrize("options", AUTOCAST, ids=str)
def test_autocast(options, backward_inside):
    """float32 weights under bfloat16 autocast: y is bfloat16, the gradients are float32."""
    layer = make_layer(torch.float32, **options)
    x = torch.randn(2, 8, IN)
    # bfloat16 represents x and dy exactly, so only the arithmetic differs.
    x = x.bfloat16().float()
    dy = torch.randn(2, 8, OUT).bfloat16()
    truth = training_step(layer, x, dy.float())
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    trained = {n: q for n, q in layer.named_parameters() if q.requires_grad}
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaf)
        if backward_inside:
            grads = torch.autograd.grad(y, (leaf, *trained.values()), dy)
    if not backward_inside:
        grads = torch.autograd.grad(y, (leaf, *trained.values()), dy)
    assert y.dtype == torch.bfloat16
    actual = {"y": y.detach().float(), "dx": grads[0]}
    actual.update(zip(trained, grads[1:], strict=True))
    for name, expected in truth.items():
        assert actual[name].dtype == torch.float32
        # A handful of bfloat16 roundings (2^-9 each) on sums of IN = 12 or 16 tokens' terms.
        error = (actual[name] - expected).norm() / expected.norm()
        assert error < 0.02, f"{name}: {error}"


@pytest.mark.parametrize(
    "options",
    ({}, dict(router="mlp"), dict(granularity="sequence"), dict(router="task", num_tasks=3)),
    ids=str,
)
def test_router_logits_are_float32_under_autocast(options):
    """Autocast does not change the router: bfloat16 logits would select other experts."""
    layer = make_layer(torch.float32, **options)
    if options.get("router") == "task":
        set_tasks(layer, [1, 3])
    x = torch.randn(2, 8, IN).bfloat16().float()
    with record_routing(layer):
        layer(x)
        expected = layer.record.logits
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        actual = layer.record.logits
    assert actual.dtype == torch.float32
    tolerance = dict(rtol=1e-5, atol=1e-5)
    if options.get("granularity") == "sequence":
        # The mean of the tokens is rounded to bfloat16 once.
        tolerance = dict(rtol=0, atol=2**-8)
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("options", ({}, dict(router="mlp")), ids=str)
def test_float32_routers_under_a_bfloat16_base_give_float32_logits(options):
    """x is bfloat16 and the router float32: the logits are computed in float32."""
    layer = make_layer(torch.bfloat16, adapter_dtype="float32", **options)
    x = torch.randn(9, IN).bfloat16()
    with record_routing(layer):
        layer(x)
        actual = layer.record.logits
    router = copy.deepcopy(layer.router).double()
    torch.testing.assert_close(actual.double(), router(x.double()), rtol=1e-5, atol=1e-5)


def test_autocast_leaves_float64_alone():
    """Autocast does not change float64 products, and the layer follows it."""
    layer = make_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)


def test_an_explicit_formulation_runs_or_raises():
    """impl="reference" gives the same values; a formulation that does not exist raises."""
    layer = make_layer()
    specification = make_layer(impl="reference")
    x = torch.randn(4, IN, dtype=torch.float64)
    assert_same(training_step(layer, x), training_step(specification, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="impl: expected one of"):
        MoeLoraConfig(impl="fast")
