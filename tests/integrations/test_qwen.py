"""A Hugging Face Qwen2 with presets starts as its base, generates and trains."""

import copy

import pytest
import torch

from moelora_kernels import (
    MoeLoraConfig,
    adapter_parameters,
    collect_aux_loss,
    replace_linears,
    set_tasks,
)
from support.linears import randomise
from support.models import language_model

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def qwen():
    """Return a Qwen2 of 2 layers, 16 wide, with grouped-query attention."""
    return language_model(attn_implementation="eager")


def adapted(qwen, config):
    model = copy.deepcopy(qwen)
    model.requires_grad_(False)
    assert len(replace_linears(model, config, PROJECTIONS)) == 14
    return model


def configs():
    return {
        "ming": MoeLoraConfig.preset("ming", num_experts=4, rank=2, aux={"load_balance": 0.01}),
        "moelora": MoeLoraConfig.preset(
            "moelora", num_experts=4, num_tasks=3, task_embedding_dim=5
        ),
    }


IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [3, 4, 5, 3, 4]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ("ming", "moelora"))
def test_qwen_starts_as_its_base(qwen, name):
    model = adapted(qwen, configs()[name])
    if name == "moelora":
        set_tasks(model, [1, 2, 3])
    with torch.no_grad():
        actual = model(IDS, attention_mask=ATTENTION).logits
        expected = qwen(IDS, attention_mask=ATTENTION).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("ming", "moelora"))
def test_qwen_generates_a_batch_with_a_cache(qwen, name):
    """A batch decodes the tokens of each prompt alone. The code of MING raises for a batch."""
    model = randomise(adapted(qwen, configs()[name])).eval()
    options = dict(max_new_tokens=4, do_sample=False)

    def generate(rows, **extra):
        if name == "moelora":
            set_tasks(model, [row + 1 for row in rows])
        return model.generate(IDS[rows], attention_mask=ATTENTION[rows], **options, **extra)[
            :, IDS.shape[1] :
        ]

    batch = generate([0, 1, 2])
    assert batch.shape == (3, 4)
    assert torch.equal(generate([0, 1, 2], use_cache=False), batch)
    for row in range(3):
        assert torch.equal(generate([row])[0], batch[row]), row
    plain = qwen.generate(IDS, attention_mask=ATTENTION, **options)[:, IDS.shape[1] :]
    assert not torch.equal(plain, batch)


def train(qwen, name, recompute):
    """Return the losses of three steps of Adam, and the gradients of the last step."""
    torch.manual_seed(3)
    model = adapted(qwen, configs()[name]).train()
    parameters = adapter_parameters(model)
    assert {id(q) for q in model.parameters() if q.requires_grad} == {id(q) for q in parameters}
    if name == "moelora":
        set_tasks(model, [1, 2, 3])
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    labels = IDS.masked_fill(ATTENTION == 0, -100)
    losses = []
    for _ in range(3):
        loss = model(IDS, attention_mask=ATTENTION, labels=labels, use_cache=False).loss
        aux = collect_aux_loss(model, ATTENTION.bool())
        assert (aux > 0) == (name == "ming")
        optimizer.zero_grad()
        (loss + aux).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [q.grad for q in parameters]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ("ming", "moelora"))
def test_qwen_trains(qwen, name):
    """Only the adapters train, with the same bits under activation checkpointing."""
    losses, grads = train(qwen, name, False)
    recomputed_losses, recomputed = train(qwen, name, True)
    assert losses == recomputed_losses
    for a, b in zip(grads, recomputed, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
    assert losses[-1] < losses[0]
