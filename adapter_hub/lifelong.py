"""Look after a registry, pass by pass: the log into the drift monitor, what people corrected into updates. Finds and acts; `continual` decides.

A pass may be killed at any moment: what it knows is written before what it does, and what it does are acts of the registry, each whole.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from adapter_hub.continual.alerts import Alerts, Sink, to_log
from adapter_hub.continual.drift import Alarm, DriftMonitor, Kind
from adapter_hub.continual.maintenance import (
    RECENT,
    Decision,
    Health,
    MaintenancePolicy,
    Memory,
    Proof,
    Step,
    decide,
    judged,
    proof_of,
)
from adapter_hub.errors import HubError, InvalidInput
from adapter_hub.examples import Example, measuring
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry.events import EventKind
from adapter_hub.registry.layout import EVALUATION_FILE, EXEMPLARS_FILE, GATE_FILE
from adapter_hub.registry.moves import REASON_CHARS_MAX
from adapter_hub.registry.observations import Observation, first_id
from adapter_hub.routing.decision import Reason

if TYPE_CHECKING:
    from adapter_hub.hub import Hub
    from adapter_hub.training.config import TrainConfig

log = logging.getLogger("adapter_hub")

JSON = Any
DRIFT, MAINTENANCE, ALARMS = "drift", "maintenance", "alarm"    # kinds of notes
STATE = "state"            # key of the note DRIFT
SETTLED_S = 5.0            # by then other processes have written what they logged
ENCODED_ROWS = 1_000       # texts that are encoded together
ALARMS_KEPT = 1_000
HELD_SHARE, HELD_ROWS = 0.4, 200    # of the corrected rows, and at most: they prove the gain of an update and have no part in making it
SPLIT_SEED = 0
NEW_LABEL_ROWS = 5         # with fewer a label that people named is not learned yet


@dataclass(frozen=True, slots=True)
class Done:
    """What a pass did about one adapter, or would do."""

    ref: AdapterRef
    step: Step
    reason: str
    result: AdapterRef | None = None         # the version that was learned, or gone back to
    promoted: bool = False
    evaluation: dict[str, JSON] | None = None    # on the set that is kept with it, where it was measured in this pass

    def to_json(self) -> dict[str, JSON]:
        facts: dict[str, JSON] = {"adapter": str(self.ref), "step": str(self.step), "reason": self.reason}
        facts |= {"result": None if self.result is None else str(self.result), "promoted": self.promoted}
        return facts | ({"evaluation": self.evaluation} if self.evaluation else {})


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """One pass."""

    alarms: tuple[Alarm, ...]
    done: tuple[Done, ...]
    dry_run: bool

    @property
    def failed(self) -> tuple[Done, ...]:
        return tuple(one for one in self.done if one.step is Step.FAILED)

    def to_json(self) -> dict[str, JSON]:
        return {"dry_run": self.dry_run, "alarms": [one.to_json() for one in self.alarms], "done": [one.to_json() for one in self.done]}


# ---- watch ----------------------------------------------------------------------------------------------------------


def watch(hub: Hub, sinks: Iterable[Sink] = (), *, dry_run: bool = False, now: datetime | None = None) -> list[Alarm]:
    """See `Hub.watch`; the caller holds the registry's maintenance lock."""
    now = now or datetime.now(UTC)
    notes = hub.registry.notes
    kept = notes.read(DRIFT).get(STATE) or {}
    monitor = DriftMonitor.from_json(kept["monitor"]) if kept else DriftMonitor()
    alerts = Alerts((to_log, *sinks))
    if kept:
        alerts.restore(kept["alerts"])
    production = {ref.name: ref.version for ref in hub.registry.production()}
    for name in monitor.adapters:    # another version answers otherwise, and that is no drift
        if kept["production"].get(name) != production.get(name):
            monitor.reset(name)
    seen, said = kept.get("seen", ""), tuple(kept.get("said", ("", "")))
    alarms: list[tuple[Alarm, str]] = []
    for row, vector in _encoded(hub, _since(hub, seen)):
        turned_away = row.adapter is None and row.reason == Reason.BELOW_THRESHOLD
        whose = row.adapter.name if row.adapter else row.candidate if turned_away else None
        routed = row.score is not None
        found = monitor.observe(whose, score=row.score, abstained=turned_away if routed else None, embedding=vector)
        alarms += [(alarm, seen) for alarm in found]
        seen = row.id
    for row in hub.log.corrected(said):
        if row.adapter is not None and (right := _right(row)) is not None:
            alarms += [(alarm, row.id) for alarm in monitor.observe(row.adapter.name, error=not right)]
        said = (row.feedback.at, row.id) if row.feedback else said
    if dry_run:
        return [alarm for alarm, _ in alarms]
    told = [alarm for alarm, _ in alarms]
    _keep(hub, alarms, now)
    alerts.send(told, now_s=now.timestamp())
    state = {"monitor": monitor.to_json(), "alerts": alerts.to_json(), "seen": seen, "said": list(said), "production": production}
    notes.write(DRIFT, {STATE: state})
    return told


