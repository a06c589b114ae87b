"""Every tile of `kernels.configs.TILES` on the GPU at hand: what "qualified" means there.

`python tests/qualify.py --commit SHA` runs this file and prints what to write into the table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import DEVICE, keep_apart
from op_cases import DTYPES, Case, Inputs, compare, forward_of
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.kernels import (
    configs,
    gram,
    launcher,
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
)

pytestmark = pytest.mark.gpu

REPEATS = 50

# name -> case and parts; tails of every tile. The comment says which programs it makes.
VARIANTS = {
    # Router, gate and its gradient in the epilogue: two products per step, one launch.
    "fused": (Case(T=1000, I=4104, O=4104, bias=True), 1),
    # Sums to planes; the mask drawn beside the product.
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


def _gram(inputs: Inputs, split: int) -> tuple[str, Callable, Callable, list]:
    def launch(*arguments):
        return gram.launch(*arguments, split=split)

    forward = forward_of(inputs)
    back = reference.shrink_gate_backward(*inputs.backward(forward))
    return "da drouter dbias db", launch, reference.gram, inputs.gram(forward, back)


def _shrink_dx(inputs: Inputs, split: int) -> tuple[str, Callable, Callable, list]:
    back = reference.shrink_gate_backward(*inputs.backward(forward_of(inputs)))

    def launch(*arguments):
        return [shrink_dx.launch(*arguments)]

    def specification(*arguments):
        return [reference.shrink_dx(*arguments)]

    return "dx", launch, specification, inputs.shrink_dx(back)


# A kernel in the table that is not here has nothing to qualify it: the tests below fail.
OPS = {
    "shrink_gate": _shrink_gate,
    "shrink_gate_backward": _shrink_gate_backward,
    "gram": _gram,
    "shrink_dx": _shrink_dx,
}


def _entries() -> list:
    """(key of the table, dtype) for the GPU at hand; for an H200 where there is none."""
    supported = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    device = DEVICE if supported else torch.device("cpu")
    keys = configs.TILES[configs.processors(device)[0]]
    return [
        pytest.param(key, dtype, id=f"{key[0]}-{name}-{key[2]}")
        for key in keys
        for name, dtype in DTYPES.items()
        if dtype.itemsize == key[1]
    ]


def _flat(outputs) -> list[Tensor]:
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
    case, split = VARIANTS[variant]
    case = case._replace(ranks=(columns // 4,) * 4)
    inputs = keep_apart(Inputs(case, dtype, device=DEVICE))
    names, op, specification, arguments = OPS[kernel](inputs, split)
    with launcher.recording() as launches:
        first = _flat(op(*arguments))
    tile = configs.TILES[configs.processors(DEVICE)[0]][key]
    assert any(launch.tile is tile for launch in launches), f"no launch takes the tile of {key}"
    compare(names, op, specification, arguments, dtype)

    differing = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
    for _ in range(REPEATS - 1):
        for i, again in enumerate(_flat(op(*arguments))):
            differing[i] += (again != first[i]).any()
    assert differing.tolist() == [0] * len(first), f"runs of {REPEATS} that differ, by output"
