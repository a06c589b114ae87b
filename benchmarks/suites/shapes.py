"""The cases: linears, siblings and feed-forward networks of published models, by name.

Cases are named `IxO` (one linear), `qkv-I`, `qkv-IxKV`, `gate_up-IxO` (siblings that read the same
x) and `ffn-IxH` (a gated feed-forward network of H hidden units). A shape that several models
share is one case; `used_by` names the models.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One frozen linear, n siblings that read the same x [T, I], or a feed-forward network.

    siblings: ((name, O), ...) in the order of the outputs;  used_by: "model.module" names;
    intermediate: width between the linears of a feed-forward network, else 0.
    """

    suite: str
    name: str
    in_features: int
    siblings: tuple[tuple[str, int], ...]
    used_by: tuple[str, ...] = ()
    intermediate: int = 0

    @property
    def out_features(self) -> tuple[int, ...]:
        """O of every output."""
        return tuple(out for _, out in self.siblings)


# model: hidden size, width of k and v, intermediate size of the gated FFN
DECODERS = {
    "Qwen1.5-1.8B": (2048, 2048, 5504),
    "Qwen1.5-7B": (4096, 4096, 11008),
    "Qwen1.5-14B": (5120, 5120, 13696),
    "Llama-2-7B": (4096, 4096, 11008),
    "Llama-3-8B": (4096, 1024, 14336),
}

# ChatGLM-6B fuses q, k and v into one linear and has no gate: it adds linears, but no siblings.
CHATGLM_6B = {
    "query_key_value": (4096, 12288),
    "dense": (4096, 4096),
    "dense_h_to_4h": (4096, 16384),
    "dense_4h_to_h": (16384, 4096),
}


def linear_case(in_features: int, out_features: int, used_by: tuple[str, ...] = ()) -> Case:
    name = f"{in_features}x{out_features}"
    return Case("linear", name, in_features, (("linear", out_features),), used_by)


def qkv_case(hidden: int, kv: int, used_by: tuple[str, ...] = ()) -> Case:
    name = f"qkv-{hidden}" if kv == hidden else f"qkv-{hidden}x{kv}"
    siblings = (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv))
    return Case("group", name, hidden, siblings, used_by)


def gate_up_case(hidden: int, intermediate: int, used_by: tuple[str, ...] = ()) -> Case:
    name = f"gate_up-{hidden}x{intermediate}"
    siblings = (("gate_proj", intermediate), ("up_proj", intermediate))
    return Case("group", name, hidden, siblings, used_by)


def ffn_case(hidden: int, intermediate: int, used_by: tuple[str, ...] = ()) -> Case:
    name = f"ffn-{hidden}x{intermediate}"
    return Case("ffn", name, hidden, (("mlp", hidden),), used_by, intermediate)


def grouped_case(case: Case) -> Case:
    """Return a linear as a case of the suite `grouped`, which varies the mixture over it."""
    return replace(case, suite="grouped")


def decode_case(case: Case) -> Case:
    """Return a linear or siblings as a case of the suite `decode`: few tokens, no gradients."""
    return replace(case, suite="decode")


def linear_cases() -> list[Case]:
    """Return every distinct linear of the models above, smallest first."""
    users: dict[tuple[int, int], list[str]] = {}
    for model, (hidden, kv, intermediate) in DECODERS.items():
        modules = {
            "q_proj,o_proj": (hidden, hidden),
            "k_proj,v_proj": (hidden, kv),
            "gate_proj,up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }
        for module, shape in modules.items():
            users.setdefault(shape, []).append(f"{model}.{module}")
    for module, shape in CHATGLM_6B.items():
        users.setdefault(shape, []).append(f"ChatGLM-6B.{module}")
    by_size = sorted(users, key=lambda shape: (shape[0] * shape[1], shape))
    return [linear_case(*shape, tuple(users[shape])) for shape in by_size]


def group_cases() -> list[Case]:
    """Return every distinct sibling group of the models above: q/k/v first, then gate/up."""
    qkv: dict[tuple[int, int], list[str]] = {}
    gate_up: dict[tuple[int, int], list[str]] = {}
    for model, (hidden, kv, intermediate) in DECODERS.items():
        qkv.setdefault((hidden, kv), []).append(f"{model}.self_attn")
        gate_up.setdefault((hidden, intermediate), []).append(f"{model}.mlp")
    return [qkv_case(*shape, tuple(qkv[shape])) for shape in sorted(qkv)] + [
        gate_up_case(*shape, tuple(gate_up[shape])) for shape in sorted(gate_up)
    ]


def ffn_cases() -> list[Case]:
    """Return every distinct feed-forward network of the models above."""
    users: dict[tuple[int, int], list[str]] = {}
    for model, (hidden, _, intermediate) in DECODERS.items():
        users.setdefault((hidden, intermediate), []).append(f"{model}.mlp")
    return [ffn_case(*shape, tuple(users[shape])) for shape in sorted(users)]


# The cases of --quick: the same structure, and no dimension is a multiple of a tile.
QUICK_CASES = {
    "linear": [linear_case(72, 104)],
    "group": [qkv_case(72, 40), gate_up_case(72, 104)],
    "grouped": [grouped_case(linear_case(72, 104))],
    "decode": [decode_case(linear_case(72, 104)), decode_case(qkv_case(72, 40))],
    "ffn": [ffn_case(72, 104)],
}

CASES = {
    "linear": linear_cases(),
    "group": group_cases(),
    "grouped": [grouped_case(case) for case in linear_cases()],
    "decode": [decode_case(case) for case in linear_cases() + group_cases()],
    "ffn": ffn_cases(),
}


def select_cases(suite: str, quick: bool, names: list[str]) -> list[Case]:
    """Return the cases of a suite with these names; "all" stands for every name.

    names: names of cases of any suite. Raises ValueError for a name that no suite has.
    """
    cases = QUICK_CASES if quick else CASES
    known = {case.name for suite_cases in cases.values() for case in suite_cases}
    if unknown := sorted({*names} - known - {"all"}):
        raise ValueError(
            f"argument --cases: expected 'all' or some of {sorted(known)}, got {unknown}"
        )
    return [case for case in cases[suite] if "all" in names or case.name in names]
