"""The layout of MING-MOE: models, states that do not fit, and options that it cannot store.

`support.layouts.moelora_peft` has the same names.
"""

from __future__ import annotations

import torch

from moelora_kernels import MoeLoraConfig, adapter_parameters, replace_linears
from moelora_kernels.checkpoints import export_ming, load_ming
from support.originals import MoLora, PlainLora, qwen, replace, state_of

NAME = "MING"
load, export = load_ming, export_ming
EXPERTS, RANK, ALPHA = 4, 3, 6.0
CONFIG = MoeLoraConfig.preset("ming", num_experts=EXPERTS, rank=RANK, alpha=ALPHA)
LORA = MoeLoraConfig.preset("lora", rank=RANK, alpha=ALPHA)
# Two shared experts are one of twice the rank, with the scaling of the others.
SHARED = CONFIG.replace(shared_expert="always", shared_rank=2 * RANK, scaling=ALPHA / RANK)
RSLORA = CONFIG.replace(scaling="alpha/sqrt(r)")
# Name -> config of the MLP, options of the original, whether attention has plain LoRA.
VARIANTS = {
    "public": (CONFIG, {}, False),
    "shared": (SHARED, {"shared": 2}, False),
    "rslora": (RSLORA, {"rs": True}, False),
    "public_attention": (CONFIG, {}, True),
    "shared_attention": (SHARED, {"shared": 2}, True),
    "rslora_attention": (RSLORA, {"rs": True}, True),
}
# The name of the adapter in the keys, with its dot.
ADAPTERS = {"unnamed": "", "default": ".default"}
# x [batch, sequence, I]. MING has no tasks.
BATCH_SHAPE = (3, 5)
TASK_IDS = {"without_tasks": None}

FIRST = "model.layers.0.mlp.up_proj"
A0 = f"base_model.model.{FIRST}.experts.0.lora_A_0.weight"
# A key of the layout, and a frozen weight of the model.
KEY, FROZEN = A0, f"{FIRST}.weight"
base_model = qwen


def original(variant="public"):
    """Return the original over a small Qwen: mixtures in the MLP."""
    _, options, attention = VARIANTS[variant]
    model = qwen()
    torch.manual_seed(1)
    replace(model, lambda base: MoLora(base, EXPERTS, RANK, ALPHA, **options), ".mlp.")
    if attention:
        replace(model, lambda base: PlainLora(base, RANK, ALPHA), "_attn.")
    return model


def ours(variant="public", dtype=torch.float32, config=None):
    """Return the layers of the package over the same linears, with other adapters.

    config: the config of the MLP, by default that of the variant.
    """
    variant_config, _, attention = VARIANTS[variant]
    model = qwen().to(dtype)
    replace_linears(model, config or variant_config, ["up_proj", "down_proj"])
    if attention:
        replace_linears(model, LORA, ["q_proj", "o_proj"])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_()
    return model


def set_task_ids(ids, model, *originals):
    """Do nothing: MING has no tasks."""


def exported_state(source):
    """Return the state that `export` returns for the adapters of `source`."""
    return state_of(source)


def gradients_of(source):
    """Return the gradients of the original: zero for an expert without tokens."""
    return state_of(source, value=lambda p: torch.zeros_like(p) if p.grad is None else p.grad)


def may_be_zero(key):
    """Return whether the gradient of a key may be zero: an expert may have no tokens."""
    return ".experts." in key


# Name -> (a change of the state, the error).
BROKEN = {
    "a router renamed": (
        lambda state: {k.replace("switch.bias", "gate.bias"): t for k, t in state.items()},
        r"unexpected: .*up_proj\.gate\.bias",
    ),
    "routers missing": (
        # Like molora.bin in the original's intermediate checkpoints.
        lambda state: {k: t for k, t in state.items() if "switch" not in k},
        rf"missing: {FIRST}\.switch\.weight",
    ),
    "an expert missing": (
        lambda state: {k: t for k, t in state.items() if ".experts.3." not in k},
        rf"missing: {FIRST}\.experts\.3\.lora_A_3\.weight",
    ),
    "an expert more": (
        lambda state: {**state, A0.replace("0.lora_A_0", "4.lora_A_4"): state[A0]},
        r"unexpected: .*experts\.4\.lora_A_4\.weight",
    ),
    "another expert's number": (
        lambda state: {
            k.replace("experts.1.lora_A_1", "experts.1.lora_A_2"): t for k, t in state.items()
        },
        r"unexpected: .*experts\.1\.lora_A_2\.weight",
    ),
    "another shape": (
        lambda state: {**state, A0: torch.zeros(RANK, 9)},
        r"shape of .*experts\.0\.lora_A_0\.weight: expected \[3, 8\], got \[3, 9\]",
    ),
    "shared experts": (
        lambda state: {
            **state,
            A0.replace("experts.0.lora_A_0", "share_experts.lora_A"): state[A0],
        },
        r"unexpected: .*share_experts\.lora_A\.weight",
    ),
}

# Name -> (options of a config that the layout cannot store, the error).
REFUSED = {
    # The original has a bias, and would start it at random.
    "router without bias": (dict(router_bias=False), "router_bias=True"),
    "mlp router": (dict(router="mlp"), "linear router"),
    "shared A": (dict(share="A"), "share='none' and equal ranks"),
    "complement": (dict(shared_expert="complement"), "'always', got 'complement'"),
}


def refused_model(name):
    """Return a model with the options of a case of REFUSED."""
    return ours(config=CONFIG.replace(**REFUSED[name][0]))
