"""Choose the formulation that computes a layer: wide, grouped, decode or reference."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from moelora_kernels import native
from moelora_kernels.ops.registration import kernels_problem
from moelora_kernels.types import FFN_SLOTS

IMPLS = ("reference", "wide", "grouped", "decode")
CHOICES = (*IMPLS, "auto")

# impl="decode" takes at most this many tokens.
DECODE_TOKENS = 64


class Threshold(NamedTuple):
    """When impl="auto" takes which form on a device class.

    decode if T <= decode_tokens, in evaluation and without gradients; else grouped if
    R > columns * K and T >= tokens; else wide.
    """

    # Up to this rank per expert of a token the wide form is faster.
    columns: float
    # With fewer tokens, the additional launches take longer than the products that they save.
    tokens: int
    # How the two numbers were found.
    source: str
    # 0 if the class does not take decode: on a GPU it has the launches of the wide form.
    decode_tokens: int = 0
    # Up to this R, whole-FFN experts are fused, if their activation can be; None if the device has
    # no kernel for it. With more ranks the gradients of a strip of columns do not fit into a cache.
    # Modelled. On a GPU: more do not fit into the registers of a program.
    ffn_rank: int | None = None
    # Whether they are fused for x of 16 bits alone, and for at most FFN_SLOTS experts of a token:
    # more do not fit into a tile of the Triton kernels.
    ffn_in_tiles: bool = False


# benchmarks/model/forms.py has the rule of `tokens`.
_MODEL = "modelled: (4/3) FLOP/s over B/s of the device; tokens by benchmarks/forms.py"
_SM_89 = "modelled: (4/3) FLOP/s over B/s of the device; tokens of sm_89"

# Device class -> threshold. A GPU's class is its compute capability; "cuda" is any other GPU.
THRESHOLDS = {
    "cpu": Threshold(
        32,
        1,
        "measured: benchmarks/results/amd-epyc-2-cores/grouped.json, not below 1024 tokens",
        decode_tokens=DECODE_TOKENS,
        ffn_rank=1024,
    ),
    "sm_80": Threshold(205, 512, _MODEL, ffn_rank=128, ffn_in_tiles=True),
    "sm_89": Threshold(230, 4096, _MODEL, ffn_rank=128, ffn_in_tiles=True),
    "sm_90": Threshold(245, 2048, _MODEL, ffn_rank=128, ffn_in_tiles=True),
    "sm_100": Threshold(305, 1024, _MODEL, ffn_rank=128, ffn_in_tiles=True),
    "sm_120": Threshold(140, 4096, _SM_89, ffn_rank=128, ffn_in_tiles=True),
    "cuda": Threshold(205, 4096, _SM_89, ffn_rank=128, ffn_in_tiles=True),
}


class Choice(NamedTuple):
    """A formulation, and the reason why it was chosen."""

    impl: str
    reason: str


def check(impl: str) -> None:
    """Raise ValueError unless `impl` is "auto" or a formulation."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(CHOICES)}, got {impl!r}")


def grouped_problem(top_k: int | None, share_a: bool) -> str | None:
    """Return why a layer cannot run grouped; None if it can. top_k is None for a dense gate."""
    if top_k is None:
        return "a dense gate uses every expert for every token"
    return "experts that share A shrink every token once" if share_a else None


def check_grouped(top_k: int | None, share_a: bool) -> None:
    """Raise ValueError if a layer cannot run grouped. top_k is None for a dense gate."""
    if problem := grouped_problem(top_k, share_a):
        raise ValueError(f"impl: 'grouped' is not supported for this layer: {problem}")


def check_decode(tokens: int, has_gradients: bool, dropout: float) -> None:
    """Raise ValueError if a call cannot run impl="decode".

    tokens: T. has_gradients: whether grad mode is on. dropout: the probability of this call.
    """
    problem = None
    if has_gradients:
        problem = "grad mode is on; call the layer inside torch.no_grad()"
    elif dropout > 0.0:
        problem = "it has no dropout; call eval() on the layer"
    elif tokens > DECODE_TOKENS:
        problem = f"expected at most {DECODE_TOKENS} tokens, got {tokens}"
    if problem:
        raise ValueError(f"impl: 'decode' is not supported for this call: {problem}")


def choose_impl(
    device: str,
    *,
    tokens: int,
    num_experts: int,
    total_rank: int,
    top_k: int | None,
    share_a: bool = False,
    trains: bool = True,
) -> str:
    """Return the formulation that impl="auto" takes: "wide", "grouped" or "decode".

    The arguments are as in `explain_choice`. Layers call this function because it works in a
    compiled graph: the graph depends only on whether T is below the threshold. `explain_choice`
    writes T into a text, so the graph would be compiled again for every T.
    """
    threshold = THRESHOLDS[device_class(device)]
    if not trains and takes_decode(device, tokens):
        return "decode"
    top_k = _sparse(top_k, num_experts)
    if top_k is None or grouped_problem(top_k, share_a) or _fast_ops_problem(device):
        return "wide"
    few = tokens < threshold.tokens
    return "wide" if few or total_rank <= threshold.columns * top_k else "grouped"


