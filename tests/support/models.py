"""Tiny models that the tests put adapters into."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, replace_ffns, replace_linears
from moelora_kernels.presets import FFN_PRESETS
from support.linears import randomise

SIZES = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def language_model(family: str = "Qwen2", seed: int = 0, **options) -> nn.Module:
    """Return a causal language model of transformers in evaluation, the same weights at every call.

    family: the first word of its classes, "Qwen2", "Llama" or "Mistral".
    options: of its config; by default 2 layers, 16 wide, with grouped-query attention.
    """
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def add_preset(model: nn.Module, preset: str, targets: Sequence[str], **options) -> nn.Module:
    """Add layers of a preset to a frozen model, with adapters that are not zero. Return the model.

    targets: the linears to replace. A preset of whole-FFN experts replaces the MLPs instead.
    """
    config = MoeLoraConfig.preset(preset, **options)
    if preset in FFN_PRESETS:
        replace_ffns(model, config)
    else:
        replace_linears(model, config, targets)
    return randomise(model)


def two_blocks(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return two blocks of a linear 6 -> 8 ("0.0", "1.0"), a norm and a linear 8 -> 6 ("0.2")."""
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)) for _ in range(2)]
    return nn.Sequential(*blocks).to(dtype)


def adapt(model: nn.Module, *replaced: tuple[MoeLoraConfig, object], seed: int = 1) -> nn.Module:
    """Replace linears of `model` by layers with adapters that are not zero. Return `model`.

    replaced: pairs (config, targets), the arguments of `replace_linears`.
    seed: the seed of the adapters.
    """
    for config, targets in replaced:
        replace_linears(model, config, targets)
    return randomise(model, seed)


def make_model(
    config: MoeLoraConfig,
    targets: object = r"\d\.(0|2)",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return `two_blocks` with layers in place of its linears, and adapters that are not zero.

    targets: the linears to replace, by default all four.
    seed: base weights and adapters differ between two seeds.
    """
    return adapt(two_blocks(seed, dtype), (config, targets), seed=seed + 1)


class MlpBlock(nn.Module):
    """An MLP with the names of a transformer's, a norm, and one linear with a similar name."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.my_up_proj = nn.Linear(width, width)

    def forward(self, x):
        return x + self.my_up_proj(self.down_proj(self.up_proj(self.norm(x)).relu()))


def mlp_blocks() -> nn.ModuleDict:
    """Return a model of two MlpBlocks, "layers.0" and "layers.1", with fixed weights."""
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.Sequential(MlpBlock(), MlpBlock())})
