"""Pictures of the knowledge map and of the router's space, as PNG. matplotlib draws them: the extra `bench`, imported when a picture is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from adapter_hub.continual.knowledge_map import COLOURS, DIRECTED, EdgeKind, KnowledgeMap, layout
from adapter_hub.continual.space import Space
from adapter_hub.errors import InvalidInput

F64 = NDArray[np.float64]
Figure: TypeAlias = Any    # matplotlib's
Axes: TypeAlias = Any
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#000000")    # Okabe and Ito's, yellow made darker
MARKERS, GLYPHS = ("o", "s", "^", "D", "P", "v"), "●■▲◆✚▼"    # with the colours 48 adapters are told apart
NAMED_MAX = 40        # adapters whose names are written
CROWD = 40            # adapters from which on all is drawn smaller
LANDS_MAX = 48        # whose points are drawn in colours of their own; others are grey
SHADES = ((0.1, "#e8e8e8"), (0.25, "#cfcfcf"), (0.5, "#b0b0b0"))    # shares of held-out inputs that are turned away, and their grey
DPI = 150


def check_picture(path: str | Path) -> None:
    """Raises InvalidInput where matplotlib is not installed, and for a path that is no PNG's."""
    if Path(path).suffix.lower() != ".png":
        raise InvalidInput(f"{str(path)!r} does not end with .png.", hint="Pictures are written as PNG.")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInput("a picture needs matplotlib, which is not installed.", hint="Install the extra: pip install 'adapter_hub[bench]'.")


def draw_map(found: KnowledgeMap, path: str | Path) -> None:
    """The graph as PNG. Raises InvalidInput without matplotlib or for another kind of file."""
    figure, axes = _figure(path, 11, 8.5)
    refs = [node.ref for node in found.nodes]
    at = dict(zip(refs, layout(refs, found.edges), strict=True))
    kinds = [kind for kind in EdgeKind if any(edge.kind is kind for edge in found.edges)]
    answers = np.array([node.answers for node in found.nodes], float)
    crowded = min(1.0, (CROWD / max(1, len(refs))) ** 0.5)    # of many all is drawn smaller
    sizes = crowded * (120 + 900 * np.sqrt(answers / max(1.0, answers.max(initial=0))))    # points², of the circle's square
    radii = dict(zip(refs, np.sqrt(sizes) / 2, strict=True))
    drawn: dict[tuple[Any, Any], int] = {}
    for edge in found.edges:
        ends = min(edge.source, edge.target), max(edge.source, edge.target)
        bend = 0.2 * ((drawn.get(ends, 0) + 1) // 2) * (-1) ** drawn.get(ends, 0)    # edges of one pair lie side by side
        drawn[ends] = drawn.get(ends, 0) + 1
        bend = bend if edge.source == ends[0] else -bend
        style: dict[str, Any] = {"arrowstyle": "-|>" if edge.kind in DIRECTED else "-", "mutation_scale": 12 * crowded, "zorder": 1}
        style |= {"shrinkA": radii[edge.source] + 3, "shrinkB": radii[edge.target] + 3}
        width = 1 + 3.5 * max(0.0, min(1.0, edge.value)) if edge.kind is not EdgeKind.LINEAGE else 1.5
        width = max(0.4, crowded**2 * width)
        dashed: dict[str, Any] = {"linestyle": (0, (5, 3))} if edge.kind is EdgeKind.LINEAGE else {}
        from matplotlib.patches import FancyArrowPatch

        arrow = FancyArrowPatch(tuple(at[edge.source]), tuple(at[edge.target]), connectionstyle=f"arc3,rad={bend}", color=COLOURS[edge.kind],
                                linewidth=width, alpha=0.75, **style, **dashed)  # fmt: skip
        axes.add_patch(arrow)
    twins = {ref for pair in found.near_duplicates for ref in (pair.first, pair.second)}
    for ref, size in zip(refs, sizes, strict=True):
        edge_colour, line = ("#D55E00", 2.5) if ref in twins else ("#333333", 1.0)
        axes.scatter(*at[ref], s=size, color="white", edgecolors=edge_colour, linewidths=line, zorder=3)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.2, 1.2))
    axes.set_axis_off()
    named = sorted(found.nodes, key=lambda node: (node.ref not in twins, -node.answers, -node.exemplars))[:NAMED_MAX]
    _write(axes, [f"{node.ref}\n{node.exemplars:,} exemplars" + (f", {node.answers:,} answers" if node.answers else "") for node in named],
           np.array([at[node.ref] for node in named]).reshape(-1, 2), np.array([at[ref] for ref in refs]).reshape(-1, 2), [*radii.values()],
           lines=[(at[edge.source], at[edge.target]) for edge in found.edges])  # fmt: skip
    from matplotlib.lines import Line2D

    limits = {EdgeKind.ROUTING: "routing: exemplars lie close", EdgeKind.WEIGHTS: "weights: they change the base alike",
              EdgeKind.CONFUSION: "confusion: inputs of one go to the other", EdgeKind.CORRECTED: "corrected: people said so",
              EdgeKind.LINEAGE: "lineage: made from it"}  # fmt: skip
    legend = [
        Line2D([], [], color=COLOURS[kind], linewidth=2.5, linestyle="--" if kind is EdgeKind.LINEAGE else "-",
               label=limits[kind] + ("" if kind is EdgeKind.LINEAGE else f" (≥ {getattr(found.limits, kind):g})"))
        for kind in kinds
    ]  # fmt: skip
    if twins:
        ring: dict[str, Any] = {"color": "white", "markeredgecolor": "#D55E00", "markeredgewidth": 2.5, "markersize": 10}
        legend.append(Line2D([], [], marker="o", label="near-duplicates", **ring))
    if legend:
        axes.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, -0.02), frameon=False, fontsize=9)
    unnamed = f"; {len(refs) - len(named)} are not named" if len(refs) > len(named) else ""
    sized = "A larger node answered more. " if answers.any() else ""
    _finish(figure, axes, path, f"Knowledge map of {len(refs)} adapters",
            f"{sized}Nodes that are joined lie together; the thicker an edge, the larger its value{unnamed}.")  # fmt: skip


