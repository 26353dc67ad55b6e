"""Find new tasks among inputs that were turned away: vectors in, clusters out. Pure: no torch, no files, no log.

Turned away are a new task's inputs, the share of known ones that the threshold costs, and odd ones that belong nowhere. Only the first
come in kinds that are asked again and again: tight groups are found first, and what is near of them makes up a task. Which of it is
proposed again, or never, is `continual.proposals`' to know.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import binom
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from adapter_hub.errors import InvalidInput, InvalidName
from adapter_hub.refs import check_name

# n inputs, d encoder width, g groups
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

GROUP_DISTANCE, LEVEL = 0.6, 0.01    # see DiscoveryConfig
NAME_WORDS = 2
WORD = re.compile(r"[^\W\d_]{3,}")
SMOOTHING = 1.0     # texts, added to counts of texts with a word


@dataclass(frozen=True, slots=True)
class DiscoveryConfig:
    """Distances are 1 - cosine, chosen with all-MiniLM-L6-v2 (benchmarks/README.md). Raises InvalidInput for a value out of range."""

    group_distance: float = GROUP_DISTANCE    # mean, up to which inputs are one kind
    join_distance: float = 0.85      # mean between kinds' centres, up to which they are one task
    group_rows_min: int = 5          # inputs of a kind
    rows_min: int = 20               # inputs of a task: with fewer there is nothing to learn from
    group_share: float = 0.01        # inputs of a kind, as a share of the scattered ones, which are in no group: the more odd inputs there
    rows_share: float = 0.1          # are, the more of them are alike by chance; and inputs of a task, as a share of the scattered ones
    stability_min: float = 0.6       # mean Jaccard index of a group with its likest in resamples: below it a group is dissolved easily
    resamples: int = 20
    resample_share: float = 0.8      # of the inputs, drawn without replacement
    level: float = LEVEL             # how rarely false rejects alone may look like more
    rows_max: int = 2_000            # inputs that are looked at, the newest: time and memory grow with their square
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (least, most) = getattr(self, field.name), _RANGES[field.name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise InvalidInput(f"{field.name}={value!r} is not a number from {least:g} to {most:g}.")


_RANGES = {
    "group_distance": (0, 2), "join_distance": (0, 2), "group_rows_min": (2, 1e6), "rows_min": (2, 1e6), "group_share": (0, 1),
    "rows_share": (0, 100), "stability_min": (0, 1), "resamples": (1, 1e4), "resample_share": (0.1, 1), "level": (0, 1),
    "rows_max": (2, 1e5), "seed": (0, 2**32 - 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cluster:
    """Inputs that look like one task, by their rows in what was given."""

    groups: tuple[tuple[int, ...], ...]    # kinds of inputs, largest first; in each the most typical input first
    cohesion: float                        # mean cosine of two inputs of one group
    stability: float                       # mean over the inputs: of their group in resamples, 0-1

    @property
    def rows(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(row for group in self.groups for row in group))

    @property
    def typical(self) -> tuple[int, ...]:
        """Every row, in turn one of each group, the most typical first."""
        deepest = max(map(len, self.groups))
        return tuple(group[place] for place in range(deepest) for group in self.groups if place < len(group))


def exceeds(rejected: int, routed: int, rate: float, level: float = LEVEL) -> bool:
    """Whether more of `routed` inputs were turned away than a false reject rate explains, by a one-sided binomial test."""
    return rejected > 0 and float(binom.sf(rejected - 1, max(routed, rejected), rate)) < level


def discover(vectors: ArrayLike, routed: int, rate: float, config: DiscoveryConfig | None = None) -> tuple[Cluster, ...]:
    """Clusters of the turned away inputs (n, d) of `routed`, largest first; the same whatever the order of the rows.

    There are none where `rate` explains that so many were turned away. Groups, and then their centres, are joined by average linkage;
    what is small beside the scattered inputs is left out, and so is a group that resamples do not keep (Hennig 2007, "Cluster-wise
    assessment of cluster stability": subsets, Jaccard index).
    Raises InvalidInput for rows that are zero or not finite.
    """
    config = config or DiscoveryConfig()
    units = _units(vectors)
    if len(units) < config.rows_min or not exceeds(len(units), routed, rate, config.level):
        return ()
    order = np.lexsort(units.T[::-1])    # sums of floats, and draws by row, must not depend on the order that inputs came in
    units = units[order]
    products = units @ units.T
    groups, scattered = _groups(products, config)
    steadiness = _stability(products, groups, config)
    kept = [(group, steady) for group, steady in zip(groups, steadiness, strict=True) if steady >= config.stability_min]
    found = []
    for joined in _joined(units, [group for group, _ in kept], config.join_distance):
        size = sum(len(kept[g][0]) for g in joined)
        if size < max(config.rows_min, config.rows_share * scattered):
            continue
        sides = [(_by_typicality(products, kept[g][0]), kept[g][1]) for g in joined]
        sides.sort(key=lambda side: (-len(side[0]), side[0].tolist()))
        weights = np.array([len(group) for group, _ in sides], float)
        cohesion = np.average([_cohesion(products, group) for group, _ in sides], weights=weights)
        steady = np.average([one for _, one in sides], weights=weights)
        found.append(Cluster(tuple(tuple(order[group].tolist()) for group, _ in sides), float(cohesion), float(steady)))
    return tuple(sorted(found, key=lambda cluster: -len(cluster.rows)))


def joins(vectors: ArrayLike, groups: Sequence[ArrayLike], distance: float = GROUP_DISTANCE) -> NDArray[np.bool_]:
    """(n,): whether an input (n, d) is as near to one of the groups, each (m, d), as inputs of one kind are to each other."""
    units = _units(vectors)
    near = np.zeros(len(units), bool)
    for group in groups:
        near |= 1 - units @ _units(group).mean(axis=0) <= distance
    return near


def _units(vectors: ArrayLike) -> F64:
    """Raises InvalidInput."""
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2:
        raise InvalidInput(f"vectors of shape {rows.shape} are no rows.", hint="Give (n, d).")
    norms = np.linalg.norm(rows, axis=1)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise InvalidInput(f"vector {int(np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[0]) + 1} of {len(rows)} is zero or not finite.")
    return np.asarray(rows / norms[:, None])


def _linked(products: F64, distance: float) -> I64:
    """(n,): the number of each row's cluster, by average linkage up to this distance."""
    if len(products) == 1:
        return np.ones(1, np.int64)
    distances = np.maximum(1 - products, 0)
    np.fill_diagonal(distances, 0)
    return np.asarray(fcluster(linkage(squareform(distances, checks=False), "average"), distance, "distance"), np.int64)


def _groups(products: F64, config: DiscoveryConfig) -> tuple[list[I64], int]:
    """The rows of each group, and how many inputs are scattered."""
    numbers = _linked(products, config.group_distance)
    sizes = np.bincount(numbers)
    scattered = int(sizes[sizes < config.group_rows_min].sum())
    least = max(config.group_rows_min, config.group_share * scattered)
    return [np.flatnonzero(numbers == number) for number in np.flatnonzero(sizes >= least)], scattered


def _joined(units: F64, groups: Sequence[I64], distance: float) -> list[list[int]]:
    """Places of the groups that are one task. The centre of many inputs is steadier than each: kinds are compared by it."""
    if not groups:
        return []
    centres = _units([units[group].mean(axis=0) for group in groups])
    numbers = _linked(centres @ centres.T, distance)
    return [np.flatnonzero(numbers == number).tolist() for number in np.unique(numbers)]


def _stability(products: F64, groups: Sequence[I64], config: DiscoveryConfig) -> F64:
    """(g,): of each group the mean Jaccard index with the likest cluster of a resample, over what of it was drawn."""
    rng, n = np.random.default_rng(config.seed), len(products)
    total, times = np.zeros(len(groups)), np.zeros(len(groups))
    for _ in range(config.resamples if groups else 0):
        drawn = np.sort(rng.permutation(n)[: max(2, round(config.resample_share * n))])
        numbers = np.zeros(n, np.int64)
        numbers[drawn] = _linked(products[np.ix_(drawn, drawn)], config.group_distance)
        sizes = np.bincount(numbers)
        for place, group in enumerate(groups):
            own = numbers[group][numbers[group] > 0]
            if len(own):
                shared = np.bincount(own)
                total[place] += (shared / (len(own) + sizes[: len(shared)] - shared)).max()
                times[place] += 1
    return total / np.maximum(times, 1)


def _by_typicality(products: F64, group: I64) -> I64:
    return group[np.argsort(-products[np.ix_(group, group)].sum(axis=1), kind="stable")]


def _cohesion(products: F64, group: I64) -> float:
    n = len(group)
    return float((products[np.ix_(group, group)].sum() - n) / (n * (n - 1)))


# ---- names ------------------------------------------------------------------------------------------------------


def suggest_name(texts: Sequence[str], others: Sequence[str], taken: Collection[str] = (), otherwise: str = "new_task") -> str:
    """A valid adapter name that is not taken, of words that many of `texts` have and few of `others`; a person will choose a better one."""
    words = _distinctive(texts, others)
    while words:
        name = "_".join(words)
        try:
            return _free(check_name(name), taken)
        except InvalidName:
            words.pop()
    return _free(otherwise, taken)


def is_of(name: str, texts: Iterable[str]) -> bool:
    """Whether all words of this suggested name are words of these texts."""
    return set(WORD.findall(name)) <= _counts(texts).keys()


def _distinctive(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """By the share of texts that a word is in, times the logarithm of how much greater that is than its share elsewhere."""
    here, elsewhere = _counts(texts), _counts(others)
    n, m = len(texts) + SMOOTHING, len(others) + SMOOTHING
    score = {word: count / n * float(np.log(count / n / ((elsewhere[word] + SMOOTHING) / m))) for word, count in here.items()}
    found: list[str] = []
    for word in sorted(score, key=lambda word: (-score[word], word)):
        if not any(word.startswith(one[:4]) for one in found):    # flight, flights
            found.append(word)
        if len(found) == NAME_WORDS:
            break
    return found


def _counts(texts: Iterable[str]) -> Counter[str]:
    """How many texts have a word."""
    words = (word for text in texts for word in set(map(_ascii, WORD.findall(text.lower()))))
    return Counter(word for word in words if len(word) >= 3 and word not in ENGLISH_STOP_WORDS)


def _ascii(word: str) -> str:
    """As a name may have it."""
    return unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()


def _free(name: str, taken: Collection[str]) -> str:
    return next(free for number in range(1, len(taken) + 2) if (free := name if number == 1 else f"{name}_{number}") not in taken)
