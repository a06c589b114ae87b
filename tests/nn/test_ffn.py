"""MoeLoraFFN equals a loop over whole FFNs: for every gate, dtype, base and activation."""

import copy
import itertools

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    record_routing,
    reference,
    set_tasks,
)
from moelora_kernels.nn.gates import gate_of_logits
from support.compare import assert_same, training_step
from support.ffns import (
    HIDDEN,
    INNER,
    check,
    expert_blocks,
    inputs,
    make_ffn,
    step_of_loop,
)
from support.linears import PackedLinear


@pytest.mark.parametrize("normalize", ("sum", "none"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((5,), (2, 3), (1, 1), (2, 17)), ids=str)
def test_the_layer_equals_the_loop(shape, bias, normalize):
    """With normalize="none" the weights do not sum to 1: bd is added sum_k w_tk times."""
    layer = make_ffn(bias=bias, normalize=normalize, router_bias=bias)
    check(layer, *inputs(*shape))


DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, "float32"),
    (torch.float16, None),
    (torch.float16, "float32"),
]


@pytest.mark.parametrize(("dtype", "adapters"), DTYPES, ids=str)
def test_dtypes_within_their_budget(dtype, adapters):
    """y and every gradient, by name, are within the error budget of the dtype."""
    layer = make_ffn(dtype, adapter_dtype=adapters)
    x, dy = inputs(4, 8, dtype=dtype)
    check(layer, x, dy)
    actual = training_step(layer, x, dy)
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    adapter_dtypes = {g.dtype for n, g in actual.items() if n not in ("y", "dx")}
    assert adapter_dtypes == {torch.float32 if adapters else dtype}


@pytest.mark.parametrize("top_k", (1, 4), ids=("K=1", "K=E"))
def test_ends_of_top_k(top_k):
    check(make_ffn(top_k=top_k), *inputs(7))


def dense_gate(x, p, layer):
    """Return the gate [T, E] of any option, from the router's logits."""
    sequence = layer.config.granularity == "sequence"
    rows = x.mean(dim=1) if sequence else x.reshape(-1, x.shape[-1])
    logits = nn.functional.linear(rows, p["router.weight"])
    weights, experts = gate_of_logits(logits, layer.config, layer.training)
    if experts is not None:
        weights = torch.zeros_like(logits).scatter(1, experts.long(), weights)
    if layer.config.shared_expert == "complement":
        weights = torch.cat([weights, 1 - weights.amax(dim=1, keepdim=True)], dim=1)
    return weights.repeat_interleave(x.shape[1], dim=0) if sequence else weights


GATES = {
    "all": dict(top_k=None),
    "topp": dict(top_k=None, select="topp", top_p=0.6),
    "threshold": dict(top_k=None, select="threshold", threshold=0.2, normalize="none"),
    "sigmoid": dict(score="sigmoid"),
    "raw": dict(score="identity", normalize="none"),
    "sequence": dict(granularity="sequence"),
    "complement": dict(top_k=1, normalize="none", shared_expert="complement"),
    "sequence complement": dict(granularity="sequence", shared_expert="complement"),
}


@pytest.mark.parametrize("name", GATES)
def test_other_gates(name):
    """A dense gate runs as K = E slots. A sequence gate has one row per token."""
    check(make_ffn(**GATES[name]), *inputs(3, 4), dense_gate)


def test_a_sequence_gate_keeps_its_slots():
    """A top-k gate of a sequence computes K experts for each token, not E."""
    layer, x = make_ffn(granularity="sequence"), inputs(3, 4)[0]
    weights, experts, *_ = layer.token_slots(x, x.view(12, HIDDEN))
    assert weights.shape == experts.shape == (12, 2)
    assert (weights > 0).all()


