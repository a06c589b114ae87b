"""The warning of a layer whose router has parameters that nothing trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

from torch import nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.config_rules import router_remedy, untrained_router_problem

# The warnings that were shown inside the innermost `router_warnings`, or None outside of it.
_SHOWN: ContextVar[set[str] | None] = ContextVar("shown", default=None)
_HIDDEN: ContextVar[bool] = ContextVar("hidden", default=False)


@contextlib.contextmanager
def router_warnings(are_hidden: bool = False) -> Iterator[None]:
    """Show each warning of an untrained router once for all layers that the context builds.

    are_hidden: whether to show none, because the layers are those of an existing adapter.
    """
    shown, hidden = _SHOWN.set(set()), _HIDDEN.set(are_hidden)
    try:
        yield
    finally:
        _SHOWN.reset(shown)
        _HIDDEN.reset(hidden)


def warn_if_untrained(config: MoeLoraConfig, router: nn.Module | None) -> None:
    """Warn if the router has parameters that nothing trains."""
    has_parameters = router is not None and any(p.requires_grad for p in router.parameters())
    if not has_parameters or _HIDDEN.get():
        return
    if problem := untrained_router_problem(config):
        text = f"config: the router gets no gradient ({problem}). {router_remedy(config)}"
        shown = _SHOWN.get()
        if shown is None or text not in shown:
            # One location and one text for each config: Python shows it once for all such layers.
            warnings.warn(text, stacklevel=2)
        if shown is not None:
            shown.add(text)
