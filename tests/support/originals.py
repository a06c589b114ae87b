"""The layers of MOELoRA-peft and of MING-MOE: their formulas as loops, with their parameter names.

The formulas and the names are those of the papers and of the published checkpoints.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from moelora_kernels import adapter_parameters

TASKS, TASK_DIM = 16, 8


class Weighted(nn.Module):
    """A module with one parameter, `weight`."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * 0.3)


class Expert(nn.Module):
    """A matrix with two names, `mlp.weight` and `weight`."""

    def __init__(self, *shape):
        super().__init__()
        self.mlp = Weighted(*shape)
        self.weight = self.mlp.weight


def parent_of(**modules):
    """Return a module that has these children."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


class TaskLora(nn.Module):
    """y = W x + b + alpha / r sum_e w_e B_e A_e x, x [L, B, I], w [B, E]; r is the total rank.

    Every layer has an embedding and a gate. If the model has a shared gate, no forward reads them.

    shared: a list with the model that has the shared gate (a list, because the model must not
        become a child of its layer), or None.
    """

    def __init__(self, base, experts, rank, alpha, shared=None):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.shared = shared
        o, i = base.weight.shape
        self.lora_A = parent_of(
            loraA=nn.ModuleList(Expert(rank // experts, i) for _ in range(experts))
        )
        self.lora_B = parent_of(
            loraB=nn.ModuleList(Expert(o, rank // experts) for _ in range(experts))
        )
        self.lora_task_embedding = Weighted(TASKS + 1, TASK_DIM)
        self.lora_gate = parent_of(GateL=Weighted(experts, TASK_DIM))
        self.tasks = None

    def gate(self):
        """Return w [B, E] of `tasks`: one task id per sample, or several, padded with 0."""
        module = self if self.shared is None else self.shared[0]
        embedding = module.lora_task_embedding.weight
        vectors = []
        for ids in module.tasks.tolist():
            ids = [ids] if isinstance(ids, int) else [task for task in ids if task != 0]
            vectors.append(torch.stack([embedding[task] for task in ids]).mean(dim=0))
        logits = torch.stack(vectors).float() @ module.lora_gate.GateL.weight.float().t()
        return logits.softmax(dim=1)

    def forward(self, x):
        y = nn.functional.linear(x, self.base.weight, self.base.bias)
        w = self.gate()
        for e, (a, b) in enumerate(zip(self.lora_A.loraA, self.lora_B.loraB, strict=True)):
            delta = (x @ a.weight.t()) @ b.weight.t()
            y = y + (self.scale * w[:, e]).to(y.dtype)[None, :, None] * delta
        return y


class MoLora(nn.Module):
    """y = W x + b + s sum_j softmax(g[top])_j B_j A_j x + s B_s A_s x, g = W_g x + b_g.

    shared: the number of shared experts, which are one pair A_s, B_s of rank r * shared.
    rs: whether s is alpha / sqrt(r) instead of alpha / r.
    """

    def __init__(self, base, experts, rank, alpha, shared=0, rs=False):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / (rank**0.5 if rs else rank)
        o, i = base.weight.shape
        pairs = [
            {f"lora_A_{e}": Weighted(rank, i), f"lora_B_{e}": Weighted(o, rank)}
            for e in range(experts)
        ]
        self.experts = nn.ModuleList(parent_of(**pair) for pair in pairs)
        self.switch = Weighted(experts, i)
        self.switch.bias = nn.Parameter(torch.randn(experts))
        if shared:
            self.share_experts = parent_of(
                lora_A=Weighted(rank * shared, i), lora_B=Weighted(o, rank * shared)
            )

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        logits = tokens.float() @ self.switch.weight.float().t() + self.switch.bias.float()
        outputs = []
        for token, row in zip(tokens, logits, strict=True):
            order = sorted(range(len(row)), key=lambda e: (-row[e].item(), e))[:2]
            w = torch.stack([row[e] for e in order]).softmax(dim=0)
            y = self.base(token)
            for j, e in enumerate(order):
                a = getattr(self.experts[e], f"lora_A_{e}").weight
                b = getattr(self.experts[e], f"lora_B_{e}").weight
                y = y + (self.scale * w[j]).to(y.dtype) * (b @ (a @ token))
            if hasattr(self, "share_experts"):
                pair = self.share_experts
                y = y + self.scale * (pair.lora_B.weight @ (pair.lora_A.weight @ token))
            outputs.append(y)
        return torch.stack(outputs).view(*x.shape[:-1], -1)


class PlainLora(nn.Module):
    """y = W x + b + alpha / r B A x"""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        o, i = base.weight.shape
        self.lora_A, self.lora_B = Weighted(rank, i), Weighted(o, rank)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A.weight.t()) @ self.lora_B.weight.t()


class Block(nn.Module):
    """Two linears of attention and two of the MLP, with the names of ChatGLM or Qwen2."""

    def __init__(self, names, width, bias):
        super().__init__()
        (first, first_out), (second, second_in), (third, third_out), (fourth, fourth_in) = names
        self.paths = [first, second, third, fourth]
        sizes = ((width, first_out), (second_in, width), (width, third_out), (fourth_in, width))
        for path, (i, o) in zip(self.paths, sizes, strict=True):
            parent, name = path.split(".")
            if not hasattr(self, parent):
                self.add_module(parent, nn.Module())
            getattr(self, parent).add_module(name, nn.Linear(i, o, bias))

    def forward(self, x):
        first, second, third, fourth = (self.get_submodule(path) for path in self.paths)
        x = x + second(first(x).tanh())
        return x + fourth(third(x).tanh())


class Model(nn.Module):
    """Blocks under a path of two names, such as transformer.layers."""

    def __init__(self, path, names, width, depth, bias):
        super().__init__()
        parent, child = path.split(".")
        self.path = path
        self.add_module(parent, nn.Module())
        blocks = [Block(names, width, bias) for _ in range(depth)]
        getattr(self, parent).add_module(child, nn.Sequential(*blocks))

    def forward(self, x):
        return self.get_submodule(self.path)(x)


def chatglm(width=8, inner=12, depth=2):
    """Return frozen linears with biases and the names of ChatGLM-6B."""
    torch.manual_seed(0)
    names = (
        ("attention.query_key_value", 3 * width), ("attention.dense", 3 * width),
        ("mlp.dense_h_to_4h", inner), ("mlp.dense_4h_to_h", inner),
    )  # fmt: skip
    return Model("transformer.layers", names, width, depth, bias=True).requires_grad_(False)


def qwen(width=8, inner=12, depth=2):
    """Return frozen linears without biases and with the names of Qwen1.5."""
    torch.manual_seed(0)
    names = (
        ("self_attn.q_proj", width), ("self_attn.o_proj", width),
        ("mlp.up_proj", inner), ("mlp.down_proj", inner),
    )  # fmt: skip
    return Model("model.layers", names, width, depth, bias=False).requires_grad_(False)


def replace(model, make, name_part=""):
    """Replace every linear whose name contains `name_part` by make(linear). Return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name_part in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def copy_of(parameter):
    """Return a copy of a parameter without its graph."""
    return parameter.detach().clone()


def state_of(original, adapter="", value=copy_of):
    """Return the adapters of an original model under the keys of its file; aliases included.

    adapter: the name of the adapter that the keys contain, with a dot before it; "" for none.
    value: a function of a parameter. Parameters for which it returns None are left out.
    """
    state = {}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad or value(parameter) is None:
            continue
        key = name if name.startswith("lora_") else f"base_model.model.{name}"
        for word in ("lora_A", "lora_B", "lora_gate", "lora_task_embedding"):
            key = key.replace(f"{word}.", f"{word}{adapter}.")
        state[key] = value(parameter)
    return state


def gradient_model(model):
    """Return a copy of `model` whose adapters have the values of their gradients."""
    result = copy.deepcopy(model)
    pairs = zip(adapter_parameters(result), adapter_parameters(model), strict=True)
    for parameter, trained in pairs:
        parameter.data.copy_(trained.grad)
    return result


def snapshot(model):
    """Return a copy of every parameter and buffer of a model, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
