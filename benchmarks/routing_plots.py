"""The pictures of the routing benchmark. Each takes figures that were measured and writes one .png."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from routing_metrics import F64

# Okabe and Ito's colours, told apart with any eyes; ours is always the first, and thicker.
OURS = "#0072B2"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
OUTSIDE = "#D55E00"
Curves = Mapping[str, Sequence[float]]


@contextmanager
def _figure(path: Path, panels: int, title: str) -> Iterator[Sequence[Axes]]:
    figure, axes = plt.subplots(1, panels, figsize=(5.6 * panels, 4.4), squeeze=False, layout="constrained")
    figure.suptitle(title)
    yield axes[0]
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _styles(names: Sequence[str]) -> dict[str, dict[str, object]]:
    others = [name for name in names if not name.startswith("ours")]
    styles: dict[str, dict[str, object]] = {name: {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.4} for i, name in enumerate(others)}
    for i, name in enumerate(name for name in names if name.startswith("ours")):
        styles[name] = {"color": OURS, "linewidth": 2.4, "linestyle": "-" if i == 0 else "--", "zorder": 5}
    return styles


def growth(path: Path, panels: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[Sequence[float]]]]]) -> None:
    """For each panel: numbers of adapters, and for each head one curve an order. Lines are means, bands the extremes."""
    with _figure(path, len(panels), "Accuracy of the first adapters' inputs as others come") as axes:
        for axis, (title, (counts, heads)) in zip(axes, panels.items(), strict=True):
            styles = _styles(list(heads))
            for name, orders in heads.items():
                values = np.array(orders)
                axis.plot(counts, values.mean(axis=0), marker="o", markersize=3, label=name, **styles[name])
                axis.fill_between(counts, values.min(axis=0), values.max(axis=0), color=styles[name]["color"], alpha=0.08)
            axis.set(title=title, xlabel="adapters", ylabel="top-1 of the first adapters' test inputs")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.legend(fontsize=8)


def coverage_risk(path: Path, panels: Mapping[str, Curves]) -> None:
    """For each panel and head: the share of wrong answers at coverages evenly spaced up to 1."""
    with _figure(path, len(panels), "Wrong answers among the inputs with the highest acceptance scores") as axes:
        for axis, (title, heads) in zip(axes, panels.items(), strict=True):
            styles = _styles(list(heads))
            for name, risks in heads.items():
                axis.plot((np.arange(len(risks)) + 1) / len(risks), risks, label=name, **styles[name])
            axis.set(title=title, xlabel="coverage", ylabel="risk")
            axis.set_ylim(bottom=0)
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(PercentFormatter(1.0))
            axis.legend(fontsize=8)


def scores(path: Path, heads: Mapping[str, tuple[F64, F64, float | None]]) -> None:
    """For each head: acceptance scores in scope and out of scope, and the threshold of a stated rate."""
    with _figure(path, len(heads), "Acceptance scores, CLINC150 test inputs, 10 adapters") as axes:
        for axis, (title, (inside, outside, threshold)) in zip(axes, heads.items(), strict=True):
            both = np.concatenate([inside, outside])
            bins = np.linspace(*np.quantile(both, [0.001, 0.999]), 50)
            axis.hist(inside, bins, density=True, alpha=0.65, color=OURS, label=f"in scope ({len(inside):,})")
            axis.hist(outside, bins, density=True, alpha=0.65, color=OUTSIDE, label=f"out of scope ({len(outside):,})")
            if threshold is not None:
                axis.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label="threshold, 5 % false reject")
            axis.set(title=title, xlabel="acceptance score", ylabel="density")
            axis.legend(fontsize=8)


def calibration(path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], within: float) -> None:
    """For each panel and task: stated and observed false reject."""
    with _figure(path, len(panels), "False reject, stated and observed on test inputs") as axes:
        for axis, (title, tasks) in zip(axes, panels.items(), strict=True):
            most = max([0.1, *(rate for stated, observed in tasks.values() for rate in (*stated, *observed))]) * 1.1
            line = np.array([0, most])
            axis.plot(line, line, color="black", linewidth=1)
            axis.fill_between(line, line - within, line + within, color="black", alpha=0.08, label=f"within {100 * within:g} points")
            for i, (name, (stated, observed)) in enumerate(tasks.items()):
                axis.plot(stated, observed, marker="o", linewidth=1.2, color=(OURS, *COLOURS)[i % 8], label=name)
            axis.set(title=title, xlabel="stated", ylabel="observed", xlim=(0, most), ylim=(0, most))
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(PercentFormatter(1.0))
            axis.legend(fontsize=8)
