"""A tiny model that several processes train, its batches, and the same training in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from moelora_kernels import collect_aux_loss, link_siblings, set_tasks
from moelora_kernels.nn.sharding import gathered
from support.models import add_preset, language_model

LINEARS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
AUX = {"load_balance": 0.5, "z": 0.1}
TASKS = dict(num_experts=3, num_tasks=4, task_embedding_dim=6, dropout=0.0)
# What people train: token gates with auxiliary losses and linked siblings, a task gate that all
# layers share, one for each layer, whole-FFN experts, and token gates under PEFT.
MODELS = {
    "ming": dict(preset="ming", num_experts=4, rank=2, aux=AUX, dropout=0.0),
    "shared gate": dict(preset="moelora", rank=2, **TASKS),
    "layer gates": dict(preset="moelora", rank=2, task_gate="per_layer", **TASKS),
    "mixlora": dict(preset="mixlora", num_experts=4, rank=2, aux=AUX, dropout=0.0),
    "peft": dict(preset="ming", num_experts=4, rank=2, aux=AUX, dropout=0.0),
    "peft shared gate": dict(preset="moelora", rank=2, **TASKS),
    "peft gates": dict(preset="moelora", rank=2, task_gate="per_layer", **TASKS),
}
# Sequences of a step over all processes, and their tokens. 1, 2 and 4 processes share them.
SEQUENCES, LENGTH = 4, 6
# float32: every process adds its tokens in the same order as one process does. Then the parts of
# the processes are added in another order, at most 4 roundings of 6e-8 for a step, and a router
# carries the difference of one step into the next one. Relative to the largest entry of a tensor.
ROUNDING = 2e-6
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def make_model(kind: str, **more) -> nn.Module:
    """Return a frozen Qwen2 of two layers in training, with adapters that are not zero.

    more: further options of the preset.
    """
    options = {**MODELS[kind], **more}
    preset = options.pop("preset")
    base = language_model().train().requires_grad_(False)
    if not kind.startswith("peft"):
        model = add_preset(base, preset, LINEARS, **options)
        if kind == "ming":
            link_siblings(model)
        return damped(model)
    from peft import get_peft_model

    from moelora_kernels.peft import MoeLoraPeftConfig
    from support.peft_models import randomise

    config = MoeLoraPeftConfig(preset=preset, target_modules=LINEARS, **options)
    return damped(randomise(get_peft_model(base, config)).train())


@torch.no_grad()
def damped(model: nn.Module) -> nn.Module:
    """Divide the adapters by five, so that three steps of SGD do not diverge. Return the model."""
    for parameter in trained(model).values():
        parameter.mul_(0.2)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the token ids [SEQUENCES, LENGTH] and the tasks [SEQUENCES] of a step."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 40, (SEQUENCES, LENGTH), generator=draw)
    return ids, torch.randint(1, 5, (SEQUENCES,), generator=draw)


def parts(step: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batch of a step in `count` parts of the same size."""
    return list(zip(*(tensor.chunk(count) for tensor in batch(step)), strict=True))


def loss_of(model: nn.Module, part: tuple[Tensor, Tensor], uses_tasks: bool) -> Tensor:
    """Return the mean loss of the tokens of a part, with the auxiliary losses of the layers."""
    ids, tasks = part
    if uses_tasks:
        set_tasks(model, tasks)
    return model(input_ids=ids, labels=ids).loss + collect_aux_loss(model)


def uses_tasks(kind: str) -> bool:
    """Return whether the gates of a model belong to tasks."""
    return MODELS[kind]["preset"] == "moelora"


def backward(
    model: nn.Module,
    kind: str,
    step: Sequence[tuple[Tensor, Tensor]],
    before: Callable[[int, int], None] = lambda micro, count: None,
) -> None:
    """Add the gradients of the mean loss of the parts of a step; see `train` for `before`."""
    for micro, part in enumerate(step):
        before(micro, len(step))
        (loss_of(model, part, uses_tasks(kind)) / len(step)).backward()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum: unlike Adam's, its steps are proportional to the gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(
    model: nn.Module,
    kind: str,
    steps: Sequence[Sequence[tuple[Tensor, Tensor]]],
    before: Callable[[int, int], None] = lambda micro, count: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[dict[str, Tensor]]:
    """Train one step for each list of parts; the loss of a step is the mean of its parts.

    before(micro, count): called before the forward of part `micro` of `count`.

    Returns:
        The gradients of the first step and the trained values after the last one, by name.
    """
    optimizer = sgd(model) if optimizer is None else optimizer
    first: dict[str, Tensor] = {}
    for step in steps:
        backward(model, kind, step, before)
        first = first or {name: gathered(p.grad).clone() for name, p in trained(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    return [first, {name: gathered(p.detach()).clone() for name, p in trained(model).items()}]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the Parameters that train, by their name in the model without DDP."""
    named = model.named_parameters()
    return {name.removeprefix("module."): p for name, p in named if p.requires_grad}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Return the adapters and the optimizer as torch.distributed.checkpoint stores them."""
    adapters, averages = get_state_dict(model, optimizer, options=TRAINED)
    return {"model": adapters, "optimizer": averages}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    """Set the adapters and the optimizer to a state of `state_of`."""
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED,
    )


def one_process(kind: str, count: int, steps: int, micro: int = 1) -> list[dict[str, Tensor]]:
    """Return what `count` processes must get that train `steps` steps of `micro` parts each."""
    return train(make_model(kind), kind, [parts(step, count * micro) for step in range(steps)])


def part_of(rank: int, count: int, step: int, micro: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return the parts of a step that belong to a process: neighbours."""
    return parts(step, count * micro)[rank * micro : (rank + 1) * micro]


def assert_close(found: list[dict], expected: list[dict], rounding: float = ROUNDING) -> None:
    """Compare what `train` returned: names, and |difference| <= rounding * max |expected|."""
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.keys() == wanted.keys()
        for name, tensor in wanted.items():
            scale = tensor.abs().max().item()
            torch.testing.assert_close(
                actual[name],
                tensor,
                rtol=0.0,
                atol=rounding * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )
