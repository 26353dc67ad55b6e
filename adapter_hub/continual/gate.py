"""Whether a candidate goes live. Pure: evidence in, verdict out; no files, no torch, nothing drawn at random.

| the candidate | verdict |
|---|---|
| has a fault: the engine answers otherwise than it was trained, its numbers are not finite | reject |
| is right no more often than always answering the commonest label, on rows that can tell | reject |
| has scores, and is better than its baseline neither on more rows than it is worse on nor in the mean, on rows that can tell | reject |
| is the first version (or no row is new to the one in production), right or wrong, and worse than a linear probe on the frozen encoder | reject |
| is worse than the version in production, on rows that neither was trained on | hold |
| answers what that one was made for worse, by more than `margin` | hold |
| lacks a label that that one knows | hold |
| lets fewer inputs of the other adapters reach them: of all by more than `margin`, of one by more than `routed_margin` | hold |
| takes more from one of them than `max_taken` | hold |
| anything else: better, or not to be told apart | promote |

A reject outweighs a hold. *Worse* is told by a paired bootstrap (Efron and Tibshirani 1993, ch. 16; Koehn 2004): of all samples, drawn with
replacement from the rows that were judged, fewer than `level` have the candidate at least as good. Few rows cannot tell: one row that
each of the two wins is added, so that five rows of one mind are the fewest that count at 5 %. What one row decides is no evidence.
A constant answer is to be beaten, not only equalled: who is no better shows no use, where there was room to show it. Rows *can tell* where
the same bootstrap would call a candidate better that wins every row which can be won, those that the constant answer has not right: at 5 %
five such rows, however many there are beside them. Where there are fewer, only who is worse by that bootstrap is rejected; of others the
reason says that the rows are too few.

A row of one label among several is right or wrong. Of other tasks it has a score, and of the two whose score is higher wins the row; who
differ by less than `continual.measures` says do both:

| the task | score of a row | its baseline |
|---|---|---|
| several labels | overlap of given and wanted labels (Jaccard), 0-1 | always the commonest set of labels in training |
| a number | minus the absolute error | always the mean of the training rows |
| labels of tokens | share of the tokens that are right, 0-1 | always the commonest label of these tokens |
| text | minus the nats a token of what was to be written | the base model, asked with the same prompt |

The baseline is what a first version is compared with; one of one label, with a linear probe, too. Where a constant answer is right on every row,
these tell nothing apart and it is none.
"""

# n rows

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from adapter_hub.errors import counted

LABELS_SHOWN = 6
ROUNDING = 1e-9    # of a mean of scores: what is no larger is no difference
DECIMALS = 9    # of a probability: what the Fourier transform rounds is far below


class Verdict(StrEnum):
    PROMOTE = "promote"
    HOLD = "hold"        # it may harm what is there: a person decides
    REJECT = "reject"    # it is of no use


