"""Quantised linears, and the formulas of layers over them.

bitsandbytes and torchao quantise for real. GPTQ-like and fp8 linears are stand-ins.
"""

from __future__ import annotations

import copy
import platform
import sys
import warnings

import pytest
import torch
from torch import nn

from support.ffns import GatedMlp, topk_gate

IN, OUT, HIDDEN, INNER = 64, 32, 64, 96

# bitsandbytes and torchao have CPU kernels for this platform only; on it they must be installed.
HAS_LIBRARIES = sys.platform == "linux" and platform.machine() == "x86_64"
library = pytest.mark.skipif(not HAS_LIBRARIES, reason="no CPU kernels for this platform")


class _PackedProduct(torch.autograd.Function):
    """x Wt from codes. Backward dequantises the weight again, in the dtype of the kernel."""

    @staticmethod
    def forward(x, linear):
        return x.to(linear.scales.dtype) @ linear.dequantised().t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.x_dtype, ctx.linear = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx, dy):
        return (dy @ ctx.linear.dequantised()).to(ctx.x_dtype), None


class GptqLinear(nn.Module):
    """A stand-in for GPTQ and AWQ linears: packed buffers, no `weight`, only a forward.

    qweight: int32 [I / 8, O], 8 codes of 4 bits in each entry.
    scales: [O], in the dtype that the forward computes in.
    casts: whether it returns x's dtype or that of the scales; both kinds exist.
    """

    def __init__(self, linear, dtype=torch.float32, casts=True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.casts = casts
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1) / 7
        codes = (weight / scales[:, None]).round().to(torch.int64).t() + 8
        packed = sum(codes[i::8] << (4 * i) for i in range(8))
        packed = torch.where(packed >= 2**31, packed - 2**32, packed)
        self.register_buffer("qweight", packed.to(torch.int32))
        self.register_buffer("scales", scales.to(dtype))
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.register_buffer("bias", bias)

    def dequantised(self):
        shifts = torch.arange(8, dtype=torch.int32) * 4
        codes = ((self.qweight[:, None] >> shifts[None, :, None]) & 15) - 8
        return codes.reshape(self.in_features, self.out_features).t() * self.scales[:, None]

    def forward(self, x):
        y = _PackedProduct.apply(x.reshape(-1, self.in_features), self)
        y = y if self.bias is None else y + self.bias
        return (y.to(x.dtype) if self.casts else y).view(*x.shape[:-1], self.out_features)


class Fp8Linear(nn.Linear):
    """A stand-in for fp8 linears: a subclass of nn.Linear with a one-byte float weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        codes = (linear.weight.detach() / scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), bias)


def bnb_4bit(linear, storage=torch.uint8, dtype=torch.float32):
    """Return an NF4 linear of bitsandbytes."""
    import bitsandbytes

    quantised = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype,
        quant_type="nf4", quant_storage=storage,
    )  # fmt: skip
    quantised.load_state_dict(linear.state_dict())
    # The move to a device quantises the weight, like loading a model does.
    return quantised.to("cpu")


def bnb_8bit(linear):
    """Return an LLM.int8 linear: int8 rows; entries of x above 6 in full precision."""
    import bitsandbytes

    quantised = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None,
        has_fp16_weights=False, threshold=6.0,
    )  # fmt: skip
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def torchao_int8(linear):
    """Return an nn.Linear whose weight is a tensor subclass of torchao."""
    holder = nn.Sequential(copy.deepcopy(linear))
    torchao_quantise(holder)
    return holder[0]


def torchao_quantise(model):
    """Give every nn.Linear of a model int8 weights, in place."""
    with warnings.catch_warnings():
        # torchao uses names that torch has deprecated.
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig(version=2))


BASES = {
    "bnb_4bit": bnb_4bit,
    "bnb_4bit_bf16": lambda linear: bnb_4bit(linear, torch.bfloat16, torch.bfloat16),
    "bnb_8bit": bnb_8bit,
    "torchao_int8": torchao_int8,
    "gptq": GptqLinear,
    "gptq_fp16": lambda linear: GptqLinear(linear, torch.float16, casts=False),
    "fp8": Fp8Linear,
}
KINDS = tuple(
    pytest.param(kind, marks=library) if kind.startswith(("bnb", "torchao")) else kind
    for kind in BASES
)


def make_base(kind, in_features=64, out_features=32, bias=True, dtype=torch.float32):
    """Return a frozen quantised linear of a kind in BASES.

    dtype: the dtype of the weight before it is quantised.
    """
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    return BASES[kind](linear).requires_grad_(False)


def quantised_mlp(kind):
    """Return a GatedMlp [HIDDEN, INNER] whose three linears are quantised."""
    mlp = GatedMlp(HIDDEN, INNER)
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, name)
        setattr(mlp, name, make_base(kind, linear.in_features, linear.out_features))
    return mlp


def inputs(*shape, out_features=OUT, dtype=torch.float32, dy_dtype=None):
    """Return x [*shape, IN] and dy [*shape, out_features]."""
    x, dy = torch.randn(*shape, IN).to(dtype), torch.randn(*shape, out_features)
    return x, dy.to(dy_dtype or dtype)


def trained_parameters(layer):
    """Return the parameters that train, by name."""
    return {n: p for n, p in layer.named_parameters() if p.requires_grad}


def expert_sum(p, layer, x):
    """Return sum_e gate_e s_e B_e A_e x, expert by expert; p: the parameters by name."""
    tokens = x.reshape(-1, x.shape[-1])
    gate = topk_gate(tokens, p, layer)
    ranks = list(layer.config.ranks())
    blocks = zip(p["lora_A"].split(ranks), p["lora_B"].split(ranks, dim=1), strict=True)
    terms = [
        gate[:, e : e + 1] * scale * (tokens @ a.t()) @ b.t()
        for e, ((a, b), scale) in enumerate(zip(blocks, layer.config.scales(), strict=True))
    ]
    return sum(terms).view(*x.shape[:-1], layer.out_features)


def linear_formula(layer, x, dy):
    """Return y and the gradients of a layer, by name, like `training_step`.

    The base is called in its own dtypes. The experts are computed in float64.
    """
    leaf = x.clone().requires_grad_()
    base_y = layer.base_layer(leaf)
    (base_dx,) = torch.autograd.grad(base_y, leaf, dy)
    p = {n: q.detach().double().requires_grad_() for n, q in trained_parameters(layer).items()}
    x64 = x.double().requires_grad_()
    delta = expert_sum(p, layer, x64)
    dx, *grads = torch.autograd.grad(delta, (x64, *p.values()), dy.double())
    y = base_y.detach().double() + delta.detach()
    return {"y": y, "dx": dx + base_dx.double(), **dict(zip(p, grads, strict=True))}


def ffn_formula(layer, x):
    """Return y of a MoeLoraFFN whose three linears are called:

    y = sum_e gate_e (down(a_e) + s Bd_e Ad_e a_e)
    """
    p = dict(layer.named_parameters())
    gate = topk_gate(x, p, layer)
    ranks, y = list(layer.config.ranks()), 0
    gates, ups = layer.gate_proj(x), layer.up_proj(x)

    def low_rank(name, e, rows):
        a, b = p[f"{name}_lora_A"].split(ranks)[e], p[f"{name}_lora_B"].split(ranks, dim=1)[e]
        return layer.config.scales()[e] * (rows @ a.t()) @ b.t()

    for e in range(len(ranks)):
        a = layer.act_fn(gates + low_rank("gate", e, x)) * (ups + low_rank("up", e, x))
        y = y + gate[:, e : e + 1] * (layer.down_proj(a) + low_rank("down", e, a))
    return y
