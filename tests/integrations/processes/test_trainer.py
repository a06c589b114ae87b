"""Hugging Face's Trainer and TRL's SFTTrainer in two processes: DDP, FSDP1, FSDP2."""

from __future__ import annotations

import pytest
import torch

for name in ("transformers", "datasets", "accelerate", "peft"):
    pytest.importorskip(name)

from peft import PeftModel, get_peft_model  # noqa: E402
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from moelora_kernels import adapter_state_dict, load_adapter, save_adapter  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.compare import assert_same  # noqa: E402
from support.models import language_model  # noqa: E402
from support.processes import run_processes  # noqa: E402
from support.trainers import (  # noqa: E402
    CLOSE,
    PROJECTIONS,
    batches_of,
    loop,
    make_model,
    make_trainer,
)

pytestmark = pytest.mark.exhaustive

MING = dict(top_k=1, normalize="none", score="softmax")
TASKS = dict(task_gate="per_layer")


def model_of(kind):
    if kind != "peft":
        return make_model(kind, **(MING if kind == "ming" else TASKS))
    base = language_model().requires_grad_(False).train()
    config = MoeLoraPeftConfig(
        preset="ming", target_modules=PROJECTIONS, num_experts=4, rank=2, dropout=0.0,
        aux={"load_balance": 0.5, "z": 0.1}, **MING,
    )  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(base, config)


def use_fsdp():
    """Let accelerate use FSDP on a CPU. It has FSDP for accelerators only, and takes DDP else."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    start = AcceleratorState.__init__

    def start_with_fsdp(self, *args, **kwargs):
        state = PartialState(cpu=True)
        if state.distributed_type is DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU
            # FSDP1 compares it with the device of the Parameters.
            state.device = torch.device("cpu")
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = start_with_fsdp


def engine_arguments(engine):
    if engine == "ddp":
        return dict(ddp_backend="gloo", ddp_find_unused_parameters=False)
    use_fsdp()
    config = dict(version=int(engine[-1]), transformer_layer_cls_to_wrap=["Qwen2DecoderLayer"])
    if engine == "fsdp1":
        config |= dict(use_orig_params=True, sync_module_states=False)
    return dict(fsdp=True, fsdp_config=config)


def run(rank, kind, engine, folder):
    options = engine_arguments(engine)
    trainer = make_trainer(model_of(kind), folder, **options)
    trainer.train()
    engines = {name for kind, name in ENGINES.items() if isinstance(trainer.model_wrapped, kind)}
    assert engines == {engine}
    if kind == "peft":
        trainer.save_model(str(folder / "saved"))
    else:
        save_adapter(trainer.model, folder / "saved")
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return batches_of(trainer), logs


ENGINES = {DistributedDataParallel: "ddp", FullyShardedDataParallel: "fsdp1", FSDPModule: "fsdp2"}
CASES = [("peft", "ddp"), ("peft", "fsdp1"), ("peft", "fsdp2"), ("ming", "fsdp2")]
CASES += [("moelora", "fsdp2")]


@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_trainer(kind, engine, tmp_path):
    """The model that one process loads from the folder was trained as by one loop."""
    (batches, logs), (other, _) = run_processes(run, 2, tmp_path, kind, engine, tmp_path)
    expected = model_of(kind)
    losses, _ = loop(expected, [list(pair) for pair in zip(batches, other, strict=True)])
    assert logs == pytest.approx(losses, rel=1e-4)
    if kind == "peft":
        loaded = PeftModel.from_pretrained(language_model(), tmp_path / "saved")
    else:
        loaded = model_of(kind)
        load_adapter(loaded, tmp_path / "saved")
    assert_same(adapter_state_dict(loaded), adapter_state_dict(expected), **CLOSE)
