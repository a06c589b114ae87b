"""Published methods as bundles of options; the options not named keep their defaults."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Plain LoRA: one expert that every token uses.
    "lora": {
        "num_experts": 1,
        "rank": 16,
        "alpha": 32.0,
        "router": None,
    },
    # MOELoRA (arXiv 2310.18339): softmax of a task embedding over all experts, the total rank of 16
    # split over them, one gate for all layers.
    "moelora": {
        "num_experts": 8,
        "rank": 2,
        "alpha": 32.0,
        "scaling": "alpha/R",
        "router": "task",
        "num_tasks": 16,
        "task_embedding_dim": 64,
        "dropout": 0.1,
        "dropout_mask": "per_expert",
        "init": "normal",
    },
    # MING-MOE (arXiv 2404.09027): per token and linear, softmax over the two largest logits.
    "ming": {
        "num_experts": 8,
        "rank": 16,
        "alpha": 32.0,
        "router": "linear",
        "router_bias": True,
        "score": "identity",
        "top_k": 2,
        "normalize": "softmax",
    },
    # LoRAMoE (arXiv 2312.09979): per token, softmax over all experts.
    "loramoe": {
        "num_experts": 8,
        "rank": 4,
        "alpha": 32.0,
        "router": "linear",
        "normalize": "none",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
    },
    # HydraLoRA (arXiv 2404.19245): LoRAMoE's gate over heads B that share one A. The original draws
    # a dropout mask per head; with one A they share it here.
    "hydralora": {
        "num_experts": 3,
        "rank": 4,
        "alpha": 32.0,
        "router": "linear",
        "normalize": "none",
        "share": "A",
        "dropout": 0.05,
    },
    # MoLA (arXiv 2402.08562): softmax, two experts kept and renormalised, load balance.
    "mola": {
        "num_experts": 8,
        "rank": 8,
        "alpha": 16.0,
        "router": "linear",
        "top_k": 2,
        "normalize": "sum",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"load_balance": 0.001},
    },
    # MixLoRA (arXiv 2404.15159): per FFN, whose linears are all of one expert, softmax, two experts
    # kept and renormalised, load balance. The original draws a dropout mask per linear; gate and up
    # share that of x here.
    "mixlora": {
        "num_experts": 8,
        "rank": 16,
        "alpha": 32.0,
        "router": "linear",
        "top_k": 2,
        "normalize": "sum",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"load_balance": 0.001},
    },
    # LLaVA-MoLE (arXiv 2401.16160): one router per FFN, its largest expert for all three linears,
    # not scaled by the gate: the weight is p / p = 1, and only the load balance trains the router.
    # Number of experts and weight of the balance are left to the caller there.
    "llava-mole": {
        "num_experts": 3,
        "rank": 16,
        "alpha": 32.0,
        "router": "linear",
        "router_bias": True,
        "top_k": 1,
        "normalize": "sum",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"load_balance": 0.01},
    },
}

# Those whose experts are whole FFNs: for `MoeLoraFFN` and `replace_ffns`.
OF_FFNS = ("mixlora", "llava-mole")
