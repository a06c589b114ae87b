"""What is measured: the linears of real models, named cases, token counts.

Cases are named `IxO` (one linear), `qkv-I`, `qkv-IxKV`, `gate_up-IxO` (siblings that read the same
x) and `ffn-IxH` (a gated feed-forward network of H hidden units). A shape which several models
share is measured once; `used_by` keeps the names.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One frozen linear, n siblings reading the same x [T, I], or a feed-forward network.

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


def grouped_case(of: Case) -> Case:
    """The linear of a case in the suite that varies the mixture over it."""
    return replace(of, suite="grouped")


def linear_cases() -> list[Case]:
    """Every distinct (I, O) of the models above, smallest first."""
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
    """Every distinct sibling group of the models above: q/k/v first, then gate/up."""
    qkv: dict[tuple[int, int], list[str]] = {}
    gate_up: dict[tuple[int, int], list[str]] = {}
    for model, (hidden, kv, intermediate) in DECODERS.items():
        qkv.setdefault((hidden, kv), []).append(f"{model}.self_attn")
        gate_up.setdefault((hidden, intermediate), []).append(f"{model}.mlp")
    return [qkv_case(*shape, tuple(qkv[shape])) for shape in sorted(qkv)] + [
        gate_up_case(*shape, tuple(gate_up[shape])) for shape in sorted(gate_up)
    ]


def ffn_cases() -> list[Case]:
    """Every distinct feed-forward network of the models above."""
    users: dict[tuple[int, int], list[str]] = {}
    for model, (hidden, _, intermediate) in DECODERS.items():
        users.setdefault((hidden, intermediate), []).append(f"{model}.mlp")
    return [ffn_case(*shape, tuple(users[shape])) for shape in sorted(users)]


# Toy shapes for --quick: the same structure, no dimension a multiple of a tile.
QUICK_CASES = {
    "linear": [linear_case(72, 104)],
    "group": [qkv_case(72, 40), gate_up_case(72, 104)],
    "grouped": [grouped_case(linear_case(72, 104))],
    "ffn": [ffn_case(72, 104)],
}

CASES = {
    "linear": linear_cases(),
    "group": group_cases(),
    "grouped": [grouped_case(case) for case in linear_cases()],
    "ffn": ffn_cases(),
}

# What a run without --cases measures. The GPU list holds one 7B model; each further cell costs
# about three seconds, most of it torch.compile for the rival, and the run should take minutes.
DEFAULT_CASES = {
    "cuda": {
        "linear": ("4096x4096", "4096x11008", "11008x4096"),
        "group": ("qkv-4096", "gate_up-4096x11008"),
        "grouped": ("4096x4096",),
        "ffn": ("ffn-4096x11008",),
    },
    "cpu": {
        "linear": ("2048x2048", "4096x4096"),
        "group": ("qkv-2048", "gate_up-2048x5504"),
        "grouped": ("2048x2048",),
        "ffn": ("ffn-2048x5504",),
    },
}

TOKENS = {
    "cuda": (1, 8, 64, 256, 1024, 2048, 4096, 8192, 16384),
    # Two cores take 0.2 s for one forward and backward of the slowest rival at 1024.
    "cpu": (128, 512, 1024),
    "quick": (1, 33),
}


@dataclass(frozen=True)
class MachineShapes:
    """Sizes of the suite `machine`.

    copy: MiB;  product, addmm: (T, I, O);  shrink: (T, I, R);  weight_grad: (T, I, O, R);
    layer: (I, O).
    """

    copy: tuple[int, ...]
    product: tuple[tuple[int, int, int], ...]
    addmm: tuple[tuple[int, int, int], ...]
    shrink: tuple[tuple[int, int, int], ...]
    weight_grad: tuple[tuple[int, int, int, int], ...]
    layer: tuple[int, int]
    layer_tokens: tuple[int, ...]


# What the suite `machine` measures, by device.
MACHINE = {
    "cuda": MachineShapes(
        # [8192, 4096] in bf16, which partly fits the cache it is written to, and what does not.
        copy=(64, 1024),
        product=((8192, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192)),
        addmm=((1024, 4096, 4096), (8192, 4096, 4096), (1024, 4096, 14336), (8192, 4096, 14336)),
        shrink=(
            *((T, 4096, R) for T in (1024, 8192) for R in (32, 64, 128)),
            (8192, 14336, 128),
        ),
        weight_grad=((1024, 4096, 4096, 128), (8192, 4096, 4096, 128), (8192, 4096, 14336, 128)),
        layer=(4096, 4096),
        layer_tokens=(1024, 8192),
    ),
    "cpu": MachineShapes(
        copy=(256,),
        product=((512, 2048, 2048),),
        addmm=((128, 2048, 2048), (512, 2048, 2048)),
        shrink=tuple((512, 2048, R) for R in (32, 64, 128)),
        weight_grad=((512, 2048, 2048, 128),),
        layer=(2048, 2048),
        layer_tokens=(512,),
    ),
    "quick": MachineShapes(
        copy=(1,),
        product=((33, 72, 104),),
        addmm=((33, 72, 104),),
        shrink=((33, 72, 32),),
        weight_grad=((33, 72, 104, 32),),
        layer=(72, 104),
        layer_tokens=(33,),
    ),
}


def select_cases(suite: str, device: str, quick: bool, wanted: list[str] | None) -> list[Case]:
    """The cases of `suite` to run; `wanted` names cases of any suite, or "all".

    Raises ValueError for a name that no suite knows.
    """
    cases = QUICK_CASES if quick else CASES
    known = {case.name for of_suite in cases.values() for case in of_suite}
    if wanted is None:
        wanted = list(known) if quick else list(DEFAULT_CASES[device][suite])
    elif "all" in wanted:
        wanted = list(known)
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise ValueError(f"--cases: unknown {unknown}; expected 'all' or some of {sorted(known)}")
    return [case for case in cases[suite] if case.name in wanted]
