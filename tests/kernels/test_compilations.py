"""The number of kernels that Triton compiles for one layer, over all numbers of tokens.

Each takes seconds, in the first step that meets it, on every rank.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels.kernels import shrink_dx, shrink_gate, shrink_gate_backward, weight_grad
from moelora_kernels.types import NO_DROPOUT, NO_GATE, Dropout, Gate, Mixture, RouterTensors
from support.fake_driver import fake_driver

BF16 = torch.bfloat16
SIZE, RANKS = 4096, (16,) * 8
TOKENS = (1, 2, 7, 16, 33, 64, 100, 128, 256, 500, 1000, 1024, 2048, 3000, 4096, 6000, 8192, 16384)


def rows(tokens: int) -> Tensor:
    """Return a matrix [tokens, SIZE] that takes the memory of one row. No kernel reads it."""
    return torch.zeros(1, SIZE, dtype=BF16).expand(tokens, SIZE)


def launch_step(tokens: int, gate: str) -> None:
    """Launch the kernels of one forward and backward of a layer."""
    x, dy, R = rows(tokens), rows(tokens), sum(RANKS)
    a, b = torch.zeros(R, SIZE, dtype=BF16), torch.zeros(SIZE, R, dtype=BF16)
    router = [torch.zeros(len(RANKS), SIZE, dtype=BF16)] if gate == "router" else []
    mixture = Mixture(RANKS, (2.0,) * 8, router_top_k=2 if router else 0)
    passed = Gate(*NO_GATE)
    if not router:
        ids = torch.zeros(tokens, dtype=torch.int32)
        passed = Gate(torch.zeros(5, len(RANKS)), rows=ids)
    h, u, *routed = shrink_gate.launch(
        x, [a], RouterTensors(router, []), passed, mixture, Dropout(*NO_DROPOUT)
    )
    if router:
        passed = mixture.router_gate(*routed)
    dh, u, dgate = shrink_gate_backward.launch([dy], [b], h, passed, None, mixture)
    dlogits = dgate if router else None
    shrink_dx.launch(dh, dlogits, [a], router, RANKS, NO_DROPOUT)
    weight_grad.launch(x, dh, dlogits, [dy], u, RANKS, NO_DROPOUT, BF16, BF16)


@pytest.mark.parametrize("gate", ("router", "task gates"))
def test_compilations_of_a_layer(gate: str) -> None:
    with fake_driver("sm_90") as driver:
        for tokens in TOKENS:
            launch_step(tokens, gate)
    assert len(driver.compiled) <= 12, sorted(driver.compiled)
