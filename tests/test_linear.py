"""MoeLoraLinear as a module: which bases, inputs, dtypes and surroundings it lives in."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    record_routing,
    set_tasks,
)
from moelora_kernels.nn import MlpRouter

IN, OUT = 12, 10
MING = dict(num_experts=4, rank=3, alpha=6.0, router_bias=True, top_k=2)


def make_layer(dtype=torch.float64, base=None, seed=0, **options):
    """A layer whose B is not zero, so that its adapter shows."""
    torch.manual_seed(seed)
    options = {**MING, **options}
    if options.get("router") in ("external", None) and "router" in options:
        options.pop("top_k")
    base = nn.Linear(IN, OUT, dtype=dtype) if base is None else base
    layer = MoeLoraLinear.from_linear(base, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    return layer


def step(layer, x, dy=None, forward=None):
    """y, dx and the gradient of every parameter that trains, by name; seeded for the dropout."""
    torch.manual_seed(3)
    leaf = x.detach().clone().requires_grad_()
    y = (layer if forward is None else forward)(leaf)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if dy is None else dy
    trained = {n: q for n, q in layer.named_parameters() if q.requires_grad}
    grads = torch.autograd.grad(y, (leaf, *trained.values()), dy, allow_unused=True)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def assert_same(found, expected, **tolerance):
    """Same names, same tensors: bitwise unless a tolerance is given."""
    assert found.keys() == expected.keys()
    tolerance = tolerance or dict(rtol=0, atol=0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=name)


# --- the base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str
)
def test_a_new_layer_is_its_base(dtype, bias):
    """B = 0: training starts from the frozen model, whatever A and the router hold."""
    torch.manual_seed(0)
    layer = MoeLoraLinear(IN, OUT, bias, dtype=dtype, **MING)
    x = torch.randn(7, IN, dtype=dtype)
    expected = nn.functional.linear(x.double(), layer.weight.double(), None)
    expected = expected + layer.bias.double() if bias else expected
    # One rounding more than one of the result: the sum may pass through y's dtype twice.
    band = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=band)
    assert (layer.bias is None) == (not bias)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("training", (True, False))
def test_from_linear_keeps_the_very_module(training):
    """Tied weights, offload hooks and quantisation state hang on the module's identity."""
    base = nn.Linear(IN, OUT).train(training)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert layer.base_layer is base
    assert layer.weight is base.weight
    assert not any(q.requires_grad for q in base.parameters())
    assert {m.training for m in layer.modules()} == {training}
    names = [n for n, q in layer.named_parameters() if q.requires_grad]
    assert names == ["lora_A", "lora_B", "router.weight", "router.bias"]


def test_from_linear_wants_a_linear():
    with pytest.raises(TypeError, match=r"linear: .*in_features.*LayerNorm"):
        MoeLoraLinear.from_linear(nn.LayerNorm(4), **MING)


class Doubling(nn.Linear):
    """A subclass with a forward of its own: reading its weight would miss the factor."""

    def forward(self, x):
        return 2.0 * super().forward(x)


