"""Plant faults into the source of the Triton kernels, and show which tests find them.

    python tests/tools/plant.py                 every fault; exit 1 if a test does not find one
    python tests/tools/plant.py --only mask     the faults whose name contains this

Each fault changes one line in a copy of the repository. Then a test of the executed kernels
(`tests/ptx`) must fail there. If the interpreter cannot see the fault, the same test on the
interpreted kernels must pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("moelora_kernels", "kernels")
WIDE, GROUPED = "tests/ops/test_wide_ops.py", "tests/ops/test_grouped_ops.py"
FFN = "tests/ops/test_ffn_inner_kernels.py"


class Fault(NamedTuple):
    """A line of a kernel or a launcher, and the line in its place."""

    name: str
    file: str
    line: str
    replacement: str
    # File of the test, and its parameters "op-case".
    test: str
    parameters: str
    # Whether the interpreter sees it: None if it is not run, because it would write anywhere.
    interpreted: bool | None = True
    # The architectures whose code has the line.
    architectures: tuple[str, ...] = ("sm_80", "sm_90")


FAULTS = (
    # --- one tile, step, split or sibling too few
    Fault(
        "shrink_gate: last tile of tokens", "shrink_gate.py",
        "    token_tiles = launcher.ceil_div(T, tile_config.tokens)",
        "    token_tiles = launcher.ceil_div(T, tile_config.tokens) - 1", WIDE, "shrink_gate-rows",
    ),
    Fault(
        "shrink_gate: router of sibling 0", "shrink_gate.py",
        "        router_ptr = select_from(router_ptrs, sibling)",
        "        router_ptr = select_from(router_ptrs, sibling * 0)", WIDE, "shrink_gate-siblings",
    ),
    Fault(
        "gate_partials: last split", "common/reduce_partials.py",
        "    for _ in range(splits):", "    for _ in range(tl.maximum(splits - 1, 1)):",
        WIDE, "shrink_gate-long",
    ),
    Fault(
        "shrink_gate_backward: B of sibling 0", "shrink_gate_backward.py",
        "    b_ptr = select_from(b_ptrs, sibling)", "    b_ptr = select_from(b_ptrs, sibling * 0)",
        WIDE, "shrink_gate_backward-siblings",
    ),
    Fault(
        "shrink_dx: last tile of ranks", "shrink_dx.py",
        "    for first in range(start, end, BLOCK_R):",
        "    for first in range(start, end - BLOCK_R, BLOCK_R):", WIDE, "shrink_dx-plain",
    ),
    Fault(
        "resident_dx: last tile of ranks", "shrink_dx.py",
        "    for j in tl.static_range(len(tiles)):",
        "    for j in tl.static_range(len(tiles) - 1):", WIDE, "shrink_dx-mixed_ranks_dense",
        architectures=("sm_90",),
    ),
    Fault(
        "weight_grad: last step of tokens", "weight_grad.py",
        "    for first in range(start_t, end_t, BLOCK_T):",
        "    for first in range(start_t, end_t - BLOCK_T, BLOCK_T):", WIDE, "weight_grad-one_row",
    ),
    Fault(
        "reduce_partials: last split", "common/reduce_partials.py",
        "            for split in range(splits):",
        "            for split in range(tl.maximum(splits - 1, 1)):", WIDE, "weight_grad-long",
    ),
    Fault(
        "grouped_shrink: last step", "grouped_shrink.py",
        "        for first_i in range(0, I, BLOCK_I):",
        "        for first_i in range(0, I - BLOCK_I, BLOCK_I):", GROUPED, "grouped_shrink-wide",
    ),
    Fault(
        "grouped_shrink_backward: last step", "grouped_shrink_backward.py",
        "            for first_o in range(0, O, BLOCK_O):",
        "            for first_o in range(0, O - BLOCK_O, BLOCK_O):",
        GROUPED, "grouped_shrink_backward-wide",
    ),
    Fault(
        "grouped_expand: last step of ranks", "grouped_expand.py",
        "                for first_r in range(BLOCK_R, rank, BLOCK_R):",
        "                for first_r in range(BLOCK_R, rank - BLOCK_R, BLOCK_R):",
        GROUPED, "grouped_expand-large_ranks",
    ),
    Fault(
        "grouped_dx: dlogits of sibling 0", "grouped_expand.py",
        "                logit_ptr = dlogits_ptr + tokens * L + expert",
        "                logit_ptr = dlogits_ptr + tokens * L + local_expert",
        GROUPED, "grouped_dx-distinct_experts",
    ),
    Fault(
        "grouped_dx: router of sibling 0", "grouped_expand.py",
        "                    router_row = router_ptr + expert.to(tl.int64) * O",
        "                    router_row = router_ptr + local_expert.to(tl.int64) * O",
        GROUPED, "grouped_dx-distinct_experts",
    ),
    Fault(
        "grouped_dx: dlogits of the first slot alone", "grouped_expand.py",
        "        if not sparse_dlogits:", "        if True:",
        GROUPED, "grouped_dx-distinct_experts",
    ),
    Fault(
        "reduce_chunks: last chunk", "common/chunks.py",
        "        for position in range(first, expert_end - size + 1, size):",
        "        for position in range(first, expert_end - 2 * size + 1, size):",
        GROUPED, "grouped_weight_grad-skew",
    ),
    Fault(
        "router_logits: last step", "router.py",
        "        router = load_transposed(router_ptr, I, experts, i, experts_in, i < I)",
        "        router = load_transposed(router_ptr, I, experts, i, experts_in, i < I - BLOCK_I)",
        GROUPED, "router_logits-wide",
    ),
    # --- sums
    Fault(
        "gate_partials: a sum that is rounded after every split",
        "common/reduce_partials.py",
        "        partials_ptr += T.to(tl.int64) * (n * WIDTH)",
        "        partials_ptr += T.to(tl.int64) * (n * WIDTH)\n"
        "        total = total.to(tl.bfloat16).to(tl.float32)",
        WIDE,
        "shrink_gate-many_experts",
    ),
    Fault(
        "gate_rows: masked tokens are added to row 0", "common/gate_rows.py",
        "            row = tl.load(rows_ptr + tokens, mask=tokens_in, other=-1).to(tl.int64)",
        "            row = tl.load(rows_ptr + tokens // 2).to(tl.int64)",
        WIDE, "shrink_gate_backward-rows",
    ),
    # --- what only the compiled code shows
    Fault(
        "weight_grad: every program stores the bias", "weight_grad.py",
        "        if first_i == 0:", "        if first_i >= 0:",
        WIDE, "weight_grad-long", False,
    ),
    Fault(
        "router_grad: every program stores the bias", "router.py",
        "    if first_i == 0:", "    if first_i >= 0:", GROUPED, "router_grad-wide", False,
    ),
    Fault(
        "a wrong alignment hint of the first rank", "common/tables.py",
        "    return math.gcd(16, *ranks)", "    return 16",
        WIDE, "shrink_dx-dropout_per_expert", False,
    ),
    Fault(
        "a mask of rows that a load lacks", "common/memory.py",
        "        mask=rows_in[:, None] & columns_in[None, :],",
        "        mask=(rows_in | True)[:, None] & columns_in[None, :],",
        WIDE, "shrink_gate-plain", None,
    ),
    Fault(
        "a mask that a store lacks", "shrink_gate.py",
        "        tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_bounds)",
        "        tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty))",
        WIDE, "shrink_gate-plain", None,
    ),
    # --- whole-FFN experts
    Fault(
        "ffn_inner: last tile of tokens", "ffn_inner.py",
        "        token_tiles * split,", "        (token_tiles - 1) * split,",
        FFN, "ffn_inner-mixed_ranks",
    ),
    Fault(
        "ffn_inner_backward: z in the place of its activation", "ffn_inner_backward.py",
        "        dz_up = tl.where(selected, da * value, 0.0)",
        "        dz_up = tl.where(selected, da * z_gate, 0.0)",
        FFN, "ffn_inner_backward-mixed_ranks",
    ),
    Fault(
        "ffn_inner_weight_grad: nothing is stored for an expert without pairs",
        "ffn_inner_weight_grad.py",
        "    store_rows(dup_b_ptr + partial, R, f, columns, f_in, columns_in, dup_b)",
        "    has_terms = tl.max(tl.abs(dup_b), 0) > 0\n"
        "    store_rows(dup_b_ptr + partial, R, f, columns, f_in, columns_in & has_terms, dup_b)",
        FFN, "ffn_inner_backward-empty", architectures=("sm_90",),
    ),
    Fault(
        "ffn_inner: rows that are no pairs have an expert", "common/pair_rows.py",
        "    ranks = tl.multiple_of(tl.where(routed, ranks, 0), RANK_DIVISOR)",
        "    ranks = tl.multiple_of(ranks, RANK_DIVISOR)", FFN, "ffn_inner_backward-mixed_ranks",
    ),
)  # fmt: skip


def copy_repository(folder: Path) -> None:
    """Copy the files of the repository, also those that are not committed yet."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def fails(folder: Path, fault: Fault, parameters: str) -> tuple[bool, str]:
    """Return whether the test fails, and its message."""
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", f"{fault.test}::test_op[{parameters}]"],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{fault.name}: {parameters}\n{done.stdout}{done.stderr}")
    lines = [line[2:].strip() for line in done.stdout.splitlines() if line.startswith("E ")]
    return done.returncode == 1, next(iter(lines), "")


