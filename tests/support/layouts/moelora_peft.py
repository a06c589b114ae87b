"""The layout of MOELoRA-peft: models, states that do not fit, and options that it cannot store.

`support.layouts.ming` has the same names.
"""

from __future__ import annotations

import torch

from moelora_kernels import MoeLoraConfig, adapter_parameters, replace_linears, set_tasks
from moelora_kernels.checkpoints import export_moelora_peft, load_moelora_peft
from support.originals import (
    TASK_DIM,
    TASKS,
    TaskLora,
    Weighted,
    chatglm,
    parent_of,
    replace,
    state_of,
)

NAME = "MOELoRA-peft"
load, export = load_moelora_peft, export_moelora_peft
EXPERTS, RANK, ALPHA = 4, 8, 16.0
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CONFIG = MoeLoraConfig.preset(
    "moelora", num_experts=EXPERTS, rank=RANK // EXPERTS, alpha=ALPHA, num_tasks=TASKS,
    task_embedding_dim=TASK_DIM, dropout=0.0, batch_dim=1,
)  # fmt: skip
# Name -> config: one gate for the model, or one per layer.
VARIANTS = {
    "shared": CONFIG,
    "per_layer": CONFIG.replace(task_gate="per_layer"),
}
# The name of the adapter in the keys, with its dot.
ADAPTERS = {"unnamed": "", "default": ".default", "clinic": ".clinic"}
# x [sequence, batch, I], and the task ids of each sample.
BATCH_SHAPE = (5, 3)
TASK_IDS = {"one": [3, 16, 1], "several": [[3, 0, 5], [16, 2, 1], [0, 0, 7]]}

FIRST = "transformer.layers.0.attention.query_key_value"
A0 = f"base_model.model.{FIRST}.lora_A.loraA.0"
GATE = "lora_gate.GateL.weight"
# The keys of the shared gate.
SHARED_GATE = {"lora_task_embedding.weight", GATE}
# A key of the layout, and a frozen weight of the model.
KEY, FROZEN = GATE, f"{FIRST}.bias"
base_model = chatglm


def original(variant="shared"):
    """Return the original over a small ChatGLM, with one gate or one per layer."""
    model = chatglm()
    torch.manual_seed(1)
    shared = None
    if variant == "shared":
        model.lora_task_embedding = Weighted(TASKS + 1, TASK_DIM)
        model.lora_gate = parent_of(GateL=Weighted(EXPERTS, TASK_DIM))
        shared = [model]
    return replace(model, lambda base: TaskLora(base, EXPERTS, RANK, ALPHA, shared))


def ours(variant="shared", dtype=torch.float32, config=None):
    """Return the layers of the package over the same linears, with other adapters.

    config: the config of all linears, by default that of the variant.
    """
    model = chatglm().to(dtype)
    replace_linears(model, config or VARIANTS[variant], TARGETS)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_()
    return model


def set_task_ids(ids, model, *originals):
    """Set the task ids of the batch in a model of the package and in originals."""
    set_tasks(model, ids)
    for source in originals:
        for module in source.modules():
            module.tasks = torch.tensor(ids)


def exported_state(source):
    """Return the state that `export` returns for the adapters of `source`.

    With a shared gate, the gates of the layers are left out.
    """
    state = state_of(source)
    if not SHARED_GATE.issubset(state):
        return state
    return {k: t for k, t in state.items() if k in SHARED_GATE or not is_gate(k)}


def is_gate(key):
    """Return whether a key is a tensor of a gate, of a layer or of the model."""
    return key.endswith(tuple(SHARED_GATE))


def gradients_of(source):
    """Return the gradients of the original. Gates that no forward reads have none."""
    return state_of(source, value=lambda p: p.grad)


def may_be_zero(key):
    """Return whether the gradient of a key may be zero: never, every token uses all experts."""
    return False


# Name -> (a change of the state, the error).
BROKEN = {
    "a gate renamed": (
        lambda state: {k.replace("GateL", "Gate"): t for k, t in state.items()},
        r"unexpected: lora_gate\.Gate\.weight",
    ),
    "the task embedding missing": (
        lambda state: {k: t for k, t in state.items() if k != "lora_task_embedding.weight"},
        r"missing: lora_task_embedding\.weight",
    ),
    "an expert missing": (
        lambda state: {k: t for k, t in state.items() if ".loraB.3." not in k},
        rf"missing: {FIRST}\.lora_B\.loraB\.3\.mlp\.weight",
    ),
    "an expert more": (
        lambda state: {
            **state,
            f"{A0}.mlp.weight".replace("loraA.0", "loraA.4"): state[f"{A0}.mlp.weight"],
        },
        r"unexpected: .*loraA\.4\.mlp\.weight",
    ),
    "another shape": (
        lambda state: {**state, f"{A0}.mlp.weight": torch.zeros(3, 8)},
        rf"shape of {A0}\.mlp\.weight: expected \[2, 8\], got \[3, 8\]",
    ),
    "an alias that differs": (
        lambda state: {**state, f"{A0}.weight": state[f"{A0}.weight"] + 1e-3},
        rf"{A0}\.weight: differs from its alias {A0}\.mlp\.weight",
    ),
    "a sparse tensor with an alias": (
        lambda state: {**state, f"{A0}.mlp.weight": state[f"{A0}.mlp.weight"].to_sparse()},
        rf"{A0}\.mlp\.weight: expected a dense tensor, got a sparse_coo one",
    ),
    "a sparse gate that no forward reads": (
        lambda state: {**state, f"{FIRST}.{GATE}": torch.zeros(4, 8).to_sparse()},
        r"lora_gate\.GateL\.weight: expected a dense tensor, got a sparse_coo one",
    ),
    "two adapters": (
        lambda state: {
            k.replace("lora_A.", "lora_A.a.").replace("lora_B.", "lora_B.b."): t
            for k, t in state.items()
        },
        r"several adapters, expected one",
    ),
}

# Name -> (options of a config that the layout cannot store, the error).
REFUSED = {
    "ranks that differ": (dict(rank=(1, 2, 2, 3)), "share='none' and equal ranks"),
    "shared A": (dict(share="A", dropout_mask="shared"), "share='none' and equal ranks"),
    "linear router": (dict(router="linear", batch_dim=0), "router='task'"),
    "shared expert": (dict(shared_expert="always"), "shared_expert='none'"),
}


def refused_model(name):
    """Return a model with the options of a case of REFUSED."""
    return ours(config=CONFIG.replace(**REFUSED[name][0]))
