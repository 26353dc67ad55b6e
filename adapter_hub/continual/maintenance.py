"""What a maintenance pass does about one adapter. Pure: what was found goes in, one step comes out; `lifelong` finds and acts.

| what was found | step |
|---|---|
| an update began and its candidate is there, for the pass was cut off | judge it |
| the version that was in production before answers what people corrected since better than this one | roll back |
| the share of right answers lies below what it must be, and enough corrected rows are new | update |
| it lies below, and too few rows are new, or the last update is too recent | wait |
| an alarm that enough answers since do not confirm | nothing, and the alarm is closed |
| anything else | nothing |

*Below* and *better* are told by tests of what people said, an exact binomial and the gate's paired bootstrap. Each pass that finds new answers
tests anew, and of many tests some find harm by chance: the n-th one of a version gets 6/(π²n²) of `level`. However many passes come, all
of them have at most `level` together (alpha spending, Lan and DeMets 1983).
A candidate goes live where the gate promotes it *and* it answers more of the rows right that had no part in making either version; that is
a test of its own. What it learned from is set aside then, and where the gate sees harm: rows that were refused once are no evidence
later. Where only the proof is missing, the next update waits for twice as many rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Self

from scipy.stats import binom

from adapter_hub.continual.gate import is_worse
from adapter_hub.refs import AdapterRef

RECENT = 200         # answers that the share of right ones is of
CLOSING_ROWS = 50    # answers since an alarm that do not confirm it close it


class Step(StrEnum):
    NONE = "none"
    WAIT = "wait"              # harm is seen, and nothing can be done yet
    UPDATE = "update"          # learn from what people corrected
    JUDGE = "judge"            # the candidate of a pass that was cut off
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

    def level_of(self, test: int) -> float:
        """Of the test with this number, from 1 on."""
        return self.level * 6 / (math.pi * test) ** 2


@dataclass(frozen=True, slots=True)
class Memory:
    """What earlier passes know of an adapter: a note beside the log. Of another version only `set_aside` and `updated_at` still hold."""

    version: int = 0
    tests: int = 0                                  # that were made of this version
    looked_at: int = 0                              # answers that the last of them saw
    alarm: Mapping[str, Any] | None = None          # the oldest one that is open
    alarmed_at: str = ""                            # the last observation before it
    harm: str = ""                                  # that a test found, and nothing was done about yet
    updated_at: str | None = None                   # when the last update began, ISO 8601
    update: int | None = None                       # the newest version when it began; None: its candidate was judged
    rows_next: int = 0                              # that an update takes at least, after one that proved nothing
    set_aside: tuple[str, str] = ("", "")           # feedback up to this moment and observation was learned from or refused

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> Self:
        return cls() if found is None else cls(**{**found, "set_aside": tuple(found["set_aside"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def of(self, version: int) -> Self:
        """As it stands for the version that is in production now."""
        return self if version == self.version else type(self)(version, updated_at=self.updated_at, set_aside=self.set_aside)


@dataclass(frozen=True, slots=True)
class Health:
    """What a pass found out about the version in production of one name."""

    ref: AdapterRef
    newest: int                                     # number of the newest version of the name
    spoken: int = 0                                 # its inputs that people spoke of, since it is in production and behind what is set aside
    right: int = 0                                  # of `answers`: those that it gave, and that people say are right
    answers: int = 0                                # the latest of those, at most RECENT: old ones hide what is new
    right_since: int = 0                            # the same of those since the open alarm
    answers_since: int = 0
    rows: int = 0                                   # corrected rows with text that an update would learn from
    expected: float | None = None                   # share of its evaluation set that is answered right, routed, 0-1; None: no set is kept
    previous: AdapterRef | None = None              # what a rollback would go to
    compared: tuple[int, int, int] = (0, 0, 0)      # of the inputs that it answered: all, those that it alone has right, the previous alone
    candidate: AdapterRef | None = None             # of an update that was cut off


@dataclass(frozen=True, slots=True)
class Decision:
    """One step, why, and what is known afterwards."""

    step: Step
    reason: str
    memory: Memory
    level: float | None = None      # of the test that was made, of an update that of its candidate; None: none was


def decide(health: Health, memory: Memory, policy: MaintenancePolicy, now: datetime) -> Decision:
    """The step for one adapter. `memory` is of its version (`Memory.of`)."""
    if memory.update is not None and health.candidate is not None:
        return Decision(Step.JUDGE, f"{health.candidate} was learned by a pass that was cut off", memory, policy.level_of(max(1, memory.tests)))
    if memory.update is not None:
        return Decision(Step.UPDATE, "a pass was cut off while it learned", memory, policy.level_of(max(1, memory.tests)))
    level: float | None = None
    if not memory.harm and health.spoken <= memory.looked_at:
        return Decision(Step.NONE, _well(health, memory), memory)
    if not memory.harm:
        memory = replace(memory, tests=memory.tests + 1, looked_at=health.spoken)
        level = policy.level_of(memory.tests)
        rows, gained, lost = health.compared
        if health.previous is not None and is_worse(rows, gained, lost, level):
            reason = f"of {rows} answers that people spoke of {lost} are wrong that {health.previous} has right, {gained} the other way round"
            return Decision(Step.ROLL_BACK, reason, memory, level)
        least = max(policy.floor, (health.expected or 0.0) - policy.margin) if memory.alarm else policy.floor
        right, answers = (health.right_since, health.answers_since) if memory.alarm else (health.right, health.answers)
        said = f"{right} of {answers} answers are right as people say, at least {100 * least:.1f} % should be"
        if not binom.cdf(right, answers, least) < level:
            if memory.alarm and answers >= CLOSING_ROWS:
                return Decision(Step.NONE, f"{said}: the alarm is not confirmed", replace(memory, alarm=None, alarmed_at=""), level)
            return Decision(Step.NONE, _well(health, memory), memory, level)
        memory = replace(memory, harm=said)
    if health.rows < (wanted := max(policy.update_rows, memory.rows_next)):
        return Decision(Step.WAIT, f"{memory.harm}; {health.rows} of {wanted} rows to learn from are there", memory, level)
    if memory.updated_at is not None and now < (due := datetime.fromisoformat(memory.updated_at) + policy.cooldown):
        return Decision(Step.WAIT, f"{memory.harm}; the last update is too recent: not before {due.isoformat(timespec='minutes')}", memory, level)
    begun = replace(memory, update=health.newest, updated_at=now.isoformat(), tests=memory.tests + 1)
    return Decision(Step.UPDATE, f"{memory.harm}; {health.rows} rows are there to learn from", begun, policy.level_of(begun.tests))


def _well(health: Health, memory: Memory) -> str:
    open_alarm = f"; an alarm is open: {memory.alarm['reason']}" if memory.alarm else ""
    if not health.answers:
        return f"nobody has spoken of its answers{open_alarm}"
    return f"{health.right} of {health.answers} answers are right as people say{open_alarm}"


class Proof(StrEnum):
    """What speaks for a candidate."""

    BETTER = "better"
    MISSING = "missing"    # the gate lets it pass, and it may be better by chance
    AGAINST = "against"    # the gate sees harm


def proof_of(verdict: str, rows: int, gained: int, lost: int, level: float) -> tuple[Proof, str]:
    """Whether a candidate goes live, and why: the gate's verdict, and counts of rows that had no part in making either version."""
    if verdict != "promote":
        return Proof.AGAINST, f"the gate says {verdict}"
    said = f"of {rows} new rows {gained} are answered right that are not now, and {lost} the other way round"
    return (Proof.BETTER, said) if is_worse(rows, lost, gained, level) else (Proof.MISSING, f"{said}: no proof")


def judged(memory: Memory, proof: Proof, rows: int, until: tuple[str, str]) -> Memory:
    """What is known after an update that was made of `rows` rows, the last of them `until`."""
    memory = replace(memory, update=None)
    if proof is Proof.MISSING:
        return replace(memory, rows_next=2 * rows)
    return replace(memory, harm="", alarm=None, alarmed_at="", set_aside=until)
