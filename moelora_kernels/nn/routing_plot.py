"""plot_routing: heat maps of a routing report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moelora_kernels.nn.routing_report import RoutingReport


def plot_routing(report: RoutingReport, folder: str | Path) -> list[Path]:
    """Write the heat maps of a routing report as PNG, and return their paths.

        load.png     layer x expert: the share of each expert
        tasks.png    task x expert: the share of each expert in the gate of a task, averaged over
                     layers; written if layers are counted by task

    Args:
        report: the result of `routing_report`, or the `report` of the trainer's callback.
        folder: the folder of the images. It is created if it does not exist.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layers.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, count_routing, plot_routing, routing_report
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> with count_routing(layer):
        ...     y = layer(torch.randn(2, 5, 16))
        ...     report = routing_report(layer)
        >>> [path.name for path in plot_routing(report, tempfile.mkdtemp())]
        ['load.png']
    """
    if not report.layers:
        raise ValueError("report: expected at least one layer, got none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    loads = _table([layer.load[None] for layer in report.layers.values()])
    paths = [_heat_map(loads, list(report.layers), "layer", folder / "load.png")]
    tasks = [layer.task_load for layer in report.layers.values() if layer.task_load is not None]
    if tasks:
        means = _task_shares(tasks)
        names = [str(task) for task in range(1, len(means) + 1)]
        paths.append(_heat_map(means, names, "task", folder / "tasks.png"))
    return paths


def _table(rows: Sequence[Tensor]) -> Tensor:
    """Return the rows below each other, with NaN beyond the experts of a layer."""
    width = max(row.shape[1] for row in rows)
    return torch.cat(
        [torch.nn.functional.pad(row, (0, width - row.shape[1]), value=torch.nan) for row in rows]
    )


def _task_shares(task_loads: Sequence[Tensor]) -> Tensor:
    """Return the share of each expert in the gate of each task, [tasks, E].

    It is the mean over the layers. A task without tokens has NaN.
    """
    tasks = max(len(load) for load in task_loads) - 1
    # Row 0 is no task.
    shares = [load[1:] / load[1:].sum(dim=1, keepdim=True) for load in task_loads]
    missing = [(0, 0, 0, tasks - len(share)) for share in shares]
    padded = [
        torch.nn.functional.pad(share, pad, value=torch.nan)
        for share, pad in zip(shares, missing, strict=True)
    ]
    table = _table(padded).view(len(padded), tasks, -1)
    return table.nanmean(dim=0)


def _heat_map(values: Tensor, names: list[str], kind: str, path: Path) -> Path:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot_routing needs matplotlib: pip install "moelora_kernels[bench]"'
        ) from error
    rows, columns = values.shape
    # Without pyplot, so that no window opens and the user's backend stays.
    figure = Figure(figsize=(3 + 0.4 * columns, 1.5 + 0.25 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), aspect="auto", vmin=0, cmap="viridis")
    axes.set_xticks(range(columns))
    axes.set_yticks(range(rows), names, fontsize=7)
    axes.set_xlabel("expert")
    axes.set_ylabel(kind)
    figure.colorbar(image, label="share of the gate weights")
    figure.savefig(path, dpi=120)
    return path