class PackedLinear(nn.Module):
    """A stand-in for a quantised linear: int8 codes in `weight`, dequantised in forward."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        # Packed in one row, as bitsandbytes packs, so that only forward knows the shape.
        self.weight = nn.Parameter(codes.reshape(1, -1), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self):
        return self.weight.view(self.out_features, -1).to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


def hooked(kind):
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    if kind == "forward":
        base.register_forward_hook(lambda module, args, y: 2.0 * y)
    elif kind == "pre":
        base.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    elif kind == "patched":
        # What accelerate's hooks and some LoRA tools do: forward replaced on the instance.
        plain = base.forward
        base.forward = lambda x: 2.0 * plain(x)
    elif kind == "parametrized":
        nn.utils.parametrize.register_parametrization(base, "weight", Twice())
    elif kind == "subclass":
        return Doubling(IN, OUT, dtype=torch.float64)
    elif kind == "packed":
        return PackedLinear(base)
    return base


class Twice(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


@pytest.mark.parametrize(
    "kind", ("forward", "pre", "patched", "parametrized", "subclass", "packed")
)
def test_a_base_that_is_more_than_a_weight_is_called(kind):
    """Whatever the base computes is what lies under the experts, forward and backward."""
    base = hooked(kind)
    layer = make_layer(base=base, adapter_dtype="float64")
    bare = make_layer(base=nn.Linear(IN, OUT, dtype=torch.float64))
    bare.load_state_dict({**bare.state_dict(), **adapter_of(layer)})
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    dy = torch.randn(2, 3, OUT, dtype=torch.float64)
    found = step(layer, x, dy)

    leaf = x.clone().requires_grad_()
    of_base = base(leaf)
    (dx_of_base,) = torch.autograd.grad(of_base, leaf, dy)
    without = step(bare, x, dy)
    plain = nn.functional.linear(x, bare.weight, bare.bias)
    expected = dict(without, y=without["y"] - plain + of_base.detach())
    expected["dx"] = without["dx"] - dy @ bare.weight + dx_of_base
    assert_same(found, expected, rtol=1e-12, atol=1e-12)


def adapter_of(layer):
    return {k: v for k, v in layer.state_dict().items() if not k.startswith("base_layer.")}


def test_adapters_over_a_packed_base_are_float32():
    """int8 codes are no dtype for A and B; the output keeps the dtype that the base returns."""
    base = PackedLinear(nn.Linear(IN, OUT)).to(torch.bfloat16)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert {q.dtype for q in adapter_parameters(layer)} == {torch.float32}
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)


# --- the input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((), (5,), (2, 3), (2, 3, 2)), ids=str)
def test_any_number_of_leading_dimensions(shape):
    """A linear takes them all; the tokens are what they are one by one."""
    layer = make_layer()
    x = torch.randn(*shape, IN, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape, OUT)
    one_by_one = torch.stack([layer(t) for t in x.reshape(-1, IN)]).view(y.shape)
    torch.testing.assert_close(y, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    (
        {},
        dict(router="mlp"),
        dict(router="external"),
        dict(select="topp", top_p=0.5, top_k=None),
        dict(shared_expert="complement"),
        dict(dropout=0.5),
        dict(dropout=0.5, dropout_mask="per_expert"),
        dict(granularity="sequence"),
    ),
    ids=str,
)
@pytest.mark.parametrize("shape", ((0,), (0, 3), (2, 0)), ids=str)
def test_an_empty_batch_has_zero_gradients(shape, options):
    """A rank without tokens must still take part in the all-reduce: zeros, never None."""
    layer = make_layer(**options)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    if options.get("router") == "external":
        set_tasks(layer, torch.rand(1, 4, dtype=torch.float64))
    found = step(layer, x)
    assert found["y"].shape == (*shape, OUT)
    for name, gradient in found.items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_a_strided_x_and_a_strided_dy():
    """x cut from a wider tensor, dy from a sum (stride 0) and a transpose: views, not copies."""
    layer = make_layer()
    wide = torch.randn(4, 2 * IN, dtype=torch.float64)
    strided = wide[:, ::2]
    for dy in (
        torch.ones((), dtype=torch.float64).expand(4, OUT),
        torch.randn(OUT, 4, dtype=torch.float64).t(),
        torch.randn(4, 2 * OUT, dtype=torch.float64)[:, ::2],
        torch.randn(1, OUT, dtype=torch.float64).expand(4, OUT),
    ):
        expected = step(layer, strided.contiguous(), dy.contiguous())
        torch.manual_seed(3)
        leaf = wide.clone().requires_grad_()
        y = layer(leaf[:, ::2])
        trained = [q for q in layer.parameters() if q.requires_grad]
        dwide, *grads = torch.autograd.grad(y, (leaf, *trained), dy)
        torch.testing.assert_close(y, expected["y"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dwide[:, ::2], expected["dx"], rtol=1e-12, atol=1e-12)
        assert not dwide[:, 1::2].any()
        for g, want in zip(grads, list(expected.values())[2:], strict=True):
            torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-12)


def test_a_bad_x_is_named():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 12\], got \[3, 11\]"):
        layer(torch.randn(3, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x: expected"):
        layer(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x: expected a float dtype, got torch.int64"):
        layer(torch.ones(3, IN, dtype=torch.int64))


def test_a_nan_token_reaches_only_its_own_output():
    """One overflowed sequence of a batch must not poison the others' activations."""
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


