"""Quantised linears for the tests: of the libraries that run here, and stand-ins for the rest."""

from __future__ import annotations

import copy
import platform
import sys
import warnings

import pytest
import torch
from torch import nn

# Where bitsandbytes and torchao have CPU kernels: there they must be installed, and are used.
HAS_LIBRARIES = sys.platform == "linux" and platform.machine() == "x86_64"
library = pytest.mark.skipif(not HAS_LIBRARIES, reason="no CPU kernels for this platform")


class _PackedProduct(torch.autograd.Function):
    """x Wt from codes: the weight is made anew in backward, in the dtype of the kernel."""

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
    """A stand-in for GPTQ and AWQ linears: packed buffers, no `weight`, no way but its forward.

    8 codes of 4 bits in each int32 of `qweight` [I / 8, O], `scales` [O]. It computes in the dtype
    of the scales and returns that, or x's dtype where `casts` (both kinds are in use).
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
    """NF4 with nested statistics, in training: see `bnb` about evaluation on a CPU."""
    import bitsandbytes

    quantised = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype,
        quant_type="nf4", quant_storage=storage,
    )  # fmt: skip
    quantised.load_state_dict(linear.state_dict())
    # Moving it quantises it, as loading a model does.
    return quantised.to("cpu")


def bnb_8bit(linear):
    """LLM.int8: int8 rows, outliers of x above 6 in full precision."""
    import bitsandbytes

    quantised = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None,
        has_fp16_weights=False, threshold=6.0,
    )  # fmt: skip
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def torchao_int8(linear):
    """An nn.Linear whose weight is a tensor subclass."""
    holder = nn.Sequential(copy.deepcopy(linear))
    torchao_quantise(holder)
    return holder[0]


def torchao_quantise(model):
    """int8 weights in every nn.Linear of a model, in place."""
    with warnings.catch_warnings():
        # Its own use of names that torch has deprecated.
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
    """A quantised linear; dtype is that of the linear that was quantised."""
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    return BASES[kind](linear).requires_grad_(False)
