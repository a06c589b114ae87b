"""Copies of a module: by deepcopy, by pickle, and through a file of torch.save."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn


def saved(module: nn.Module) -> nn.Module:
    """Return a copy of a module that torch.save wrote and torch.load read."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(module: nn.Module) -> nn.Module:
    """Return a copy of a module that was pickled."""
    return pickle.loads(pickle.dumps(module))


COPIERS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
each_copier = pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
