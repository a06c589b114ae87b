"""What lies between the modelled time of a layer and the limit that it should reach, by launch.

The floor of a launch is the time of device memory: every tensor once. A launch is above its floor
because of its largest limit, of a last wave that is not full, and of its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.model import budget
from benchmarks.model.budget import Cell, Modelled


class Limit(NamedTuple):
    """The most that a layer should cost, over the frozen linears; or over the rival."""

    layer: str
    tokens: int
    most: float
    over_rival: bool = False

    def ratio(self, cell: Cell) -> float:
        """Return the modelled ratio that the limit bounds."""
        return cell.ratio / cell.rival_ratio if self.over_rival else cell.ratio

    @property
    def baseline(self) -> str:
        """The layer that the ratio is over."""
        return "the compiled rival" if self.over_rival else "frozen"


GPU = "H200"
LIMITS = (
    Limit("router", 8192, 1.18),
    Limit("router, CUDA C++ shrink", 8192, 1.13),
    Limit("router", 1024, 1.45),
    Limit("given gates", 8192, 0.92, over_rival=True),
    Limit("q/k/v, R=64", 8192, 1.14),
    Limit("gate/up", 8192, 1.10),
    Limit("grouped, 64 experts", 8192, 1.47),
    Limit("whole-FFN experts, F=14336", 8192, 1.10),
    Limit("decode", 1, 1.10),
    Limit("decode", 16, 1.10),
)

# Launch -> why its programs ask L2 for more than every tensor once.
READ_AGAIN = {
    "shrink_gate": "every tile of tokens reads A and Wr, every tile of columns reads x",
    "cluster_shrink": "every cluster of 256 tokens reads A and Wr",
    "gate_partials": "every tile of tokens reads the table of experts",
    "u Bt": "every tile of y reads u and B",
    "shrink_gate_backward": "every tile of tokens reads B, every tile of columns reads dy",
    "gate_partials_backward": "every tile of tokens reads the table of experts",
    "shrink_dx": "every tile of tokens reads A and Wr, every tile of columns reads dh and dlogits",
    "resident_dx": "every tile of columns reads dh and dlogits, every range of tokens A and Wr",
    "weight_grad": "every tile of x reads dh and dlogits, every tile of dy reads u",
    "reduce_partials": "it reads partial sums, which stay in L2",
    "reduce_chunks": "it reads partial sums, which stay in L2",
    "router_logits": "every tile of tokens reads Wr",
    "router_grad": "every tile of x reads dlogits",
    "route": "every block reads the expert ids",
    "topk_gate": "nothing is read twice",
    "topk_gate_backward": "nothing is read twice",
    "grouped_shrink": "each slot of a token reads its row of x, every tile of pairs reads A",
    "grouped_shrink_backward": "each slot of a token reads its row of dy, every tile of pairs B",
    "grouped_expand": "every tile of pairs reads the matrix of its expert",
    "grouped_weight_grad": "each slot of a token reads its rows of x and dy",
    "pair_table": "nothing is read twice",
    "ffn_inner": "every tile of tokens reads B of gate and up and A of down",
    "ffn_inner_rank": "it reads partial sums, which stay in L2",
    "ffn_inner_backward": "every tile of tokens reads B of gate and up and A of down",
    "ffn_inner_weight_grad": "each slot of a token reads its rows; every tile of F rank space",
    "routed weights": "nothing is read twice",
    "y + delta": "nothing is read twice",
    "dweights": "nothing is read twice",
    "sum of dx": "nothing is read twice",
    "dlogits Wr": "every tile of dx reads dlogits and Wr",
}
BOUND_BY = {
    "memory": "every tensor once",
    "matrix": "its operations",
    "issue": "its instructions",
    "latency": "loads that wait for each other",
}


# The products of frozen linears.
BASE = (
    "y += x Wt", "dx += dy W", "x Wgt", "x Wut", "summed Wdt", "dy Wd", "dgate_out Wg",
    "dup_out Wu",
)  # fmt: skip


def is_base(launch: Modelled) -> bool:
    """Return whether a launch is the product of a frozen linear."""
    return launch.name in BASE


def reason(launch: Modelled) -> str:
    """Return why a launch takes longer than its floor, in words."""
    if is_base(launch):
        adds = (
            ", and a part of the read of the matrix that it adds to" if "+=" in launch.name else ""
        )
        return f"the frozen product{adds}"
    if launch.limit == "L2":
        text = f"L2: {READ_AGAIN[launch.name]}"
    else:
        text = f"{launch.limit}: {BOUND_BY[launch.limit]}"
    if budget.tail(launch.waves) > 1.0:
        text += f"; {launch.waves:.2f} waves"
    return f"{text}; the start takes {launch.start:.1f}"


def at_floors(cell: Cell) -> float:
    """Return the time of a layer whose launches take their floor and their start.

    The products of the frozen linears keep their time.
    """
    return sum(
        launch.us if is_base(launch) else launch.limits["memory"] + launch.start
        for launch in cell.launches
    )


def section(cells: Sequence[Cell]) -> list[str]:
    """Return the lines of the section: a table for each of LIMITS."""
    lines = [
        "## What is left to the limits",
        "",
        f"On an {GPU}. Times in microseconds. The floor is the time of device memory: every tensor "
        "once. Launches with the same name and direction and the same times are one line.",
        "",
    ]
    for limit in LIMITS:
        name = GPU, limit.layer, limit.tokens
        cell = next((each for each in cells if each[:3] == name), None)
        if cell is None:
            continue
        ratio, time = limit.ratio(cell), budget.total(cell.launches)
        allowed = time * limit.most / ratio
        floor = at_floors(cell) * ratio / time
        state = f"{time - allowed:.0f} us too many" if time > allowed else "reached"
        lines += [
            f"### {limit.layer}, T={limit.tokens}: {ratio:.3f} of {limit.baseline}, at most "
            f"{limit.most:.2f}: {state}",
            "",
            f"If every launch took its floor and its start: {floor:.2f}.",
            "",
            "| launch | direction | us | floor | why it is above the floor |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        rows: dict[tuple[str, ...], int] = {}
        for launch in sorted(cell.launches, key=lambda row: row.direction, reverse=True):
            us, least = f"{launch.us:.1f}", f"{launch.limits['memory']:.1f}"
            row = (launch.name, launch.direction, us, least, reason(launch))
            rows[row] = rows.get(row, 0) + 1
        for (name, *rest), count in rows.items():
            lines.append(
                "| " + " | ".join([f"{count} x {name}" if count > 1 else name, *rest]) + " |"
            )
        lines.append("")
    return lines
