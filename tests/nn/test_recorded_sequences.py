"""Gates of sequences: losses and reports count a sequence by its tokens."""

import torch
from torch import nn

from moelora_kernels import (
    MoeLoraLinear,
    adapter_parameters,
    collect_aux_loss,
    count_routing,
    record_routing,
    routing_report,
    set_samples,
)
from support.branches import AUX, tokens


class Ratio(nn.Module):
    """Call a layer with a granularity of sequences on inputs of several lengths."""

    def __init__(self):
        super().__init__()
        self.layer = MoeLoraLinear(
            6, 6, granularity="sequence", dtype=torch.float64, **(AUX | dict(aux={"z": 1.0}))
        )

    def forward(self, *inputs):
        for x in inputs:
            self.layer(x)


def z_of(layer, x):
    logits = layer.router(x.mean(dim=1).double())
    return logits.logsumexp(dim=1).square()


def test_sequences_count_by_their_tokens():
    model = Ratio()
    adapter_parameters(model)
    short, long = (
        tokens(rows * length)[None].reshape(rows, length, 6) for rows, length in ((3, 2), (1, 9))
    )
    model(short, long)
    expected = (2 * z_of(model.layer, short).sum() + 9 * z_of(model.layer, long).sum()) / 15
    torch.testing.assert_close(collect_aux_loss(model), expected)


def test_packed_sequences_count_by_their_tokens():
    model, x = Ratio(), tokens(10)[None]
    adapter_parameters(model)
    set_samples(model, torch.tensor([0] * 7 + [1] * 2 + [-1]))
    model(x)
    parts = [z_of(model.layer, part) for part in (x[:, :7], x[:, 7:9])]
    expected = (7 * parts[0].sum() + 2 * parts[1].sum()) / 9
    torch.testing.assert_close(collect_aux_loss(model), expected)


def test_reports_count_sequences_by_their_tokens():
    model = Ratio()
    short, long = torch.zeros(3, 2, 6).double(), torch.ones(1, 9, 6).double()
    with count_routing(model):
        model(short, long)
        load = routing_report(model).layers["layer"].load
    with record_routing(model):
        model(short, long)
        gates = [call.weights.float() for call in model.layer.record.last]
    torch.testing.assert_close(load, (2 * gates[0].sum(dim=0) + 9 * gates[1].sum(dim=0)) / 15)
