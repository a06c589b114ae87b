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
    # MOLE, the fixed top-k rival in AdaMoLE's code (arXiv 2405.00361): MoLA's gate, and the total
    # rank of 32 split over the experts.
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
    # AdaMoLE (arXiv 2405.00361): probabilities less a threshold that each token learns, at most
    # 1/E, so that the number of experts differs from token to token.
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
    # DynMoLE (arXiv 2504.00661): the experts that make up 0.75 of the probability, at least two,
    # and all where the Tsallis entropy is high; not renormalised. Its code leaves out the expert
    # that crosses 0.75 and adds 1e-5 to each probability before it takes the entropy; here top-p
    # keeps that expert, and nothing is added.
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
    # GOAT (arXiv 2502.16894): MoLA's gate over experts that start as segments of the base's
    # singular values; the total rank of 32 split over them, alpha is its eta.
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
    # MoCLE (arXiv 2312.12379): per instruction, the most probable expert of its cluster by the
    # cluster's embedding, and a universal expert with the rest of the weight. Its code multiplies
    # the expert by its probability twice; this is the paper's formula, once.
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
    # Octavius (arXiv 2311.02684): per sample, one gate for the whole model from the instruction's
    # embeddings, `nn.SequenceGate`; no scaling. Its code draws a second-expert policy that it does
    # not use.
    "octavius": {
        "num_experts": 4,
        "rank": 32,
        "scaling": 1.0,
        "router": "external",
    },
    # HMoRA (ICLR 2025): probabilities of the token mixed with those of a task vector, two kept, and
    # a softmax of these; one A as in its published command. Its divergence loss is not here.
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
    # X-LoRA (arXiv 2402.07148): LoRAs that exist already, gated by a classifier of the hidden state
    # of a first pass, which is the caller's.
    "xlora": {
        "num_experts": 4,
        "rank": 16,
        "alpha": 32.0,
        "freeze": "AB",
        "router": "external",
    },
    # Arrow (arXiv 2405.11157): LoRAs that exist already, gated by x along their first right
    # singular vectors, softmax of the three largest. Nothing trains.
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
    # SMoRA (arXiv 2501.15103): every rank of one LoRA is an expert; eight are selected with a bias
    # that balances their load. There is no public code: that the weights are the softmax of the
    # logits that were kept is this package's reading.
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
    # FlyLoRA (arXiv 2510.08396): the eight ranks of largest |A x + bias| as they are; A is sparse,
    # random and frozen. Selection is that of flylora.py: the fork of PEFT beside it leaves out the
    # magnitude and the gradient of x.
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
    # Riemannian mixture (arXiv 2502.15828): MoLA's gate, and its root in the gradients of the
    # experts. The preconditioner of each expert is the optimizer's part and not here.
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
    # PESC (arXiv 2401.02731; Camelidae, sparsetral): adapters with a GELU in rank space on what the
    # FFN returns, softmax over the two largest logits of what it is given, load balance. Its code
    # drops 0.1 of each expert's input; adapters have no dropout here.
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

# Those whose experts are whole FFNs: for `MoeLoraFFN` and `replace_ffns`.
OF_FFNS = ("mixlora", "llava-mole")
