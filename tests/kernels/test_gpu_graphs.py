"""CUDA graphs: a layer is captured forward and backward, and replayed with other inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.gpu_cases import DEVICE, STEPS, assert_equal, each_step, make_layer

pytestmark = pytest.mark.gpu


def capture(work: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `work` after two runs of it, and the tensors that every replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


# Two tokens split every product, 8192 fill an H200 without; the task form has two sequences.
@pytest.mark.parametrize("tokens", (2, 8192))
@pytest.mark.parametrize("mode", ("infer", "train"))
@each_step
def test_replay_equals_eager(form: str, mode: str, tokens: int) -> None:
    """Nothing of an input is frozen: no size, index, gate row or address of a temporary."""
    step = STEPS[form](tokens)
    step.redraw(0)
    work = getattr(step, mode)
    graph, outputs = capture(work)
    seen = []
    for seed in (1, 2):
        step.redraw(seed)
        graph.replay()
        found = [t.clone() for t in outputs]
        assert_equal(found, work())
        seen.append(found)
    assert not torch.equal(seen[0][0], seen[1][0]), "the replays ignore their inputs"


def test_every_replay_draws_a_mask_of_its_own() -> None:
    """The seed of the dropout is drawn on the device; one drawn on the host would be frozen."""
    layer = make_layer(top_k=2, dropout=0.5).train()
    x = torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        graph, (y,) = capture(lambda: [layer(x)])
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.isfinite(y).all()
    assert not torch.equal(y, first)


PROGRAM = """
import torch
import moelora_kernels
layer = moelora_kernels.MoeLoraLinear(
    4096, 4096, num_experts=4, rank=8, top_k=2, device="cuda", dtype=torch.bfloat16
)
torch.nn.init.normal_(layer.lora_B)
x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
trained = [x, layer.lora_A, layer.lora_B, layer.router.weight]
def work():
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]
def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    graph.replay()
    return [t.clone() for t in outputs]
"""
COLD = """
import traceback
{before}
try:
    capture()
except RuntimeError:
    traceback.print_exc()
else:
    print("captured")
"""
WARM = """
state = torch.get_rng_state(), torch.cuda.get_rng_state()
moelora_kernels.warmup(layer, tokens=(1, 8192))
assert all(map(torch.equal, state, (torch.get_rng_state(), torch.cuda.get_rng_state())))
assert x.grad is None and all(p.grad is None for p in layer.parameters())
assert all(map(torch.equal, capture(), work()))
print("captured")
"""


def run(program: str) -> str:
    """What a fresh process prints, its traceback included."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        env=os.environ,
        timeout=300,
    )
    return done.stdout


@pytest.mark.parametrize("before", ("", "layer(x[:1])"), ids=("nothing_ran", "other_tokens_ran"))
def test_capture_without_warmup_says_what_to_do(before: str) -> None:
    """Tables and compilations cannot be made while a graph is captured."""
    printed = run(COLD.format(before=before))
    assert "RuntimeError" in printed, printed
    assert "moelora_kernels.warmup" in printed, printed


def test_warmup_makes_a_capture_possible() -> None:
    """Forward and backward, without a gradient or a random number that shows."""
    printed = run(WARM)
    assert printed.strip().endswith("captured"), printed


REDUCED = """
compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
for _ in range(3):
    torch.compiler.cudagraph_mark_step_begin()
    y = compiled(x[:64])
    found = [t.clone() for t in torch.autograd.grad(y, trained[1:], torch.ones_like(y))]
y = layer(x[:64])
expected = torch.autograd.grad(y, trained[1:], torch.ones_like(y))
assert all(map(torch.equal, found, expected))
print("replayed")
"""


def test_compiled_models_may_run_as_graphs_at_once() -> None:
    """Tables that outlive a run must not lie in the memory pool of the compiler's graphs."""
    printed = run(REDUCED)
    assert printed.strip().endswith("replayed"), printed
