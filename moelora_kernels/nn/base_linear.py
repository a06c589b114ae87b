"""The frozen base of a layer: read its weight or call it, and choose device and dtype."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.sharding import is_dtensor
from moelora_kernels.numerics import is_autocast
from moelora_kernels.types import ExternalGates


def is_plain_linear(module: nn.Module | None) -> bool:
    """Return whether a module is exactly an nn.Linear without hooks or a patched forward."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )


def missing_size(module: nn.Module) -> str | None:
    """Return "in_features" or "out_features" if the module lacks it; None if it has both."""
    for name in ("in_features", "out_features"):
        if not isinstance(getattr(module, name, None), int):
            return name
    return None


def conv1d_remedy(module: nn.Module) -> str:
    """Return the end of an error that refuses a Conv1D of transformers (GPT-2), or "".

    It computes y = x W + b with W [I, O]. A merge or an export would need the transposed experts.
    """
    if type(module).__name__ != "Conv1D" or not isinstance(getattr(module, "nf", None), int):
        return ""
    return (
        "; its weight is [in_features, out_features]: put an nn.Linear in its place first, with "
        "weight=nn.Parameter(conv.weight.t().contiguous()) and bias=conv.bias"
    )


def state_without_graph(module: nn.Module, name: str) -> dict:
    """Return the state for a copy or a pickle, with the tensor attribute `name` detached."""
    tensor = module.__dict__[name]
    is_leaf = tensor is None or tensor.grad_fn is None
    return module.__dict__ | ({} if is_leaf else {name: tensor.detach()})