_GRAVITY = list(Verdict)


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What counts as harm. The `gate_…` settings and `max_taken` of hub.toml."""

    level: float = 0.05            # of the bootstrap, above 0 to 0.5: how rarely harm may be seen where there is none
    margin: float = 0.02           # share of old inputs, and of all other adapters' inputs, that may be lost, 0-1
    routed_margin: float = 0.05    # share of one other adapter's inputs that may be lost, 0-1
    max_taken: float = 1.0         # share of one other adapter's inputs that the candidate may take, 0-1; not even "always" overrides it


@dataclass(frozen=True, slots=True)
class Paired:
    """Whether candidate and reference were right, on the same rows; of rows that have scores, whether they won or drew."""

    reference: str                 # who, in words: "banking@2", "a linear probe"
    candidate_right: tuple[bool, ...]
    reference_right: tuple[bool, ...]
    measure: str = ""              # what the scores are, in words; empty where a row is right or wrong
    means: tuple[float, float] = (0.0, 0.0)    # of the scores: candidate's and reference's
    least: float = 0.0             # by which scores must differ to be told apart
    at_best: int = 0               # rows whose reference has the best score that there is, as far as is told apart: nobody wins them

    def __post_init__(self) -> None:
        if len(self.candidate_right) != len(self.reference_right):
            raise ValueError(f"{len(self.candidate_right)} rows of the candidate stand beside {len(self.reference_right)} of {self.reference}")

    @classmethod
    def of_scores(
        cls, reference: str, candidate: Sequence[float], other: Sequence[float], *, measure: str, least: float = 0.0, best: float = math.inf
    ) -> Self:
        """Who wins each row, by scores (n,) of which the higher is the better; both where they differ by `least` or less.

        What is not a number is the worst there is. `best` is of all scores.
        """
        mine, theirs = ([-math.inf if math.isnan(score) else score for score in scores] for scores in (candidate, other))
        drawn = [a == b or abs(a - b) <= least for a, b in zip(mine, theirs, strict=True)]
        candidate_right, reference_right = (
            tuple(even or a > b for even, a, b in zip(drawn, *sides, strict=True)) for sides in ((mine, theirs), (theirs, mine))
        )
        means = (sum(mine) / max(1, len(mine)), sum(theirs) / max(1, len(theirs)))
        return cls(reference, candidate_right, reference_right, measure, means, least, sum(best - score <= max(least, ROUNDING) for score in theirs))

    @property
    def counts(self) -> tuple[int, int, int]:
        """(rows, gained, lost): of candidate against reference."""
        pairs = list(zip(self.candidate_right, self.reference_right, strict=True))
        return len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    @property
    def winnable(self) -> int:
        """Rows on which the reference can be beaten."""
        return len(self.reference_right) - self.at_best if self.measure else self.reference_right.count(False)


@dataclass(frozen=True, slots=True)
class Routed:
    """What the router would change for the inputs of one other adapter."""

    adapter: str
    inputs: int     # that were looked at
    gained: int     # would reach it, and do not now
    lost: int       # reach it now, and would not
    taken: float    # share of its inputs, 0-1, that would go to the candidate instead


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a verdict rests on."""

    validation: Paired
    baseline: Paired | None = None                 # the same rows against one constant answer, or the base model; None where nothing can be won
    probed: bool = True                            # the reference is a linear probe or the baseline, not the version in production
    slices: Mapping[str, Paired] = field(default_factory=dict)    # old inputs, by what they are
    lost_labels: tuple[str, ...] = ()              # that the version in production knows and the candidate does not
    routed: tuple[Routed, ...] = ()
    faults: tuple[str, ...] = ()                   # of integrity, in words
    notes: tuple[str, ...] = ()                    # what could not be looked at, in words


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what it found, and what follows from it alone."""

    check: str
    verdict: Verdict
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"check": self.check, "verdict": str(self.verdict), "reason": self.reason, "numbers": dict(self.numbers)}


@dataclass(frozen=True, slots=True)
class GateReport:
    """The verdict and all that it rests on; stored with the version as gate.json."""

    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]
    policy: GatePolicy
    notes: tuple[str, ...] = ()

    @property
    def forbidden(self) -> str:
        """Why not even a person's "always" puts it into production; empty where that may."""
        return next((found.reason for found in self.findings if found.check == "max_taken" and found.verdict is not Verdict.PROMOTE), "")

    def to_json(self) -> dict[str, Any]:
        facts = {"verdict": str(self.verdict), "reason": self.reason, "policy": asdict(self.policy)}
        return facts | {"findings": [found.to_json() for found in self.findings], "notes": list(self.notes)}


def judge(evidence: Evidence, policy: GatePolicy) -> GateReport:
    """The gravest verdict of all checks, and in words why."""
    findings = tuple(_findings(evidence, policy))
    verdict = max((found.verdict for found in findings), key=_GRAVITY.index)
    compared, *others = [found for found in findings if found.check == "validation"] + [found for found in findings if found.check != "validation"]
    against = [found.reason for found in others if found.verdict is not Verdict.PROMOTE]
    return GateReport(verdict, "; but ".join(filter(None, [compared.reason, ", and ".join(against)])), findings, policy, evidence.notes)


