"""The gates that a user passes for router="external", dense or sparse.

In this file E is num_experts, without a shared expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels.nn.base_linear import tensor_problem
from moelora_kernels.reference.gates import dense_gate
from moelora_kernels.types import Gate

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def external_gates(gates: Tensor | None, num_experts: int) -> Tensor:
    """Return user-supplied dense gates as [G, E].

    Raises:
        ValueError: they are missing, or have the wrong shape or dtype.
        TypeError: they are not a dense tensor.
    """
    if gates is None:
        raise ValueError(
            "gates: router='external' needs them: layer(x, gates) or set_tasks(model, gates)"
        )
    if not isinstance(gates, Tensor) or gates.is_nested or gates.layout is not torch.strided:
        problem = tensor_problem(gates) or "a sparse tensor; pass gates.to_dense()"
        raise TypeError(f"gates: expected a dense tensor [..., {num_experts}], got {problem}")
    if gates.dim() < 2 or gates.shape[-1] != num_experts or not gates.is_floating_point():
        raise ValueError(
            f"gates: expected floats [..., {num_experts}], got {gates.dtype} {[*gates.shape]}"
        )
    return gates.reshape(-1, num_experts)


def check_pair(gates: tuple, name: str) -> None:
    """Raise TypeError unless a tuple that was passed as gates has two entries."""
    if len(gates) != 2:
        raise TypeError(
            f"{name}: expected a tensor, or a tuple (weights, indices), got {len(gates)} entries"
        )


def external_slots(
    gates: tuple[Tensor, ...], num_experts: int, name: str = "gates"
) -> tuple[Tensor, Tensor]:
    """Return user-supplied sparse gates as weights [G, K] and experts [G, K] int32.

    A slot whose index is outside [0, E) is not routed: its expert becomes -1 and its weight 0.

    Args:
        gates: weights [..., K], floats; indices [..., K], whole numbers. K is 1 to E.
        num_experts: E.
        name: the argument that an error names.

    Raises:
        ValueError: the shapes or the devices differ, or K is not 1 to E.
        TypeError: they are not two dense tensors, or have another dtype.
    """
    check_pair(gates, name)
    for i, (tensor, kind) in enumerate(zip(gates, ("floats", "whole numbers"), strict=True)):
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout != torch.strided:
            problem = tensor_problem(tensor) or "a sparse tensor; pass its to_dense()"
            raise TypeError(f"{name}[{i}]: expected {kind} [..., K], got {problem}")
        if not (tensor.dtype in INTEGERS if i else tensor.is_floating_point()):
            raise TypeError(f"{name}[{i}]: expected {kind} [..., K], got {tensor.dtype}")
    weights, indices = gates
    slots = weights.shape[-1] if weights.dim() > 1 else 0
    if not 1 <= slots <= num_experts:
        raise ValueError(
            f"{name}[0]: expected weights [..., K] of K slots, 1 to {num_experts}, got "
            f"{[*weights.shape]}"
        )
    if indices.shape != weights.shape:
        raise ValueError(
            f"{name}[1]: expected indices like the weights {[*weights.shape]}, got "
            f"{[*indices.shape]}"
        )
    if indices.device != weights.device:
        raise ValueError(
            f"{name}[1]: expected indices on the device of the weights, {weights.device}, got "
            f"{indices.device}"
        )
    is_routed = (indices >= 0) & (indices < num_experts)
    experts = torch.where(is_routed, indices, -1).to(torch.int32)
    weights = torch.where(is_routed, weights, 0)
    return weights.reshape(-1, slots), experts.reshape(-1, slots)


def dense_rows(weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    """Return sparse gates [..., K] as dense gates [G, E]. Repeated experts are added."""
    slots = weights.shape[-1]
    gate = Gate(weights.reshape(-1, slots), indices.reshape(-1, slots))
    return dense_gate(gate, len(gate.weights), 1, num_experts, weights.dtype)[:, 0]
