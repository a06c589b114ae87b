"""model.generate with a static cache and torch.compile: two graphs, without a break."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moelora_kernels import dispatch, link_siblings, set_tasks
from moelora_kernels.autograd.ffn import TORCH
from support.models import add_preset, language_model
from support.selection import exhaustive

transformers = pytest.importorskip("transformers")

# Padded on the left, which generation needs.
IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 4, 5, 3, 4]])
NEW = 6

MODELS = [
    pytest.param(
        family,
        preset,
        linked,
        id=f"{family}-{preset}-{'linked' if linked else 'bare'}",
        marks=() if family == "Qwen2" else exhaustive,
    )
    for family in ("Qwen2", "Llama")
    for preset, linked in (("ming", True), ("ming", False), ("moelora", True), ("mixlora", False))
]


def make_model(family: str, preset: str, linked: bool, dtype=torch.float64) -> nn.Module:
    """Return a model of two blocks with trained adapters. In float64 two tokens never tie."""
    model = language_model(family).to(dtype).requires_grad_(False)
    options = dict(num_tasks=3, task_embedding_dim=5) if preset == "moelora" else {}
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    add_preset(model, preset, targets, num_experts=4, dropout=0.3, **options)
    if linked:
        link_siblings(model)
    return model.eval()


def generate(model: nn.Module, **options) -> torch.Tensor:
    """Return the prompts `IDS` and the tokens that follow them."""
    attention = (IDS != 0).long()
    return model.generate(
        IDS.to(model.device),
        attention_mask=attention.to(model.device),
        max_new_tokens=NEW,
        do_sample=False,
        **options,
    )


class Counted:
    """A backend of torch.compile that counts its graphs and compiles nothing."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.mark.parametrize(("family", "preset", "linked"), MODELS)
def test_prefill_and_decoding_are_one_graph_each(family, preset, linked):
    """The compiled model generates the tokens of eager, also of other tasks, in the same graphs."""
    torch._dynamo.reset()
    model = make_model(family, preset, linked)
    tasks = ([1, 2, 3], [3, 1, 1]) if preset == "moelora" else (None,)
    backend, forward = Counted(), model.forward
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    tokens = []
    for ids in tasks:
        if ids:
            set_tasks(model, ids)
        model.forward = forward
        expected = generate(model)
        assert torch.equal(generate(model, cache_implementation="static"), expected)
        model.forward = compiled
        tokens.append(generate(model, cache_implementation="static"))
        assert torch.equal(tokens[-1], expected)
        assert backend.graphs == 2, "not one graph for the prompt and one for a token"
    if len(tokens) > 1:
        assert not torch.equal(*tokens), "the graph holds the tasks as constants"


class FirstBlock(nn.Module):
    """The first decoder block of a model, as a function of hidden states."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.block, self.rotary = model.model.layers[0], model.model.rotary_emb

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = self.rotary(hidden, positions)
        out = self.block(hidden, position_ids=positions, position_embeddings=embeddings)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("training", (False, True), ids=("decode", "train"))
@pytest.mark.parametrize(("family", "preset", "linked"), MODELS)
def test_a_decoder_block_is_one_graph(family, preset, linked, training):
    """fullgraph=True raises at a graph break. Values and gradients of x are those of eager."""
    torch._dynamo.reset()
    model = make_model(family, preset, linked)
    if preset == "moelora":
        set_tasks(model, [1, 2])
    block = FirstBlock(model)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(2, 1 if not training else 7, 16, dtype=torch.float64)
    hidden.requires_grad_(training)
    sizes = dict(dtype=torch.float64, total_rank=16, top_k=2)
    is_grouped = preset == "mixlora" and dispatch.choose_ffn("cpu", **sizes) == "grouped"
    if training and is_grouped and TORCH < (2, 13):
        with pytest.raises(Exception, match=r"needs torch 2\.13"):
            compiled(hidden)
        return
    with torch.set_grad_enabled(training):
        actual, expected = compiled(hidden), block(hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    if training:
        pairs = [torch.autograd.grad(y.square().sum(), hidden)[0] for y in (actual, expected)]
        torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-10)


@exhaustive
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_reduce_overhead_on_a_cpu(preset):
    """Inductor compiles the block of one token; on a CPU the mode makes no CUDA graph."""
    torch._dynamo.reset()
    model = make_model("Qwen2", preset, linked=True, dtype=torch.float32)
    if preset == "moelora":
        set_tasks(model, [1, 2])
    block = FirstBlock(model)
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(2):
            hidden = torch.randn(2, 1, 16)
            torch.testing.assert_close(compiled(hidden), block(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ("ming", "moelora"))
@pytest.mark.parametrize("family", ("Qwen2", "Llama"))
def test_decoding_replays_a_cuda_graph(family, preset):
    """On a GPU `generate` compiles a model with a static cache; tasks are inputs of the graph."""
    torch._dynamo.reset()
    model = make_model(family, preset, linked=True, dtype=torch.float32).cuda()
    compile_config = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
    for ids in ([1, 2, 3], [3, 1, 1]):
        if preset == "moelora":
            set_tasks(model, ids)
        actual = generate(model, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(actual, generate(model))
