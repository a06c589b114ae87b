"""check_trainable names layers whose weight is read instead of called, and counts hidden calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from moelora_kernels import MoeLoraLinear, check_trainable, replace_linears
from support.linears import small_config


def test_a_weight_that_the_loss_reads_is_named() -> None:
    """Losses in chunks multiply by `lm_head.weight`."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = MoeLoraLinear(8, 8, config=small_config())
            self.lm_head = MoeLoraLinear(8, 12, config=small_config())

        def forward(self, x):
            h = self.body(x)
            self.lm_head(h[:1])
            return h

    def chunked_loss(h):
        return (h @ model.lm_head.weight.t()).square().mean()

    model = Model()
    report = check_trainable(model, torch.randn(6, 8), chunked_loss)
    assert "chunked_loss reads its weight" in report.unreached["lm_head"]


@pytest.mark.parametrize("is_peft", (False, True))
def test_a_read_of_the_weight_compiles_to_one_graph(is_peft) -> None:
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x.to(self.q.weight.dtype))

    model, x = Caller(), torch.randn(6, 8)
    if is_peft:
        peft = pytest.importorskip("peft")
        from moelora_kernels.peft import MoeLoraPeftConfig

        model = peft.get_peft_model(model, MoeLoraPeftConfig(target_modules=["q"]))
    else:
        replace_linears(model, small_config(), ["q"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert check_trainable(compiled, x).ok


class Weights(nn.Module):
    """Computes with the weight of q in a way that no source of a forward shows."""

    def __init__(self, way):
        super().__init__()
        self.q, self.k, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x):
        return self.k(self.way(self, x))


WAYS = {
    "getattr": lambda m, x: x @ getattr(m.q, "we" + "ight").T,
    "data": lambda m, x: torch.einsum("ti,oi->to", x, m.q.weight.data),
    "parameters": lambda m, x: x @ next(p for p in m.parameters() if p.shape == (8, 8)).T,
    "modules": lambda m, x: linear(x, next(c for c in m.modules() if hasattr(c, "weight")).weight),
    "class": lambda m, x: nn.Linear.forward(m.q, x),
    "state_dict": lambda m, x: x @ next(v for k, v in m.state_dict().items() if "weight" in k).T,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_read_in_a_hidden_way_is_named(way) -> None:
    model = Weights(WAYS[way])
    x = torch.randn(6, 8)
    y = model(x)
    replace_linears(model, small_config(), ["q", "k"])
    nn.init.normal_(model.q.lora_B)
    torch.testing.assert_close(model(x), y)  # the experts of q have no effect
    report = check_trainable(model, x)
    assert set(report.not_called) == {"q"}


def test_calls_through_functional_call_and_tied_weights_count() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.q, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, ids):
            values = dict(self.q.named_parameters())
            return self.lm_head(torch.func.functional_call(self.q, values, (self.embed(ids),)))

    model = Model()
    replace_linears(model, small_config(), ["q", "lm_head"])
    assert check_trainable(model, torch.arange(6)).ok