def unrouted(poison):
    """Layers, one with NaN in an expert that no token is routed to, and x."""
    layer = make_layer()
    with torch.no_grad():
        layer.router.bias[2] = -1e4
    broken = copy.deepcopy(layer)
    columns = slice(6, 9)
    with torch.no_grad():
        if "A" in poison:
            broken.lora_A[columns] = torch.nan
        if "B" in poison:
            broken.lora_B[:, columns] = torch.nan
    return layer, broken, torch.randn(2, 4, IN, dtype=torch.float64)


def test_nan_in_the_a_of_an_unrouted_expert_stays_there():
    """Select, not multiply: y and the gradients of all other experts and of the router."""
    layer, broken, x = unrouted("A")
    expected, found = step(layer, x), step(broken, x)
    for name in ("y", "lora_A", "lora_B", "router.weight", "router.bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
    assert not found["lora_A"][6:9].any()
    assert not found["lora_B"][:, 6:9].any()


def test_nan_in_the_b_of_an_unrouted_expert_leaves_the_gradients():
    """P = dy B is NaN in its columns, and neither dgate nor dh may see that."""
    layer, broken, x = unrouted("B")
    expected, found = step(layer, x), step(broken, x)
    for name in ("dx", "lora_A", "lora_B", "router.weight", "router.bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.xfail(
    strict=True,
    reason="the wide formulation multiplies all of B (y = u Bt) and all of A (dx = dh A): 0 * NaN",
)
@pytest.mark.parametrize(("poison", "name"), (("B", "y"), ("A", "dx")))
def test_nan_of_an_unrouted_expert_stays_out_of_y_and_dx(poison, name):
    """What a loop over routed experts gives, and the wide products cannot."""
    layer, broken, x = unrouted(poison)
    torch.testing.assert_close(step(broken, x)[name], step(layer, x)[name])


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
def test_float32_adapters_under_a_low_precision_base(low):
    """Compute in the base's dtype, gradients in the parameters': PEFT's autocast_adapter_dtype."""
    layer = make_layer(low, adapter_dtype="float32")
    found = step(layer, torch.randn(5, IN, dtype=low))
    assert found["y"].dtype == found["dx"].dtype == low
    for name in ("lora_A", "lora_B", "router.weight", "router.bias"):
        assert found[name].dtype == torch.float32
        if "router" in name:
            # Router gradients are float32 all the way: more than x's 8 or 11 bits survive.
            assert not torch.equal(found[name], found[name].to(low).float()), name


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
    """float32 weights under bfloat16 autocast: bfloat16 y, float32 gradients near the true."""
    layer = make_layer(torch.float32, **options)
    x = torch.randn(2, 8, IN)
    # x and dy that bfloat16 holds exactly: what differs is the arithmetic, not the data.
    x = x.bfloat16().float()
    dy = torch.randn(2, 8, OUT).bfloat16()
    truth = step(layer, x, dy.float())
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
    found = {"y": y.detach().float(), "dx": grads[0]}
    found.update(zip(trained, grads[1:], strict=True))
    for name, expected in truth.items():
        assert found[name].dtype == torch.float32
        # A handful of bfloat16 roundings (2^-9 each) on sums of IN = 12 or 16 tokens' terms.
        error = (found[name] - expected).norm() / expected.norm()
        assert error < 0.02, f"{name}: {error}"


@pytest.mark.parametrize(
    "options",
    ({}, dict(router="mlp"), dict(granularity="sequence"), dict(router="task", num_tasks=3)),
    ids=str,
)
def test_router_logits_are_float32_under_autocast(options):
    """bfloat16 logits flip the choice of experts: autocast must not reach into the router."""
    layer = make_layer(torch.float32, **options)
    if options.get("router") == "task":
        set_tasks(layer, [1, 3])
    x = torch.randn(2, 8, IN).bfloat16().float()
    with record_routing(layer):
        layer(x)
        expected = layer.record.logits
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        found = layer.record.logits
    assert found.dtype == torch.float32
    tolerance = dict(rtol=1e-5, atol=1e-5)
    if options.get("granularity") == "sequence":
        # The mean over positions is taken of bfloat16 tokens and rounded to bfloat16 once.
        tolerance = dict(rtol=0, atol=2**-8)
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("options", ({}, dict(router="mlp")), ids=str)
def test_float32_routers_under_a_bfloat16_base_give_float32_logits(options):
    """x is bfloat16, the router float32: its logits are those of float32 arithmetic."""
    layer = make_layer(torch.bfloat16, adapter_dtype="float32", **options)
    x = torch.randn(9, IN).bfloat16()
    with record_routing(layer):
        layer(x)
        found = layer.record.logits
    router = copy.deepcopy(layer.router).double()
    torch.testing.assert_close(found.double(), router(x.double()), rtol=1e-5, atol=1e-5)


def test_autocast_leaves_float64_alone():
    """autocast does not touch float64: neither does the layer."""
    layer = make_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)


