"""One model with many LoRAs: one adapter per sample, and training of all of them at once."""

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, replace_linears, set_tasks

LORAS, BATCH, LENGTH, WIDTH, RANK = 16, 2, 5, 12, 3


def block(config):
    """Return two frozen linears with adapters, the same weights at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, WIDTH)).double()
    replace_linears(model.requires_grad_(False), config, ["0", "2"])
    return model


def many(impl="auto"):
    """Return a model with one expert for each LoRA."""
    return block(
        MoeLoraConfig(num_experts=LORAS, rank=RANK, alpha=6.0, router="external", impl=impl)
    )


def separate(model):
    """Return one model with a plain LoRA for each expert of `model`."""
    config = MoeLoraConfig(num_experts=1, rank=RANK, alpha=6.0, router=None)
    models = []
    for e in range(LORAS):
        alone = block(config)
        rows = slice(RANK * e, RANK * (e + 1))
        with torch.no_grad():
            for i in (0, 2):
                alone[i].lora_A.copy_(model[i].lora_A[rows])
                alone[i].lora_B.copy_(model[i].lora_B[:, rows])
        models.append(alone)
    return models


def gates_of(loras):
    """Return the gates of samples that use one LoRA each."""
    indices = torch.as_tensor(loras)[:, None]
    return torch.ones(indices.shape, dtype=torch.float64), indices


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ("grouped", "wide"))
def test_samples_have_separate_adapters(impl):
    """Sample b gives what a model with its LoRA alone gives. Index -1 is the base."""
    model = many(impl)
    with torch.no_grad():
        for i in (0, 2):
            model[i].lora_B.normal_(std=0.3)
    models = separate(model)
    loras = [3, 15, 3, 0]
    x = torch.randn(len(loras) + 1, LENGTH, WIDTH, dtype=torch.float64)
    set_tasks(model, gates_of([*loras, -1]))
    y = model(x)
    for row, lora in enumerate(loras):
        close(y[row], models[lora](x[row]))
    base = nn.Sequential(model[0].base_layer, model[1], model[2].base_layer)
    close(y[-1], base(x[-1]))


@pytest.mark.parametrize("impl", ("grouped", "wide"))
def test_one_model_trains_many_loras(impl):
    """Five steps of Adam on 16 streams of data. A LoRA that gets no data in a step has no share.

    The loss of one model is the sum of the losses of the streams, so each LoRA gets the gradients
    of its stream. Adam computes each element on its own.
    """
    model = many(impl)
    models = separate(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    alone = [
        torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for each in models
    ]
    shape = (LORAS, BATCH, LENGTH, WIDTH)
    targets = torch.randn(LORAS, 1, 1, WIDTH, dtype=torch.float64)
    for _ in range(5):
        streams = torch.randn(shape, dtype=torch.float64)
        order = torch.randperm(LORAS * BATCH)
        set_tasks(model, gates_of(order // BATCH))
        y = model(streams.flatten(0, 1)[order])
        per_sample = (y - targets[order // BATCH, 0]).square().mean(dim=(1, 2))
        losses = torch.zeros(LORAS, dtype=torch.float64).index_add(0, order // BATCH, per_sample)
        optimizer.zero_grad()
        (losses / BATCH).sum().backward()
        optimizer.step()
        for e, each in enumerate(models):
            loss = (each(streams[e]) - targets[e]).square().mean()
            alone[e].zero_grad()
            loss.backward()
            alone[e].step()
            close(losses[e] / BATCH, loss)
    for i in (0, 2):
        close(model[i].lora_A, torch.cat([each[i].lora_A for each in models]))
        close(model[i].lora_B, torch.cat([each[i].lora_B for each in models], dim=1))
        assert (model[i].lora_B.abs().amax(dim=0) > 0.01).all()