def forget(hub: Hub) -> None:
    """Let the detectors begin anew from here: their state holds vectors of what was asked."""
    with hub.registry.maintaining():
        if kept := hub.registry.notes.read(DRIFT).get(STATE):
            hub.registry.notes.write(DRIFT, {STATE: kept | {"monitor": DriftMonitor().to_json()}})


def _since(hub: Hub, seen: str) -> list[Observation]:
    """What was logged behind an id, oldest first, but for the last moments, which other processes may still write to."""
    until = first_id(datetime.now(UTC) - timedelta(seconds=SETTLED_S))
    return list(hub.log.read(since=seen + "0" if seen else None, before=until))[::-1]


def _encoded(hub: Hub, rows: Sequence[Observation]) -> Iterator[tuple[Observation, Any]]:
    """Each with its vector, where its text was kept and routed."""
    for start in range(0, len(rows), ENCODED_ROWS):
        part = rows[start : start + ENCODED_ROWS]
        texts = [row.text for row in part if row.text and row.score is not None]
        vectors = iter(hub.encoder.encode(texts) if texts else ())
        for row in part:
            yield row, next(vectors) if row.text and row.score is not None else None


def _keep(hub: Hub, alarms: Sequence[tuple[Alarm, str]], now: datetime) -> None:
    """Alarms outlive a pass that is killed before it acted on them: the adapter's memory has the first, and all of them are noted."""
    notes = hub.registry.notes
    memories = {name: Memory.from_json(found) for name, found in notes.read(MAINTENANCE).items()}
    opened = {}
    for ref in hub.registry.production():
        own = [(alarm, seen) for alarm, seen in alarms if alarm.adapter == ref.name and alarm.kind is Kind.ALARM]
        memory = memories.get(ref.name, Memory()).of(ref.version or 0)
        if own and memory.alarm is None:
            alarm, seen = own[0]
            opened[ref.name] = replace(memory, alarm=alarm.to_json(), alarmed_at=seen).to_json()
    notes.write(MAINTENANCE, opened)
    at = now.isoformat(timespec="milliseconds")
    if alarms:
        gone = dict.fromkeys(list(notes.read(ALARMS))[:-ALARMS_KEPT])
        notes.write(ALARMS, gone | {f"{at} {number:04}": alarm.to_json() | {"noted_at": at} for number, (alarm, _) in enumerate(alarms)})


def _right(row: Observation) -> bool | None:
    """Whether the adapter's answer was right, as somebody said; None: nobody did."""
    said = row.feedback
    if said is None or row.adapter is None:
        return None
    if said.correct_adapter not in (None, row.adapter.name):
        return False
    return None if said.correct_label is None or row.label is None else row.label == said.correct_label


# ---- maintain -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Corrected:
    """What people said of one adapter's inputs, behind what was set aside."""

    answers: tuple[tuple[Observation, bool], ...]    # since the version is in production, and whether that gave the right one
    rows: dict[str, Example]            # by text: to learn from
    until: tuple[str, str]              # the last of both


def maintain(
    hub: Hub,
    *,
    dry_run: bool = False,
    names: Iterable[str] | None = None,
    sinks: Iterable[Sink] = (),
    config: TrainConfig | str | None = None,
    now: datetime | None = None,
) -> MaintenanceReport:
    """See `Hub.maintain`."""
    now = now or datetime.now(UTC)
    if now.tzinfo is None:
        raise InvalidInput(f"now={now!r} has no time zone.", hint="datetime.now(timezone.utc)")
    wanted = None if names is None else {hub.registry.resolve(name).name for name in names}
    with hub.registry.maintaining():
        alarms = watch(hub, sinks, dry_run=dry_run, now=now)
        if not dry_run:
            _calibrate_anew(hub)
        done = []
        for ref in hub.registry.production():
            if wanted is None or ref.name in wanted:
                done.append(_attended(hub, ref, alarms, config, now, dry_run))
        if any(one.promoted for one in done):
            _calibrate_anew(hub)
    return MaintenanceReport(tuple(alarms), tuple(done), dry_run)


