"""The measured ratios beside the goals of the package, for the suites `ffn` and `decode`."""

from typing import NamedTuple

from benchmarks.output import tables
from benchmarks.output.tables import Table

# Providers that compute less than a mixture of experts: nothing that the package could overtake.
LESS = ("frozen", "plain_lora")


class Goal(NamedTuple):
    """The most that the package should cost over the frozen layer in a cell.

    rivals: the providers that it should be ahead of; None: every one with the same mixture.
    """

    case: str
    mode: str
    tokens: int
    most: float
    mixture: tuple[int, int, int] = (8, 16, 2)
    rivals: tuple[str, ...] | None = ()

    def holds_for(self, row: dict) -> bool:
        """Return whether a row of a provider with experts is of this cell."""
        cell = row["case"], row["mode"], row["tokens"]
        return cell == self[:3] and self.mixture == (row["experts"], row["rank"], row["top_k"])


SIX_LINES = ("masked", "masked_compiled")
# Device -> goals. A CPU has two cores; every GPU has the same goals.
GOALS = {
    "cpu": (
        Goal("ffn-2048x5504", "fwd_bwd", 128, 1.25, rivals=None),
        Goal("ffn-2048x5504", "fwd_bwd", 1024, 1.30, rivals=None),
        Goal("ffn-2048x5504", "fwd_bwd", 2048, 1.30, rivals=None),
        Goal("ffn-2048x5504", "fwd_bwd", 128, 1.45, (16, 16, 4)),
        Goal("ffn-2048x5504", "fwd_bwd", 1024, 1.45, (16, 16, 4)),
        Goal("ffn-2048x5504", "fwd_bwd", 2048, 1.45, (16, 16, 4)),
        Goal("4096x4096", "fwd", 1, 1.12, rivals=SIX_LINES),
        Goal("4096x4096", "fwd", 16, 1.12, rivals=SIX_LINES),
        Goal("2048x2048", "fwd", 1, 1.35, rivals=SIX_LINES),
        Goal("qkv-2048", "fwd", 1, 1.20),
    ),
    "gpu": (
        Goal("ffn-4096x11008", "fwd_bwd", 8192, 1.10),
        Goal("4096x4096", "decode_graph", 1, 1.10),
        Goal("4096x4096", "decode_graph", 16, 1.10),
    ),
}


def faster_rivals(cell: dict[str, dict], goal: Goal) -> list[str]:
    """Return the rivals of a cell, provider -> row, that are at least as fast as the package."""
    others = [name for name in cell if name not in LESS and not name.startswith("moelora")]
    named = others if goal.rivals is None else [name for name in others if name in goal.rivals]
    return [name for name in named if cell[name]["median_us"] <= cell["moelora"]["median_us"]]


def goal_tables(result: dict) -> list[Table]:
    """Return a table with a line per goal whose cell was measured; none if there is no such cell.

    Only the suites `ffn` and `decode` have goals.
    """
    goals = GOALS["gpu" if result["machine"]["device"].startswith("NVIDIA") else "cpu"]
    lines = [["case", "mode", "E, r, K", "T", "at most", "measured", "ahead of rivals"]]
    rows = [row for row in result["rows"] if row.get("suite") in ("ffn", "decode")]
    for group in tables.split(rows, "case", "mixture", "mode", "tokens"):
        cell = {row["provider"]: row for row in group if row["median_us"]}
        if "moelora" not in cell or "frozen" not in cell:
            continue
        ratio = cell["moelora"]["median_us"] / cell["frozen"]["median_us"]
        for goal in (each for each in goals if each.holds_for(cell["moelora"])):
            faster = faster_rivals(cell, goal)
            lines.append(
                [
                    goal.case,
                    tables.title(goal.mode),
                    ", ".join(map(str, goal.mixture)),
                    str(goal.tokens),
                    f"{goal.most:.2f}x",
                    f"{ratio:.2f}x" + ("" if ratio <= goal.most else ": missed"),
                    f"no: {', '.join(faster)}" if faster else "-" if goal.rivals == () else "yes",
                ]
            )
    return [Table("Goals of the package", lines, [])] if len(lines) > 1 else []
