"""torch.compile of a PeftModel: the siblings of a graph read x once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from support.compare import FLOAT64, assert_same, training_step
from support.graphs import Graphs
from support.models import language_model
from support.peft_models import LORA, MING, TASKS
from support.peft_siblings import IDS, add, pair


class FirstBlock(torch.nn.Module):
    """The first decoder block of a model, as a function of hidden states."""

    def __init__(self, model):
        super().__init__()
        inner = model.base_model.model.model
        self.block, self.rotary = inner.layers[0], inner.rotary_emb

    def forward(self, hidden):
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = self.rotary(hidden, positions)
        out = self.block(hidden, position_ids=positions, position_embeddings=embeddings)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("checkpointed", (False, True))
@pytest.mark.parametrize("options", (MING, TASKS), ids=("ming", "tasks"))
@pytest.mark.parametrize("family", ("Qwen2", "Llama"))
def test_a_compiled_decoder_block(family, options, checkpointed):
    """One graph, with one pass for q, k, v, one for o, one for gate, up and one for down."""
    torch._dynamo.reset()
    plain, linked = (FirstBlock(model) for model in pair(family, options))
    graphs = Graphs()

    def run(hidden):
        return checkpoint(linked, hidden, use_reentrant=False) if checkpointed else linked(hidden)

    x = torch.randn(2, 5, 16, dtype=torch.float64)
    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    assert_same(training_step(linked, x, forward=compiled), training_step(plain, x), **FLOAT64)
    assert graphs.passes() == 4
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(training_step(linked, x, forward=compiled), training_step(plain, x), **FLOAT64)


def test_a_compiled_model_whose_adapters_change():
    torch._dynamo.reset()
    models = pair()
    for model in models:
        add(model, "other", LORA, ["q_proj", "k_proj"])
        model.eval()
    plain, linked = models
    graphs = Graphs()
    compiled = torch.compile(linked.base_model.model, fullgraph=True, backend=graphs)
    # Linked layers, then o and down.
    for names, passes in (("default", 4), ("other", 1), (["default", "other"], 8), ("default", 0)):
        for model in models:
            model.base_model.set_adapter(names)
        graphs.modules.clear()
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS).logits, plain(IDS).logits)
        assert graphs.passes() == passes * 2, names
    with linked.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            compiled(IDS).logits, language_model("Qwen2").double()(IDS).logits
        )