@pytest.mark.parametrize("rows", ("one", "sequence", "token"))
def test_external_gates(rows):
    """By argument and by set_tasks. A gate of exactly zero has its gradient."""
    layer = make_ffn(router="external", top_k=None)
    x, dy = inputs(3, 4)
    shape = {"one": (1, 4), "sequence": (3, 4), "token": (3, 4, 4)}[rows]
    gates = torch.rand(shape, dtype=torch.float64)
    gates[..., 2] = 0.0
    gates.requires_grad_()
    by_token = {"one": gates[0], "sequence": gates[:, None], "token": gates}[rows]
    truth = step_of_loop(layer, x, dy, lambda *_: by_token.expand(3, 4, 4).reshape(12, 4))
    y = layer(x, gates)
    torch.testing.assert_close(y, truth["y"], rtol=1e-12, atol=1e-12)
    # The loop skips an expert with gate zero, so its gradient is a finite difference.
    (actual,) = torch.autograd.grad(y, gates, dy)
    nudged = [layer(x, gates.detach() + e) for e in (1e-6 * torch.eye(4)[2], 0.0)]
    slope = ((nudged[0] - nudged[1]) * dy).sum() / 1e-6
    torch.testing.assert_close(actual[..., 2].sum(), slope, rtol=1e-5, atol=1e-5)
    set_tasks(layer, gates.detach())
    assert torch.equal(layer(x), y)


def test_task_gates():
    layer = make_ffn(router="task", num_tasks=3, task_embedding_dim=5)
    x, dy = inputs(2, 3)
    with pytest.raises(RuntimeError, match="call set_tasks"):
        layer(x)
    set_tasks(layer, [3, 1])

    def gate(x, p, layer):
        logits = p["router.embedding.weight"][[3, 1]] @ p["router.gate.weight"].t()
        weights, experts = logits.softmax(dim=1).topk(2, dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True)
        rows = torch.zeros_like(logits).scatter(1, experts, weights)
        return rows.repeat_interleave(3, dim=0)

    check(layer, x, dy, gate)


@pytest.mark.parametrize("options", ({}, dict(top_k=None), dict(router="mlp"), GATES["sequence"]))
@pytest.mark.parametrize("shape", ((0,), (0, 3), (2, 0)), ids=str)
def test_an_empty_batch_has_zero_gradients(shape, options):
    """A process without tokens still takes part in the all-reduce: zeros, never None."""
    layer = make_ffn(**options)
    actual = training_step(layer, inputs(*shape)[0])
    assert actual["y"].shape == (*shape, HIDDEN)
    for name, gradient in actual.items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_experts_without_tokens_have_zero_gradients():
    layer = make_ffn(router_bias=True)
    with torch.no_grad():
        layer.router.bias[2] = -1e4
    actual = training_step(layer, inputs(9)[0])
    for linear in ("gate", "up", "down"):
        a, b = actual[f"{linear}_lora_A"], actual[f"{linear}_lora_B"]
        assert not a[3:6].any()
        assert not b[:, 3:6].any()
        assert a[:3].any()
        assert b[:, :3].any()


@pytest.mark.parametrize("matrix", ("A", "B"))
@pytest.mark.parametrize("options", ({}, GATES["threshold"]), ids=("topk", "threshold"))
def test_a_nan_in_an_unrouted_expert_does_not_spread(options, matrix):
    """An expert without tokens changes neither y nor a gradient."""
    layer = make_ffn(router_bias=True, **options)
    with torch.no_grad():
        layer.router.bias[2] = -1e4
    broken = copy.deepcopy(layer)
    with torch.no_grad():
        for linear in ("gate", "up", "down"):
            parameter = getattr(broken, f"{linear}_lora_{matrix}")
            (parameter[3:6] if matrix == "A" else parameter[:, 3:6]).fill_(torch.nan)
    x, dy = inputs(9)
    assert_same(training_step(broken, x, dy), training_step(layer, x, dy))


