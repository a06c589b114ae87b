"""Siblings that a model calls one by one: the same layers unlinked and linked."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, link_siblings, replace_linears
from support.linears import randomise

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, o) for o in (12, 6, 6))


def pair(**options):
    """Return the same layers unlinked and linked."""
    return linked_too(Attention().double(), **options)


def linked_too(plain, **options):
    """Put experts into the linears NAMES of a model. Return the model, and a linked copy."""
    config = MoeLoraConfig(**{"num_experts": 3, "rank": 2, **options})
    replace_linears(plain, config, list(NAMES))
    randomise(plain)
    linked = copy.deepcopy(plain)
    link_siblings(linked)
    return plain, linked


def random_x(*shape):
    return torch.randn(*shape, 12, dtype=torch.float64)
