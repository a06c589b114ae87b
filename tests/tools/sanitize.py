"""Every kernel and variant once, at toy size: what `.ci/sanitize` runs under a sanitizer.

    python tests/tools/sanitize.py [name ...]

Inputs are drawn on the CPU and results looked at there, so that on the GPU nothing else runs.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.kernels import cluster_shrink
from moelora_kernels.kernels.common import launcher
from support import arguments, route_cases, shrink_ptx
from support.backends import DTYPES, KERNEL_DTYPES, op_launcher
from support.cases import GROUPED, WIDE
from support.inputs import Inputs, moved
from support.op_checks import GROUPED_OPS

# Names of WIDE: every form of a gate, fused and split, each kind of column tile and mask.
WIDE_NAMES = (
    "plain", "one_token", "one_expert_dense", "all_experts", "softmax_before_topk", "many_experts",
    "mixed_ranks", "siblings_sparse", "one_row", "rows_int64", "share_a", "dropout",
    "dropout_per_expert", "float32_adapters",
)  # fmt: skip
# Names of GROUPED: tiles beyond the last, parts, empty experts, each form of a row.
GROUPED_NAMES = (
    "plain", "eight_slots", "mostly_one", "empty", "mixed_ranks", "large_ranks", "few_pairs",
    "nothing_routed_int64", "three_siblings", "per_pair_base", "dropout_per_expert",
)  # fmt: skip


def run_wide(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return all outputs of the wide ops, on the CPU; each op gets results of the last."""
    inputs, results = Inputs(WIDE[name], dtype).to(device), []
    for split in (1, 3):
        shrunk = op_launcher("shrink_gate")(*arguments.shrink_gate(inputs), split=split)
        args = arguments.shrink_gate_backward(inputs, shrunk)
        grads = op_launcher("shrink_gate_backward")(*args, split=split)
        args = arguments.weight_grad(inputs, shrunk, grads)
        *weight_grads, dbs = op_launcher("weight_grad")(*args, split=split)
        dx = op_launcher("shrink_dx")(*arguments.shrink_dx(inputs, grads))
        results += [*shrunk, *grads, *weight_grads, *dbs, dx]
    return [tensor.cpu() for tensor in results]


def run_grouped(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return all outputs of the grouped ops, on the CPU; each op gets results of the reference."""
    inputs, results = Inputs(GROUPED[name], dtype), []
    for op in GROUPED_OPS:
        # `route` has no Triton kernel.
        for args in arguments.calls(op, inputs) if op != "route" else ():
            outputs = op_launcher(op)(*moved(args, device))
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            results += [t for o in outputs for t in (o if isinstance(o, list) else [o])]
    return [tensor.cpu() for tensor in results]


def run_others(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return the outputs of the ops that are used alone, on the CPU."""
    logits, dweights = torch.randn(101, 7).to(dtype), torch.randn(101, 3)
    logits, dweights = logits.to(device), dweights.to(device)
    results = [op_launcher("dropout")(logits, 0.1, torch.tensor([5]).to(device), 1)]
    for renormalize in (True, False):
        weights, experts = op_launcher("topk_gate")(logits, 3, renormalize, 0.8)
        args = dweights, weights, experts, logits, renormalize, 0.8
        results += [weights, experts, op_launcher("topk_gate_backward")(*args)]
    return [tensor.cpu() for tensor in results]


def run_route(device: str) -> None:
    """Run `route`, a kernel of the native library; the last case has too many experts for it."""
    wide = torch.zeros(100, 2, dtype=torch.int32), 5000, 1
    for experts, num_experts, siblings in (*route_cases.CASES.values(), wide):
        *_, chunks = ops.route(experts.to(device), num_experts, siblings, 3, 64)
        assert (chunks.cpu() >= 0).all()


def run_cluster_shrink(device: str) -> None:
    """Run `cluster_shrink`, a kernel of the native library, if it is built for this GPU."""
    if device == "cpu" or cluster_shrink.op() is None:
        return
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for case in shrink_ptx.CASES.values():
        inputs = Inputs(case, torch.bfloat16).to(device)
        (flat,) = arguments.calls("shrink_gate", inputs)
        for tensor in cluster_shrink.launch_op(*flat):
            assert torch.isfinite(tensor).all(), f"{case}: non-finite values"


def main(names: list[str]) -> None:
    """Run the named cases, or all of WIDE_NAMES and GROUPED_NAMES, in every dtype."""
    device = "cpu" if launcher.INTERPRET else "cuda"
    for dtype_name in KERNEL_DTYPES:
        dtype = DTYPES[dtype_name]
        # Addresses are the same in every dtype; products and the router's are not.
        few = dtype_name != "bf16" and not names
        for name in names or dict.fromkeys((*WIDE_NAMES, *GROUPED_NAMES)):
            if few and name not in ("plain", "float32_adapters"):
                continue
            results = []
            if name in WIDE:
                results += run_wide(name, dtype, device)
            if name in GROUPED_NAMES:
                results += run_grouped(name, dtype, device)
            for tensor in results:
                assert torch.isfinite(tensor).all(), f"{name}, {dtype_name}: non-finite values"
        run_others(dtype, device)
    run_route(device)
    run_cluster_shrink(device)
    print("every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1:])
