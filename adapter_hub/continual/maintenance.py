"""What a maintenance pass does about one adapter. Pure: what was found goes in, one step comes out; `lifelong` finds and acts.

| what was found | step |
|---|---|
| a pass was cut off within a step | end that step |
| the version that was in production before answers what people corrected since better, and its own evaluation set no worse | roll back |
| the share of right answers lies below what it must be, and enough corrected rows are new | update |
| it lies below, and too few rows are new, or the last update is too recent | wait |
| it lay below, and lies there no more | nothing, and the harm is forgotten |
| an alarm that enough answers since do not confirm | nothing, and the alarm is closed |
| no harm, no open alarm, and many corrected rows that agree with one another are new | update, as a matter of routine |
| anything else | nothing |

*Below* and *better* are told by exact tests of what people said, one answer a text: a binomial, and a sign test of the answers in which two versions
differ. Each pass that finds something new tests anew, and of many some find harm by chance: each kind of test has a quarter of `level`, its n-th
look at a version 6/(π²n²) of that. However many passes come, all of them have at most `level` together (alpha spending, Lan and DeMets 1983).
Who only corrects what is wrong shows less right answers than there are: the tests hold for feedback that also confirms.
A candidate goes live where the gate promotes it *and* it answers more of the rows right that had no part in making either version; that is
a test of its own. What it learned from is set aside then, and where the gate sees harm: rows that were refused once are no evidence
later. Where only the proof is missing, the next update waits for half as many rows again.
What is learned as a matter of routine agrees with what is known, and so few rows rarely prove its gain: it goes live where the gate
promotes it, no fewer of the rows held back are answered right with it, it gains no less than the other adapters lose, and neither these nor
any of its labels' kept rows are told to lose, by sign tests at `level`. It learns from answers of the version in production, by blocks of
BLOCK_ANSWERS in the order of what was said: a block of which fewer are right than of all others, by Fisher's exact test at `level` shared by the
blocks, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self

from scipy.stats import binom, hypergeom

from adapter_hub.refs import AdapterRef

RECENT = 200         # answers that the share of right ones is of
CLOSING_ROWS = 50    # answers since an alarm that do not confirm it close it
BLOCK_ANSWERS = 50   # of a block, which must be like the others to be learned as a matter of routine
TESTS = 4            # that share the level: the version before, the floor, the alarm, and the candidates
NEVER = ("", "")     # a moment of feedback, and the observation: before all
Moment = tuple[str, str]


class Step(StrEnum):
    NONE = "none"
    WAIT = "wait"              # harm is seen, and nothing can be done yet
    UPDATE = "update"          # learn from what people corrected
    RESUME = "resume"          # end what a pass began that was cut off
    ROLL_BACK = "roll back"
    FAILED = "failed"          # a step raised an error; the others went on


@dataclass(frozen=True, slots=True)
class MaintenancePolicy:
    """The settings of hub.toml that say when something is done."""

    floor: float = 0.7             # least share of right answers, 0-1
    margin: float = 0.02           # after an alarm: by how much it may lie below the share on the evaluation set, 0-1
    level: float = 0.05            # of all tests of one version together, above 0 to 0.5
    update_rows: int = 50          # new corrected rows that an update takes
    cooldown: timedelta = timedelta(days=1)
    refresh_rows: int = 200        # new corrected rows from which an update is tried where nothing is wrong; 0: none is

    def level_of(self, number: int) -> float:
        """Of the test of one kind with this number, from 1 on."""
        return self.level / TESTS * 6 / (math.pi * number) ** 2


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that has begun. It is written before anything is done, and gone when all is."""

    step: Step
    of: int                 # the version that was in production
    newest: int             # the newest version of the name
    rows: int               # corrected rows that an update learns from
    until: Moment           # the last of them
    level: float            # of the candidate's test; 1 where it is routine
    reason: str
    routine: bool = False   # nothing was wrong
    moves: int = 0          # of production, until then: one more by somebody else, and the step is void
    target: int = 0         # the version that a rollback goes to

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        return cls(**{**found, "step": Step(found["step"]), "until": tuple(found["until"])})


@dataclass(frozen=True, slots=True)
class Memory:
    """What earlier passes know of an adapter: a note beside the log."""

    version: int = 0                                # that what stands from here to `harm` is about
    seen: Moment = NEVER                            # the newest feedback that a look has seen
    alarm: Mapping[str, Any] | None = None          # the oldest one that is open
    alarmed_at: Moment = NEVER                      # the last feedback before it
    harm: str = ""                                  # that a test found, and nothing was done about yet
    looks: Mapping[str, int] = field(default_factory=dict)      # at each version
    updates: Mapping[str, int] = field(default_factory=dict)    # of each version that were tried
    updated_at: str | None = None                   # when the last update began, ISO 8601
    rows_next: int = 0                              # that an update takes at least, after one that proved nothing
    set_aside: Moment = NEVER                       # feedback up to here was learned from or refused
    pending: Pending | None = None
    refresh_next: int = 0                           # as `rows_next`, of updates as a matter of routine

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> Self:
        if found is None:
            return cls()
        moments = {name: tuple(found[name]) for name in ("seen", "alarmed_at", "set_aside")}
        pending = Pending.from_json(found["pending"]) if found["pending"] else None
        return cls(**{**found, **moments, "pending": pending})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def of(self, version: int) -> Self:
        """As it stands for the version that is in production now."""
        if version == self.version:
            return self
        return replace(self, version=version, seen=NEVER, alarm=None, alarmed_at=NEVER, harm="", rows_next=0, refresh_next=0)


