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
    Limit("router", 1024, 1.45),
    Limit("given gates", 8192, 0.92, over_rival=True),
    Limit("q/k/v, R=64", 8192, 1.14),
    Limit("gate/up", 8192, 1.10),
    Limit("grouped, 64 experts", 8192, 1.47),
)

# Launch -> what its programs read from L2 again.
READ_AGAIN = {
    "shrink_gate": "A and Wr for every tile of tokens, x for every tile of columns",
    "gate_partials": "the table of experts for every tile of tokens",
    "u Bt": "u and B for every tile of y",
    "shrink_gate_backward": "B for every tile of tokens, dy for every tile of columns",
    "gate_partials_backward": "the table of experts for every tile of tokens",
    "shrink_dx": "A and Wr for every tile of tokens, dh and dlogits for every tile of columns",
    "resident_dx": "dh and dlogits for every tile of columns, A and Wr for every range of tokens",
    "weight_grad": "dh and dlogits for every tile of x, u for every tile of dy",
    "reduce_partials": "nothing: the partial sums are still in L2",
    "router_logits": "Wr for every tile of tokens",
    "router_grad": "dlogits for every tile of x",
    "route": "the expert ids in every block",
    "grouped_shrink": "a row of x for each slot of its token, A for every tile",
    "grouped_shrink_backward": "a row of dy for each slot of its token, B for every tile",
    "grouped_expand": "the matrix of an expert for every tile of its pairs",
    "grouped_weight_grad": "a row of x and of dy for each slot of its token",
}  # fmt: skip
BOUND_BY = {
    "memory": "every tensor once",
    "matrix": "its operations",
    "issue": "its instructions",
    "latency": "loads that wait for each other",
}


def is_base(launch: Modelled) -> bool:
    """Return whether a launch is the product of a frozen linear."""
    return launch.name in ("y += x Wt", "dx += dy W")


def reason(launch: Modelled) -> str:
    """Return why a launch takes longer than its floor, in words."""
    if is_base(launch):
        return "the frozen product, and a part of the read of the matrix that it adds to"
    if launch.limit == "L2":
        text = f"L2: it reads again {READ_AGAIN[launch.name]}"
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