def draw_space(found: Space, path: str | Path) -> None:
    """The plane as PNG. Raises InvalidInput without matplotlib or for another kind of file."""
    figure, axes = _figure(path, 11, 10)
    shaded: tuple[tuple[float, str], ...] = ()
    if (field := found.field()) is not None:
        x, y, share = field
        levels = [level for level in SHADES if np.nanmax(share, initial=0.0) > level[0]]
        if levels:
            axes.contourf(x, y, np.nan_to_num(share), levels=[*(level for level, _ in levels), 1.01], colors=[grey for _, grey in levels], zorder=0)
        shaded = tuple(levels)
    centres = []
    for number, land in enumerate(found.lands):
        own = number < LANDS_MAX
        colour, marker = (PALETTE[number % len(PALETTE)], MARKERS[number // len(PALETTE) % len(MARKERS)]) if own else ("#999999", ".")
        axes.scatter(*land.exemplars.T, s=7, color=colour, marker=marker, alpha=0.22, linewidths=0, zorder=2)
        axes.scatter(*land.prototypes.T, s=55, color=colour, marker=marker, edgecolors="white", linewidths=0.9, zorder=3)
        away = land.inputs[land.margins < 0]
        axes.scatter(*away.T, s=26, facecolors="none", edgecolors=colour, marker="o", linewidths=1.1, zorder=3)
        centres.append(land.prototypes.mean(axis=0))
    accepted = np.array([(one.x, one.y) for one in found.asked if one.accepted]).reshape(-1, 2)
    refused = np.array([(one.x, one.y) for one in found.asked if not one.accepted]).reshape(-1, 2)
    axes.scatter(*accepted.T, s=22, color="black", marker="+", linewidths=0.9, zorder=4)
    axes.scatter(*refused.T, s=34, color="#B00020", marker="x", linewidths=1.5, zorder=5)
    axes.set_aspect("equal", adjustable="datalim")    # before names are placed: it moves everything
    named = min(len(found.lands), NAMED_MAX)
    dots = np.array(centres).reshape(-1, 2)
    names = [f"{GLYPHS[number // len(PALETTE) % len(GLYPHS)]} {land.ref}" for number, land in enumerate(found.lands[:named])]
    _write(axes, names, dots[:named], dots[:0], (),
           [PALETTE[number % len(PALETTE)] if number < LANDS_MAX else "#666666" for number in range(named)])  # fmt: skip
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grey: dict[str, Any] = {"color": "#666666", "linestyle": "none"}
    legend: list[Any] = [
        Line2D([], [], marker="o", markersize=7, label="prototype: the mean of one class", **grey),
        Line2D([], [], marker="o", markersize=3, label="exemplar", **grey),
    ]
    if any(len(land.inputs) for land in found.lands):
        legend.append(Line2D([], [], marker="o", markersize=6, markerfacecolor="none", label="held-out input that is turned away", **grey))
        said = "more than {:.0f} % of the held-out inputs near here are turned away"
        legend += [Patch(facecolor=shade, label=said.format(100 * level)) for level, shade in shaded]
    if len(found.asked):
        legend.append(Line2D([], [], marker="+", color="black", linestyle="none", label=f"recent traffic, accepted ({len(accepted)})"))
        legend.append(Line2D([], [], marker="x", color="#B00020", linestyle="none", label=f"recent traffic, turned away ({len(refused)})"))
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=2, frameon=False, fontsize=9)
    axes.set(xticks=[], yticks=[])
    caption = (
        f"The plane holds {100 * found.held:.0f} % of the variance between the adapters' means: neighbours here may be far apart in the router's own "
        f"space. Whether an input is turned away was decided there, with the threshold of {100 * found.max_false_reject:g} % false rejects."
    )
    _finish(figure, axes, path, f"The router's space: {len(found.lands)} adapters", caption)


def _figure(path: str | Path, width: float, height: float) -> tuple[Figure, Axes]:
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.03, 0.12, 0.94, 0.75))