def adapter_device_dtype(
    base: nn.Module, config: MoeLoraConfig
) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of A, B and the router over `base`.

    The dtype is config.adapter_dtype. If that is None, it is the dtype of the base's weight, or
    float32 for a quantised base.
    """
    tensors = [*base.parameters(), *base.buffers()]
    device = tensors[0].device if tensors else torch.get_default_device()
    if device.type == "meta":
        device = _execution_device(base) or device
    if config.adapter_dtype is not None:
        return device, getattr(torch, config.adapter_dtype)
    weight = float_weight(base)
    return device, torch.float32 if weight is None else weight.dtype


def _execution_device(base: nn.Module) -> torch.device | None:
    """Return the device on which accelerate's hooks run an offloaded base; None without hooks."""
    hook = getattr(base, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def float_weight(base: nn.Module) -> Tensor | None:
    """Return the base's weight if it is a float weight to compute with; None for quantised bases.

    A float dtype does not prove an unquantised weight: bitsandbytes can store packed 4-bit codes as
    bf16, so the element count is checked too. A count of 0 is accepted because ZeRO-3 empties
    weights outside forward.
    """
    weight = getattr(base, "weight", None)
    is_float = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    if is_float and not missing_size(base):
        is_float = weight.numel() in (0, base.in_features * base.out_features)
    return weight if is_float else None


def member(module: nn.Module, name: str) -> Any:
    """Return `module.name`. It takes a third of the time if that is a Parameter or a child.

    A tensor may be neither: if it is parametrized, pruned or sharded by FSDP1.
    """
    for members in (module._parameters, module._modules):
        if name in members:
            return members[name]
    return getattr(module, name)


def dense_weight(base: nn.Module | None) -> Tensor | None:
    """Return the weight of a plain nn.Linear if it is a plain tensor; None for every other base."""
    if not is_plain_linear(base):
        return None
    weight = member(base, "weight")
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def check_input(
    x: Tensor,
    features: int,
    gates: ExternalGates | None,
    router: str | nn.Module | None,
    layer: nn.Module | None = None,
) -> None:
    """Raise unless x is a float tensor [..., features] and gates are None or allowed.

    layer: the layer that reads x, if it has one base.
    """
    if problem := tensor_problem(x):
        raise TypeError(f"x: expected a tensor [..., {features}], got {problem}")
    if x.dim() < 1 or x.shape[-1] != features:
        remedy = "needs all of x: RowwiseParallel(input_layouts=Replicate())"
        remedy = if_parallel(getattr(layer, "base_layer", None), remedy)
        raise ValueError(f"x: expected [..., {features}], got {[*x.shape]}{remedy}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a float dtype, got {x.dtype}")
    if gates is not None and router != "external":
        raise ValueError(f"gates: only router='external' takes gates, got {router!r}")


def if_parallel(base: nn.Module | None, remedy: str) -> str:
    """Return "; a tensor parallel base " and a remedy if the base is one, else nothing.

    Every process holds all values of the adapters, so it needs all of x and y.
    """
    is_parallel = is_dtensor(getattr(base, "weight", None))
    return f"; under adapters a tensor parallel base {remedy}" if is_parallel else ""


def tensor_problem(x: object) -> str | None:
    """Return what x is, and what to pass instead, if no layer can read it; None for a tensor.

    A sparse COO tensor can be read; nn.Linear reads it too.
    """
    if not isinstance(x, Tensor):
        hint = "; use torch.export.export" if isinstance(x, torch.fx.Proxy) else ""
        return f"{type(x)}{hint}"
    if x.is_nested:
        return "a nested tensor; pass its values() if it is jagged, or x.to_padded_tensor(0.0)"
    if torch._C._are_functorch_transforms_active() and torch._C._functorch.is_batchedtensor(x):
        return "one under torch.func.vmap; pass the whole batch: a layer takes x [..., I]"
    if x.layout not in (torch.strided, torch.sparse_coo):
        return f"a tensor with layout {x.layout}; pass x.to_dense()"
    return None


def flat_rows(x: Tensor) -> Tensor:
    """Return x [..., I] as [T, I]. Raise TypeError if x is sparse."""
    if x.is_sparse:
        raise TypeError(
            f"x: expected a dense tensor, got a sparse one {[*x.shape]}; pass x.to_dense() (a "
            "layer over one linear also takes a sparse x [T, I])"
        )
    # torch cannot infer a size of -1 beside a size of 0.
    tokens = -1 if x.shape[-1] else math.prod(x.shape[:-1])
    return x.reshape(tokens, x.shape[-1])


def given_input(x: Tensor | None, input: Tensor | None) -> Tensor:
    """Return the one of `x` and `input` that was passed; nn.Linear names its argument `input`."""
    # torch.fx passes a Proxy for both. `check_input` then refuses x.
    if (x is None) == (input is None) and not isinstance(x, torch.fx.Proxy):
        raise TypeError("x: expected one tensor, as `x` or as `input`")
    return input if x is None else x


def check_adapters(adapter: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the adapters are on x's device.

    With adapters on the meta device the output would be uninitialised memory.
    """
    if adapter.device != x.device:
        raise ValueError(f"x: expected the adapters' device {adapter.device}, got {x.device}")


def call_base(base: nn.Module, x: Tensor, out_features: int) -> Tensor:
    """Call the base on x [..., I] and return its output as [T, O], in the dtype it returned.

    Do not modify the result in place. Warns if x needs a gradient and the output has none.

    Raises:
        ValueError: a plain base is on another device than x, or the output is not [..., O].
        TypeError: a plain base has another dtype than x, or the output is not a float tensor.
    """
    check_called(base, x)
    y = base(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y)
        raise TypeError(f"base: expected {type(base)} to return a float tensor, got {kind}")
    expected = [*x.shape[:-1], out_features]
    if [*y.shape] != expected:
        problem = f"expected {type(base)} to return {expected}, got {[*y.shape]}"
        remedy = "must return all of y: ColwiseParallel(output_layouts=Replicate())"
        raise ValueError(f"base: {problem}{if_parallel(base, remedy)}")
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        _warn_without_gradient(base)
    return flat_rows(y)


def _warn_without_gradient(base: nn.Module) -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        f"base: {type(base)} returned an output without a gradient for an x that needs one: dx "
        "contains only the experts' part, so the layers below train on a wrong gradient. The base "
        "probably uses an inference kernel, or was packed for inference by eval()",
        stacklevel=2,
    )


def check_called(base: nn.Module, x: Tensor) -> None:
    """Check the device and dtype of x against a plain base, so that the error names the argument.

    Raises:
        ValueError: the devices differ.
        TypeError: the dtypes differ, and autocast is off.
    """
    weight = dense_weight(base)
    if weight is None:
        return
    if weight.device != x.device:
        raise ValueError(f"x: expected the base's device {weight.device}, got {x.device}")
    check_dtype(x, weight.dtype)


def check_dtype(x: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless x has the dtype of the base's weight, or autocast is on."""
    if x.dtype != dtype and not is_autocast(x.device):
        raise TypeError(
            f"x: expected the base's dtype {dtype}, got {x.dtype}; pass x.to({dtype}), or call the "
            "model inside torch.autocast"
        )


def linear_with(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a frozen nn.Linear with the given weight and the bias of `linear`."""
    result = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=False)
    result.bias = linear.bias
    return result.train(linear.training)