# --- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ("one", "sequence", "token"))
def test_external_gates_by_argument_and_by_set_tasks(rows):
    """Both ways, one row for all, per sequence or per token; and the gates have gradients."""
    layer = make_layer(router="external")
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    shape = {"one": (1, 4), "sequence": (3, 4), "token": (3, 4, 4)}[rows]
    gates = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 4, OUT, dtype=torch.float64)
    y = layer(x, gates)
    (found,) = torch.autograd.grad(y, gates, dy)

    by_token = {"one": gates[0], "sequence": gates[:, None], "token": gates}[rows]
    expected = layer.base_layer(x)
    for e in range(4):
        own = slice(3 * e, 3 * e + 3)
        delta = (x @ layer.lora_A[own].t()) @ layer.lora_B[:, own].t()
        expected = expected + 2.0 * by_token.expand(3, 4, 4)[..., e : e + 1] * delta
    (wanted,) = torch.autograd.grad(expected, gates, dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    set_tasks(layer, gates.detach())
    assert torch.equal(layer(x), y)
    # The argument comes first, and only for its own forward.
    other = torch.rand(1, 4, dtype=torch.float64)
    assert not torch.equal(layer(x, other), y)
    assert torch.equal(layer(x), y)


def test_a_gate_that_starts_at_zero_has_its_gradient():
    """A gate of exactly zero contributes nothing and still learns: d y / d gate = s B A x."""
    layer = make_layer(router="external")
    x = torch.randn(5, IN, dtype=torch.float64)
    gates = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    layer(x, gates).sum().backward()
    for e in range(4):
        own = slice(3 * e, 3 * e + 3)
        delta = 2.0 * (x @ layer.lora_A[own].t()) @ layer.lora_B[:, own].t()
        torch.testing.assert_close(gates.grad[:, e], delta.sum(dim=1), rtol=1e-12, atol=1e-12)


def test_gates_that_do_not_fit_raise():
    layer = make_layer(router="external")
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gates: router='external' needs them"):
        layer(x)
    for gates in (torch.rand(3, 5), torch.rand(4), torch.ones(3, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"gates: expected floats \[\.\.\., 4\]"):
            layer(x, gates)
    with pytest.raises(ValueError, match=r"gates: 5 gate rows for x \[3, 4, 12\]"):
        layer(x, torch.rand(5, 4))
    with pytest.raises(ValueError, match=r"gates: 3 gate rows for x \[12, 12\]"):
        layer(x.reshape(12, IN), torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"gates: only router='external'"):
        make_layer()(x, torch.rand(3, 4))


class Prototype(nn.Module):
    """A router of one's own: cosine to prototypes, with a parameter that must get a gradient."""

    def __init__(self, experts):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(experts, IN, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.prototypes).t()


def test_any_module_can_be_the_router():
    """y and all gradients, the router's among them, as autograd of the plain formula has them."""
    layer = make_layer(router=Prototype(4), router_bias=False, normalize="none", top_k=2)
    x = torch.randn(2, 3, IN, dtype=torch.float64)

    def plain(leaf):
        p = layer.router(leaf.reshape(-1, IN)).softmax(dim=1).view(2, 3, 4)
        kept = torch.zeros_like(p).scatter(2, p.topk(2).indices, 1.0)
        y = layer.base_layer(leaf)
        for e in range(4):
            own = slice(3 * e, 3 * e + 3)
            delta = (leaf @ layer.lora_A[own].t()) @ layer.lora_B[:, own].t()
            y = y + 2.0 * (p * kept)[..., e : e + 1] * delta
        return y

    found = step(layer, x)
    assert found["router.prototypes"].abs().max() > 0
    assert_same(found, step(layer, x, forward=plain), rtol=1e-11, atol=1e-11)


def test_a_router_with_the_wrong_shape_is_named():
    """A linear when the layer is built; of another module only the forward can tell."""
    with pytest.raises(ValueError, match=r"router: expected a weight \[4, 12\], got \[3, 12\]"):
        make_layer(router=nn.Linear(IN, 3))
    layer = make_layer(router=Prototype(3), router_bias=False)
    with pytest.raises(ValueError, match=r"router: expected logits \[5, 4\], got \[5, 3\]"):
        layer(torch.randn(5, IN, dtype=torch.float64))


def test_a_hooked_router_is_called():
    """A hook that steers the routing (bias update, logging) must see and change the logits."""
    layer = make_layer()
    seen = []
    layer.router.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    layer(torch.randn(2, 3, IN, dtype=torch.float64))
    assert seen == [(6, 4)]


@pytest.mark.parametrize("shape", ((5,), (2, 5), (2, 3, 5)), ids=str)
def test_a_sequence_gate_sees_the_mean_of_its_sequence(shape):
    """2-D x is one sequence; with more dimensions the first counts the sequences."""
    layer = make_layer(granularity="sequence")
    x = torch.randn(*shape, IN, dtype=torch.float64)
    batch = x[None] if x.dim() == 2 else x.flatten(1, -2)
    means = batch.mean(dim=1)
    with record_routing(layer):
        y = layer(x)
        logits = layer.record.logits
    torch.testing.assert_close(logits, layer.router(means), rtol=1e-12, atol=1e-12)
    external = make_layer(router="external")
    external.load_state_dict({k: v for k, v in layer.state_dict().items() if "router" not in k})
    values, indices = logits.detach().topk(2)
    gates = torch.zeros_like(logits).scatter(1, indices, values.softmax(dim=1))
    torch.testing.assert_close(
        y.view(*batch.shape[:2], OUT), external(batch, gates), rtol=1e-12, atol=1e-12
    )


def test_an_mlp_router_trains():
    layer = make_layer(router="mlp", router_hidden=5)
    assert isinstance(layer.router, MlpRouter)
    assert layer.router.fc1.weight.shape == (5, IN)
    found = step(layer, torch.randn(4, IN, dtype=torch.float64))
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert found[f"router.{name}"].abs().max() > 0, name


def test_noise_is_for_training_only():
    """Two training forwards differ, two in eval mode are the same bits and those without noise."""
    layer = make_layer(noise=1.0)
    x = torch.randn(4, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    quiet = make_layer()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), quiet.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared_expert", ("always", "complement"))
@pytest.mark.parametrize("top_k", (None, 2))
def test_a_shared_expert_is_on_for_every_token(shared_expert, top_k):
    """Weight 1, or 1 - max(gate) (MoCLE), outside the softmax of the routed experts."""
    layer = make_layer(
        shared_expert=shared_expert, shared_rank=2, top_k=top_k, normalize="none", alpha=4.0
    )
    assert layer.lora_A.shape == (4 * 3 + 2, IN)
    assert layer.config.scales()[-1] == 2.0
    x = torch.randn(5, IN, dtype=torch.float64)

    def plain(leaf):
        p = layer.router(leaf).softmax(dim=1)
        p = torch.zeros_like(p).scatter(1, p.topk(top_k or 4).indices, 1.0) * p
        own = torch.ones(5, 1).double()
        if shared_expert == "complement":
            own = 1 - p.max(dim=1, keepdim=True).values
        gate = torch.cat([p * 4.0 / 3.0, own * 4.0 / 2.0], dim=1)
        gate = gate.repeat_interleave(torch.tensor([3, 3, 3, 3, 2]), dim=1)
        return layer.base_layer(leaf) + (gate * (leaf @ layer.lora_A.t())) @ layer.lora_B.t()

    assert_same(step(layer, x), step(layer, x, forward=plain), rtol=1e-11, atol=1e-11)


def test_record_routing_holds_only_within():
    """Each token's experts and weights, for monitoring; nothing is kept alive outside."""
    layer = make_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    layer(x)
    assert layer.record.logits is None
    with record_routing(nn.Sequential(layer)):
        layer(x)
        record = layer.record
        values, indices = layer.router(x.reshape(6, IN)).topk(2)
        assert torch.equal(record.indices.long(), indices)
        torch.testing.assert_close(record.weights, values.softmax(1), rtol=1e-12, atol=1e-12)
        assert not record.weights.requires_grad
    assert (layer.record.weights, layer.record.logits, layer.record.wanted) == (None, None, False)


# --- life of a module ---------------------------------------------------------------------------

LIVES = [
    {},
    dict(router="mlp"),
    dict(router="task", num_tasks=3, dropout=0.1),
    dict(router="external"),
    dict(share="A", shared_expert="always"),
]


def ready(layer):
    if layer.config.router == "task":
        set_tasks(layer, [2, 1])
    elif layer.config.router == "external":
        set_tasks(layer, torch.full((2, 4), 0.25, dtype=torch.float64))
    return layer.eval()


@pytest.mark.parametrize("copier", ("deepcopy", "pickle", "torch.save"))
@pytest.mark.parametrize("options", LIVES, ids=str)
def test_copies_compute_the_same(options, copier):
    """deepcopy for EMA and for references, pickle for worker processes; also after a forward."""
    layer = ready(make_layer(**options))
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), y)
    assert twin.config == layer.config
    with torch.no_grad():
        twin.lora_A.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("options", LIVES, ids=str)