def _findings(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    yield _validation(evidence, policy)
    yield Finding("integrity", Verdict.REJECT if evidence.faults else Verdict.PROMOTE, ", and ".join(evidence.faults))
    for name, pairs in evidence.slices.items():
        yield _slice(name, pairs, policy)
    if evidence.lost_labels:
        shown = ", ".join(map(repr, evidence.lost_labels[:LABELS_SHOWN])) + (", …" if len(evidence.lost_labels) > LABELS_SHOWN else "")
        reason = f"it no longer knows {len(evidence.lost_labels)} of the labels in production ({shown})"
        yield Finding("labels", Verdict.HOLD, reason, {"lost": len(evidence.lost_labels)})
    if evidence.routed:
        yield from _routing(evidence.routed, policy)


def _validation(evidence: Evidence, policy: GatePolicy) -> Finding:
    if evidence.validation.measure:
        return _scored(evidence, policy)
    rows, gained, lost = evidence.validation.counts
    right, baseline, unclear = sum(evidence.validation.candidate_right), evidence.baseline, ""
    numbers = _numbers(rows, gained, lost) | {"right": right, "reference_right": right - gained + lost}
    accuracy = f"validation accuracy {_share(right, rows)}"
    if not rows:
        return Finding("validation", Verdict.PROMOTE, "no row was left to judge it on", numbers)
    if baseline is not None:
        numbers["commonest_right"] = commonest = sum(baseline.reference_right)
        constant = f"{baseline.reference} ({_share(commonest, rows)})"
        if right <= commonest and _tells(baseline, policy.level):
            return Finding("validation", Verdict.REJECT, f"{accuracy} is not above {constant}", numbers)
        if right <= commonest:
            unclear = f"; {counted(rows, 'row is', 'rows are')} too few to tell whether it is of more use than {constant}"
    beside = f"{accuracy}, {evidence.validation.reference} {_share(right - gained + lost, rows)}"
    if is_worse(rows, gained, lost, policy.level):
        verdict = Verdict.REJECT if evidence.probed else Verdict.HOLD
        return Finding("validation", verdict, f"{beside}: worse on {lost} of {counted(rows, 'row')}, better on {gained}", numbers)
    better, asked = is_worse(rows, lost, gained, policy.level), counted(rows, "row")
    told = f"better on {asked}" if better else f"not to be told apart on {asked}, {gained} of them better, {lost} worse"
    return Finding("validation", Verdict.PROMOTE, f"{beside}: {told}{unclear}", numbers)


def _tells(baseline: Paired, level: float) -> bool:
    """Whether rows on which a candidate is no better than its baseline are evidence that it is of no use: see the top."""
    return is_worse(*baseline.counts, level) or is_worse(len(baseline.reference_right), 0, baseline.winnable, level)


def _scored(evidence: Evidence, policy: GatePolicy) -> Finding:
    pairs, baseline = evidence.validation, evidence.baseline
    rows, gained, lost = pairs.counts
    numbers = _numbers(rows, gained, lost) | _finite({"score": pairs.means[0], "reference_score": pairs.means[1]})
    if not rows:
        return Finding("validation", Verdict.PROMOTE, "no row was left to judge it on", numbers)
    said, unclear = f"{_compared(pairs)}: better on {gained} of {counted(rows, 'row')}, worse on {lost}", ""
    if baseline is not None:
        _, above, below = baseline.counts
        numbers |= {"above_baseline": above, "below_baseline": below} | _finite({"baseline_score": baseline.means[1]})
        useless = above <= below and not baseline.means[0] - baseline.means[1] > max(baseline.least, ROUNDING)
        if useless and _tells(baseline, policy.level):
            reason = said if evidence.probed else f"{_compared(baseline)}: better on {above} of {counted(rows, 'row')}, worse on {below}"
            return Finding("validation", Verdict.REJECT, reason, numbers)
        if useless:
            unclear = f"; {counted(rows, 'row is', 'rows are')} too few to tell whether it is of more use than {baseline.reference}"
    elif evidence.probed and is_worse(rows, gained, lost, policy.level):    # than one that is right on every row: there is nothing to win
        return Finding("validation", Verdict.REJECT, said, numbers)
    # Of a baseline the rule above is all: squared errors may be small in the mean and yet larger on most rows.
    harmed = not evidence.probed and is_worse(rows, gained, lost, policy.level)
    return Finding("validation", Verdict.HOLD, said, numbers) if harmed else Finding("validation", Verdict.PROMOTE, f"{said}{unclear}", numbers)


def _compared(pairs: Paired) -> str:
    mine, theirs = (f"{abs(mean):.3f}" for mean in pairs.means)    # of errors and nats too, which count as scores below 0
    return f"{pairs.measure} {mine}, {pairs.reference} {theirs}"


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Without those that JSON cannot hold."""
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _slice(name: str, pairs: Paired, policy: GatePolicy) -> Finding:
    rows, gained, lost = pairs.counts
    harmed = _harmed(rows, gained, lost, policy.margin, policy.level)
    asked = counted(rows, name.removesuffix("s"), name)
    said = f"of {asked} it answers {lost} wrongly that {pairs.reference} has right, and {gained} the other way round"
    if pairs.measure:
        said = f"of {asked} it answers {lost} worse than {pairs.reference} does, and {gained} better ({_compared(pairs)})"
    return Finding(name, Verdict.HOLD if harmed else Verdict.PROMOTE, said, _numbers(rows, gained, lost))


def _routing(routed: Sequence[Routed], policy: GatePolicy) -> Iterator[Finding]:
    inputs, gained, lost = (sum(getattr(other, name) for other in routed) for name in ("inputs", "gained", "lost"))
    harmed = _harmed(inputs, gained, lost, policy.margin, policy.level)
    said = f"of {counted(inputs, 'input')} of all other adapters {lost} would no longer reach theirs, and {gained} would that do not now"
    yield Finding("routing", Verdict.HOLD if harmed else Verdict.PROMOTE, said, _numbers(inputs, gained, lost))
    parts = _parts(routed, policy.level)
    for other in routed:
        if _harmed(other.inputs, other.gained, other.lost, policy.routed_margin, policy.level / parts):
            asked = counted(other.inputs, "input")
            said = f"of {asked} of {other.adapter} {other.lost} would no longer reach it, and {other.gained} would that do not now"
            yield Finding(f"routing of {other.adapter}", Verdict.HOLD, said, _numbers(other.inputs, other.gained, other.lost))
    most = max(routed, key=lambda other: other.taken)
    above = policy.max_taken < 1 and most.taken > policy.max_taken
    said = f"it would take {100 * most.taken:.1f} % of the inputs of {most.adapter}, hub.toml allows {100 * policy.max_taken:.1f} %"
    yield Finding("max_taken", Verdict.HOLD if above else Verdict.PROMOTE, said, {"taken": most.taken})


def _parts(routed: Sequence[Routed], level: float) -> int:
    """Of the level, one for each adapter that could show harm: looked at one by one, many would by chance (Bonferroni).

    Those of which too few inputs change for that, were all of them lost, are none of the many (Tarone 1990, "A modified Bonferroni method for
    discrete data"): else the more adapters there are that a newcomer does not touch, the more it may take from one.
    """
    least = [chance_of_no_loss(other.inputs, 0, changed) for other in routed if (changed := other.gained + other.lost)]
    return next(parts for parts in itertools.count(1) if sum(chance < level / parts for chance in least) <= parts)


def _harmed(rows: int, gained: int, lost: int, margin: float, level: float) -> bool:
    """More is lost than the margin, and not by chance."""
    return lost - gained > margin * rows and is_worse(rows, gained, lost, level)


def is_worse(rows: int, gained: int, lost: int, level: float) -> bool:
    """Whether of all bootstrap samples fewer than `level` have the candidate at least as good as its reference."""
    return lost > gained and chance_of_no_loss(rows, gained, lost) < level


def chance_of_no_loss(rows: int, gained: int, lost: int) -> float:
    """The share, 0-1, of bootstrap samples in which at least as many rows are gained as are lost.

    Of the samples of every one that could be drawn, not of some: the sum of n draws from {1, 0, -1} has a distribution in closed form, the
    n-th power of the characteristic function of one draw. So there is no seed, and a row more that is right never makes the share smaller.
    """
    import numpy as np  # here: to list and to promote costs no numpy

    gained, lost, n = gained + 1, lost + 1, rows + 2    # a row that each wins
    turns = np.exp(2j * np.pi * np.fft.fftfreq(2 * n + 1))
    powers = ((gained * np.conj(turns) + lost * turns + (n - gained - lost)) / n) ** n
    sums = np.real(np.fft.ifft(powers))    # P(sum = 0), P(1), …, P(n), P(-n), …, P(-1)
    return round(float(np.clip(sums[: n + 1].sum(), 0, 1)), DECIMALS)


def _numbers(rows: int, gained: int, lost: int) -> dict[str, float]:
    return {"rows": rows, "gained": gained, "lost": lost, "chance_of_no_loss": chance_of_no_loss(rows, gained, lost)}


def _share(right: int, rows: int) -> str:
    return f"{right / max(rows, 1):.3f}"