def plant(fault: Fault, folder: Path) -> bool:
    """Plant a fault into a copy of the repository, print what is found, and remove it."""
    path = folder / KERNELS / fault.file
    original = path.read_text()
    if f"{fault.line}\n" not in original:
        raise RuntimeError(f"{fault.name}: {fault.file} has no line {fault.line.strip()!r}")
    path.write_text(original.replace(f"{fault.line}\n", f"{fault.replacement}\n"))
    try:
        results = {
            architecture: fails(folder, fault, f"{fault.parameters}-ptx-{architecture}-bf16")
            for architecture in fault.architectures
        }
        seen = all(failed for failed, _ in results.values())
        interpreted = "not run"
        if fault.interpreted is not None:
            found, _ = fails(folder, fault, f"{fault.parameters}-triton-fp16")
            interpreted = "found" if found else "passes"
            seen &= found == fault.interpreted
        found_by = "; ".join(
            f"{architecture}: {message[:110] if failed else 'NOT FOUND'}"
            for architecture, (failed, message) in results.items()
        )
        print(f"{fault.name} | {found_by} | interpreter: {interpreted}", flush=True)
        return seen
    finally:
        path.write_text(original)


def main(arguments: list[str] | None = None) -> int:
    """Plant every fault; return 1 if a test does not see one as it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="plant the faults whose name contains this")
    only = parser.parse_args(arguments).only
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        wrong = [f.name for f in FAULTS if only in f.name and not plant(f, Path(folder))]
    print(f"not as expected: {', '.join(wrong)}" if wrong else "all as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
