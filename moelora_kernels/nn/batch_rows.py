"""Does the shape of x tell which samples its tokens belong to? `check_rows` raises if not.

A gate of samples has one row for each sample, so the number of rows tells if x has another layout.
It does not tell if x is square, such as [5, 5, I], or if the tokens that a module selected happen
to be as many as the samples; then the hint of `token_order` counts. A gate of sequences has no
number to compare, so x is compared with the rows of the tensors that the model was called with.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moelora_kernels.nn.forward_hooks import ModelHooks
from moelora_kernels.nn.samples import Samples
from moelora_kernels.nn.token_order import SELECTED, TokenOrder
from moelora_kernels.nn.wrappers import is_pretrained, named_modules, unwrap

if TYPE_CHECKING:
    from moelora_kernels.nn.layer import MixtureLayer

# Arguments of models whose first dimension may not be that of samples.
NOT_ROWS = ("position", "pos_", "rotary", "freq", "cache", "grid", "past_", "mems")


def check_rows(layer: MixtureLayer, x: Tensor, count: int) -> None:
    """Raise ValueError if the shape of x does not tell the samples of its tokens.

    Args:
        layer: a layer with a gate of samples.
        x: [..., I], the input of the layer.
        count: the number of gate rows, or of task vectors.
    """
    config, order = layer.config, layer.token_order
    if isinstance(layer.samples, Samples):
        return
    per_sequence = config.granularity == "sequence"
    if x.dim() < 3:
        if count > 1 and not per_sequence and order is not None and order.change == SELECTED:
            raise ValueError(
                f"x: {[*x.shape]} for {order.name}: {order.kind} selects its tokens, so "
                f"their samples are not known; leave {order.name} out of target_modules, use a "
                "router of tokens, or call set_samples(model, samples) with the sample of each "
                "selected token"
            )
        return
    if order is not None and order.change == SELECTED:
        order = None
    if not per_sequence and (order is None or count == 1):
        return
    rows, other = x.shape[config.batch_dim], x.shape[1 - config.batch_dim]
    sizes: dict[int, set[int]] = {count: set()}
    if per_sequence:
        if torch.compiler.is_compiling() or not _calls.batches:
            return
        batch = _calls.batches[-1]
        sizes = batch.sizes
        if rows == 1 and batch.is_packed():
            raise ValueError(
                f"{_subject(x, order)}: position_ids or cu_seq_lens say that several samples are "
                "packed into the row, but granularity='sequence' has one gate for each row; call "
                "set_samples(model, samples) with the sample of each token, or do not pack"
            )
    if rows in sizes:
        if other in sizes and order is not None:
            raise ValueError(
                f"{_subject(x, order)}: {order.kind} seems to swap the first two dimensions, and "
                "the shape does not tell which of them counts samples. If x is [sequence, batch, "
                "features], use batch_dim=1 for this layer; if it is [batch, sequence, features], "
                f"call set_samples(model, torch.arange({rows}))"
            )
        if order is not None and not torch.compiler.is_compiling():
            # The hint was wrong.
            layer.token_order = None
            layer.checks_rows = per_sequence
        return
    if not per_sequence or not sizes:
        return
    numbers = " or ".join(map(str, sorted(sizes)))
    if other in sizes:
        raise ValueError(
            f"{_subject(x, order)}: dimension {config.batch_dim} counts sequences, because "
            f"batch_dim={config.batch_dim}, but the model was called with {numbers} rows; use "
            f"batch_dim={1 - config.batch_dim} for this layer, or call set_samples(model, samples) "
            "with the sample of each row or token"
        )
    if rows == 1 and any(x.shape[:-1].numel() in tokens for tokens in sizes.values()):
        raise ValueError(
            f"{_subject(x, order)}: one row, but the model was called with {numbers} rows, so "
            "several samples may be packed into it; call set_samples(model, samples) with the "
            "sample of each token"
        )


def _subject(x: Tensor, order: TokenOrder | None) -> str:
    """Return the words for x in an error: its shape and the layer that got it."""
    return f"x: {[*x.shape]}" if order is None else f"x: {[*x.shape]} for {order.name}"


class _Batch:
    """The tensors that a forward of a model got.

    sizes: the rows of a tensor -> the numbers of tokens [batch, sequence] of such tensors.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        named = {k: v for k, v in kwargs.items() if not any(part in k for part in NOT_ROWS)}
        self.sizes: dict[int, set[int]] = {}
        for tensor in (*args, *named.values()):
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                self.sizes.setdefault(tensor.shape[0], set()).add(tensor.shape[:2].numel())
        self._packed = any(v is not None and "cu_seq" in k for k, v in kwargs.items())
        self._positions = None if self._packed else _single_row_positions(kwargs)

    def is_packed(self) -> bool:
        """Return whether the arguments say that a row holds several samples.

        If only the values of position_ids tell, the first call waits for the device that has them.
        A later check could not stop a forward that is wrong.
        """
        if self._positions is not None:
            self._packed = bool((self._positions[1:] == 0).any())
            self._positions = None
        return self._packed


def _single_row_positions(kwargs: dict[str, Any]) -> Tensor | None:
    """Return the position_ids [L] of a single row with several tokens; None without such a row."""
    positions = kwargs.get("position_ids")
    # With a mask, positions start again after the padding.
    if not isinstance(positions, Tensor) or kwargs.get("attention_mask") is not None:
        return None
    is_row = positions.dim() == 2 and len(positions) == 1 and positions.shape[1] > 1
    return positions[0] if is_row else None


class _Calls(threading.local):
    """The batches of the running forwards of a thread, innermost last."""

    def __init__(self) -> None:
        self.batches: list[_Batch] = []


_calls = _Calls()


def follow_batches(model: nn.Module) -> None:
    """Add the hooks that note the rows of a batch to `model`, and to every PreTrainedModel in it.

    Gates of sequences need them. Call the function again after you add layers.
    """
    model = unwrap(model)
    for _, part in [*named_modules(model)]:
        if part is model or is_pretrained(part):
            BatchHooks.add_to(part)


class BatchHooks(ModelHooks):
    """The hooks of one model or part that note the rows of its tensors."""

    attribute = "_moelora_batch_hooks"

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the rows of the tensors of a forward."""
        if not torch.compiler.is_compiling():
            _calls.batches.append(_Batch(args, kwargs))

    def end(self, model: nn.Module) -> None:
        """Forget the rows of a forward."""
        if not torch.compiler.is_compiling() and _calls.batches:
            _calls.batches.pop()