def test_a_nan_behind_a_gate_of_zero_does_not_spread():
    """A gate of zero selects nothing: y, dx and the gradients of other experts do not change.

    This does not hold for a NaN in A of gate and up, because dx = dh A with dh = 0, and in B of
    down, because y = u B with u = 0. MoeLoraLinear has the same limits.
    """
    layer = make_ffn(router="external", top_k=None)
    broken = copy.deepcopy(layer)
    with torch.no_grad():
        broken.up_lora_B[:, 3:6] = torch.nan
        broken.down_lora_A[3:6] = torch.nan
    x, dy = inputs(9)
    gates = torch.rand(9, 4, dtype=torch.float64)
    gates[:, 2] = 0.0
    expected, actual = (
        training_step(module, x, dy, forward=lambda leaf, module=module: module(leaf, gates))
        for module in (layer, broken)
    )
    for name in expected:
        if "lora" in name:
            rows = 0 if name.endswith("A") else 1
            for tensors in (expected, actual):
                tensors[name] = torch.cat(
                    [t for t in tensors[name].split([3, 3, 2], rows)[::2]], rows
                )
        assert torch.equal(actual[name], expected[name]), name


def test_bases_are_called_and_can_train():
    """A quantised base, a base with a hook, and a base that trains."""
    layer = make_ffn(adapter_dtype="float64")
    plain = copy.deepcopy(layer)
    layer.gate_proj = PackedLinear(layer.gate_proj)
    packed = layer.gate_proj
    with torch.no_grad():
        plain.gate_proj.weight.copy_(packed.dequantised())
        plain.up_proj.weight.mul_(2)
        plain.up_proj.bias.mul_(2)
    layer.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
    for module in (layer, plain):
        module.down_proj.requires_grad_(True)
    x, dy = inputs(3, 4)
    actual, truth = training_step(layer, x, dy), step_of_loop(plain, x, dy)
    assert "down_proj.bias" in actual
    assert actual.keys() == truth.keys()
    assert_same(actual, truth, rtol=1e-10, atol=1e-10)


