"""Train experts in several processes, on GPUs or on a CPU.

    torchrun --nproc-per-node 2 examples/many_processes.py --engine ddp
    torchrun --nproc-per-node 2 examples/many_processes.py --engine fsdp2

Every process makes the same small Qwen2 with random weights and trains on other sequences. At the
end all processes save one adapter, and the first one loads it into a model that is not sharded. The
page moelora_kernels/nn/SCALING.md says which engine fits which size.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

from moelora_kernels import (
    MoeLoraConfig,
    adapter_state_dict,
    collect_aux_loss,
    load_adapter,
    replace_linears,
    save_adapter,
)

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
VOCABULARY, BATCH, LENGTH = 100, 4, 32


def make_model(device: torch.device) -> Qwen2ForCausalLM:
    """Return a frozen Qwen2 with experts, the same in every process."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=2, **SIZES))
    model.requires_grad_(False)
    config = MoeLoraConfig.preset("ming", num_experts=4, rank=4, aux={"load_balance": 0.01})
    replace_linears(model, config, ["gate_proj", "up_proj", "down_proj"])
    return model.to(device).train()


def distribute(model: Qwen2ForCausalLM, engine: str) -> torch.nn.Module:
    """Return the model under an engine. The experts are in it before it is wrapped or sharded."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def train(model: torch.nn.Module, steps: int, device: torch.device) -> None:
    """Train on random sequences, other ones in every process."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=draw).to(device)
        loss = model(input_ids=ids, labels=ids).loss + collect_aux_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {mean.item() / dist.get_world_size():.4f}")


def main(argv: list[str] | None = None) -> None:
    """Run one of the processes that torchrun starts."""
    parser = argparse.ArgumentParser(description="Train experts in several processes.")
    parser.add_argument("--engine", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/many_processes"))
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = distribute(make_model(device), args.engine)
    train(model, args.steps, device)

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "adapter.safetensors"
    # A collective under FSDP2: every process makes this call.
    save_adapter(model, path)
    trained = adapter_state_dict(model)
    if dist.get_rank() == 0:
        fresh = make_model(device)
        load_adapter(fresh, path)
        loaded = adapter_state_dict(fresh)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
        print(f"{path}: loaded in one process, identical")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