def _finish(figure: Figure, axes: Axes, path: str | Path, title: str, caption: str) -> None:
    import textwrap

    figure.text(0.03, 0.965, title, fontsize=16, fontweight="bold", va="top")
    figure.text(0.03, 0.93, "\n".join(textwrap.wrap(caption, 140)), fontsize=9, color="#444444", va="top")
    figure.savefig(path, format="png", metadata={"Software": ""})


def _write(
    axes: Axes,
    texts: Sequence[str],
    at: F64,
    dots: F64,
    radii: Sequence[float],
    colours: Sequence[str] | None = None,
    lines: Sequence[tuple[F64, F64]] = (),
) -> None:
    """Texts beside their places, moved until no two overlap and none lies on a dot or a line: tried around the place, ever farther.

    `radii` are of the dots, in points.
    """
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    taken: list[tuple[float, float, float, float]] = []
    for (x, y), radius in zip(axes.transData.transform(dots) if len(dots) else (), radii, strict=True):
        reach = radius * DPI / 72 + 2
        taken.append((x - reach, y - reach, x + reach, y + reach))
    for start, stop in lines:
        points = axes.transData.transform([start + share * (stop - start) for share in np.linspace(0.1, 0.9, 15)])
        taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    frame = axes.get_window_extent(renderer)
    for number, (text, (x, y)) in enumerate(zip(texts, at, strict=True)):
        shown = axes.text(x, y, text, fontsize=8.5, ha="center", va="center", color=colours[number] if colours else "#222222", zorder=6,
                          bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8})  # fmt: skip
        box = shown.get_window_extent(renderer).padded(4)
        px, py = axes.transData.transform((x, y))
        width, height = box.width, box.height
        free = None
        for ring in np.arange(0.0 if not len(dots) else 1.0, 4.0, 0.5):
            for turn in range(16):
                angle = -np.pi / 2 + (turn + 1) // 2 * (-1) ** turn * np.pi / 8
                cx, cy = px + ring * (width / 2 + 12) * np.cos(angle), py + ring * (height / 2 + 12) * np.sin(angle)
                spot = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                inside = frame.x0 <= spot[0] and spot[2] <= frame.x1 and frame.y0 <= spot[1] and spot[3] <= frame.y1
                if inside and not any(a < spot[2] and spot[0] < c and b < spot[3] and spot[1] < d for a, b, c, d in taken):
                    free = (cx, cy, spot)
                    break
            if free:
                break
        if free is None:
            shown.remove()    # rather no name than two on each other
            continue
        cx, cy, spot = free
        taken.append(spot)
        shown.set_position(tuple(axes.transData.inverted().transform((cx, cy))))
        if np.hypot(cx - px, cy - py) > height + width / 2 + 20:
            line = axes.transData.inverted().transform([(cx, cy), (px, py)])
            axes.plot(*line.T, color="#999999", linewidth=0.6, zorder=2)