class Scaled(nn.Module):
    """An activation that a user wrote, with a parameter that stays frozen."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, z):
        return z * torch.sigmoid(self.slope * z)


@pytest.mark.parametrize(
    "activation",
    ("gelu", "gelu_tanh", "relu", Scaled(), torch.tanh),
    ids=lambda activation: getattr(activation, "__name__", str(activation)),
)
def test_activations(activation):
    layer = make_ffn(activation=activation)
    check(layer, *inputs(3, 4))
    assert not any("act_fn" in n for n, q in layer.named_parameters() if q.requires_grad)


@pytest.mark.parametrize("per_expert", (True, False))
def test_dropout_of_the_inputs_of_a(per_expert):
    """x has a mask per token, the activations per pair; experts have their own or a shared mask.

    The frozen products read x and the activations without dropout.
    """
    layer = make_ffn(dropout=0.4, dropout_mask="per_expert" if per_expert else "shared")
    x, dy = inputs(5)
    weights, experts, *_ = layer.token_slots(x, x)
    torch.manual_seed(3)
    seeds = [torch.randint(0, 2**62, (1,)) for _ in range(2)]

    def mask(rows, width, seed, expert):
        ones = torch.ones(rows, width, dtype=torch.float64)
        return reference.dropout(ones, 0.4, seed, expert if per_expert else 0)

    p = dict(layer.named_parameters())
    blocks = {name: list(expert_blocks(p, layer, name)) for name in ("gate", "up", "down")}

    def linear(name, e, row, seen):
        scale, a, b = blocks[name][e]
        return getattr(layer, f"{name}_proj")(row) + scale * b @ (a @ seen)

    y = []
    for t, k in itertools.product(range(5), range(2)):
        e = int(experts[t, k])
        seen = x[t] * mask(5, HIDDEN, seeds[0], e)[t]
        a = layer.act_fn(linear("gate", e, x[t], seen)) * linear("up", e, x[t], seen)
        kept = a * mask(10, INNER, seeds[1], e)[2 * t + k]
        y.append(weights[t, k] * linear("down", e, a, kept))
    y = torch.stack(y).view(5, 2, HIDDEN).sum(dim=1)
    trained = {n: q for n, q in p.items() if q.requires_grad}
    actual = training_step(layer, x, dy)
    grads = torch.autograd.grad(y, trained.values(), dy)
    torch.testing.assert_close(actual["y"], y, rtol=1e-11, atol=1e-11)
    for name, gradient in zip(trained, grads, strict=True):
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_activations_run_without_autocast():
    """Backward computes the activations again, and does not know the autocast of the forward."""
    seen = []

    def activation(z):
        seen.append(torch.is_autocast_enabled("cpu"))
        return nn.functional.silu(z)

    layer = make_ffn(torch.float32, activation=activation)
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs(3, dtype=torch.float32)[0]).float().sum().backward()
    assert seen == [False, False]


@pytest.mark.parametrize("backward_inside", (True, False))
@pytest.mark.parametrize("options", ({}, dict(router="mlp"), dict(dropout=0.2)), ids=str)
def test_autocast(options, backward_inside):
    """float32 weights under bfloat16 autocast: y is bfloat16, the gradients are float32."""
    layer = make_ffn(torch.float32, **options)
    x, dy = inputs(2, 8, dtype=torch.float32)
    truth = training_step(layer, x, dy)
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    trained = {n: q for n, q in layer.named_parameters() if q.requires_grad}
    with torch.autocast("cpu", torch.bfloat16), record_routing(layer):
        y = layer(leaf)
        assert layer.record.logits.dtype == torch.float32
        if backward_inside:
            grads = torch.autograd.grad(y, (leaf, *trained.values()), dy.bfloat16())
    if not backward_inside:
        grads = torch.autograd.grad(y, (leaf, *trained.values()), dy.bfloat16())
    assert y.dtype == torch.bfloat16
    actual = {"y": y.detach().float(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}
    for name, expected in truth.items():
        assert actual[name].dtype == torch.float32
        # A handful of bfloat16 roundings (2^-9 each) through three products.
        error = (actual[name] - expected).norm() / expected.norm()
        assert error < 0.03, f"{name}: {error}"


BAD = [
    (dict(share="A", rank=2), ValueError, "share: 'A' is not supported for whole-FFN"),
    (dict(impl="wide"), ValueError, "impl: 'wide' is not supported for whole-FFN experts"),
    (dict(init="svd_segments"), ValueError, "init: 'svd_segments' is not supported for whole-FFN"),
    (dict(router=None, top_k=None), ValueError, "router: None gives every expert"),
    (dict(shared_expert="always"), ValueError, "shared_expert: 'always' would add the frozen FFN"),
    (dict(activation="swish"), ValueError, "activation: expected one of silu.*got 'swish'"),
    (dict(activation=3), TypeError, "activation: expected a module or a function, got"),
    (
        dict(activation=nn.ReLU(inplace=True)),
        ValueError,
        "activation: .* does not change its input",
    ),
    (dict(config="mixlora"), TypeError, "config: expected a MoeLoraConfig"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make_ffn(**options)


def test_a_bad_input_is_named():
    layer = make_ffn(torch.float32)
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 6\], got \[3, 5\]"):
        layer(torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"x: expected a float dtype, got torch\.int64"):
        layer(torch.ones(3, HIDDEN, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x: expected the base's dtype torch\.float32, got"):
        layer(torch.randn(3, HIDDEN).bfloat16())
    with pytest.raises(ValueError, match="gates: only router='external' takes gates"):
        layer(torch.randn(3, HIDDEN), torch.rand(3, 4))
    external = make_ffn(torch.float32, router="external", top_k=None)
    with pytest.raises(ValueError, match="gates: router='external' needs them"):
        external(torch.randn(3, HIDDEN))
    with pytest.raises(ValueError, match="gates: 5 gate rows for x"):
        external(torch.randn(3, HIDDEN), torch.rand(5, 4))


def test_one_expert_without_a_router_is_a_plain_lora():
    layer = make_ffn(config=MoeLoraConfig.preset("lora", rank=3), num_experts=1, rank=3, top_k=None)
    assert isinstance(layer, MoeLoraFFN)
    assert layer.router is None
    check(layer, *inputs(2, 3), lambda x, p, layer: x.new_ones((6, 1)))
