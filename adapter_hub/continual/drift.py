"""Tell that traffic has changed for the worse: what each input gave goes in, alarms come out. Pure: numpy and river, no torch, no files.

What an alarm leads to is the caller's: an evaluation and an alert (`alerts`), never a training by itself.
Inputs that look alike over time are assumed; where mornings differ from evenings, that is a change and is told as one.
"""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from river.drift import ADWIN, PageHinkley

from adapter_hub.errors import InvalidInput

# n vectors of the reference, m of the latest window, d encoder width, b permutations
OVERALL = "*"            # stands for all inputs together; no adapter can have this name
FORMAT = 1
SCORE_LIMIT = 2.0        # scores are clipped to ±2 before detectors see them: 1 is like the exemplars, inputs to be turned away lie around −1
SCORE_DIGITS = 4         # what is kept of a score, so that the state is small
RECENT = 50              # values that a warning calls the latest: Page-Hinkley names no moment of the change
SPLIT_LEAST = 5          # values on either side of a change, as ADWIN's own
EXCEEDED_MOST = 3        # permutations that may reach the statistic of a significant test; they are as many as the level needs for that
F32 = NDArray[np.float32]


class Signal(StrEnum):
    """What is watched. All but the embedding have a harmful direction, and only that one alarms."""

    SCORE = "score"            # acceptance score: harmful where it falls
    ABSTAINED = "abstained"    # share that no adapter took: harmful where it rises
    ERROR = "error"            # share of wrong answers, as far as feedback tells: harmful where it rises
    EMBEDDING = "embedding"    # what the inputs are about: any change


class Kind(StrEnum):
    """How sure it is."""

    ALARM = "alarm"        # rare without a change: evaluate
    WARNING = "warning"    # earlier, and wrong more often: look


@dataclass(frozen=True, slots=True)
class Alarm:
    """One change that was found."""

    adapter: str       # its name; "*" for all inputs together
    signal: Signal
    kind: Kind
    detector: str      # "ADWIN", "Page-Hinkley" or "MMD"
    at: int            # values of this signal seen so far, the one that gave the alarm included
    before: float      # mean before the change; of embeddings: mean kernel among the reference, 0-1
    after: float       # mean since; of embeddings: mean kernel between the latest window and the reference, 0-1
    reason: str        # in words

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Alarm:
        return cls(**{**found, "signal": Signal(found["signal"]), "kind": Kind(found["kind"])})