def test_state_dict_round_trip(options):
    """Strict, and without anything that is set per batch."""
    layer, other = ready(make_layer(**options)), ready(make_layer(seed=1, **options))
    assert not any("task_ids" in key or "gates" in key for key in layer.state_dict())
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", LIVES, ids=str)
def test_to_dtype(options, dtype):
    """`model.to(dtype)` after the swap is what people write: ids stay integers, gates follow."""
    layer = ready(make_layer(**options)).to(dtype)
    y = layer(torch.randn(2, 3, IN, dtype=dtype))
    assert y.dtype == dtype
    assert {q.dtype for q in layer.parameters()} == {dtype}


@pytest.mark.parametrize("options", LIVES, ids=str)
def test_meta_device(options):
    """Large models are built on meta: no values, only shapes; then to_empty and load."""
    source = ready(make_layer(**options))
    with torch.device("meta"):
        layer = MoeLoraLinear(IN, OUT, config=source.config, dtype=torch.float64)
    if not isinstance(source.config.router, str) or source.config.router not in (
        "task",
        "external",
    ):
        assert layer(torch.randn(2, 3, IN, device="meta", dtype=torch.float64)).shape == (2, 3, OUT)
    assert {q.device.type for q in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    assert torch.equal(ready(layer)(x), source(x))


def test_repr_tells_layers_apart():
    text = repr(make_layer())
    for part in ("in_features=12", "out_features=10", "num_experts=4", "rank=3", "top_k=2"):
        assert part in text
    assert "router=Prototype" in repr(make_layer(router=Prototype(4), router_bias=False))


def test_reset_parameters_starts_anew():
    layer = make_layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-12, atol=1e-12)
    assert layer.lora_A.requires_grad