@dataclass(frozen=True, slots=True)
class Health:
    """What a pass found out about the version in production of one name. Answers are told apart by their text: the last one counts."""

    ref: AdapterRef
    newest: int                                     # number of the newest version of the name
    moves: int = 0                                  # of production, so far
    latest: Moment = NEVER                          # of the feedback to `answers`
    right: int = 0                                  # of `answers`: those that it gave, and that people say are right
    answers: int = 0                                # to its inputs, that people spoke of, at most RECENT: old ones hide what is new
    right_since: int = 0                            # the same of those since the open alarm
    answers_since: int = 0
    rows: int = 0                                   # corrected rows with text, and a label that it knows: what an update would learn from
    agreeing: int = 0                               # of them those of `alike` answers of this version: what it would learn as a matter of routine
    until: Moment = NEVER                           # the last of them
    expected: float | None = None                   # share of its evaluation set that is answered right, routed, 0-1; None: no set is kept
    previous: AdapterRef | None = None              # what a rollback would go to
    compared: tuple[int, int] = (0, 0)              # of the inputs that it answered: those that it alone has right, the previous alone
    measured: tuple[int, int] = (0, 0)              # the same of the previous one's evaluation set


@dataclass(frozen=True, slots=True)
class Decision:
    """One step, why, and what is known afterwards."""

    step: Step
    reason: str
    memory: Memory


def decide(health: Health, memory: Memory, policy: MaintenancePolicy, now: datetime) -> Decision:
    """The step for one adapter. `memory` is of its version (`Memory.of`)."""
    if memory.pending is not None:
        return Decision(Step.RESUME, f"{memory.pending.reason}; a pass was cut off", memory)
    fresh = health.latest > memory.seen
    if fresh:
        look = memory.looks.get(str(memory.version), 0) + 1
        memory = replace(memory, seen=health.latest, looks={**memory.looks, str(memory.version): look})
        level = policy.level_of(look)
        alone, other = health.compared
        if health.previous is not None and is_fewer(alone, other, level) and health.measured[0] <= health.measured[1]:
            reason = f"people say that it answers {other} inputs wrongly that {health.previous} has right, and {alone} the other way round"
            return _begun(Step.ROLL_BACK, reason, health, memory, level)
        least = (health.expected or policy.floor) - policy.margin    # since an alarm
        harm = _below(health.right, health.answers, policy.floor, level)
        if memory.alarm is not None:
            harm = harm or _below(health.right_since, health.answers_since, least, level)
        lies_below = health.right < policy.floor * health.answers or (memory.alarm is not None and health.right_since < least * health.answers_since)
        memory = replace(memory, harm=harm or (memory.harm if lies_below else ""))
        if memory.alarm is not None and not memory.harm and health.answers_since >= CLOSING_ROWS:
            said = f"{_well(health, memory)}; {health.right_since} of {health.answers_since} since do not confirm it"
            return Decision(Step.NONE, said, replace(memory, alarm=None, alarmed_at=NEVER))
    if not memory.harm:
        return _refreshed(health, memory, policy, now)
    if health.rows < (wanted := max(policy.update_rows, memory.rows_next)):
        return Decision(Step.WAIT, f"{memory.harm}; {health.rows} of {wanted} rows to learn from are there", memory)
    if due := _due(memory, policy, now):
        return Decision(Step.WAIT, f"{memory.harm}; the last update is too recent: not before {due.isoformat(timespec='minutes')}", memory)
    number = memory.updates.get(str(memory.version), 0) + 1
    memory = replace(memory, updated_at=now.isoformat(), updates={**memory.updates, str(memory.version): number})
    return _begun(Step.UPDATE, f"{memory.harm}; {health.rows} rows are there to learn from", health, memory, policy.level_of(number))


def _refreshed(health: Health, memory: Memory, policy: MaintenancePolicy, now: datetime) -> Decision:
    """Where nothing is wrong: what people said is learned all the same, when it is much."""
    few = health.answers < 2 * BLOCK_ANSWERS or health.agreeing < max(policy.refresh_rows, memory.refresh_next)
    if not policy.refresh_rows or few or memory.alarm is not None or _due(memory, policy, now):
        return Decision(Step.NONE, _well(health, memory), memory)
    left_out = f", {health.rows - health.agreeing} are left out" if health.rows > health.agreeing else ""
    reason = f"{_well(health, memory)}; {health.agreeing} rows are there to learn from{left_out}"
    return _begun(Step.UPDATE, reason, health, replace(memory, updated_at=now.isoformat()), 1.0, routine=True)


