"""Frozen experts keep their values in a Trainer with weight decay, also when it resumes."""

from __future__ import annotations

import pytest
import torch

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

from moelora_kernels import freeze_experts  # noqa: E402
from moelora_kernels.nn.layer import mixture_layers  # noqa: E402
from support.trainers import make_model, make_trainer  # noqa: E402


@pytest.mark.parametrize("attached", (True, False))
def test_frozen_experts_keep_their_values(attached, tmp_path):
    """Without `attach`, and without passing the optimizer, weight decay moves them."""
    model = make_model("ming")
    freeze_experts(model, [1])
    layers = mixture_layers(model)
    rank = layers[0].config.rank
    rows = slice(rank, 2 * rank)
    before = [layer.lora_A.detach().clone() for layer in layers]
    trainer = make_trainer(model, tmp_path, attached=attached, weight_decay=0.5, max_steps=3)
    trainer.train()
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.lora_A[rows], old[rows]) == attached
        assert not torch.equal(layer.lora_A[2 * rank :], old[2 * rank :])


def test_an_optimizer_that_cannot_keep_them_is_a_warning(tmp_path):
    model = make_model("ming")
    freeze_experts(model, [1])
    trainer = make_trainer(model, tmp_path, max_steps=1)
    torch.nn.utils.parametrizations.weight_norm(mixture_layers(model)[0], "lora_A")
    with pytest.warns(UserWarning, match="weight decay can move frozen experts"):
        trainer.train()