def takes_decode(device: str, tokens: int) -> bool:
    """Return whether impl="auto" takes decode for T tokens, in evaluation and without gradients."""
    limit = _decode_limit(device)
    # A graph that is exported takes every number of tokens.
    return limit >= 0 and not torch.compiler.is_exporting() and tokens <= limit


@cache
def decode_limit(device: str) -> int:
    """Return up to how many tokens `takes_decode` is True outside of graphs; -1 if it never is."""
    return _decode_limit(device)


def _decode_limit(device: str) -> int:
    limit = THRESHOLDS[device_class(device)].decode_tokens
    return -1 if limit == 0 or _fast_ops_problem(device) else limit


def choose_ffn(device: str, *, dtype: torch.dtype, total_rank: int, top_k: int) -> str:
    """Return how impl="auto" computes whole-FFN experts: "fused" or "grouped".

    dtype: of x. total_rank: R, the sum of the ranks of one of the three linears. top_k: K.
    """
    threshold = THRESHOLDS[device_class(device)]
    limit = threshold.ffn_rank
    if limit is None or total_rank > limit or _fast_ops_problem(device):
        return "grouped"
    fits = not threshold.ffn_in_tiles or (dtype.itemsize == 2 and top_k <= FFN_SLOTS)
    return "fused" if fits else "grouped"


def _sparse(top_k: int | None, num_experts: int) -> int | None:
    """Return K, or None if a token uses all E experts, because the gate is then dense."""
    return None if top_k is None or top_k >= num_experts else top_k


def device_class(device: str) -> str:
    """Return the key of THRESHOLDS for a device type."""
    return _device_class(device)


def _fast_ops_problem(device: str) -> str | None:
    """Return why a device type has only the reference of the ops; None if it has fast ones."""
    return _missing_ops(device)


@cache
def _device_class(device: str) -> str:
    if device != "cuda" or not torch.cuda.is_available():
        return device if device in THRESHOLDS else "cuda"
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    return name if name in THRESHOLDS else "cuda"


@cache
def _missing_ops(device: str) -> str | None:
    if device == "cpu":
        return None if native.available() else f"the native library is missing ({native.reason()})"
    return kernels_problem()


# The results are constants of a compiled graph, because code in a graph cannot look for a package
# or query a device. torch.compiler.assume_constant_result sets the same mark, but it imports the
# whole compiler.
for _constant in (device_class, _fast_ops_problem):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain_choice(
    device: str,
    *,
    tokens: int,
    in_features: int,
    out_features: int,
    num_experts: int,
    rank: int,
    top_k: int | None,
    total_rank: int | None = None,
    share_a: bool = False,
    trains: bool = True,
) -> Choice:
    """Return the formulation that impl="auto" takes for a layer, and the reason.

    The choice depends on the arguments only. Nothing is timed, and no tensor is read.

    Args:
        device: a device type, such as "cpu" or "cuda".
        tokens: T.
        in_features, out_features: I and O. No threshold depends on them.
        num_experts: E.
        rank: the rank of every expert, if `total_rank` is None.
        top_k: K; None or E for a dense gate.
        total_rank: R, the sum of the ranks.
        share_a: whether the experts share A.
        trains: whether the call computes gradients, or the layer is in training mode.
    """
    total = num_experts * rank if total_rank is None else total_rank
    impl = choose_impl(
        device, tokens=tokens, num_experts=num_experts, total_rank=total, top_k=top_k,
        share_a=share_a, trains=trains,
    )  # fmt: skip
    name = device_class(device)
    threshold = THRESHOLDS[name]
    if impl == "decode":
        reason = f"not above {threshold.decode_tokens} tokens, without gradients ({name})"
        return Choice(impl, f"T = {tokens}: {reason}")
    top_k = _sparse(top_k, num_experts)
    if problem := grouped_problem(top_k, share_a) or _fast_ops_problem(device):
        return Choice(impl, f"R = {total}: {problem}")
    assert top_k is not None
    if tokens < threshold.tokens:
        return Choice(impl, f"T = {tokens}: below {threshold.tokens} tokens ({name})")
    limit = threshold.columns * top_k
    relation = "above" if total > limit else "not above"
    return Choice(
        impl,
        f"R = {total} is {relation} {threshold.columns:g} x top_k ({top_k}) = {limit:g} ({name})",
    )
