"""The router's space on a plane: where adapters lie, which inputs are turned away, what was asked of late. Pure numpy; `pictures` draws it.

The plane is that of the two directions in which the means of the adapters differ most (principal components); of fewer than three
adapters, their exemplars. It holds a part of what tells them apart, which `held` says: what lies side by side here may be far apart in
the router's own space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_hub.refs import AdapterRef

# n inputs, m exemplars, p prototypes, d encoder width
F64 = NDArray[np.float64]
Vectors = NDArray[np.floating[Any]]
GRID = 80                 # cells a side of the field
WIDTH = 0.04              # of the Gaussian that smooths the field, as a share of the plane's larger side
NEAR = 2.0                # weight of inputs, each 1 at its place, from which on the field says anything


@dataclass(frozen=True, slots=True)
class Asked:
    """One input of the log on the plane, and what became of it then."""

    x: float
    y: float
    adapter: AdapterRef | None
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Land:
    """One adapter on the plane."""

    ref: AdapterRef
    exemplars: F64       # (m, 2)
    prototypes: F64      # (p, 2), the mean of each class
    inputs: F64          # (n, 2), evaluation inputs: held out from the exemplars
    margins: F64         # (n,), how far their acceptance scores lie above the threshold; below 0 they are turned away


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The plane, and what lies on it."""

    lands: tuple[Land, ...]
    asked: tuple[Asked, ...]
    held: float               # share that the plane holds of the variance between the adapters' means, 0-1
    max_false_reject: float   # that the threshold is of

    def field(self) -> tuple[F64, F64, F64] | None:
        """(x, y, share): on a grid the share, 0-1, of the held-out inputs near it that are turned away; NaN where there are none. None without any.

        It is of real inputs, smoothed over the plane: a point of it is no input, and has no score of its own.
        """
        inputs = np.concatenate([land.inputs for land in self.lands] or [np.empty((0, 2))])
        away = np.concatenate([land.margins for land in self.lands] or [np.empty(0)]) < 0
        if len(inputs) < 2:
            return None
        low, high = inputs.min(axis=0), inputs.max(axis=0)
        width = WIDTH * float((high - low).max())
        if width <= 0:
            return None
        x, y = (np.linspace(low[axis] - 2 * width, high[axis] + 2 * width, GRID) for axis in (0, 1))
        across, along = (np.exp(-((at[:, None] - inputs[:, axis]) ** 2) / (2 * width**2)) for axis, at in ((0, x), (1, y)))
        weight = along @ across.T    # separable: (GRID, GRID), rows are y
        return x, y, np.where(weight >= NEAR, (along * away) @ across.T / np.maximum(weight, 1e-12), np.nan)


def space_of(
    exemplars: Mapping[AdapterRef, tuple[Vectors, Sequence[str]]],
    inputs: Mapping[AdapterRef, Vectors],
    margins: Mapping[AdapterRef, Sequence[float]],
    asked: Vectors,
    went: Sequence[tuple[AdapterRef | None, bool]],
    max_false_reject: float,
) -> Space:
    """`exemplars` are vectors (m, d) and the class of each, `inputs` (n, d) those held out, `asked` (k, d) what the log has and `went` what
    became of it: who answered, and whether it was accepted. The axes point so that the farthest exemplar lies to the right and above.
    """
    refs = sorted(exemplars)
    if not refs:
        return Space((), (), 0.0, max_false_reject)
    vectors = np.concatenate([np.asarray(exemplars[ref][0], np.float64) for ref in refs])
    spread = np.array([np.mean(exemplars[ref][0], axis=0, dtype=np.float64) for ref in refs]) if len(refs) > 2 else vectors
    middle = spread.mean(axis=0)
    _, values, directions = np.linalg.svd(spread - middle, full_matrices=False)
    axes = np.zeros((len(middle), 2))
    axes[:, : len(directions[:2])] = directions[:2].T
    farthest = (vectors - middle) @ axes
    axes = axes * np.where(np.take_along_axis(farthest, np.abs(farthest).argmax(axis=0)[None], axis=0)[0] < 0, -1.0, 1.0)
    lands = []
    for ref in refs:
        own, classes = np.asarray(exemplars[ref][0], np.float64), np.asarray(exemplars[ref][1])
        means = np.array([own[classes == name].mean(axis=0) for name in np.unique(classes)])
        held_out = np.asarray(inputs.get(ref, np.empty((0, len(middle)))), np.float64)
        told = np.asarray(margins.get(ref, ()), np.float64)
        lands.append(Land(ref, (own - middle) @ axes, (means - middle) @ axes, (held_out - middle) @ axes, told))
    places = (np.asarray(asked, np.float64).reshape(-1, len(middle)) - middle) @ axes
    points = tuple(Asked(float(x), float(y), adapter, accepted) for (x, y), (adapter, accepted) in zip(places, went, strict=True))
    share = float((values[:2] ** 2).sum() / max(float((values**2).sum()), 1e-30))
    return Space(tuple(lands), points, share, max_false_reject)