def test_frozen_adapters_and_an_unfrozen_base():
    """Staged training: only the router; or the base as well, whose gradients are a linear's."""
    layer = make_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    everything = step(layer, x)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    only_router = step(layer, x)
    assert set(only_router) == {"y", "dx", "router.weight", "router.bias"}
    for name, value in only_router.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-12, atol=1e-12)
    layer.base_layer.requires_grad_(True)
    found = step(layer, x)
    dy = torch.linspace(-1, 1, 4 * OUT, dtype=torch.float64).view(4, OUT)
    torch.testing.assert_close(found["base_layer.weight"], dy.t() @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["base_layer.bias"], dy.sum(0), rtol=1e-12, atol=1e-12)


# --- activation checkpointing -------------------------------------------------------------------

DROPPING = [
    dict(dropout=0.4),
    dict(dropout=0.4, dropout_mask="per_expert"),
    dict(dropout=0.4, noise=0.5),
    dict(router="task", num_tasks=3, dropout=0.4),
]


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("options", DROPPING, ids=str)
def test_checkpointing_gives_the_same_bits(options, use_reentrant):
    """The recomputed forward must draw the mask, and the noise, of the first one."""
    layer = make_layer(**options)
    if layer.config.router == "task":
        set_tasks(layer, [3, 1])
    x = torch.randn(2, 5, IN, dtype=torch.float64)

    def gradients(forward):
        torch.manual_seed(9)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        # Something else draws in between, as the next layers of a model do.
        torch.randn(3)
        y.square().sum().backward()
        return {"y": y.detach(), "dx": leaf.grad} | {
            n: q.grad.clone() for n, q in layer.named_parameters() if q.requires_grad
        }

    expected = gradients(layer)
    found = gradients(lambda leaf: checkpoint(layer, leaf, use_reentrant=use_reentrant))
    assert_same(found, expected)


