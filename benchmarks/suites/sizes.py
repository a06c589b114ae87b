"""The cells that a run measures: on a CPU and on a GPU, by default, with --full and with --quick.

The default has a table of every suite and takes a few minutes. Its cells are a part of the cells of
--full, so that their numbers can be compared.
"""

from dataclasses import dataclass, replace

from benchmarks.suites.cells import DEFAULT_MIXTURE, GroupedSizes, Mixture, mixtures

MODES = ("fwd", "fwd_bwd")
# A forward that is replayed from a CUDA graph, which only a GPU has.
GRAPH = "decode_graph"


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a suite of layers: every mixture on every case at every T in every mode."""

    cases: tuple[str, ...]
    tokens: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    mixtures: tuple[Mixture, ...] = (DEFAULT_MIXTURE,)


@dataclass(frozen=True)
class MachineSizes:
    """The sizes of the suite `machine`.

    copy: MiB;  product, addmm: (T, I, O);  shrink: (T, I, R);  weight_grad: (T, I, O, R);
    layer: (I, O), measured at each of layer_tokens in each of layer_modes.
    """

    copy: tuple[int, ...]
    product: tuple[tuple[int, int, int], ...]
    addmm: tuple[tuple[int, int, int], ...]
    shrink: tuple[tuple[int, int, int], ...]
    weight_grad: tuple[tuple[int, int, int, int], ...]
    layer: tuple[int, int]
    layer_tokens: tuple[int, ...]
    layer_modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class RunSizes:
    """The sizes of every suite, and how long a cell is sampled.

    budget_s: seconds of samples in a cell;  min_rounds: the fewest samples of a provider. Large
    cells need more time for them than the budget.
    """

    linear: LayerSizes
    group: LayerSizes
    decode: LayerSizes
    ffn: LayerSizes
    grouped: GroupedSizes
    machine: MachineSizes
    budget_s: float
    min_rounds: int


DECODE_CASES = ("4096x4096", "2048x2048", "qkv-2048", "gate_up-2048x5504")
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
# Whole networks: few experts, and twice as many of them for a token.
FFN_MIXTURES = mixtures((8, 16, 2), (16, 16, 4))

CPU_DEFAULT = RunSizes(
    # Few tokens and many. Compiling `masked_compiled` takes ten seconds and more per cell.
    linear=LayerSizes(("2048x2048",), (128, 1024)),
    group=LayerSizes(("qkv-2048",), (512,), ("fwd_bwd",)),
    decode=LayerSizes(("2048x2048",), (1, 16), ("fwd",)),
    ffn=LayerSizes(("ffn-2048x5504",), (128,), ("fwd_bwd",)),
    grouped=GroupedSizes(
        cases=("2048x2048",),
        # Both sides of the threshold in use, R / K = 32, and few tokens for each of many experts.
        mixtures=mixtures((8, 8, 4), (8, 16, 2), (64, 16, 2)),
        tokens=1024,
        routed=Mixture(64, 16, 2),
        scaled=Mixture(8, 16, 2),
        token_counts=(1024, 2048),
        tables=("mixtures",),
        modes=("fwd_bwd",),
    ),
    machine=MachineSizes(
        copy=(256,),
        product=((512, 2048, 2048),),
        addmm=((512, 2048, 2048),),
        shrink=((512, 2048, 128),),
        weight_grad=((512, 2048, 2048, 128),),
        layer=(2048, 2048),
        layer_tokens=(512,),
        layer_modes=("fwd_bwd",),
    ),
    budget_s=3.0,
    min_rounds=5,
)

CPU_FULL = RunSizes(
    # Two cores take 0.2 s for one forward and backward of the slowest provider at T = 1024.
    linear=LayerSizes(("2048x2048", "4096x4096"), (128, 512, 1024)),
    group=LayerSizes(("qkv-2048", "gate_up-2048x5504"), (128, 512, 1024)),
    decode=LayerSizes(DECODE_CASES, DECODE_TOKENS, ("fwd",)),
    ffn=LayerSizes(("ffn-2048x5504",), (128, 1024, 2048), mixtures=FFN_MIXTURES),
    grouped=GroupedSizes(
        cases=("2048x2048",),
        # Larger mixtures need a second and more for one wide product on two cores.
        mixtures=mixtures(
            (8, 4, 4),
            (8, 8, 4),
            (8, 8, 2),
            (8, 16, 2),
            (8, 32, 2),
            (8, 24, 4),
            (8, 64, 2),
            (16, 8, 8),
            (64, 16, 8),
            (64, 16, 2),
            (64, 64, 4),
            (256, 8, 2),
        ),
        tokens=1024,
        routed=Mixture(64, 16, 2),
        scaled=Mixture(8, 16, 2),
        token_counts=(1024, 2048, 4096),
    ),
    machine=MachineSizes(
        copy=(256,),
        product=((512, 2048, 2048),),
        addmm=((128, 2048, 2048), (512, 2048, 2048)),
        shrink=tuple((512, 2048, R) for R in (32, 64, 128)),
        weight_grad=((512, 2048, 2048, 128),),
        layer=(2048, 2048),
        layer_tokens=(512,),
    ),
    budget_s=6.0,
    min_rounds=5,
)

# One linear of a 7B model: decoding, a few sequences, and a training step.
GPU_DEFAULT = RunSizes(
    linear=LayerSizes(("4096x4096",), (1, 64, 1024, 8192)),
    group=LayerSizes(("qkv-4096",), (1, 1024, 8192)),
    decode=LayerSizes(("4096x4096",), (1, 16), ("fwd", GRAPH)),
    ffn=LayerSizes(("ffn-4096x11008",), (1024, 8192)),
    grouped=GroupedSizes(
        cases=("4096x4096",),
        mixtures=mixtures(
            (8, 16, 2), (8, 64, 2), (16, 16, 2), (64, 16, 2), (64, 64, 4), (256, 8, 2)
        ),
        tokens=8192,
        routed=Mixture(64, 64, 4),
        scaled=Mixture(64, 64, 4),
        token_counts=(1024, 8192),
        tables=("mixtures",),
        modes=("fwd_bwd",),
    ),
    machine=MachineSizes(
        copy=(1024,),
        product=((8192, 4096, 4096),),
        addmm=((8192, 4096, 4096),),
        shrink=((8192, 4096, 128),),
        weight_grad=((8192, 4096, 4096, 128),),
        layer=(4096, 4096),
        layer_tokens=(8192,),
    ),
    # Hundreds of rounds, but for the largest T.
    budget_s=0.3,
    min_rounds=10,
)

GPU_TOKENS = (1, 8, 64, 256, 1024, 2048, 4096, 8192, 16384)

GPU_FULL = RunSizes(
    # The linears of one 7B model.
    linear=LayerSizes(("4096x4096", "4096x11008", "11008x4096"), GPU_TOKENS),
    group=LayerSizes(("qkv-4096", "gate_up-4096x11008"), GPU_TOKENS),
    decode=LayerSizes(DECODE_CASES, DECODE_TOKENS, ("fwd", GRAPH)),
    ffn=LayerSizes(("ffn-4096x11008",), GPU_TOKENS, mixtures=FFN_MIXTURES),
    grouped=GroupedSizes(
        cases=("4096x4096",),
        # On an H200, wide and grouped cross at R / K = 245 in the model.
        mixtures=mixtures(
            # The rank, few experts: R / K from 32 to 512.
            *((8, rank, 2) for rank in (8, 16, 32, 48, 64, 96, 128)),
            *((8, 64, top_k) for top_k in (1, 4)),
            # K, on both sides of the modelled crossover: R / K from 32 to 256.
            *((16, 16, top_k) for top_k in (1, 2, 4, 8)),
            (16, 128, 8),
            # The rank, many experts: R / K from 256 to 4096.
            *((64, rank, 2) for rank in (8, 16, 32, 64, 128)),
            *((64, 8, top_k) for top_k in (4, 8)),
            *((64, 64, top_k) for top_k in (1, 4, 8)),
            (64, 48, 8),
            # Few tokens for each expert, and weights of the experts far larger than W.
            *((256, 8, top_k) for top_k in (1, 2, 4, 8)),
            (256, 32, 4),
            (256, 128, 8),
        ),
        tokens=8192,
        routed=Mixture(64, 64, 4),
        scaled=Mixture(64, 64, 4),
        token_counts=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    ),
    machine=MachineSizes(
        # [8192, 4096] in bf16 partly fits into the cache; 1024 MiB do not.
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
    budget_s=0.3,
    min_rounds=10,
)

# Toy shapes: no dimension is a multiple of a tile.
QUICK = RunSizes(
    linear=LayerSizes(("72x104",), (1, 33)),
    group=LayerSizes(("qkv-72x40", "gate_up-72x104"), (1, 33)),
    decode=LayerSizes(("72x104", "qkv-72x40"), (1, 33), ("fwd",)),
    ffn=LayerSizes(("ffn-72x104",), (1, 33), mixtures=mixtures((8, 16, 2), (4, 3, 3))),
    grouped=GroupedSizes(
        cases=("72x104",),
        # R / K on both sides of the threshold of a CPU; rows of rank 2 are not 16 bytes long.
        mixtures=mixtures((8, 2, 2), (4, 12, 2), (8, 16, 1)),
        tokens=33,
        routed=Mixture(8, 16, 1),
        scaled=Mixture(8, 16, 1),
        token_counts=(1, 33),
    ),
    machine=MachineSizes(
        copy=(1,),
        product=((33, 72, 104),),
        addmm=((33, 72, 104),),
        shrink=((33, 72, 32),),
        weight_grad=((33, 72, 104, 32),),
        layer=(72, 104),
        layer_tokens=(33,),
    ),
    budget_s=0.02,
    min_rounds=3,
)

QUICK_GPU = replace(QUICK, decode=replace(QUICK.decode, modes=("fwd", GRAPH)))

EXTENTS = ("default", "full", "quick")

RUN_SIZES = {
    ("cpu", "default"): CPU_DEFAULT,
    ("cpu", "full"): CPU_FULL,
    ("cpu", "quick"): QUICK,
    ("cuda", "default"): GPU_DEFAULT,
    ("cuda", "full"): GPU_FULL,
    ("cuda", "quick"): QUICK_GPU,
}
