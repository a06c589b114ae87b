"""The example for several processes, and the bytes that moelora_kernels/nn/SCALING.md counts."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from support.parallel import backward, make_model, part_of, trained
from support.processes import run_processes, run_program

pytest.importorskip("transformers")
pytestmark = pytest.mark.exhaustive


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_example(engine, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["examples/many_processes.py", "--engine", engine, "--out", str(tmp_path)]
    output = run_program([*torchrun, "--nproc-per-node=2", *script])
    assert "step 5: loss" in output
    assert "loaded in one process, identical" in output


def size(tensors):
    """Return the bytes of the parts of tensors that this process holds."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.itemsize for t in local)


def run(rank, engine):
    model = make_model("ming")
    if engine == "ddp":
        model = DistributedDataParallel(model)
    else:
        for module in [*model.model.layers, model]:
            fully_shard(module)
    optimizer = torch.optim.AdamW(trained(model).values())
    backward(model, "ming", part_of(rank, 2, 0))
    optimizer.step()
    averages = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    base = [p for p in model.parameters() if not p.requires_grad]
    grads = [p.grad for p in trained(model).values()]
    return [size(base), size(trained(model).values()), size(grads), size(averages)]


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_bytes_of_a_process(engine, tmp_path):
    """DDP: b P + (2 a + 8) A in each of N processes. FSDP2: the same over all processes."""
    model = make_model("ming")
    adapters = sum(p.numel() for p in trained(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapters
    expected = [4 * base, 4 * adapters, 4 * adapters, 8 * adapters]
    found = run_processes(run, 2, tmp_path, engine)
    if engine == "ddp":
        assert found == [expected, expected]
        return
    assert [sum(pair) for pair in zip(*found, strict=True)] == expected
    # A tensor is cut between two rows, so a process may hold one row of each tensor more.
    for counts in found:
        assert all(0.45 * e < c < 0.55 * e for c, e in zip(counts, expected, strict=True))


@pytest.mark.parametrize("kind", ("ming", "shared gate"))
def test_adapter_parameters_of_a_linear(kind):
    """E r (I + O) for A and B, and E I + E for a linear router."""
    layer = make_model(kind).model.layers[0].mlp.up_proj
    experts, rank = layer.config.num_experts, layer.config.rank
    count = experts * rank * (layer.in_features + layer.out_features)
    if kind == "ming":
        count += experts * layer.in_features
        count += sum(p.numel() for name, p in layer.router.named_parameters() if name == "bias")
        found = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    else:
        found = layer.lora_A.numel() + layer.lora_B.numel()
    assert found == count
