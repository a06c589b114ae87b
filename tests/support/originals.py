"""MOELoRA-peft's and MING's layers from their formulas, as loops, with state in their layouts."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moelora_kernels import adapter_parameters

TASKS, DIM = 16, 8


class Weighted(nn.Module):
    """One tensor under the name `weight`."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * 0.3)


class Expert(nn.Module):
    """A matrix under two names, `mlp.weight` and `weight`."""

    def __init__(self, *shape):
        super().__init__()
        self.mlp = Weighted(*shape)
        self.weight = self.mlp.weight


def named(**modules):
    """Modules under names, as children of one module."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


class TaskLora(nn.Module):
    """y = W x + b + alpha / r sum_e w_e B_e A_e x, x [S, B, I], w [B, E]; r is the total rank.

    Every layer has an embedding and a gate; with a shared gate they are dead weights. `shared`
    holds that of the model in a list, so that it is no child.
    """

    def __init__(self, base, experts, rank, alpha, shared=None):
        super().__init__()
        self.base, self.scale, self.shared = base, alpha / rank, shared
        o, i = base.weight.shape
        self.lora_A = named(loraA=nn.ModuleList(Expert(rank // experts, i) for _ in range(experts)))
        self.lora_B = named(loraB=nn.ModuleList(Expert(o, rank // experts) for _ in range(experts)))
        self.lora_task_embedding = Weighted(TASKS + 1, DIM)
        self.lora_gate = named(GateL=Weighted(experts, DIM))
        self.tasks = None

    def gate(self):
        owner = self if self.shared is None else self.shared[0]
        ids, table = owner.tasks, owner.lora_task_embedding.weight
        rows = []
        for row in ids.tolist():
            several = [row] if isinstance(row, int) else [task for task in row if task != 0]
            rows.append(torch.stack([table[task] for task in several]).mean(dim=0))
        logits = torch.stack(rows).float() @ owner.lora_gate.GateL.weight.float().t()
        return logits.softmax(dim=1)

    def forward(self, x):
        y = nn.functional.linear(x, self.base.weight, self.base.bias)
        w = self.gate()
        for e, (a, b) in enumerate(zip(self.lora_A.loraA, self.lora_B.loraB, strict=True)):
            delta = (x @ a.weight.t()) @ b.weight.t()
            y = y + (self.scale * w[:, e]).to(y.dtype)[None, :, None] * delta
        return y


class MoLora(nn.Module):
    """y = W x + b + s sum_j softmax(g[top])_j B_j A_j x + s B_s A_s x, g = W_s x + b_s."""

    def __init__(self, base, experts, rank, alpha, shared=0, rs=False):
        super().__init__()
        self.base, self.scale = base, alpha / (rank**0.5 if rs else rank)
        o, i = base.weight.shape
        pairs = [
            {f"lora_A_{e}": Weighted(rank, i), f"lora_B_{e}": Weighted(o, rank)}
            for e in range(experts)
        ]
        self.experts = nn.ModuleList(named(**pair) for pair in pairs)
        self.switch = Weighted(experts, i)
        self.switch.bias = nn.Parameter(torch.randn(experts))
        if shared:
            self.share_experts = named(
                lora_A=Weighted(rank * shared, i), lora_B=Weighted(o, rank * shared)
            )

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        logits = tokens.float() @ self.switch.weight.float().t() + self.switch.bias.float()
        out = []
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
            out.append(y)
        return torch.stack(out).view(*x.shape[:-1], -1)


class PlainLora(nn.Module):
    """y = W x + b + alpha / r B A x"""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        o, i = base.weight.shape
        self.lora_A, self.lora_B = Weighted(rank, i), Weighted(o, rank)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A.weight.t()) @ self.lora_B.weight.t()


class Block(nn.Module):
    """Attention and MLP of two linears each, under the names of ChatGLM or Qwen2."""

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
    """Blocks under a name of two parts, such as transformer.layers."""

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
    """Linears with biases under the names of ChatGLM-6B."""
    torch.manual_seed(0)
    names = (
        ("attention.query_key_value", 3 * width), ("attention.dense", 3 * width),
        ("mlp.dense_h_to_4h", inner), ("mlp.dense_4h_to_h", inner),
    )  # fmt: skip
    return Model("transformer.layers", names, width, depth, True)


def qwen(width=8, inner=12, depth=2):
    """Linears without biases under the names of Qwen1.5, two of attention and two of the MLP."""
    torch.manual_seed(0)
    names = (
        ("self_attn.q_proj", width), ("self_attn.o_proj", width),
        ("mlp.up_proj", inner), ("mlp.down_proj", inner),
    )  # fmt: skip
    return Model("model.layers", names, width, depth, False)


def put(model, make, names=""):
    """Replace every linear whose name contains `names` by make(linear), in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and names in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def adapters(original, infix="", of=lambda parameter: parameter.detach().clone()):
    """Every adapter of the original under its key on disk, both names of those that have two.

    infix: the name of an adapter with a dot in front, where the original keeps them by name. of:
    what to take of a parameter; left out where that is None.
    """
    state = {}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        if ".base." in name or of(parameter) is None:
            continue
        key = name if name.startswith("lora_") else f"base_model.model.{name}"
        for word in ("lora_A", "lora_B", "lora_gate", "lora_task_embedding"):
            key = key.replace(f"{word}.", f"{word}{infix}.")
        state[key] = of(parameter)
    return state


def of_gradients(model):
    """A copy of `model` that holds its gradients in place of what it trains."""
    twin = copy.deepcopy(model)
    for own, other in zip(adapter_parameters(twin), adapter_parameters(model), strict=True):
        own.data.copy_(other.grad)
    return twin


def snapshot(model):
    """Everything a model holds, to compare with later."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bits(found, expected):
    """Same keys, dtypes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
