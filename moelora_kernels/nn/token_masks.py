"""Which tokens count? The attention mask of the part of a model that a layer belongs to.

A padding mask [batch, sequence] belongs to one part of a model:

    language model, text encoder     attention_mask
    encoder of an encoder-decoder    attention_mask
    its cross-attention: k and v     attention_mask, because they read the encoder's output
    the rest of its decoder          decoder_attention_mask
    vision tower, projector          none: every token counts

`follow_masks` adds hooks to a model that read the masks of each forward, so that the routing
records store the mask of each call. `token_mask` tells whether this mask fits the tokens of the
call. If it does not fit (4-D masks, audio before downsampling, the last token alone), every token
counts.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.nn.forward_hooks import ModelHooks
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.routing_record import RoutedCall, RoutingRecord, ThreadRecord
from moelora_kernels.nn.samples import Samples
from moelora_kernels.nn.token_order import argument_sources
from moelora_kernels.nn.wrappers import is_pretrained, named_modules, unwrap

# Modules that read the encoder's output, and their linears that do (k, v).
CROSS_ATTENTION = re.compile(r"cross_?att|enc(oder)?_?(dec(oder)?_?)?att", re.IGNORECASE)
CROSS_INPUTS = {
    "k", "v", "kv", "key", "value", "k_proj", "v_proj", "kv_proj", "key_proj", "value_proj",
    "k_lin", "v_lin", "c_attn",
}  # fmt: skip
# Parts of a multimodal model whose tokens are not those of the text.
OTHER_INPUTS = re.compile(
    r"vision|visual|image|video|audio|speech|projector|connector|perceiver|q_?former",
    re.IGNORECASE,
)


# Arguments that hold the tokens of such parts, and arguments that hold no tokens.
OTHER_ARGUMENTS = re.compile(
    r"vision|visual|image|img|pixel|patch|picture|photo|video|frame|audio|speech|sound|wave|mel",
    re.IGNORECASE,
)
TEXT_ARGUMENTS = re.compile(
    r"(^|_)(ids|tokens?|text|words?|prompts?|inputs_embeds)$", re.IGNORECASE
)
NO_TOKENS = re.compile(r"mask|label|target|position|return|output|use_|cache|kwargs", re.IGNORECASE)


def token_mask(mask: Tensor | None, shape: tuple[int, ...], batch_dim: int = 0) -> Tensor | None:
    """Return which tokens of x count, [T] bool; None if `mask` does not belong to these tokens.

    Args:
        mask: [batch, sequence], nonzero if a token counts; or None.
        shape: the shape of x without the features: [batch, sequence, ...], or [T] if the model has
            flattened [batch, sequence].
        batch_dim: 1 if x is [sequence, batch, I].
    """
    if mask is None:
        return None
    mask = mask != 0
    if batch_dim == 1:
        mask = mask.t()
    if shape[:2] == mask.shape:
        inner = (1,) * (len(shape) - 2)
        return mask.reshape(*mask.shape, *inner).expand(shape).reshape(-1)
    return mask.reshape(-1) if shape == (mask.numel(),) else None


def call_mask(layer: MixtureLayer, call: RoutedCall) -> Tensor | None:
    """Return which tokens of a call of `layer` count, [T] bool; None if all do."""
    # `set_samples` with one number for each token: their order is not that of the mask.
    if isinstance(layer.samples, Samples) and layer.samples.ids.dim() == 1 and len(call.shape) == 1:
        return None
    return token_mask(call.mask, call.shape, layer.config.batch_dim)


def tokens_per_row(call: RoutedCall, mask: Tensor | None = None) -> Tensor:
    """Return how many counted tokens use each gate row, [G] float32.

    mask: [T], which tokens count; None counts all.
    """
    weights, tokens = call.weights, math.prod(call.shape)
    count = weights.shape[0]
    if mask is None:
        mask = torch.ones(tokens, dtype=torch.bool, device=weights.device)
    mask = mask.to(weights.device)
    if call.rows is not None:
        numbers = torch.arange(count, device=weights.device)
        return ((call.rows == numbers[:, None]) & mask).sum(dim=1).float()
    if count == tokens:
        return mask.float()
    return mask.sum().float().expand(count)


def follow_masks(model: nn.Module) -> None:
    """Add the hooks that store the masks of a forward in the routing records of its layers.

    Every PreTrainedModel inside `model` gets hooks, because a multimodal model calls several of
    them, each with its own mask; a model without one gets the hooks itself. Call the function
    again after you add layers.
    """
    model = unwrap(model)
    parts = [module for _, module in named_modules(model) if is_pretrained(module)]
    for part in parts or [model]:
        # Now and not in the first forward, which may be compiled.
        MaskHooks.add_to(part).find_records(part)


class MaskHooks(ModelHooks):
    """The hooks of one model or part that set and reset the masks in the records of its layers.

    records: name of an argument of forward -> the records of the layers that its mask belongs to.
    """

    attribute = "_moelora_mask_hooks"

    def __init__(self) -> None:
        self.records: dict[str, list[RoutingRecord]] | None = None
        self.names: list[str] = []
        self.previous = PreviousMasks()

    def find_records(self, part: nn.Module) -> None:
        """Find the records of the layers of `part`, by the argument of their mask."""
        self.names = _parameter_names(part)
        self.records = mask_records(part, self.names)

    def begin(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the masks of a forward of `part`."""
        if self.records is None:
            self.find_records(part)
        previous = []
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        for name, records in self.records.items():
            mask = arguments.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                for record in records:
                    if record.is_on:
                        thread = record.thread
                        previous.append((thread, thread.mask))
                        thread.mask = mask
        self.previous.stack.append(previous)

    def end(self, part: nn.Module) -> None:
        """Reset the masks after a forward of `part`."""
        if self.previous.stack:
            for thread, mask in self.previous.stack.pop():
                thread.mask = mask


