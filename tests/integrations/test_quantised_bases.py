"""Layers over quantised bases: bitsandbytes, torchao, and stand-ins for GPTQ-like and fp8 ones."""

import copy
import warnings

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_parameters,
    link_siblings,
    replace_ffns,
    replace_linears,
)
from moelora_kernels.checkpoints import load_adapter, save_adapter
from support.compare import assert_same, training_step
from support.layers import assert_within_budget
from support.quantised import KINDS, GptqLinear, bnb_4bit, library, make_base, torchao_quantise

IN, OUT, HIDDEN, INNER = 64, 32, 64, 96
MING = dict(num_experts=4, rank=3, alpha=6.0, router_bias=True, top_k=2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*deprecated:DeprecationWarning"
)


def over(base, seed=0, **options):
    """A layer over `base` whose B is not zero."""
    torch.manual_seed(seed)
    layer = MoeLoraLinear.from_linear(base, **{**MING, **options})
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    return layer


def adapters_of(layer):
    return {n: p for n, p in layer.named_parameters() if p.requires_grad}


def gate_of(p, tokens, prefix="", top_k=2):
    """softmax, the K largest of each token, divided by their sum, [T, E]."""
    logits = tokens @ p[f"{prefix}router.weight"].t()
    if f"{prefix}router.bias" in p:
        logits = logits + p[f"{prefix}router.bias"]
    rows = []
    for row in logits.softmax(dim=1):
        chosen = row.topk(top_k).indices
        kept = torch.zeros_like(row).scatter(0, chosen, row[chosen])
        rows.append(kept / kept.sum())
    return torch.stack(rows)


def delta(p, layer, x):
    """sum_e gate_e s_e B_e A_e x in float64, expert by expert; p: parameters by name."""
    tokens = x.reshape(-1, x.shape[-1])
    gate = gate_of(p, tokens)
    ranks = list(layer.config.ranks())
    blocks = zip(p["lora_A"].split(ranks), p["lora_B"].split(ranks, dim=1), strict=True)
    parts = [
        gate[:, e : e + 1] * scale * (tokens @ a.t()) @ b.t()
        for e, ((a, b), scale) in enumerate(zip(blocks, layer.config.scales(), strict=True))
    ]
    return sum(parts).view(*x.shape[:-1], layer.out_features)


def formula(layer, x, dy):
    """What `step` returns: the base's own call in its own dtypes, the experts in float64."""
    leaf = x.clone().requires_grad_()
    of_base = layer.base_layer(leaf)
    (dx_of_base,) = torch.autograd.grad(of_base, leaf, dy)
    p = {n: q.detach().double().requires_grad_() for n, q in adapters_of(layer).items()}
    wide = x.double().requires_grad_()
    of_experts = delta(p, layer, wide)
    dx, *grads = torch.autograd.grad(of_experts, (wide, *p.values()), dy.double())
    y = of_base.detach().double() + of_experts.detach()
    return {"y": y, "dx": dx + dx_of_base.double(), **dict(zip(p, grads, strict=True))}