def _calibrate_anew(hub: Hub) -> None:
    """Where versions are in production that the calibration in use was not measured on: a pass that was killed may have left it so."""
    router = hub.settle()
    known = router.calibration.centres if router.calibration else ()
    if any(ref not in known and hub.state(ref).count for ref in hub.registry.production()):
        hub.calibrate("maintenance")


def policy_of(hub: Hub) -> MaintenancePolicy:
    kept = hub.config
    return MaintenancePolicy(
        kept.accuracy_floor, kept.gate_margin, kept.maintain_level, kept.update_rows, timedelta(days=kept.cooldown_days)
    )


def _attended(
    hub: Hub, ref: AdapterRef, alarms: Sequence[Alarm], config: TrainConfig | str | None, now: datetime, dry_run: bool
) -> Done:
    """What was done about one adapter. A fault of one is told, and the pass goes on with the others."""
    try:
        memory = Memory.from_json(hub.registry.notes.read(MAINTENANCE).get(ref.name)).of(ref.version or 0)
        measured, evaluation = _evaluated(hub, ref, any(one.adapter in ("*", ref.name) for one in alarms), dry_run)
        corrected = _corrected_of(hub, ref, memory)
        decision = decide(_health(hub, ref, memory, corrected, measured), memory, policy_of(hub), now)
        done = Done(ref, decision.step, decision.reason, evaluation=evaluation)
        if dry_run:
            return done
        _remember(hub, ref.name, decision.memory)
        return _acted(hub, done, decision, corrected, config)
    except HubError as error:
        log.error("%s could not be maintained: %s", ref, error)
        return Done(ref, Step.FAILED, str(error))


def _acted(hub: Hub, done: Done, decision: Decision, corrected: _Corrected, config: TrainConfig | str | None) -> Done:
    ref = done.ref
    if decision.step is Step.ROLL_BACK:
        back = hub.rollback(ref.name, reason=f"maintenance: {decision.reason}")
        done = replace(done, result=back, promoted=True)
    elif decision.step in (Step.UPDATE, Step.JUDGE):
        candidate = _candidate_of(hub, ref, decision.memory)
        if candidate is None:
            train, held = _split(_learnable(list(corrected.rows.values()), hub.registry.manifest(ref).labels or ()))
            candidate = hub.learn(ref.name, train, config=config, promote="never", evaluation=held).ref
        routed = sum(row.reason != Reason.NAMED for row, _ in corrected.answers) * 2 >= len(corrected.answers)
        proof, why = _proof_of(hub, ref, candidate, decision.level or 0.0, routed)
        if proof is Proof.BETTER:
            hub.promote(candidate, reason=f"maintenance: {why}")
        said = f"{done.reason}; {candidate} {'goes live' if proof is Proof.BETTER else 'is held'}: {why}"
        done = replace(done, result=candidate, promoted=proof is Proof.BETTER, reason=said)
        _remember(hub, ref.name, judged(decision.memory, proof, len(corrected.rows), corrected.until))
    if decision.step not in (Step.NONE, Step.WAIT):
        detail = {"step": str(done.step), "result": str(done.result), "promoted": done.promoted}
        hub.registry.remark(ref, f"{done.step}: {done.reason}"[:REASON_CHARS_MAX], detail)
    return done


def _remember(hub: Hub, name: str, memory: Memory) -> None:
    hub.registry.notes.write(MAINTENANCE, {name: memory.to_json()})


def _evaluated(hub: Hub, ref: AdapterRef, again: bool, dry_run: bool) -> tuple[float | None, dict[str, JSON] | None]:
    """The share of its own set that is answered right, routed, and the figures if they are new: they change with the router, or are asked for."""
    if EVALUATION_FILE not in hub.registry.manifest(ref).files:
        return None, None
    router = hub.settle().digest
    past = (event.detail for event in reversed(hub.registry.history(ref.name)) if event.kind is EventKind.MAINTAINED)
    last: Mapping[str, JSON] = next((detail for detail in past if detail.get("step") == "evaluate"), {})
    if not again and last.get("adapter") == str(ref) and last.get("router") == router:
        return last["figures"].get("routed", {}).get("accuracy"), None
    figures = hub.evaluate(names=[ref.name], max_false_reject=None)["adapters"][str(ref)]
    shown = ", ".join(f"{way} {figures[way]['accuracy']:.4f}" for way in ("oracle", "routed") if "accuracy" in figures.get(way, {}))
    if not dry_run:
        hub.registry.remark(ref, f"evaluate: {shown or 'measured'}", {"step": "evaluate", "adapter": str(ref), "router": router, "figures": figures})
    return figures.get("routed", {}).get("accuracy"), figures