class PreviousMasks(threading.local):
    """The masks that the running forwards of a thread have replaced, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[list[tuple[ThreadRecord, Tensor | None]]] = []


def _parameter_names(part: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(part.forward).parameters)
    except (TypeError, ValueError):
        return []


def mask_records(part: nn.Module, names: Iterable[str]) -> dict[str, list[RoutingRecord]]:
    """Return the records of the layers that each mask of `part` belongs to.

    Args:
        part: a model, or a part of one with a forward of its own.
        names: the names of the arguments of its forward.
    """
    names = set(names)
    pairs = not names.isdisjoint({"decoder_input_ids", "decoder_attention_mask"})
    # The "encoder" of a part without a decoder is its stack of layers (BERT).
    in_encoder = _modules(_inner(part, "encoder")) if pairs else set()
    in_decoder = _modules(_inner(part, "decoder"))
    head = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
    in_head = _modules(head)
    is_multimodal = not pairs and _is_multimodal(part)
    records: dict[str, list[RoutingRecord]] = {}
    for name, module in named_modules(part):
        record = getattr(module, "record", None)
        if not isinstance(record, RoutingRecord):
            continue
        if pairs:
            in_text = module in in_encoder or module in in_decoder or module in in_head
        elif is_multimodal:
            in_text = module in in_decoder or module in in_head
        else:
            in_text = not OTHER_INPUTS.search(name) and not reads_other_input(part, name)
        if not in_text:
            continue
        if reads_encoder(name) and module not in in_encoder:
            source = "attention_mask" if pairs else "encoder_attention_mask"
        elif pairs and module not in in_encoder:
            source = "decoder_attention_mask"
        else:
            source = "attention_mask"
        records.setdefault(source, []).append(record)
    return records


def reads_other_input(part: nn.Module, name: str) -> bool:
    """Return whether the layer `name` of `part` computes with another input than the text.

    The source of the forward tells from which arguments a child gets its input. The text is in
    the arguments whose names say so, such as `input_ids`, or else in the first argument that is
    not an image or a sound. Warns if the name of another argument does not say what it is.
    """
    names = _parameter_names(part)
    text = {n for n in names if TEXT_ARGUMENTS.search(n) and not NO_TOKENS.search(n)}
    if not text:
        text = {*[n for n in names if not OTHER_ARGUMENTS.search(n)][:1]}
    sources = argument_sources(type(part))
    parts = name.split(".")
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    read = {argument for path in paths for argument in sources.get(path, ())}
    read = {argument for argument in read if not NO_TOKENS.search(argument)}
    if not read or read & text:
        return False
    if unknown := sorted(argument for argument in read if not OTHER_ARGUMENTS.search(argument)):
        warnings.warn(
            f"attention_mask: it is taken for that of {sorted(text)}, so all tokens count in "
            f"{name}, which {type(part).__name__} calls with {unknown}. If some of them are "
            "padding, pass their mask: collect_aux_loss(part, mask)",
            stacklevel=2,
        )
    return True


def reads_encoder(name: str) -> bool:
    """Return whether `name` is that of a linear in a cross-attention that reads the encoder."""
    parts = name.split(".")
    # PEFT puts the experts of an adapter inside the linear.
    last = parts.index("moelora_experts") if "moelora_experts" in parts else len(parts)
    is_cross = any(CROSS_ATTENTION.search(part) for part in parts[: last - 1])
    return is_cross and parts[last - 1] in CROSS_INPUTS


def _is_multimodal(part: nn.Module) -> bool:
    config = getattr(part, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    return config.get_text_config() is not config


def _inner(part: nn.Module, name: str) -> nn.Module | None:
    """Return the encoder or decoder of `part`; None if it has none."""
    get = getattr(part, f"get_{name}", None)
    inner = get() if callable(get) else getattr(part, name, None)
    return inner if isinstance(inner, nn.Module) and inner is not part else None


def _modules(part: nn.Module | None) -> set[nn.Module]:
    return set() if part is None else set(part.modules())
