"""The shapes of the linears to tune for: from arguments, or from a model of transformers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


class Shape(NamedTuple):
    """The sizes of linears. number: how many of them a model has."""

    in_features: int
    out_features: int
    number: int = 1


def parse_shapes(text: str) -> list[Shape]:
    """Return the shapes of a text like "4096x4096,4096x11008": in_features x out_features.

    Raises:
        ValueError: the text has another form.
    """
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip())
        if not match:
            raise ValueError(f"shapes: expected IN x OUT, like 4096x11008, got {part!r}")
        shapes.append(Shape(int(match[1]), int(match[2])))
    if len(set(shapes)) < len(shapes):
        raise ValueError(f"shapes: expected different shapes, got {text!r}")
    return shapes


def model_shapes(config: str) -> list[Shape]:
    """Return the distinct shapes of the linears in a model of transformers, with their numbers.

    config: a config.json, its folder, or the name of a model on the hub. The model is built without
    weights. The head that computes the logits of tokens is left out.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the configuration cannot be read, or its model has no linears.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        message = "model: needs transformers (pip install transformers); or use --shapes"
        raise ImportError(message) from error
    if config.endswith(".json") and not Path(config).is_file():
        raise ValueError(f"model: {config} does not exist")
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.from_pretrained(config))
    except (OSError, ValueError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model: cannot build a model from {config!r}: {lines[0]}") from error
    numbers = Counter(
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    if not numbers:
        raise ValueError(f"model: expected a model with nn.Linear, got {type(model).__name__}")
    return [Shape(*sizes, number) for sizes, number in sorted(numbers.items())]