def _corrected_of(hub: Hub, ref: AdapterRef, memory: Memory) -> _Corrected:
    """Inputs that are its own, as people say or because it answered them; one that did not reach it was not answered right."""
    moves = [event for event in hub.registry.history(ref.name) if event.alias == PRODUCTION]
    since = first_id(moves[-1].at) if moves else ""
    answers: list[tuple[Observation, bool]] = []
    rows: dict[str, Example] = {}
    until = memory.set_aside
    for row in hub.log.corrected(memory.set_aside):
        said = row.feedback
        home = None if said is None else said.correct_adapter or (row.adapter.name if row.adapter else None)
        if said is None or home != ref.name or said.correct_label is None:
            continue
        until = (said.at, row.id)
        if row.text:
            rows.pop(row.text, None)
            rows[row.text] = Example(row.text, said.correct_label)    # the last word counts
        if row.id >= since and (row.adapter == ref or row.reason != Reason.NAMED):
            answers.append((row, row.adapter == ref and row.label == said.correct_label))
    return _Corrected(tuple(answers), rows, until)


def _health(hub: Hub, ref: AdapterRef, memory: Memory, corrected: _Corrected, expected: float | None) -> Health:
    from adapter_hub.engine.engine import Request

    recent = [right for _, right in corrected.answers[-RECENT:]]
    since = [right for row, right in corrected.answers if row.id > memory.alarmed_at]
    own = [(row, right) for row, right in corrected.answers if row.adapter == ref and row.text and row.feedback]
    previous, compared = hub.registry.rollback_target(ref.name), (0, 0, 0)
    if previous is not None and own and len(corrected.answers) > memory.looked_at:
        found = hub.engine.predict([Request(row.text or "", previous) for row, _ in own])    # past the log: nobody asked
        theirs = [row.feedback is not None and other.label == row.feedback.correct_label for (row, _), other in zip(own, found, strict=True)]
        pairs = list(zip((right for _, right in own), theirs, strict=True))
        compared = (len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    newest = max((row.ref.version or 0) for row in hub.registry.versions(ref.name))
    return Health(
        ref, newest, len(corrected.answers), sum(recent), len(recent), sum(since), len(since), len(corrected.rows), expected, previous, compared,
        _candidate_of(hub, ref, memory),
    )  # fmt: skip


def _candidate_of(hub: Hub, ref: AdapterRef, memory: Memory) -> AdapterRef | None:
    """What an update of this version made that began and was not judged."""
    if memory.update is None:
        return None
    later = (row.ref for row in hub.registry.versions(ref.name) if (row.ref.version or 0) > (memory.update or 0))
    made = (hub.registry.manifest(one) for one in later)
    return next((manifest.ref for manifest in made if manifest.parent == str(ref) and GATE_FILE in manifest.files), None)


def _proof_of(hub: Hub, ref: AdapterRef, candidate: AdapterRef, level: float, routed: bool) -> tuple[Proof, str]:
    """By the gate's verdict, which was stored with the candidate, and by the answers to rows that had no part in making either version.

    Where inputs are routed, an answer is right that reaches the adapter and has the label, with the router that there is or would be.
    """
    gate = json.loads((hub.registry.open_version(candidate) / GATE_FILE).read_text(encoding="utf-8"))
    known = {row.text for row in (*hub.kept(ref, EVALUATION_FILE), *hub.kept(ref, EXEMPLARS_FILE))}
    rows = [row for row in measuring(hub.kept(candidate, EVALUATION_FILE)) if row.text not in known and row.label is not None]
    others = [one for one in hub.registry.production() if one.name != ref.name]
    theirs, mine = (hub.answered(rows, version, [*others, version] if routed else None) for version in (ref, candidate))
    pairs = list(zip(mine, theirs, strict=True))
    return proof_of(gate["verdict"], len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), level)


def _learnable(rows: Sequence[Example], known: Collection[str]) -> list[Example]:
    """Without those of new labels that too few people named: slips of the pen, or not enough to learn from."""
    counts = Counter(row.label for row in rows)
    return [row for row in rows if row.label in known or counts[row.label] >= NEW_LABEL_ROWS]


def _split(rows: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """What is learned, and what proves the gain; of each label its share."""
    from adapter_hub.training.data import hold_out

    rest, held = hold_out(rows, min(HELD_SHARE, HELD_ROWS / len(rows)), SPLIT_SEED)
    return list(rest), list(held)
