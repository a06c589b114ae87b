"""Adapters of a model that two processes share: DDP, FSDP1, FSDP2."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moelora_kernels import (
    MoeLoraConfig,
    adapter_parameters,
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    merge_adapter,
    replace_linears,
    save_adapter,
    set_tasks,
)
from moelora_kernels.checkpoints import export_moelora_peft, load_moelora_peft
from moelora_kernels.export import export_lora, lora_of_model, main
from support.compare import assert_same
from support.linears import randomise

# Five rows of A and seven columns: no size is a multiple of the number of processes.
CONFIG = MoeLoraConfig.preset(
    "moelora", num_experts=1, rank=5, num_tasks=2, task_embedding_dim=3, dropout=0.0
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.module = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x):
        return x + self.module(self.a(x).relu())


def adapted(seed=0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    replace_linears(model, CONFIG.replace(**options), ["a", "module"])
    return randomise(model, seed)


def fsdp1(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def fsdp1_blocks(model):
    for i in range(2):
        model[i] = fsdp1(model[i], use_orig_params=True)
    return fsdp1(model, use_orig_params=True)


def fsdp2(model):
    # All layers share the router, so one unit holds the model.
    return fully_shard(model, reshard_after_forward=False)


def check_ddp(rank, folder):
    """Each process may save alone: all have all values."""
    plain, parallel = adapted(1), DistributedDataParallel(torch.compile(adapted(1)))
    assert list(adapter_state_dict(parallel)) == list(adapter_state_dict(plain))
    if rank == 0:
        save_adapter(parallel, folder / "ddp.safetensors")
        export_lora(parallel, folder / "ddp", 1)
    torch.distributed.barrier()
    target = DistributedDataParallel(adapted(2))
    load_adapter(target, folder / "ddp.safetensors")
    assert_same(adapter_state_dict(target), adapter_state_dict(plain))
    parallel = torch.compile(DistributedDataParallel(adapted(1)))
    assert_same(adapter_state_dict(parallel), adapter_state_dict(plain))


def calls_on(model, folder):
    """Every function that reads or writes the adapters of a model."""
    path = folder / "never.safetensors"
    return (
        lambda: adapter_state_dict(model),
        lambda: save_adapter(model, path),
        lambda: load_adapter_state_dict(model, {}),
        lambda: export_lora(model, folder / "never", 1),
        lambda: merge_adapter(model, 1),
        lambda: export_moelora_peft(model),
    )


def check_fsdp1(rank, folder):
    check_fsdp1_with(lambda model: fsdp1(model, use_orig_params=True), rank, folder / "flat")
    # Units of FSDP1 cannot share a router.
    check_fsdp1_with(fsdp1_blocks, rank, folder / "blocks", task_gate="per_layer")


def check_fsdp1_with(wrap, rank, path, **options):
    """Outside of summon_full_params a process holds a flat shard; inside, all values."""
    plain, model = adapted(1, **options), wrap(adapted(1, **options))
    set_tasks(model, [1])
    model(torch.ones(1, 7)).sum().backward()
    assert len(adapter_parameters(model)) == len(adapter_parameters(plain))
    for call in calls_on(model, path.parent):
        with pytest.raises(ValueError, match=r"FSDP1 shards 0\.a\.lora_A, .*summon_full_params"):
            call()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        assert_same(adapter_state_dict(model), adapter_state_dict(plain))
        save_adapter(model, path)
        assert_same(lora_of_model(model, 1), lora_of_model(plain, 1))
        assert_same(export_moelora_peft(model), export_moelora_peft(plain))
    loaded = adapted(2, **options)
    load_adapter(loaded, path)
    assert_same(adapter_state_dict(loaded), adapter_state_dict(plain))
    target = wrap(adapted(2, **options))
    with FullyShardedDataParallel.summon_full_params(target):
        load_adapter(target, path)
    with FullyShardedDataParallel.summon_full_params(target, rank0_only=True, writeback=False):
        if rank == 0:
            assert_same(adapter_state_dict(target), adapter_state_dict(plain))
        else:
            with pytest.raises(ValueError, match="FSDP1 shards"):
                adapter_state_dict(target)


def check_fsdp1_flat_parameters(rank, folder):
    """With use_orig_params=False the layers have no Parameters between two forwards."""
    plain = adapted(1)
    plain.requires_grad_(True)
    model = adapted(1)
    model.requires_grad_(True)
    model = fsdp1(model, use_orig_params=False)
    with pytest.raises(ValueError, match=r"FSDP1 shards 0\.a\.lora_A"):
        adapter_state_dict(model)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        assert_same(adapter_state_dict(model), adapter_state_dict(plain))


def check_fsdp2(rank, folder):
    """The values are gathered, and each process loads its part; a shard is never written."""
    plain, model = adapted(1), fsdp2(adapted(1))
    path = folder / "fsdp2.safetensors"
    assert_same(adapter_state_dict(model), adapter_state_dict(plain))
    # All processes write the same path, and each reads it at once.
    for _ in range(5):
        save_adapter(model, path)
        loaded = adapted(2)
        load_adapter(loaded, path)
        assert_same(adapter_state_dict(loaded), adapter_state_dict(plain))
    save_adapter(model, folder / f"fsdp2-{rank}.safetensors")
    load_adapter(loaded, folder / f"fsdp2-{rank}.safetensors")
    assert_same(adapter_state_dict(loaded), adapter_state_dict(plain))
    main(["--task", "1", str(folder / f"fsdp2-{rank}.safetensors"), str(folder / f"file{rank}")])

    target = fsdp2(adapted(2))
    set_tasks(target, [1])
    x = torch.ones(1, 7)
    with torch.no_grad():
        # After a forward, FSDP2 keeps a copy of all values, which a load must not write to.
        target(x)
    load_adapter(target, path)
    target.reshard()
    assert_same(adapter_state_dict(target), adapter_state_dict(plain))
    set_tasks(plain, [1])
    torch.testing.assert_close(target(x), plain(x))

    for call in (
        lambda: export_lora(model, folder / "never", 1),
        lambda: merge_adapter(model, 1),
        lambda: export_moelora_peft(model),
        lambda: load_moelora_peft(model, export_moelora_peft(plain)),
    ):
        with pytest.raises(ValueError, match=r"shards 0\.a\.lora_A, .*save_adapter"):
            call()
    model.unshard()
    assert_same(lora_of_model(model, 1), lora_of_model(plain, 1))


def check_late_replacements(rank, folder):
    """DDP and FSDP would not average the gradients of adapters that they do not know."""
    config = CONFIG.replace(task_gate="per_layer")
    for wrap in (DistributedDataParallel, fsdp1_blocks, fsdp2):
        model = wrap(nn.Sequential(Block(), Block()))
        with pytest.warns(UserWarning, match=r"model: a .* does not average .*replace the modules"):
            names = replace_linears(model, config, ["a"])
        assert names == ["0.a", "1.a"]


CHECKS = (check_ddp, check_fsdp1, check_fsdp1_flat_parameters, check_fsdp2, check_late_replacements)


def run_process(rank: int, port: int, folder) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for check in CHECKS:
            check(rank, folder)
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes(tmp_path):
    """One start of two processes for all checks, because a start takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (port, tmp_path), nprocs=2)
    assert not list(tmp_path.glob("never*"))
    assert not list(tmp_path.glob("*.part"))


def test_zero3_is_refused_by_name(tmp_path):
    """ZeRO-3 leaves Parameters without elements, which a file would hold without a message."""
    model = adapted()
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i
        parameter.data = torch.empty(0)
    for call in calls_on(model, tmp_path):
        message = r"ZeRO-3 shards 0\.a\.lora_A, .*0\.a\.router.*GatheredParameters"
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())
