"""Layers over bases of other tools: offloaded, sharded, reparametrised, fake-quantised, LoRA."""

import copy

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
    warmup,
)
from support.compare import assert_same, training_step
from support.ffns import GatedMlp

IN, OUT = 8, 6
MING = dict(num_experts=4, rank=2, top_k=2)
CPU = torch.device("cpu")
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


def adapt(model, ffn):
    """Add experts to the MLP of `model`, with fixed values. Return the model."""
    # The gate weights must not sum to 1, else the bias of down_proj is not tested.
    config = MoeLoraConfig(**MING, normalize="none")
    if ffn:
        replace_ffns(model, config, ["0"])
    else:
        replace_linears(model, config, PROJECTIONS)
    torch.manual_seed(1)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def offload(model, where, folder):
    from accelerate import cpu_offload, disk_offload

    if where == "disk":
        return disk_offload(model, str(folder), CPU)
    return cpu_offload(model, CPU)


@pytest.mark.parametrize("ffn", (False, True), ids=("linears", "ffn"))
@pytest.mark.parametrize("where", ("cpu", "disk"))
def test_experts_over_an_offloaded_model(where, ffn, tmp_path):
    """Weights are on the meta device outside a call. Adapters are on the CPU, where calls run."""
    model = nn.Sequential(GatedMlp(IN, 12)).double()
    expected = adapt(copy.deepcopy(model), ffn)
    offload(model, where, tmp_path)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    adapt(model, ffn)
    assert {p.device for p in adapter_parameters(model)} == {CPU}
    assert model[0].down_proj.weight.device.type == "meta"
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    # An offloaded base is called, so the sums have another order.
    assert_same(training_step(model, x), training_step(expected, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", ("linears", "linked", "ffn"))
def test_experts_offloaded_with_their_model(layers, tmp_path):
    """A layer's tensors are loaded for its call only, so linked siblings run one by one."""
    model = adapt(nn.Sequential(GatedMlp(IN, 12)).double(), layers == "ffn")
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = model(x)
    if layers == "linked":
        link_siblings(model)
        torch.testing.assert_close(model(x), expected)
    offload(model, "cpu", tmp_path)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_a_group_with_offloaded_adapters_raises(tmp_path):
    """A group does not call its siblings, so their tensors are not loaded: it raises."""
    q, k = (MoeLoraLinear(IN, OUT, **MING) for _ in range(2))
    group = nn.Sequential(MoeLoraGroup(q=q, k=k))
    offload(group, "cpu", tmp_path)
    with pytest.raises(ValueError, match="x: expected the adapters' device meta, got cpu"):
        group(torch.randn(3, IN))
    ffn = MoeLoraFFN(IN, 12, **MING)
    ffn.gate_lora_A = nn.Parameter(ffn.gate_lora_A.to("meta"))
    with pytest.raises(ValueError, match="x: expected the adapters' device meta, got cpu"):
        ffn(torch.randn(3, IN))


def test_several_hooks_and_no_hook():
    """accelerate can chain hooks. Without a hook, a meta base has adapters on meta."""
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    base = nn.Linear(IN, OUT)
    add_hook_to_module(base, ModelHook())
    add_hook_to_module(base, AlignDevicesHook(CPU, offload=True), append=True)
    assert base.weight.is_meta
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert {p.device for p in adapter_parameters(layer)} == {CPU}
    warmup(layer, tokens=(2,))
    bare = MoeLoraLinear.from_linear(nn.Linear(IN, OUT, device="meta"), **MING)
    assert {p.device.type for p in adapter_parameters(bare)} == {"meta"}


def peft_lora():
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=2, init_lora_weights=False)
    return Linear(nn.Linear(IN, OUT), "default", config=config, r=2)


def fake_quantised():
    qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.nn.qat.Linear(IN, OUT, qconfig=qconfig)


def offloaded():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    return add_hook_to_module(nn.Linear(IN, OUT), AlignDevicesHook(CPU, offload=True))


WRAPPED = {
    "peft_lora": peft_lora,
    "fake_quantised": fake_quantised,
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(IN, OUT)),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)),
    "offloaded": offloaded,
    "sequence": lambda: Sized(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, OUT)),
}


