"""Every kernel and variant once, at toy size: what `.ci/sanitize` runs under a sanitizer.

    python tests/tools/sanitize.py [name ...]

Inputs are drawn on the CPU and results looked at there, so that on the GPU nothing else runs.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.kernels import (
    dropout,
    grouped_expand,
    grouped_shrink,
    grouped_shrink_backward,
    grouped_weight_grad,
    router,
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    topk_gate,
    weight_grad,
)
from moelora_kernels.kernels.common import launcher
from support import grouped_cases, route_cases
from support.op_cases import CASES, DTYPES, Inputs

# Names of CASES: every form of a gate, fused and split, each kind of column tile and mask.
SELECTION = (
    "plain", "one_token", "one_expert_dense", "all_experts", "softmax_before_topk", "many_experts",
    "mixed_ranks", "siblings_sparse", "one_row", "rows_int64", "share_a", "dropout",
    "dropout_per_expert", "float32_adapters",
)  # fmt: skip
# Names of grouped_cases.CASES: tiles beyond the last, parts, empty experts, each form of a row.
GROUPED = (
    "plain", "eight_slots", "mostly_one", "empty", "mixed_ranks", "large_ranks", "few_pairs",
    "nothing_routed_int64", "three_siblings", "by_pair_base", "dropout_per_expert",
)  # fmt: skip
LAUNCHERS = {
    "router_logits": router.launch_logits,
    "grouped_shrink": grouped_shrink.launch,
    "grouped_shrink_backward": grouped_shrink_backward.launch,
    "grouped_expand": grouped_expand.launch,
    "grouped_weight_grad": grouped_weight_grad.launch,
    "router_grad": router.launch_grad,
}


def run_case(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """All outputs of the four ops of a layer, on the CPU; each op gets what the last returned."""
    case = CASES[name]
    inputs = Inputs(case._replace(dropout=0.0) if case.share_a else case, dtype).to(device)
    found = []
    for split in (1, 3):
        forward = shrink_gate.launch(*inputs.shrink(), split=split)
        back = shrink_gate_backward.launch(*inputs.backward(forward), split=split)
        *weight_grads, db = weight_grad.launch(*inputs.weight_grad(forward, back), split=split)
        found += [*forward, *back, *weight_grads, *db, shrink_dx.launch(*inputs.shrink_dx(back))]
    return [tensor.cpu() for tensor in found]


def run_grouped(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """All outputs of the grouped ops, on the CPU; each op gets what the reference returns."""
    inputs = grouped_cases.Inputs(grouped_cases.CASES[name], dtype)
    found = []
    for op, launch in LAUNCHERS.items():
        for arguments in inputs.calls(op):
            outputs = launch(*_moved(arguments, device))
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            found += [t for o in outputs for t in (o if isinstance(o, list) else [o])]
    return [tensor.cpu() for tensor in found]


def _moved(value, device: str):
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(v, device) for v in value))
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def run_others(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Outputs of the ops that are used alone."""
    logits, dweights = torch.randn(101, 7).to(dtype), torch.randn(101, 3)
    logits, dweights = logits.to(device), dweights.to(device)
    found = []
    for renormalize in (True, False):
        weights, indices = topk_gate.launch(logits, 3, renormalize, 0.8)
        found += [weights, indices]
        found += [topk_gate.launch_backward(dweights, weights, indices, logits, renormalize, 0.8)]
    found += [dropout.launch(logits, 0.1, torch.tensor([5]).to(device), 1)]
    return [tensor.cpu() for tensor in found]


def run_route(device: str) -> None:
    """`route`, whose kernels are those of the native library; more experts than fit in last."""
    wide = torch.zeros(100, 2, dtype=torch.int32), 5000, 1
    for indices, experts, siblings in (*route_cases.CASES.values(), wide):
        *_, chunks = ops.route(indices.to(device), experts, siblings, 3, 64)
        assert (chunks.cpu() >= 0).all()


def main(names: list[str]) -> None:
    """Run the named cases, or all of SELECTION, in every dtype."""
    device = "cpu" if launcher.INTERPRET else "cuda"
    for of_dtype in ("bf16", "fp16", "fp32"):
        dtype = DTYPES[of_dtype]
        # Addresses are the same in every dtype; products and the router's are not.
        few = of_dtype != "bf16" and not names
        for name in names or (*SELECTION, *GROUPED):
            if few and name not in ("plain", "float32_adapters"):
                continue
            results = []
            if name in CASES:
                results += run_case(name, dtype, device)
            if name in GROUPED:
                results += run_grouped(name, dtype, device)
            for tensor in results:
                assert torch.isfinite(tensor).all(), f"{name}, {of_dtype}: non-finite values"
        run_others(dtype, device)
    run_route(device)
    print("every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1:])
