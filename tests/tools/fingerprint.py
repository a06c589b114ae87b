"""Hashes of outputs and gradients of every preset, to compare two versions of the package.

    python tests/tools/fingerprint.py > after.txt      # once per version, on the same machine
    diff before.txt after.txt                          # empty: every bit is the same

One line per (preset, impl, dtype, mode): SHA-256 of y, dx, and the gradient of every trained
parameter, or the error that refuses the combination. Only public names are used, so the script
runs on versions whose insides differ.
"""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import nn

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    collect_aux_loss,
    set_prototypes,
    set_tasks,
)
from moelora_kernels.presets import FFN_PRESETS, PRESETS

I, O, F, BATCH, STEPS = 96, 80, 64, 4, 37  # noqa: E741
IMPLS = ("auto", "wide", "grouped", "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter a value, so that no gradient is zero by construction."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            scale = 0.3 if "lora_B" in name else (parameter.shape or (1,))[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return module


def make_layer(kind: str, config: MoeLoraConfig, dtype: torch.dtype) -> nn.Module:
    """A linear, a group of three linears, an FFN or an adapter with random parameters."""
    torch.manual_seed(0)
    if kind == "ffn":
        layer = MoeLoraFFN(I, F, bias=True, config=config, dtype=dtype)
    elif kind == "adapter":
        base = nn.Sequential(nn.Linear(I, F, dtype=dtype), nn.Linear(F, I, dtype=dtype))
        layer = MoeLoraAdapter(base.requires_grad_(False), I, config)
    elif kind == "group":
        layers = {name: MoeLoraLinear(I, O, config=config, dtype=dtype) for name in ("q", "k", "v")}
        layer = MoeLoraGroup(**layers)
    else:
        layer = MoeLoraLinear(I, O, config=config, dtype=dtype)
    randomise(layer)
    for module in layer.modules():
        if isinstance(module, MoeLoraLinear) and module.config.router == "prototype":
            set_prototypes(module)
    return layer


def prepare(layer: nn.Module, config: MoeLoraConfig) -> None:
    """Set the tasks or gates that the layer asks for."""
    torch.manual_seed(2)
    if config.router == "task":
        set_tasks(layer, torch.tensor([1, 2, 3, 1]))
    elif config.router == "token_task":
        set_tasks(layer, torch.randn(BATCH, config.task_embedding_dim))
    elif config.router == "external":
        set_tasks(layer, torch.rand(BATCH, config.num_experts))


def fingerprint(layer: nn.Module, dtype: torch.dtype, training: bool) -> str:
    """The hash of one forward and backward."""
    layer.train(training)
    torch.manual_seed(3)
    x = torch.randn(BATCH, STEPS, I, dtype=dtype, requires_grad=True)
    outputs = layer(x)
    outputs = [outputs] if torch.is_tensor(outputs) else [*outputs]
    loss = sum((y.float() * torch.linspace(-1, 1, y.shape[-1])).sum() for y in outputs)
    aux = collect_aux_loss(layer)
    if torch.is_tensor(aux):
        loss = loss + aux
    tensors = {f"y{i}": y for i, y in enumerate(outputs)}
    if loss.requires_grad:
        loss.backward()
        tensors["dx"] = x.grad
        tensors |= {f"d{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def main() -> None:
    """Print one line per combination."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for preset in sorted(PRESETS):
        kinds = ["linear", "group"]
        if preset in FFN_PRESETS:
            kinds = ["ffn"]
        elif PRESETS[preset].get("rank_activation"):
            kinds = ["adapter"]
        for kind, impl, (name, dtype), training in itertools.product(
            kinds, IMPLS, DTYPES.items(), (True, False)
        ):
            mode = "train" if training else "eval"
            label = f"{preset:12} {kind:7} {impl:9} {name} {mode:5}"
            try:
                config = MoeLoraConfig.preset(preset, impl=impl, adapter_dtype="float32")
                layer = make_layer(kind, config, dtype)
                prepare(layer, config)
                print(label, fingerprint(layer, dtype, training))
            except (ValueError, TypeError, RuntimeError) as error:
                print(label, "refused:", type(error).__name__)


if __name__ == "__main__":
    main()
