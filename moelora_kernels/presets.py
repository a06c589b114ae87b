"""Presets: the options of published methods. Options that a preset does not name have defaults.

METHODS.md explains them in a table and says how to add one.
"""

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
    # MOELoRA (arXiv 2310.18339). The gate is a softmax over all experts, computed from the
    # embedding of the task. All layers share it. The total rank of 16 is split over the experts.
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
    # MING-MOE (arXiv 2404.09027). Every linear has a router. The gate of a token is the softmax
    # over its two largest logits.
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
    # LoRAMoE (arXiv 2312.09979). The gate of a token is the softmax over all experts.
    "loramoe": {
        "num_experts": 8,
        "rank": 4,
        "alpha": 32.0,
        "router": "linear",
        "normalize": "none",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
    },
    # HydraLoRA (arXiv 2404.19245). The gate of LoRAMoE, and experts that share A and differ in B.
    # The original has one dropout mask per expert; here the experts share one mask, because they
    # share A.
    "hydralora": {
        "num_experts": 3,
        "rank": 4,
        "alpha": 32.0,
        "router": "linear",
        "normalize": "none",
        "share": "A",
        "dropout": 0.05,
    },
    # MoLA (arXiv 2402.08562). The two largest probabilities of a token, divided by their sum, and
    # the load-balance loss.
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
    # MOLE, the top-k baseline in the code of AdaMoLE (arXiv 2405.00361). The gate of MoLA. The
    # total rank of 32 is split over the experts.
    "mole": {
        "num_experts": 8,
        "rank": 4,
        "alpha": 16.0,
        "router": "linear",
        "top_k": 2,
        "normalize": "sum",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"load_balance": 0.001},
    },
    # AdaMoLE (arXiv 2405.00361). A learned threshold, at most 1/E, is computed from the token and
    # subtracted from its probabilities. The number of experts differs from token to token.
    "adamole": {
        "num_experts": 8,
        "rank": 4,
        "alpha": 16.0,
        "router": "linear",
        "select": "learned_threshold",
        "normalize": "sum",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"load_balance": 0.001},
    },
    # DynMoLE (arXiv 2504.00661). A token uses the experts that add up to a probability of 0.75, but
    # at least two, and all experts if the Tsallis entropy is high. The probabilities are not
    # divided by their sum. The original code leaves out the expert that crosses 0.75, and adds 1e-5
    # to each probability before it computes the entropy. Here top-p keeps that expert, and nothing
    # is added.
    "dynmole": {
        "num_experts": 6,
        "rank": 24,
        "alpha": 48.0,
        "router": "linear",
        "select": "topp",
        "top_p": 0.75,
        "keep_min": 2,
        "entropy_threshold": 0.9,
        "entropy_index": 1.1,
        "normalize": "none",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"entropy": 0.01, "load_balance": 0.001},
    },
    # GOAT (arXiv 2502.16894). The gate of MoLA. The experts start from segments of the singular
    # values of the base weight. The total rank of 32 is split over the experts. alpha is the eta of
    # the paper.
    "goat": {
        "num_experts": 8,
        "rank": 4,
        "alpha": 1.0,
        "scaling": "sqrt(3*alpha*I/r)",
        "init": "svd_segments",
        "router": "linear",
        "top_k": 2,
        "normalize": "sum",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
        "aux": {"load_balance": 0.001},
    },
    # MoCLE (arXiv 2312.12379). A sequence uses the most probable expert of its cluster, computed
    # from the embedding of the cluster, and a shared expert with the rest of the weight. The
    # original code multiplies the expert by its probability twice; here it is once, as in the
    # formula of the paper.
    "mocle": {
        "num_experts": 4,
        "rank": 8,
        "alpha": 16.0,
        "router": "task",
        "num_tasks": 64,
        "temperature": 0.05,
        "noise": 0.1,
        "top_k": 1,
        "normalize": "none",
        "shared_expert": "complement",
    },
    # MixLoRA (arXiv 2404.15159). The experts are whole FFNs: one router per FFN, and the three
    # linears use the same experts. The gate is that of MoLA. The original has one dropout mask per
    # linear; here gate_proj and up_proj share the mask of x.
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
    # LLaVA-MoLE (arXiv 2401.16160). The experts are whole FFNs. A token uses its most probable
    # expert with the gate p / p = 1, so only the load-balance loss trains the router. The original
    # leaves the number of experts and the weight of the loss to the user.
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
    # Octavius (arXiv 2311.02684). One gate per sample for the whole model, computed from the
    # embeddings of the instruction (`nn.SequenceGate`). The experts are not scaled. The original
    # code samples a policy for the second expert, but does not use it; it is left out here.
    "octavius": {
        "num_experts": 4,
        "rank": 32,
        "scaling": 1.0,
        "router": "external",
    },
    # HMoRA (ICLR 2025). The probabilities of the token are mixed with those of a task vector. The
    # gate is the softmax over the two largest. The experts share A, as in the published command.
    # The divergence loss is left out.
    "hmora": {
        "num_experts": 8,
        "rank": 8,
        "alpha": 8.0,
        "scaling": "alpha/sqrt(r)",
        "share": "A",
        "router": "token_task",
        "router_hidden": 32,
        "score": "identity",
        "top_k": 2,
        "normalize": "softmax",
        "dropout": 0.1,
    },
    # X-LoRA (arXiv 2402.07148). The experts are existing LoRAs. The user computes the gates with a
    # classifier from the hidden states of a first pass.
    "xlora": {
        "num_experts": 4,
        "rank": 16,
        "alpha": 32.0,
        "freeze": "AB",
        "router": "external",
    },
    # Arrow (arXiv 2405.11157). The experts are existing LoRAs. The logit of an expert is |x v|,
    # with the first right singular vector v of its B A. The gate is the softmax over the three
    # largest. Nothing is trained.
    "arrow": {
        "num_experts": 8,
        "rank": 16,
        "alpha": 32.0,
        "freeze": "AB",
        "router": "prototype",
        "score": "identity",
        "top_k": 3,
        "normalize": "softmax",
    },
    # SMoRA (arXiv 2501.15103). Every rank of one LoRA is an expert. Eight are selected, with a bias
    # that balances their load. There is no public code. In our reading of the paper the gate is the
    # softmax over the selected logits.
    "smora": {
        "num_experts": 64,
        "rank": 1,
        "alpha": 128.0,
        "scaling": "alpha/R",
        "router": "linear",
        "score": "identity",
        "top_k": 8,
        "balance_rate": 0.001,
        "normalize": "softmax",
    },
    # FlyLoRA (arXiv 2510.08396). Every rank of one LoRA is an expert. The eight with the largest |A
    # x + bias| are used with the gate 1. A is sparse, random and frozen. The selection follows
    # flylora.py of the original; its fork of PEFT leaves out the magnitude and the gradient of x.
    "flylora": {
        "num_experts": 32,
        "rank": 1,
        "alpha": 64.0,
        "scaling": "alpha/R",
        "init": "sparse",
        "freeze": "A",
        "router": "self",
        "score": "abs",
        "top_k": 8,
        "balance_rate": 0.001,
        "normalize": "one",
    },
    # Riemannian mixture (arXiv 2502.15828). The gate of MoLA, and its square root in the gradients
    # of the experts. The preconditioner of each expert is part of the optimizer and is left out.
    "riemannian": {
        "num_experts": 20,
        "rank": 4,
        "alpha": 16.0,
        "router": "linear",
        "top_k": 10,
        "normalize": "sum",
        "grad_gate": "sqrt",
        "dropout": 0.05,
        "dropout_mask": "per_expert",
    },
    # PESC (arXiv 2401.02731; Camelidae, sparsetral). Adapters with a GELU between A and B read the
    # output of the FFN. The gate is the softmax over the two largest logits of the FFN's input. The
    # original has a dropout of 0.1 on the input of each expert; adapters have no dropout here.
    "pesc": {
        "num_experts": 8,
        "rank": 64,
        "scaling": 1.0,
        "rank_activation": "gelu",
        "router": "linear",
        "score": "identity",
        "top_k": 2,
        "normalize": "softmax",
        "aux": {"load_balance": 0.01},
    },
}

# Presets whose experts are whole FFNs. Use them with `MoeLoraFFN` or `replace_ffns`.
FFN_PRESETS = ("mixlora", "llava-mole")


def check_preset(name: object) -> None:
    """Raise ValueError unless `name` is the name of a preset."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