def alike(rights: Sequence[bool], level: float) -> list[bool]:
    """Of answers in the order of what was said, those in blocks of BLOCK_ANSWERS of which not fewer are right than of all others."""
    starts = range(0, max(len(rights) - BLOCK_ANSWERS + 1, 1), BLOCK_ANSWERS)    # the last block has what is left
    blocks = [slice(start, end) for start, end in pairwise((*starts, len(rights)))]
    found: list[bool] = []
    for block in blocks:    # Fisher's exact test
        own = rights[block]
        found += [bool(hypergeom.cdf(sum(own), len(rights), sum(rights), len(own)) >= level / len(blocks))] * len(own)
    return found


def _due(memory: Memory, policy: MaintenancePolicy, now: datetime) -> datetime | None:
    """When the next update may begin, where that is not yet."""
    due = None if memory.updated_at is None else datetime.fromisoformat(memory.updated_at) + policy.cooldown
    return due if due is not None and now < due else None


def _begun(step: Step, reason: str, health: Health, memory: Memory, level: float, *, routine: bool = False) -> Decision:
    rows, target = health.agreeing if routine else health.rows, health.previous
    back = (target.version or 0) if target is not None and step is Step.ROLL_BACK else 0
    pending = Pending(step, memory.version, health.newest, rows, health.until, level, reason, routine, health.moves, back)
    return Decision(step, reason, replace(memory, pending=pending))


def _below(right: int, answers: int, least: float, level: float) -> str:
    """In words, where so few are right that a share of `least` would rarely show it."""
    if not binom.cdf(right, answers, least) < level:
        return ""
    return f"{right} of {answers} answers are right as people say, at least {100 * least:.1f} % should be"


def is_fewer(mine: int, others: int, level: float) -> bool:
    """Whether of `mine + others` cases in which two differ, so few are mine that a fair coin would rarely show it (sign test)."""
    return bool(binom.cdf(mine, mine + others, 0.5) < level)


def _well(health: Health, memory: Memory) -> str:
    open_alarm = ""
    if memory.alarm:
        open_alarm = f"; an alarm is open until {CLOSING_ROWS} answers since say what it was, {health.answers_since} do: {memory.alarm['reason']}"
    if not health.answers:
        told = "what people said of its answers was learned or set aside, and nothing since" if memory.set_aside > NEVER else ""
        return f"{told or 'nobody has spoken of its answers since it is in production'}{open_alarm}"
    return f"{health.right} of {health.answers} answers are right as people say{open_alarm}"


class Proof(StrEnum):
    """What speaks for a candidate."""

    BETTER = "better"
    MISSING = "missing"    # the gate lets it pass, and it may be better by chance
    AGAINST = "against"    # the gate sees harm, or what was known is lost
    VOID = "void"          # another version is in production than it was to replace


def proof_of(verdict: str, rows: int, gained: int, lost: int, level: float) -> tuple[Proof, str]:
    """Whether a candidate goes live, and why: the gate's verdict, and counts of rows that had no part in making either version."""
    if verdict != "promote":
        return Proof.AGAINST, f"the gate says {verdict}"
    said = f"of {rows} new rows {gained} are answered right that are not now, and {lost} the other way round"
    return (Proof.BETTER, said) if is_fewer(lost, gained, level) else (Proof.MISSING, f"{said}: no proof")


def no_worse(
    verdict: str, wanted: int, rows: int, gained: int, lost: int, others: tuple[int, int], kept: Mapping[str, tuple[int, int]], level: float
) -> tuple[Proof, str]:
    """The same of an update as a matter of routine, judged on `wanted` rows at least.

    `others` are gained and lost of the other adapters' inputs, `kept` by label those of the rows that are kept with the version in production.
    """
    if verdict != "promote":
        return Proof.AGAINST, f"the gate says {verdict}"
    for label, (again, gone) in kept.items():
        if is_fewer(again, gone, level):
            return Proof.AGAINST, f"of the kept rows of {label!r} {gone} are no longer answered right, and {again} are that are not now"
    if not kept:
        return Proof.MISSING, "no rows are kept that it could be asked for what is known"
    said = f"of {rows} new rows {gained} are answered right that are not now, and {lost} the other way round"
    said += f", of the others' {others[0]} and {others[1]}"
    if rows < wanted:
        return Proof.MISSING, f"{said}: too few"
    fewer = lost > gained or lost + others[1] > gained + others[0] or is_fewer(*others, level)
    return (Proof.MISSING, f"{said}: fewer than now") if fewer else (Proof.BETTER, said)


def judged(memory: Memory, proof: Proof) -> Memory:
    """What is known after an update."""
    if memory.pending is None:
        return memory
    done = replace(memory, pending=None)
    if proof is Proof.VOID:
        return done
    if proof is Proof.MISSING:
        awaited = memory.pending.rows * 3 // 2
        return replace(done, refresh_next=awaited) if memory.pending.routine else replace(done, rows_next=awaited)
    set_aside = max(memory.set_aside, memory.pending.until)
    return replace(done, harm="", alarm=None, alarmed_at=NEVER, rows_next=0, refresh_next=0, set_aside=set_aside)