def test_dropout_follows_torch_manual_seed():
    """Reproducible where the seed is set, different from step to step where it is not."""
    layer = make_layer(dropout=0.5)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --- torch.compile ------------------------------------------------------------------------------

COMPILED = [
    {},
    dict(normalize="none", top_k=None, dropout=0.3, dropout_mask="per_expert"),
    dict(router="task", num_tasks=3),
    dict(granularity="sequence", shared_expert="always"),
]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compile_without_graph_breaks_or_recompiles(options):
    """fullgraph=True, gradients as eager, and one graph for every number of tokens."""
    torch._dynamo.reset()
    layer = make_layer(**options)
    if layer.config.router == "task":
        set_tasks(layer, [3, 1])
    eval_layer = layer.eval()
    compiled = torch.compile(eval_layer, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    found = step(eval_layer, x, forward=compiled)
    assert_same(found, step(eval_layer, x), rtol=1e-11, atol=1e-11)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sequence in (7, 12):
            x = torch.randn(2, sequence, IN, dtype=torch.float64)
            found = step(eval_layer, x, forward=compiled)
            assert_same(found, step(eval_layer, x), rtol=1e-11, atol=1e-11)


def test_new_tasks_do_not_recompile():
    """Serving changes the tasks of every batch: they are data to the graph, not constants."""
    layer = make_layer(router="task", num_tasks=3).eval()
    set_tasks(layer, [1, 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in ([2, 3], [3, 1]):
            set_tasks(layer, ids)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", ({}, dict(router="mlp", noise=0.1)), ids=str)
def test_compile_under_autocast(options):
    """The graph is that of eager autocast: the same bits."""
    layer = make_layer(torch.float32, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        found = compiled(x)
        torch.manual_seed(1)
        expected = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_a_called_base_compiles():
    """A quantised or subclassed base is traced through its own forward."""
    layer = make_layer(base=hooked("packed"), adapter_dtype="float64")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN, dtype=torch.float64)
    assert_same(step(layer, x, forward=compiled), step(layer, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout_mask", ("shared", "per_expert"))
def test_training_with_dropout_compiles(dropout_mask):
    """Every step draws a seed of its own inside the graph; backward regenerates its mask."""
    torch._dynamo.reset()
    layer = make_layer(dropout=0.5, dropout_mask=dropout_mask)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    # y is linear in x where the gate is held: the Jacobian of the same mask, by seed.
    torch.manual_seed(1)
    eager = layer(x)
    torch.testing.assert_close(first, eager, rtol=1e-11, atol=1e-11)
    dy = torch.randn(6, OUT, dtype=torch.float64)
    trained = (x, layer.lora_A, layer.lora_B, layer.router.weight)
    for found, expected in zip(
        torch.autograd.grad(first, trained, dy),
        torch.autograd.grad(eager, trained, dy),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_an_explicit_formulation_is_taken_or_refused():
    """impl="reference" is the specification; what this version lacks raises when asked for."""
    layer = make_layer()
    specification = make_layer(impl="reference")
    x = torch.randn(4, IN, dtype=torch.float64)
    assert_same(step(layer, x), step(specification, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="impl: 'decode' is not available"):
        MoeLoraConfig(impl="decode")