def inputs(*shape, out=OUT, dtype=torch.float32, dy_dtype=None):
    x, dy = torch.randn(*shape, IN).to(dtype), torch.randn(*shape, out)
    return x, dy.to(dy_dtype or dtype)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_y_and_gradients_are_those_of_the_formula(kind, dtype, impl):
    """y = base(x) + delta in the dtype of base(x); gradients of x (both ways), A, B and router."""
    layer = over(make_base(kind), impl=impl)
    returned = layer.base_layer(torch.zeros(1, IN, dtype=dtype)).dtype
    assert returned == (torch.float16 if kind == "gptq_fp16" else dtype)
    x, dy = inputs(2, 5, dtype=dtype, dy_dtype=returned)
    found, twin = training_step(layer, x, dy), copy.deepcopy(layer)
    assert found["y"].dtype == returned
    assert found["dx"].dtype == dtype
    assert {found[name].dtype for name in adapters_of(layer)} == {torch.float32}
    twin.config = layer.config.replace(impl="reference")
    coarsest = max((dtype, returned), key=lambda d: torch.finfo(d).eps)
    assert_within_budget(found, formula(layer, x, dy), training_step(twin, x, dy), coarsest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_is_its_base(kind):
    """B = 0 adds exactly nothing, bit for bit: the base's output is taken as it is."""
    base = make_base(kind)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert layer.base_layer is base
    assert not any(p.requires_grad for p in base.parameters())
    for shape in ((7, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN)):
        x = torch.randn(*shape)
        torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_float32_or_as_asked(kind):
    """Codes are no dtype for A and B, also where they are stored in floats.

    torchao's weight says the dtype that it stands for, and that is taken.
    """
    stands_for = torch.bfloat16 if kind == "torchao_int8" else torch.float32
    base = make_base(kind, dtype=torch.bfloat16)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert {p.dtype for p in adapter_parameters(layer)} == {stands_for}
    asked = MoeLoraLinear.from_linear(base, **MING, adapter_dtype="bfloat16")
    assert {p.dtype for p in adapter_parameters(asked)} == {torch.bfloat16}
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert torch.isfinite(asked(x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_train(kind):
    """Three steps of AdamW with dropout: every bit of the base stays, every adapter moves."""
    layer = over(make_base(kind), dropout=0.1).train()
    # bitsandbytes casts the bias to its compute dtype in the first call.
    layer(torch.randn(2, IN))
    frozen = copy.deepcopy(layer.base_layer.state_dict())
    before = {n: p.detach().clone() for n, p in adapters_of(layer).items()}
    optimizer = torch.optim.AdamW(adapter_parameters(layer), lr=1e-2)
    x, target = inputs(16)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (layer(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    after = layer.base_layer.state_dict()
    assert after.keys() == frozen.keys()
    assert all(torch.equal(_bits(after[n]), _bits(frozen[n])) for n in frozen)
    assert {n for n, p in adapters_of(layer).items() if torch.equal(p, before[n])} == set()
    assert before.keys() == {"lora_A", "lora_B", "router.weight", "router.bias"}


def _bits(tensor):
    """Bytes, also of a tensor subclass; codes stored in floats may read as no numbers."""
    tensor = tensor.qdata if hasattr(tensor, "qdata") else tensor
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_made_or_kept(kind):
    """Beside what the base saves, backward keeps rank space; the adapter's file, A, B and router.

    x [T, I], h [T, R], gate and routing; a dequantised weight would be I x O floats, and an
    output of the base T x O.
    """
    features, tokens = 256, 16
    layer = over(make_base(kind, features, features))
    x = torch.randn(tokens, features, requires_grad=True)

    of_base, own = [], {}
    inside = []
    layer.base_layer.register_forward_pre_hook(lambda *_: inside.append(True))
    layer.base_layer.register_forward_hook(lambda *_: inside.clear())

    def keep(tensor):
        if inside:
            of_base.append(tensor)
        else:
            own[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    of_base = [t for t in of_base if type(t) in (torch.Tensor, nn.Parameter)]
    for tensor in (x, *adapter_parameters(layer), *of_base):
        own.pop(tensor.untyped_storage().data_ptr(), None)
    held = sum(t.untyped_storage().nbytes() for t in own.values())
    assert y.requires_grad
    assert own
    # h, gates and logits at most in float32, indices and routing of K slots, with room for tiles.
    total_rank, experts = sum(layer.config.ranks()), layer.config.num_experts
    assert held <= 4 * tokens * (total_rank + 8 * experts) + 1024
    assert not [t for t in own.values() if features in t.shape]
    assert layer.state_dict().keys() - adapters_of(layer).keys() == {
        f"base_layer.{n}" for n in layer.base_layer.state_dict()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind, tmp_path):
    """A deep copy and a layer over a copy of the base with the adapter's file give the same y."""
    layer = over(make_base(kind))
    x = torch.randn(4, IN)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert_same({"y": twin(x)}, {"y": y})
    with torch.no_grad():
        twin.lora_B.zero_()
    assert_same({"y": layer(x)}, {"y": y})
    save_adapter(layer, tmp_path / "adapter.safetensors")
    other = over(copy.deepcopy(layer.base_layer), seed=1)
    assert not torch.equal(other(x), y)
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert_same({"y": other(x)}, {"y": y})
    if not kind.startswith("bnb_4bit"):
        # bitsandbytes loads its 4-bit states through transformers alone, with or without experts.
        other = over(make_base(kind), seed=2)
        state = {n: t.clone() for n, t in layer.state_dict().items()}
        assert not other.load_state_dict(state).missing_keys
        assert_same({"y": other(x)}, {"y": y})


class Gated(nn.Module):
    """The MLP of Llama."""

    def __init__(self, bias=True):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def quantised_mlp(kind):
    mlp = Gated()
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = getattr(mlp, name)
        setattr(mlp, name, make_base(kind, old.in_features, old.out_features))
    return mlp


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_quantised_linears(kind):
    """The replacement goes by name, not by class, and takes what it matches alone."""
    model = nn.ModuleDict({"mlp": quantised_mlp(kind), "head": nn.Linear(HIDDEN, 3)})
    x = torch.randn(5, HIDDEN)
    before = model["mlp"](x)
    head, down = model["head"], model["mlp"].down_proj
    names = replace_linears(model, MoeLoraConfig(**MING), ["gate_proj", "up_proj"])
    assert names == ["mlp.gate_proj", "mlp.up_proj"]
    assert model["head"] is head
    assert model["mlp"].down_proj is down
    assert head.weight.requires_grad
    assert_same({"y": model["mlp"](x)}, {"y": before})


@pytest.mark.parametrize("linked", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_siblings_quantised_and_dense(kind, linked):
    """A group of a quantised and a dense linear gives what its layers give one by one."""
    model = nn.Module()
    model.q_proj, model.k_proj = over(make_base(kind), 0), over(nn.Linear(IN, 24), 1)
    alone = copy.deepcopy(model)
    x, dy = torch.randn(6, IN), (torch.randn(6, OUT), torch.randn(6, 24))
    if linked:
        assert link_siblings(model, [("q_proj", "k_proj")]) == ["{q_proj,k_proj}"]
    group = MoeLoraGroup(q_proj=model.q_proj, k_proj=model.k_proj)

    def run(model, together):
        leaf = x.clone().requires_grad_()
        ys = together(leaf) if together else (model.q_proj(leaf), model.k_proj(leaf))
        torch.autograd.backward(ys, [g.to(y.dtype) for g, y in zip(dy, ys, strict=True)])
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"q": ys[0].detach(), "k": ys[1].detach(), "dx": leaf.grad, **grads}

    found, expected = run(model, None if linked else group), run(alone, None)
    assert found["q"].dtype == expected["q"].dtype
    # Sums of the same terms in another order; of fp16 outputs, one rounding of values up to 4.
    tolerance = 4e-3 if kind == "gptq_fp16" else 2e-5
    assert_same(found, expected, rtol=1e-4, atol=tolerance)


def ffn_formula(layer, x):
    """sum_k w_tk (down(a_tk) + s Bd_e Ad_e a_tk), experts one by one over the called bases."""
    p = dict(layer.named_parameters())
    gate = gate_of(p, x)
    ranks, y = list(layer.config.ranks()), 0
    gates, ups = layer.gate_proj(x), layer.up_proj(x)

    def low_rank(name, e, rows):
        a, b = p[f"{name}_lora_A"].split(ranks)[e], p[f"{name}_lora_B"].split(ranks, dim=1)[e]
        return layer.config.scales()[e] * (rows @ a.t()) @ b.t()

    for e in range(len(ranks)):
        a = layer.act_fn(gates + low_rank("gate", e, x)) * (ups + low_rank("up", e, x))
        y = y + gate[:, e : e + 1] * (layer.down_proj(a) + low_rank("down", e, a))
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_ffn_over_a_quantised_mlp(kind):
    torch.manual_seed(0)
    options = dict(num_experts=4, rank=(1, 2, 3, 2), alpha=3.0, top_k=2)
    mlp = quantised_mlp(kind)
    layer = MoeLoraFFN.from_mlp(mlp, **options)
    assert {p.dtype for p in adapter_parameters(layer)} == {torch.float32}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    x, dy = inputs(6, out=HIDDEN)
    found = training_step(layer, x, dy.half() if kind == "gptq_fp16" else dy)
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))
    assert found.keys() == expected.keys()
    # Called on the weighted sum, the base rounds (and the 8-bit one quantises) another tensor than
    # expert by expert: bf16, fp16 and int8 steps of the activations, float32 sums elsewhere.
    steps = {"bnb_4bit_bf16": 2**-8, "gptq_fp16": 2**-9, "bnb_8bit": 2**-6}
    for name, want in expected.items():
        largest = want.abs().max().item()
        limit = (4 * steps[kind] if kind in steps else 2e-5) * max(largest, 1.0)
        torch.testing.assert_close(found[name].float(), want, rtol=0, atol=limit, msg=name)


def test_an_ffn_computes_in_the_dtype_of_x():
    """Bases that return fp16 round their own products, and not those of the experts or of act."""
    mlp = Gated()
    for name, kind in (("gate_proj", "gptq_fp16"), ("up_proj", "gptq_fp16"), ("down_proj", "gptq")):
        old = getattr(mlp, name)
        setattr(mlp, name, make_base(kind, old.in_features, old.out_features))
    layer = MoeLoraFFN.from_mlp(mlp, num_experts=4, rank=2, top_k=2)
    with torch.no_grad():
        for parameter in adapter_parameters(layer):
            parameter.normal_(std=0.1)
    x, dy = inputs(5, out=HIDDEN)
    found = training_step(layer, x, dy)["y"]
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))["y"]
    # float32 sums of at most 96 terms; one rounding to fp16 would be 5e-4 of the largest.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class Keeping(nn.Module):
    """A base that needs its output, or its buffer, unchanged after it has returned it."""

    def __init__(self, kind, in_features=IN, out_features=OUT, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear = nn.Linear(in_features, out_features, dtype=dtype)
        self.kind, self.workspace = kind, None

    def forward(self, x):
        if self.kind == "input":
            return x
        y = self.linear(x)
        if self.kind == "saved":
            # tanh saves its output for backward.
            return y.tanh()
        if self.kind == "view":
            return torch.cat([y, y], dim=-1)[..., : self.out_features]
        self.workspace = y.detach().clone()
        return self.workspace


@pytest.mark.parametrize("impl", ("wide", "grouped", "reference"))
@pytest.mark.parametrize("kind", ("saved", "view", "input", "workspace"))
@pytest.mark.filterwarnings("ignore:base. .*without a gradient")
def test_the_output_of_a_base_is_left_as_it_is(kind, impl):
    """In-place sums into it would spoil what the base saved, its buffer, or x itself."""
    base = Keeping(kind, OUT, OUT)
    layer = over(base, impl=impl)
    x = torch.randn(2, 4, OUT)
    given = x.clone()
    y = layer(x)
    assert torch.equal(x, given)
    if kind == "workspace":
        assert torch.equal(base.workspace, base.linear(x))
        assert y.untyped_storage().data_ptr() != base.workspace.untyped_storage().data_ptr()
        return
    dy = torch.randn(2, 4, OUT)
    found, expected = training_step(layer, x, dy), formula(layer, x, dy)
    for name, want in expected.items():
        # float32 sums of at most 32 terms of size 1 against float64.
        torch.testing.assert_close(found[name].double(), want, rtol=1e-5, atol=2e-5, msg=name)
    leaf = x.clone().requires_grad_()
    # And the layer's own output may be changed, as that of nn.Linear may.
    layer(leaf).add_(1.0).backward(dy)
    assert_same({"dx": leaf.grad}, {"dx": found["dx"]})


@pytest.mark.parametrize("kind", ("saved", "view"))
def test_an_ffn_leaves_the_outputs_of_its_bases(kind):
    mlp = Gated()
    dtype = torch.float64
    mlp.gate_proj, mlp.up_proj = (Keeping(kind, HIDDEN, INNER, dtype) for _ in range(2))
    mlp.down_proj = Keeping("view", INNER, HIDDEN, dtype)
    # The offset of a down projection must be in its `bias`; this one has none.
    mlp.down_proj.linear.bias = None
    layer = MoeLoraFFN.from_mlp(mlp, num_experts=4, rank=2, top_k=2, adapter_dtype="float64")
    with torch.no_grad():
        for parameter in adapter_parameters(layer):
            parameter.normal_(std=0.2)
    x, dy = inputs(5, out=HIDDEN, dtype=dtype)
    found = training_step(layer, x, dy)
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))
    assert_same(found, expected, rtol=1e-10, atol=1e-9)


class WithoutGradient(GptqLinear):
    """A kernel for inference: no gradient comes back through it."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_a_lost_gradient_is_named():
    """dx without the base's part would train the layers below wrongly, without a word."""
    layer = over(WithoutGradient(nn.Linear(IN, OUT)))
    x, dy = inputs(3)
    with pytest.warns(UserWarning, match=r"base: .*WithoutGradient.* without a gradient"):
        found = training_step(layer, x, dy)
    truth = formula(over(GptqLinear(nn.Linear(IN, OUT))), x, dy)
    assert found.keys() == truth.keys()
    assert all(found[n].abs().sum() > 0 for n in adapters_of(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x.requires_grad_())
        over(GptqLinear(nn.Linear(IN, OUT)))(x).sum().backward()


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.in_features, self.out_features, self.make = IN, OUT, make

    def forward(self, x):
        return self.make(x)


def test_what_a_base_returns_is_checked():
    """Megatron's linears return a pair, tensor parallel ones a part; integers are no output."""
    x = torch.randn(3, IN)
    for make, error, message in (
        (lambda x: (x[:, :OUT], None), TypeError, "float tensor, got .*tuple"),
        (lambda x: x[:, :OUT].long(), TypeError, "float tensor, got torch.int64"),
        (lambda x: x[:, : OUT // 2], ValueError, r"\[3, 32\], got \[3, 16\]"),
        (lambda x: x[:1, :OUT], ValueError, r"\[3, 32\], got \[1, 32\]"),
    ):
        with pytest.raises(error, match=rf"base: expected .*Returning.* to return .*{message}"):
            over(Returning(make))(x)


def test_sizes_go_by_the_names_of_nn_linear():
    """Old GPTQ linears call them infeatures and outfeatures: named, and taken once they are set."""
    base = GptqLinear(nn.Linear(IN, OUT))
    base.infeatures, base.outfeatures = base.in_features, base.out_features
    del base.in_features, base.out_features
    with pytest.raises(TypeError, match=r"linear: expected a module with in_features, got .*Gptq"):
        MoeLoraLinear.from_linear(base, **MING)
    base.in_features, base.out_features = base.infeatures, base.outfeatures
    assert over(base)(torch.randn(2, IN)).shape == (2, OUT)


def test_a_base_without_a_weight_has_none():
    layer = over(GptqLinear(nn.Linear(IN, OUT, bias=False)))
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"MoeLoraLinear.* 'weight'"):
        layer.weight  # noqa: B018
    assert layer.bias is None


def test_a_base_without_a_dense_weight_is_not_changed():
    for base in (GptqLinear(nn.Linear(IN, OUT)), make_base("fp8")):
        with pytest.raises(ValueError, match=r"init: 'svd_segments' .*plain nn\.Linear"):
            MoeLoraLinear.from_linear(base, num_experts=2, rank=2, init="svd_segments")


@pytest.mark.parametrize("kind", ("gptq", "fp8", pytest.param("torchao_int8", marks=library)))
def test_a_called_base_compiles(kind):
    layer = over(make_base(kind))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        x, dy = inputs(tokens)
        # Fused sums of float32 in another order.
        found = training_step(layer, x, dy, forward=compiled)
        assert_same(found, training_step(layer, x, dy), rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_dtype_to_the_base():
    """A base with kernels of its own need not follow autocast: y is what it returns."""
    layer = over(GptqLinear(nn.Linear(IN, OUT)))
    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.base_layer(x).dtype == layer(x).dtype == torch.float32
        dense = over(nn.Linear(IN, OUT))
        assert dense(x).dtype == torch.bfloat16


@library
@pytest.mark.filterwarnings("ignore")
def test_quantising_a_model_that_has_experts():
    """torchao takes every nn.Linear, routers included: these are then called too."""
    model = nn.Sequential(nn.Linear(IN, IN))
    replace_linears(model, MoeLoraConfig(**MING), ["0"])
    replace = nn.Sequential(Gated())
    replace_ffns(replace, MoeLoraConfig(**MING), ["0"])
    x = torch.randn(4, IN)
    for each in (model, replace):
        for parameter in adapter_parameters(each):
            nn.init.normal_(parameter, std=0.2)
        before = each(x)
        torchao_quantise(each)
        assert type(each[0].router.weight) is not nn.Parameter
        after = each(x)
        # Weights within half a step of 1 / 127 of the largest; the routing may not change for it.
        assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
        after.sum().backward()


@library
@pytest.mark.parametrize("bits", (4, 8))
def test_a_model_that_transformers_quantised(bits, tmp_path):
    """from_pretrained with a BitsAndBytesConfig, experts over it, gradients to all of them."""
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sizes = dict(hidden_size=64, intermediate_size=128, vocab_size=32, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, device_map="cpu", dtype=torch.bfloat16
    ).train()
    tokens = torch.randint(0, 32, (2, 7))
    base = model(tokens).logits
    frozen = {n for n, _ in model.named_parameters()}
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(replace_linears(model, MoeLoraConfig(**MING), targets)) == 12
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer.base_layer).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert layer.base_layer.weight.dtype in (torch.uint8, torch.int8)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert_same({"logits": model(tokens).logits}, {"logits": base})

    for parameter in frozen & {n for n, _ in model.named_parameters()}:
        model.get_parameter(parameter).requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    # With B = 0 in the first step, A and the routers moved in the second: all have gradients.
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model))


@library
def test_four_bits_in_evaluation():
    """On some CPUs bitsandbytes packs a weight for evaluation and has no gradient for that form.

    A layer neither reads nor keeps the weight: it follows, to the packed form and back.
    """
    layer = over(bnb_4bit(nn.Linear(IN, OUT)))
    x, dy = inputs(5)
    y = layer(x).detach()
    with torch.inference_mode():
        found = layer.eval()(x)
    # That kernel computes in bf16: 64 products of size 1.
    torch.testing.assert_close(found, y, rtol=0, atol=64 * 2**-8)
    assert not torch.equal(found, layer.base_layer(x))

    # Reading its state unpacks it again.
    layer.train().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx = training_step(layer, x, dy)["dx"]
    torch.testing.assert_close(dx.double(), formula(layer, x, dy)["dx"], rtol=1e-5, atol=2e-5)