@dataclass(frozen=True, slots=True)
class DriftConfig:
    """How sensitive the detectors are. The defaults were chosen on streams of real scores (benchmarks/README.md, drift)."""

    adwin_delta: float = 0.002            # ADWIN's confidence at each check, 0-1; smaller alarms more rarely and later
    warning_slack: float = 0.05           # Page-Hinkley's delta: a rise of the mean by less than this is no warning
    warning_threshold: float = 10.0       # Page-Hinkley's lambda: how much rise beyond the slack, summed over inputs, is one
    history: int = 4000                   # values kept of each signal; at this many the older half is left
    reference: int = 1000                 # vectors that stand for how inputs were: the first that come
    window: int = 400                     # latest vectors that are compared with them
    every: int = 100                      # inputs between two comparisons
    block: int = 50                       # consecutive inputs that may hang together: in the comparisons they stay together
    embedding_alarms_per_10k: float = 0.2    # false alarms that the comparisons may give, in 10,000 inputs; each gets its share as level
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("adwin_delta", 0.0, 1.0), ("warning_slack", 0.0, math.inf), ("warning_threshold", 0.0, math.inf),
            ("embedding_alarms_per_10k", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not _is_number(value) or not least < value < most:
                raise InvalidInput(f"{name}={value!r} is not a number above {least:g} and below {most:g}.", hint="Give one, or leave the default.")
        for name, smallest in (("history", 200), ("reference", 20), ("window", 20), ("every", 1), ("block", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise InvalidInput(f"{name}={value!r} is not a whole number of at least {smallest}.", hint="Give one, or leave the default.")
        reference, window = self.reference // self.block, self.window // self.block
        if self.reference % self.block or self.window % self.block or math.comb(reference + window, window) < 10 / self.level:
            fact = f"reference={self.reference} and window={self.window} are too few blocks of {self.block}, or no whole number of them"
            raise InvalidInput(f"{fact}.", hint="Give smaller blocks, or greater multiples of them.")
        if not self.level < 0.5:
            raise InvalidInput(
                f"{self.embedding_alarms_per_10k:g} false alarms in 10,000 inputs, tested every {self.every}, ask for a level of {self.level:.2g}.",
                hint="Test more often, or allow fewer.",
            )

    @property
    def level(self) -> float:
        """Of one comparison of embeddings: the rate of false alarms, spent evenly over the inputs."""
        return self.embedding_alarms_per_10k / 10_000 * self.every


class DriftMonitor:
    """Watches each adapter, and all inputs together, from plain values. Not for several threads at once.

    ADWIN alarms (Bifet and Gavalda 2007), Page-Hinkley warns (Page 1954), both by river, each on score, abstention and error; where
    embeddings are given, those of all inputs together are compared with the first ones by a two-window MMD test (Gretton et al. 2012).
    After an alarm its signal starts from the values since the change, so that one change alarms once.

    A change slower than `history` inputs is none to ADWIN, which by then knows the changed values only; the reference of the embeddings
    stays until an alarm or `reset`.
    """

    def __init__(self, config: DriftConfig | None = None) -> None:
        self.config = config or DriftConfig()
        self._tracks: dict[str, dict[Signal, _Track]] = {}
        self._windows = _Windows(self.config)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that were seen, sorted."""
        return tuple(sorted(self._tracks.keys() - {OVERALL}))

    def observe(
        self,
        adapter: str | None,
        *,
        score: float | None = None,
        abstained: bool | None = None,
        error: bool | None = None,
        embedding: ArrayLike | None = None,
    ) -> list[Alarm]:
        """What one input gave, and the alarms that it set off: those of the adapter first, then those over all.

        `adapter` is the name of the one that answered or, on abstention, of the best candidate; None counts over all only. What is None
        is not known: feedback that comes later is an observation with `error` alone. `embedding` (d,) is the router's vector.
        Raises InvalidInput, and has seen nothing then.
        """
        if adapter is not None and (not isinstance(adapter, str) or not adapter or adapter == OVERALL):
            raise InvalidInput(f"{adapter!r} is no adapter's name.", hint="Give the name that answered, or None for all inputs together.")
        values = _harms(score, abstained, error)
        vector = None if embedding is None else self._windows.checked(embedding)
        alarms: list[Alarm] = []
        for name in (OVERALL,) if adapter is None else (adapter, OVERALL):
            tracks = self._tracks.setdefault(name, {})
            for signal, value in values.items():
                track = tracks.get(signal) or tracks.setdefault(signal, _Track(self.config))
                if found := track.add(value):
                    alarms.append(_told(name, signal, track.count, *found))
        if vector is not None and (similarities := self._windows.add(vector)):
            alarms.append(_told(OVERALL, Signal.EMBEDDING, self._windows.count, Kind.ALARM, *similarities))
        return alarms

    def reset(self, adapter: str | None = None) -> None:
        """Forget what was seen of one adapter, say because another version of it went live; None: everything."""
        if adapter is None:
            self._tracks.clear()
        elif self._tracks.pop(adapter, None) is None and adapter != OVERALL:
            raise InvalidInput(f"nothing was seen of {adapter!r}.", hint=f"Seen: {', '.join(self.adapters) or 'no adapter'}.")
        if adapter in (None, OVERALL):
            self._windows = _Windows(self.config)

    def to_json(self) -> str:
        """Everything, so that a later process goes on as this one would. Holds embeddings where they were given: as sensitive as texts."""
        tracks = {name: {signal: track.state() for signal, track in of.items()} for name, of in sorted(self._tracks.items())}
        return json.dumps({"format": FORMAT, "config": asdict(self.config), "tracks": tracks, "embeddings": self._windows.state()})

    @classmethod
    def from_json(cls, text: str) -> DriftMonitor:
        """The monitor that `to_json` was called on. Raises InvalidInput for anything else."""
        try:
            state = json.loads(text)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']!r}")
            monitor = cls(DriftConfig(**state["config"]))
            for name, of in state["tracks"].items():
                monitor._tracks[name] = {Signal(signal): _Track.restored(monitor.config, kept) for signal, kept in of.items()}
            monitor._windows = _Windows.restored(monitor.config, state["embeddings"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"this is no state of a drift monitor: {error}.", hint=f"Give what `to_json` wrote (format {FORMAT}).") from error
        return monitor


class _Track:
    """One signal of one adapter. Its detectors are at any time what they are after `values`, fed to new ones: that is the whole state."""

    def __init__(self, config: DriftConfig) -> None:
        self.config = config
        self.count = 0                   # ever seen
        self.values = array("d")         # greater is worse
        self._begin()

    def _begin(self) -> None:
        # Checked at each input: every 32nd, river's default, comes some 20 later.
        self._adwin = ADWIN(delta=self.config.adwin_delta, clock=1)
        self._hinkley = PageHinkley(delta=self.config.warning_slack, threshold=self.config.warning_threshold, mode="up")
        for value in self.values:
            self._adwin.update(value)
            self._hinkley.update(value)

    def add(self, value: float) -> tuple[Kind, float, float] | None:
        """The kind and the means before and after, where this value made a harmful change certain."""
        self.count += 1
        self.values.append(value)
        self._adwin.update(value)
        self._hinkley.update(value)
        found: tuple[Kind, float, float] | None = None
        if self._adwin.drift_detected:
            # ADWIN leaves old buckets one by one, and most of what was before the change stays: it would alarm again and again.
            cut = split(self.values)
            before, after = _mean(self.values[:cut]), _mean(self.values[cut:])
            self.values = self.values[cut:]
            self._begin()
            found = (Kind.ALARM, before, after) if after > before else None
        elif self._hinkley.drift_detected:
            found = (Kind.WARNING, _mean(self.values[:-RECENT] or self.values), _mean(self.values[-RECENT:]))
        if len(self.values) >= self.config.history:
            self.values = self.values[-(self.config.history // 2) :]
            self._begin()
        return found

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "values": self.values.tolist()}

    @classmethod
    def restored(cls, config: DriftConfig, state: Mapping[str, Any]) -> _Track:
        track = cls(config)
        track.count, track.values = int(state["count"]), array("d", state["values"])
        if not all(map(math.isfinite, track.values)) or track.count < len(track.values):
            raise ValueError("values that were never observed")
        track._begin()
        return track


class _Windows:
    """The first embeddings and the latest ones."""

    def __init__(self, config: DriftConfig) -> None:
        self.config = config
        self.count = 0                          # ever seen
        self.reference: list[F32] = []
        self.latest: list[F32] = []
        self.since = 0                          # inputs since the last comparison

    def checked(self, embedding: ArrayLike) -> F32:
        """Raises InvalidInput for what is no vector like the others."""
        try:
            vector = np.asarray(embedding, np.float16).astype(np.float32)    # 16 bits are kept: half the state, and more than the test needs
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"an embedding is no vector of numbers: {error}.", hint="Give the router's vector of this input.") from error
        if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
            raise InvalidInput(f"an embedding of shape {vector.shape} is empty, no vector or not finite.", hint="Give one vector for one input.")
        if self.reference and vector.shape != self.reference[0].shape:
            fact = f"an embedding has {vector.size} numbers, those before it {self.reference[0].size}"
            raise InvalidInput(f"{fact}.", hint="After another encoder, `reset()`.")
        return vector

    def add(self, vector: F32) -> tuple[float, float] | None:
        """The mean kernel among the reference and to the latest window, where the two differ."""
        self.count += 1
        if len(self.reference) < self.config.reference:
            self.reference.append(vector)
            return None
        self.latest = [*self.latest[-(self.config.window - 1) :], vector]
        self.since += 1
        if len(self.latest) < self.config.window or self.since < self.config.every:
            return None
        self.since = 0
        found = compare(np.stack(self.reference), np.stack(self.latest), self.config.block, self.config.level, (self.config.seed, self.count))
        if found:
            self.reference, self.latest = [], []    # the new inputs are what later ones are compared with
        return found

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "since": self.since, "reference": _packed(self.reference), "latest": _packed(self.latest)}

    @classmethod
    def restored(cls, config: DriftConfig, state: Mapping[str, Any]) -> _Windows:
        windows = cls(config)
        windows.count, windows.since = int(state["count"]), int(state["since"])
        windows.reference, windows.latest = _unpacked(state["reference"]), _unpacked(state["latest"])
        return windows


def split(values: Sequence[float]) -> int:
    """Where the mean most likely changed, as the number of values before: the greatest difference of means, over its standard error."""
    total, number = np.cumsum(values), len(values)
    before = np.arange(SPLIT_LEAST, number - SPLIT_LEAST + 1)
    sums = total[before - 1]
    gap = np.abs(sums / before - (total[-1] - sums) / (number - before)) * np.sqrt(before * (number - before))
    return int(before[np.argmax(gap)])


def compare(reference: F32, latest: F32, block: int, level: float, seed: tuple[int, ...]) -> tuple[float, float] | None:
    """Two-sample test of (n, d) against (m, d): mean kernel among the reference and between the two where they differ, else None.

    The statistic is MMD² with a Gaussian kernel as wide as the median distance (Gretton et al. 2012, sections 4 and 8). Its threshold
    comes from permutations of whole blocks of consecutive inputs, for inputs come in bursts: the chance of a false alarm is at most
    `level` where blocks are exchangeable, whatever the vectors. n and m are multiples of `block`.
    """
    n, m = len(reference), len(latest)
    both = np.concatenate([reference, latest])
    squares = (both**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * both @ both.T, 0)
    median = float(np.median(distances[::3, 1::3]))    # a ninth of the pairs, none of a vector with itself: as good, and the test is no slower
    kernel = np.exp(-distances / max(median, 1e-12)).astype(np.float64)
    blocks = (n + m) // block
    sums = kernel.reshape(blocks, block, blocks, block).sum(axis=(1, 3))
    weights = np.where(np.arange(blocks) < n // block, 1 / n, -1 / m)
    # A tie counts as reached; rounding must not make one of equal blocks a difference.
    observed = float(weights @ sums @ weights) * (1 - 1e-9)
    # Counted among 4 / level − 1 permutations, three that reach the statistic are still significant.
    permutations = math.ceil((EXCEEDED_MOST + 1) / level) - 1
    drawn = np.random.default_rng(seed).permuted(np.tile(weights, (permutations, 1)), axis=1)    # (b, blocks)
    if int((((drawn @ sums) * drawn).sum(axis=1) >= observed).sum()) > EXCEEDED_MOST:
        return None
    return float(kernel[:n, :n].mean()), float(kernel[:n, n:].mean())


def _harms(score: float | None, abstained: bool | None, error: bool | None) -> dict[Signal, float]:
    """The values that are known, greater for worse. Raises InvalidInput."""
    values: dict[Signal, float] = {}
    if score is not None:
        if not _is_number(score) or math.isnan(score):
            raise InvalidInput(f"a score of {score!r} is not a number.", hint="Give the decision's score, or None.")
        values[Signal.SCORE] = round(-min(max(float(score), -SCORE_LIMIT), SCORE_LIMIT), SCORE_DIGITS)
    for signal, value in ((Signal.ABSTAINED, abstained), (Signal.ERROR, error)):
        if value is not None:
            if not isinstance(value, bool | np.bool_):
                raise InvalidInput(f"{signal}={value!r} is neither true nor false.", hint="Give one of them, or None where it is not known.")
            values[signal] = float(value)
    return values


def _told(adapter: str, signal: Signal, at: int, kind: Kind, before: float, after: float) -> Alarm:
    who = "all inputs" if adapter == OVERALL else f"inputs of '{adapter}'"
    if signal is Signal.EMBEDDING:
        reason = "the latest inputs are about something else than the earlier ones, as a permutation test of their embeddings tells"
        return Alarm(adapter, signal, kind, "MMD", at, before, after, reason)
    if signal is Signal.SCORE:
        before, after = -before, -after
        change = f"the mean acceptance score of {who} is {after:.2f}, {before:.2f} before"
    else:
        what = "are turned away" if signal is Signal.ABSTAINED else "are answered wrongly"
        change = f"{100 * after:.1f} % of {who} {what}, {100 * before:.1f} % before"
    return Alarm(adapter, signal, kind, "ADWIN" if kind is Kind.ALARM else "Page-Hinkley", at, before, after, change)


def _packed(vectors: list[F32]) -> dict[str, Any]:
    rows = np.array(vectors, np.float16).astype("<f2")
    return {"shape": list(rows.shape), "float16": base64.b64encode(rows.tobytes()).decode("ascii")}


def _unpacked(state: Mapping[str, Any]) -> list[F32]:
    rows = np.frombuffer(base64.b64decode(state["float16"], validate=True), "<f2").reshape(state["shape"])
    return list(rows.astype(np.float32))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _mean(values: array[float]) -> float:
    return math.fsum(values) / len(values)
