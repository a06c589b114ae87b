"""The loss curve of the fine-tuning example is that of plain loops over the experts."""

import copy

import promptcblue as data
import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraLinear, adapter_parameters, set_tasks
from support.example import SMALL, example
from support.selection import exhaustive


class LoraLoop(nn.Module):
    """y = x Wt + b + s x At Bt, with copies of a layer's A and B, one per expert."""

    def __init__(self, layer: MoeLoraLinear):
        super().__init__()
        config, experts = layer.config, layer.config.num_experts
        self.base = layer.base_layer
        self.scale = config.alpha / (config.rank * (experts if config.scaling == "alpha/R" else 1))
        blocks = zip(layer.lora_A.chunk(experts), layer.lora_B.chunk(experts, dim=1), strict=True)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for a, b in blocks:
            self.a.append(nn.Parameter(a.detach().clone()))
            self.b.append(nn.Parameter(b.detach().clone()))

    def forward(self, x):
        return self.base(x) + (x @ self.a[0].t()) @ self.b[0].t() * self.scale


class TaskGate(nn.Module):
    """w = softmax(G e_task), computed once per forward of the model: MOELoRA's shared gate."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.embedding = copy.deepcopy(router.embedding)
        self.gate = copy.deepcopy(router.gate)

    def set(self, ids):
        self.weights = self.gate(self.embedding(ids)).softmax(-1)


class MoeloraLoop(LoraLoop):
    """y = x Wt + b + s sum_e w_e B_e A_e x, in a loop over the experts."""

    def __init__(self, layer: MoeLoraLinear, gate: TaskGate):
        super().__init__(layer)
        self.gate = gate

    def forward(self, x):
        y = self.base(x)
        for e, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            weight = self.gate.weights[:, e].reshape(-1, 1, 1)
            y = y + (x @ a.t()) @ b.t() * self.scale * weight
        return y


class MingLoop(LoraLoop):
    """y = x Wt + b + s sum_j softmax(v)_j B_e A_e x, e = experts_j: v are the K largest logits.

    All experts compute all tokens; then the K experts of each token are gathered.
    """

    def __init__(self, layer: MoeLoraLinear):
        super().__init__(layer)
        self.switch = copy.deepcopy(layer.router)
        self.top_k = layer.config.top_k

    def forward(self, x):
        logits, experts = torch.topk(self.switch(x), self.top_k, dim=-1)
        weights = logits.softmax(-1)
        pairs = zip(self.a, self.b, strict=True)
        outputs = torch.stack([(x @ a.t()) @ b.t() * self.scale for a, b in pairs], dim=-2)
        rows = experts[..., None].expand(*experts.shape, outputs.shape[-1])
        return self.base(x) + (outputs.gather(-2, rows) * weights[..., None]).sum(-2)


def with_loops(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which loops with the same weights replace the layers."""
    model, gate = copy.deepcopy(model), None
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, MoeLoraLinear):
            continue
        if layer.config.router == "task":
            gate = gate or TaskGate(layer.router)
            loop = MoeloraLoop(layer, gate)
        else:
            loop = LoraLoop(layer) if layer.router is None else MingLoop(layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, loop)
    assert not any(isinstance(module, MoeLoraLinear) for module in model.modules())
    model.task_gate = gate
    return model


def with_exact_norms(model: nn.Module) -> nn.Module:
    """Replace the norms of a model, which compute in float32, by norms that keep float64."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Qwen2RMSNorm":
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
    return model


@pytest.mark.parametrize(
    ("preset", "lr"),
    (
        pytest.param("moelora", 1e-2, marks=exhaustive),
        # At a higher rate a rounding changes the expert of a token, the two float32 trainings
        # differ from there, and the budget (0.27 at 1e-2, seed 0) allows any error.
        ("ming", 2e-3),
    ),
)
def test_the_loss_curve_is_that_of_plain_expert_loops(preset, lr):
    """The layers of the package and the loops do the same training.

    The loops in float64 are the truth. In float32 the largest error of the package over the curve
    is at most twice the largest error of the loops, plus one rounding of the loss (measured: 0.2
    to 0.4 of that budget, about 2e-6). In float64 the two differ by roundings.
    """
    steps, distinct = 25, 5
    train, _ = data.generate(0)
    tasks = {name: number for number, name in enumerate(sorted({s.task for s in train}), 1)}
    encoder = data.Encoder(data.ByteTokenizer(), tasks, 48, "cpu")
    batches = [encoder.batch(group) for group in data.shuffled(train, 4, distinct, 0)]
    batches *= steps // distinct
    args = example.parse_arguments([*SMALL, "--pretrain-steps", "40"], sorted(example.PLANS))
    torch.manual_seed(0)
    model = with_exact_norms(example.pretrain(encoder, train, args))
    example.add_adapters(model, example.make_plan(preset, 5, dropout=0.0))
    loops = with_loops(model)

    def loop_tasks(model, ids):
        model.task_gate.set(ids)

    def curve(model, set_ids) -> torch.Tensor:
        trainable = [p for p in model.parameters() if p.requires_grad]
        schedule = example.Schedule(steps, lr=lr)
        losses = example.fit(
            model, trainable, batches, schedule, tasks=set_ids if preset == "moelora" else None
        )
        return torch.tensor(losses, dtype=torch.float64)

    count = sum(p.numel() for p in adapter_parameters(model))
    assert count == sum(p.numel() for p in loops.parameters() if p.requires_grad)
    truth = curve(copy.deepcopy(loops).double(), loop_tasks)
    exact = curve(copy.deepcopy(model).double(), set_tasks)
    plain, ours = curve(loops, loop_tasks), curve(model, set_tasks)

    assert truth[-distinct:].mean() < 0.9 * truth[:distinct].mean(), "nothing was learned"
    rounding = torch.finfo(torch.float32).eps * truth.max()
    budget = 2 * (plain - truth).abs().max() + rounding
    worst = (ours - truth).abs().max()
    assert worst <= budget, f"error {worst:.2e}, budget {budget:.2e}"
    # Measured: 3e-15.
    assert (exact - truth).abs().max() <= 1e-12 * truth.max()
