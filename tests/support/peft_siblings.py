"""Tiny language models under PEFT whose siblings are linked, and the same models without links."""

from __future__ import annotations

import torch

from moelora_kernels.peft import MoeLoraPeftConfig
from support.models import language_model
from support.peft_models import MING, adapted, randomise

IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 11, 12, 13]])
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(family="Qwen2", options=MING, **more):
    """Return a PeftModel in training over a tiny model in float64, the same for equal arguments."""
    base = language_model(family).double()
    return adapted(options, base, **{"target_modules": PROJECTIONS, "dropout": 0.0, **more}).train()


def pair(family="Qwen2", options=MING, **more):
    """Return the same model without and with links."""
    return make(family, options, link_siblings=False, **more), make(family, options, **more)


def add(model, name, options, targets=PROJECTIONS, **more):
    """Add an adapter that is linked if "default" is, with B drawn. The mode of the model stays."""
    more = {"link_siblings": model.peft_config["default"].link_siblings, **more}
    config = MoeLoraPeftConfig(target_modules=targets, **{**options, "dropout": 0.0, **more})
    model.add_adapter(name, config)
    randomise(model, seed=1)