class Sized(nn.Sequential):
    """A sequence of modules with in_features and out_features can be a base."""

    in_features, out_features = IN, OUT


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapped_base_is_called_once(wrapped):
    """y = base(x) + delta, and dx is the sum of both gradients. The base does not train.

    delta is the output of the same adapters over a base of zero.
    """
    base = WRAPPED[wrapped]()
    if wrapped == "fake_quantised":
        # Its observers change with every input until they are disabled.
        base(torch.randn(4, IN))
        base.apply(torch.ao.quantization.disable_observer)
    calls = []
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert layer.base_layer is base
    assert {p.dtype for p in adapter_parameters(layer)} == {torch.float32}
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "router.weight"}
    nn.init.normal_(layer.lora_B)
    zero = nn.Linear(IN, OUT)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    alone = MoeLoraLinear.from_linear(zero, **MING)
    adapters = {n: p for n, p in layer.state_dict().items() if n in trained}
    alone.load_state_dict(adapters, strict=False)
    x, dy = torch.randn(2, 3, IN), torch.randn(2, 3, OUT)

    leaf = x.clone().requires_grad_()
    base_y = base(leaf)
    (base_dx,) = torch.autograd.grad(base_y, leaf, dy)
    expected = training_step(alone, x, dy)
    expected["y"] = expected["y"] + base_y.detach()
    expected["dx"] = expected["dx"] + base_dx
    base.register_forward_hook(lambda module, args, y: calls.append(args[0].shape))
    actual = training_step(layer, x, dy)
    assert calls == [x.shape]
    assert_same(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def mesh():
    """Return the device mesh of a process group of one CPU process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bases_of_distributed_tensors(mesh):
    """Tensor parallelism of the base, and FSDP2 of all, give the values of the plain layer."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    base = nn.Linear(IN, OUT)
    plain = MoeLoraLinear.from_linear(copy.deepcopy(base), **MING)
    nn.init.normal_(plain.lora_B)
    x = torch.randn(2, 3, IN)
    expected = training_step(plain, x)
    adapters = {n: p for n, p in plain.state_dict().items() if not n.startswith("base_layer")}

    parallel = MoeLoraLinear.from_linear(parallelize_module(base, mesh, ColwiseParallel()), **MING)
    assert isinstance(parallel.weight, DTensor)
    assert {type(p) for p in adapter_parameters(parallel)} == {nn.Parameter}
    parallel.load_state_dict(adapters, strict=False)
    assert_same(training_step(parallel, x), expected, rtol=1e-5, atol=1e-5)

    pair = nn.Module()
    pair.q_proj, pair.k_proj = copy.deepcopy(plain), copy.deepcopy(plain)
    link_siblings(pair, [("q_proj", "k_proj")])
    for layer in (pair.q_proj, pair.k_proj):
        fully_shard(layer)
    # FSDP2 gathers a layer for its call only, so the siblings run one by one.
    assert_same({"y": pair.k_proj(x).detach()}, {"y": expected["y"]}, rtol=1e-5, atol=1e-5)

    for parts in ([], ["base_layer", "router"]):
        sharded = copy.deepcopy(plain)
        for part in parts:
            fully_shard(getattr(sharded, part))
        fully_shard(sharded)
        assert isinstance(sharded.lora_A, DTensor)
        sharded(x).backward(torch.linspace(-1, 1, expected["y"].numel()).view(2, 3, OUT))
        grads = {n: p.grad.full_tensor() for n, p in sharded.named_parameters() if p.requires_grad}
        expected_grads = {n: t for n, t in expected.items() if n not in ("y", "dx")}
        assert_same(grads, expected_grads, rtol=1e-5, atol=1e-5)


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=16)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def adapt_with_peft(model, config):
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    return peft.get_peft_model(model, MoeLoraPeftConfig(**config.to_dict()))


@pytest.mark.parametrize(
    "adapt_conv",
    (
        lambda model, config: replace_linears(model, config, ["c_attn"]),
        lambda model, config: MoeLoraLinear.from_linear(model.transformer.h[0].mlp.c_fc, config),
        adapt_with_peft,
    ),
    ids=("replace_linears", "from_linear", "peft"),
)
def test_a_conv1d_is_refused_with_the_remedy(adapt_conv):
    """The linear of GPT-2 has its weight transposed."""
    remedy = r"Conv1D.*in_features.*put an nn.Linear in its place.*conv\.weight\.t\(\)"
    with pytest.raises(TypeError, match=remedy):
        adapt_conv(gpt2(), MoeLoraConfig(**MING))


def test_the_remedy_for_a_conv1d():
    model, ids = gpt2(), torch.arange(6)[None]
    expected = model(ids).logits
    attention = model.transformer.h[0].attn
    conv = attention.c_attn
    attention.c_attn = nn.Linear(conv.nx, conv.nf)
    attention.c_attn.weight = nn.Parameter(conv.weight.t().contiguous())
    attention.c_attn.bias = conv.bias
    replace_linears(model, MoeLoraConfig(**MING), ["c_attn"])
    torch.testing.assert_close(model(ids).logits, expected)
