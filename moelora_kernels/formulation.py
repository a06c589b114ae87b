"""Which formulation computes a layer: what impl="auto" takes, and what may be asked for."""

from __future__ import annotations

from typing import NamedTuple

# name -> why it cannot be chosen, or "" where it can.
FORMULATIONS = {
    "reference": "",
    "wide": "",
    "grouped": "the grouped kernels are not part of this version",
    "decode": "the decode kernels are not part of this version",
}
CHOICES = (*FORMULATIONS, "auto")


class Choice(NamedTuple):
    """A formulation and the reason it was taken."""

    impl: str
    reason: str


def check(impl: str) -> None:
    """Raise ValueError unless `impl` names a formulation that can be chosen here."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(CHOICES)}, got {impl!r}")
    if FORMULATIONS.get(impl):
        raise ValueError(f"impl: {impl!r} is not available: {FORMULATIONS[impl]}")


def choose(
    device: str,
    *,
    tokens: int,
    in_features: int,
    out_features: int,
    num_experts: int,
    rank: int,
    top_k: int | None,
) -> Choice:
    """What impl="auto" takes for these sizes: a static function, no timing and no look at data."""
    total = num_experts * rank
    gate = f"top-{top_k}" if top_k is not None and top_k < num_experts else "dense"
    return Choice(
        "wide",
        f"R = {total} with a {gate} gate on {device}, T = {tokens}, "
        f"{in_features} -> {out_features}: wide is the only formulation of this version",
    )
