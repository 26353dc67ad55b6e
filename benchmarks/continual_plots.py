"""The pictures of the continual benchmark: accuracy over stages, and matrices of accuracies. Each writes one .png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter
from routing_plots import COLOURS, OURS

from adapter_hub.continual.metrics import AccuracyMatrix

Matrices = Mapping[str, Sequence[AccuracyMatrix]]    # of each method's runs


def curves(path: Path, title: str, matrices: Matrices, bounds: Mapping[str, float], ours: str) -> None:
    """Mean accuracy over the tasks learned so far, after each stage; `bounds` are methods that see all tasks at once."""
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    others = [name for name in (*matrices, *bounds) if name != ours]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)} | {ours: OURS}
    for name, runs in matrices.items():
        values = np.array([run.curve for run in runs])
        stages = range(1, values.shape[1] + 1)
        width = 2.4 if name == ours else 1.4
        axis.plot(stages, values.mean(axis=0), marker="o", markersize=3, label=name, color=colours[name], linewidth=width)
        axis.fill_between(stages, values.min(axis=0), values.max(axis=0), color=colours[name], alpha=0.1)
    for name, value in bounds.items():
        axis.axhline(value, label=name, color=colours[name], linewidth=1.2, linestyle="--")
    axis.set(title=title, xlabel="tasks learned", ylabel="accuracy over the tasks so far, no task id")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _write(figure, path)


def matrices(path: Path, title: str, found: Matrices) -> None:
    """The first run of each method: a row a stage, a column a task."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found) + 0.8, 3.9), squeeze=False, layout="constrained")
    figure.suptitle(title)
    picture = None
    for axis, (name, runs) in zip(axes[0], found.items(), strict=True):
        picture = axis.imshow(runs[0].values, vmin=0, vmax=1, cmap="viridis")
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="task", ylabel="after learning task")
        ticks = range(0, len(runs[0].tasks), max(1, len(runs[0].tasks) // 5))
        axis.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        axis.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    if picture is not None:
        figure.colorbar(picture, ax=axes[0].tolist(), format=PercentFormatter(1.0), shrink=0.8)
    _write(figure, path)


def _write(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
