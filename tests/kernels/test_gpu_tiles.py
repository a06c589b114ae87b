"""Every entry of `TILE_CONFIGS` (kernels/common/configs.py) on the GPU: what "qualified" means.

`python tests/tools/qualify.py --commit SHA` runs this file and prints what to write into the table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.kernels import (
    grouped_expand,
    grouped_shrink,
    grouped_shrink_backward,
    grouped_weight_grad,
    router,
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    weight_grad,
)
from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.types import CHUNK, TILE
from support import grouped_cases
from support.gpu_cases import DEVICE, keep_apart
from support.op_cases import DTYPES, Case, Inputs, compare, forward_of

pytestmark = pytest.mark.gpu

REPEATS = 50

# name -> case and parts; tails of every tile. The comment says which programs it makes.
VARIANTS = {
    # Router, gate and its gradient in the epilogue: two products per step, one launch.
    "fused": (Case(T=1000, I=4104, O=4104, bias=True), 1),
    # Sums to partials; the mask drawn beside the product.
    "split": (Case(T=1000, I=4104, O=4104, gate="dense", dropout=0.1), 2),
}


def _shrink_gate(inputs: Inputs, split: int) -> tuple[str, Callable, Callable, list]:
    def launch(*arguments):
        return shrink_gate.launch(*arguments, split=split)

    return "h u weights indices logits", launch, reference.shrink_gate, inputs.shrink()


def _shrink_gate_backward(inputs: Inputs, split: int) -> tuple[str, Callable, Callable, list]:
    def launch(*arguments):
        return shrink_gate_backward.launch(*arguments, split=split)

    arguments = inputs.backward(forward_of(inputs))
    return "dh u dgate", launch, reference.shrink_gate_backward, arguments


def _weight_grad(inputs: Inputs, split: int) -> tuple[str, Callable, Callable, list]:
    def launch(*arguments):
        return weight_grad.launch(*arguments, split=split)

    forward = forward_of(inputs)
    back = reference.shrink_gate_backward(*inputs.backward(forward))
    return "da drouter dbias db", launch, reference.weight_grad, inputs.weight_grad(forward, back)


def _shrink_dx(inputs: Inputs, split: int) -> tuple[str, Callable, Callable, list]:
    back = reference.shrink_gate_backward(*inputs.backward(forward_of(inputs)))

    def launch(*arguments):
        return [shrink_dx.launch(*arguments)]

    def specification(*arguments):
        return [reference.shrink_dx(*arguments)]

    return "dx", launch, specification, inputs.shrink_dx(back)


def _wide(make: Callable) -> Callable:
    """The calls of a kernel of the wide formulation, with so many columns of rank space."""

    def calls(columns: int, dtype: torch.dtype, variant: str) -> list[tuple]:
        case, split = VARIANTS[variant]
        case = case._replace(ranks=(columns // 4,) * 4)
        return [make(keep_apart(Inputs(case, dtype, device=DEVICE)), split)]

    return calls


def _grouped(name: str, launch: Callable) -> Callable:
    """The calls of a kernel of the grouped formulation, with experts of so many columns.

    Tails of tiles; chunks that are all of an expert, or 13 parts of it.
    """

    def calls(columns: int, dtype: torch.dtype, variant: str) -> list[tuple]:
        split = variant == "split"
        ranks = (1,) * columns if name.startswith("router") else (columns,) * 4
        case = grouped_cases.Case(
            T=1700, I=4104, O=4104, ranks=ranks, start="bias", bias=True, tile=TILE,
            chunk=65 if split else CHUNK, dropout=0.1 if split else 0.0,
        )  # fmt: skip
        names, specification = grouped_cases.OUTPUTS[name], getattr(reference, name)
        made = grouped_cases.Inputs(case, dtype, device=DEVICE).calls(name)
        return [(names, launch, specification, arguments) for arguments in made]

    return calls


# A kernel in the table that is not here has nothing to qualify it: the tests below fail.
OPS = {
    "shrink_gate": _wide(_shrink_gate),
    "shrink_gate_backward": _wide(_shrink_gate_backward),
    "weight_grad": _wide(_weight_grad),
    "shrink_dx": _wide(_shrink_dx),
    "router_logits": _grouped("router_logits", router.launch_logits),
    "router_grad": _grouped("router_grad", router.launch_grad),
    "grouped_shrink": _grouped("grouped_shrink", grouped_shrink.launch),
    "grouped_shrink_backward": _grouped("grouped_shrink_backward", grouped_shrink_backward.launch),
    "grouped_expand": _grouped("grouped_expand", grouped_expand.launch),
    "grouped_weight_grad": _grouped("grouped_weight_grad", grouped_weight_grad.launch),
}


def _entries() -> list:
    """(key of the table, dtype) for the GPU at hand; for an H200 where there is none."""
    supported = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    device = DEVICE if supported else torch.device("cpu")
    keys = configs.TILE_CONFIGS[configs.processors(device)[0]]
    return [
        pytest.param(key, dtype, id=f"{key[0]}-{name}-{key[2]}")
        for key in keys
        for name, dtype in DTYPES.items()
        if dtype.itemsize == key[1]
    ]


def _flat(outputs) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [
        tensor
        for output in outputs
        for tensor in (output if isinstance(output, list) else [output])
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("key", "dtype"), _entries())
def test_tile(key: tuple[str, int, int], dtype: torch.dtype, variant: str) -> None:
    """Right by float64, no NaN under poisoned allocations, and the same bits in 50 runs."""
    kernel, _, columns = key
    for names, op, specification, arguments in OPS[kernel](columns, dtype, variant):
        with launcher.recording() as launches:
            first = _flat(op(*arguments))
        tile = configs.TILE_CONFIGS[configs.processors(DEVICE)[0]][key]
        assert any(launch.config is tile for launch in launches), (
            f"no launch takes the tile of {key}"
        )
        compare(names, op, specification, arguments, dtype)

        differing = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
        for _ in range(REPEATS - 1):
            for i, again in enumerate(_flat(op(*arguments))):
                differing[i] += (again != first[i]).any()
        assert differing.tolist() == [0] * len(first), f"runs of {REPEATS} that differ, by output"
