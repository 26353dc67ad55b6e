"""Look after a registry, pass by pass: the log into the drift monitor, what people corrected into updates. Finds and acts; `continual` decides.

A pass may be killed at any moment: what it knows is written before what it does, and what it does are acts of the registry, each whole.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.arguments import texts_of
from adapter_hub.continual.alerts import Alerts, Sink, checked, to_log
from adapter_hub.continual.drift import OVERALL, Alarm, DriftMonitor, Kind
from adapter_hub.continual.maintenance import (
    NEVER,
    RECENT,
    Health,
    MaintenancePolicy,
    Memory,
    Pending,
    Proof,
    Step,
    alike,
    decide,
    judged,
    no_worse,
    proof_of,
)
from adapter_hub.errors import CorruptVersion, HubError, InvalidInput, ModelChanged, NotRoutable, ProductionMoved
from adapter_hub.examples import Example, measuring
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.layout import EVALUATION_FILE, EXEMPLARS_FILE, GATE_FILE
from adapter_hub.registry.moves import REASON_CHARS_MAX
from adapter_hub.registry.observations import Observation, first_id
from adapter_hub.registry.schema import VersionState
from adapter_hub.routing.decision import Reason
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.data import hold_out

if TYPE_CHECKING:
    from adapter_hub.hub import Hub

log = logging.getLogger("adapter_hub")

JSON = Any
DRIFT, MAINTENANCE, ALARMS = "drift", "maintenance", "alarm"    # kinds of notes
STATE, UNSEEN = "state", "unseen"    # keys of the notes DRIFT: the detectors, and an alarm over all inputs that no pass has looked into
SETTLED_S = 5.0            # by then other processes have written what they logged
BLOCK_ROWS = 1_000         # of the log that a watch holds at once; their texts are encoded together
SAVED_S = 3.0              # so much, and a block, a watch that is killed does again: its state is large where adapters are many
ALARMS_KEPT = 1_000
HELD_SHARE, HELD_ROWS = 0.4, 200    # of the corrected rows, and at most: they prove the gain of an update and have no part in making it
SPLIT_SEED = 0
OWN = "maintenance: "    # how the reasons of what a pass moves begin
WANTED_PART = 5      # of the rows of a routine update, one in so many must be new to judge it
KEPT_ROWS = 2_000    # of those that a version knows, that a routine update is asked


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


def watch(
    hub: Hub, sinks: Iterable[Sink] = (), *, dry_run: bool = False, now: datetime | None = None
) -> tuple[list[Alarm], dict[str, Memory]]:
    """See `Hub.watch`: the alarms, and the memories that they opened one in. The caller holds the registry's maintenance lock."""
    found = _Watch(hub, sinks, dry_run, now or datetime.now(UTC))
    for block in _blocks(_since(hub, found.seen)):
        for row, vector in zip(block, _vectors(hub, block), strict=True):
            turned_away = row.adapter is None and row.reason == Reason.BELOW_THRESHOLD
            whose = row.adapter.name if row.adapter else row.candidate if turned_away else None
            routed = row.score is not None
            found.add(found.monitor.observe(whose, score=row.score, abstained=turned_away if routed else None, embedding=vector))
            found.seen = row.id
        found.save()
    for block in _blocks(hub.log.corrected(found.said)):
        for row in block:
            # What was said late of a version that is no more in production says nothing of the one that is.
            ref, home = row.adapter, row.feedback.correct_adapter if row.feedback else None
            if ref is None and row.reason != Reason.NAMED and home is not None and found.is_routed(home):    # whose it was did not get it
                found.add(found.monitor.observe(home, error=True))
            elif ref is not None and found.production.get(ref.name) == ref.version and (right := _right(row)) is not None:
                found.add(found.monitor.observe(ref.name, error=not right))
            found.said = (row.feedback.at, row.id) if row.feedback else found.said
        found.save()
    found.save(ended=True)
    return found.alarms, found.opened


class _Watch:
    """The detectors, how far in the log they are, and what they found. It is saved as it goes: who was killed is gone on from there."""

    def __init__(self, hub: Hub, sinks: Iterable[Sink], dry_run: bool, now: datetime) -> None:
        self._hub, self._dry_run, self._now = hub, dry_run, now
        self._saved_s = time.monotonic()
        kept = hub.registry.notes.read(DRIFT).get(STATE) or {}
        if kept and kept["encoder"] != hub.encoder.fingerprint:    # vectors of another encoder compare with nothing
            kept |= {"monitor": DriftMonitor().to_json()}
        self.monitor = DriftMonitor.from_json(kept["monitor"]) if kept else DriftMonitor()
        self._alerts = Alerts((to_log, *checked(sinks)))
        if kept:
            self._alerts.restore(kept["alerts"])
        self.production = {ref.name: ref.version for ref in hub.registry.production()}
        for name in self.monitor.adapters:    # another version answers otherwise, and that is no drift
            if kept["production"].get(name) != self.production.get(name):
                self.monitor.reset(name)
        self.seen: str = kept.get("seen", "")
        self.said: tuple[str, str] = tuple(kept.get("said", NEVER))
        self.alarms = [Alarm.from_json(one) for one in kept.get("alarms", ())]    # of a watch that was killed: saved, and returned to nobody
        self.opened: dict[str, Memory] = {}
        self._routed: dict[str, bool] = {}
        self._new: list[Alarm] = []    # since it was saved

    def is_routed(self, name: str) -> bool:
        """Whether it is in production, and inputs are routed to it."""
        if name not in self._routed:
            version = self.production.get(name)
            self._routed[name] = version is not None and self._hub.registry.manifest(AdapterRef(name, version)).routed
        return self._routed[name]

    def add(self, alarms: Sequence[Alarm]) -> None:
        """Each adapter's first one opens an alarm in its memory, if none is, until answers say what it was."""
        self._new += alarms
        for alarm in alarms:
            if alarm.kind is Kind.ALARM and alarm.adapter in self.production and alarm.adapter not in self.opened:
                memory = _memory_of(self._hub, AdapterRef(alarm.adapter, self.production[alarm.adapter]))
                if memory.alarm is None:
                    self.opened[alarm.adapter] = replace(memory, alarm=alarm.to_json() | {"evaluated": False}, alarmed_at=self.said)

    def save(self, *, ended: bool = False) -> None:
        """Note and tell what was found, then how far it is; or nothing, where it was saved just now."""
        if not ended and time.monotonic() - self._saved_s < SAVED_S:
            return
        self.alarms += self._new
        new, self._new = self._new, []
        if self._dry_run:
            return
        notes = self._hub.registry.notes
        if new:    # memories before the detectors: a killed pass tells twice
            notes.write(MAINTENANCE, {name: memory.to_json() for name, memory in self.opened.items()})
            _note(self._hub, new, self._now)
            self._alerts.send(new, now_s=self._now.timestamp())
        state: dict[str, JSON] = {"monitor": self.monitor.to_json(), "alerts": self._alerts.to_json(), "seen": self.seen, "said": list(self.said)}
        state |= {"production": self.production, "encoder": self._hub.encoder.fingerprint}
        overall = [alarm.to_json() for alarm in new if alarm.adapter == OVERALL and alarm.kind is Kind.ALARM]
        unseen = {UNSEEN: overall[-1]} if overall else {}
        notes.write(DRIFT, {STATE: state | {"alarms": [] if ended else [alarm.to_json() for alarm in self.alarms]}} | unseen)
        self._saved_s = time.monotonic()


def forget(hub: Hub) -> None:
    """Let the detectors begin anew from here: their state holds vectors of what was asked. The caller holds the maintenance lock."""
    if kept := hub.registry.notes.read(DRIFT).get(STATE):
        hub.registry.notes.write(DRIFT, {STATE: kept | {"monitor": DriftMonitor().to_json()}})


def _since(hub: Hub, seen: str) -> Iterator[Observation]:
    """What was logged behind an id, oldest first, but for the last moments, which other processes may still write to."""
    until = first_id(datetime.now(UTC) - timedelta(seconds=SETTLED_S))
    return hub.log.read(since=seen + "0" if seen else None, before=until, oldest_first=True)


def _blocks(rows: Iterator[Observation]) -> Iterator[list[Observation]]:
    while block := list(islice(rows, BLOCK_ROWS)):
        yield block


def _vectors(hub: Hub, rows: Sequence[Observation]) -> list[Any]:
    """Of each row, None where its text was not kept or not routed."""
    texts = [row.text for row in rows if row.text and row.score is not None]
    vectors = iter(hub.encoder.encode(texts) if texts else ())
    return [next(vectors) if row.text and row.score is not None else None for row in rows]


def _memory_of(hub: Hub, ref: AdapterRef) -> Memory:
    return Memory.from_json(hub.registry.notes.read(MAINTENANCE).get(ref.name)).of(ref.version or 0)


def _note(hub: Hub, alarms: Sequence[Alarm], now: datetime) -> None:
    notes, at = hub.registry.notes, now.isoformat(timespec="milliseconds")
    known = list(notes.read(ALARMS))
    first = 1 + max((int(key.split()[1]) for key in known if key.startswith(at)), default=-1)
    new = {f"{at} {number:06}": alarm.to_json() | {"noted_at": at} for number, alarm in enumerate(alarms, first)}
    notes.write(ALARMS, dict.fromkeys(known[:-ALARMS_KEPT]) | new)


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

    answers: tuple[tuple[Observation, bool], ...]    # since the version is in production, and whether that gave the right one; one a text
    rows: tuple[Example, ...]                        # to learn from, one a text
    agreeing: tuple[Example, ...]                    # of them those to learn as a matter of routine
    until: tuple[str, str]                           # the last of the feedback

    @property
    def latest(self) -> tuple[str, str]:
        return max((_said(row) for row, _ in self.answers), default=NEVER)


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
    wanted = None if names is None else {hub.registry.resolve(name).name for name in texts_of("names", names)}
    config, sinks = None if config is None else TrainConfig.of(config), checked(sinks)    # before anything is begun
    with hub.registry.maintaining():
        alarms, opened = watch(hub, sinks, dry_run=dry_run, now=now)
        if not dry_run:
            _calibrate_anew(hub)
        overall = any(one.adapter == OVERALL and one.kind is Kind.ALARM for one in alarms) or UNSEEN in hub.registry.notes.read(DRIFT)
        spoken = list(hub.log.corrected())    # read once for all adapters
        done = []
        for ref in hub.registry.production():
            if wanted is None or ref.name in wanted:
                done.append(_attended(hub, ref, opened.get(ref.name), overall, spoken, config, now, dry_run))
        if any(one.promoted for one in done):
            _calibrate_anew(hub)
        if wanted is None and not dry_run:
            hub.registry.notes.write(DRIFT, {UNSEEN: None})
    return MaintenanceReport(tuple(alarms), tuple(done), dry_run)


def _calibrate_anew(hub: Hub) -> None:
    """Where versions are routed that the calibration in use was not measured on: a pass that was killed may have left it so."""
    router = hub.settle()
    known = router.calibration.centres if router.calibration else ()
    try:
        if any(ref not in known and hub.state(ref).count for ref in router.refs):
            hub.calibrate("maintenance")
    except HubError as error:
        log.error("the router could not be calibrated: %s", error)


def policy_of(hub: Hub) -> MaintenancePolicy:
    kept = hub.config
    return MaintenancePolicy(
        kept.accuracy_floor, kept.gate_margin, kept.maintain_level, kept.update_rows, timedelta(days=kept.cooldown_days), kept.refresh_rows
    )


def _attended(
    hub: Hub, ref: AdapterRef, opened: Memory | None, alarmed: bool, spoken: Sequence[Observation], config: TrainConfig | str | None,
    now: datetime, dry_run: bool,
) -> Done:    # fmt: skip
    """What was done about one adapter. A fault of one is told, and the pass goes on with the others."""
    try:
        memory = opened or _memory_of(hub, ref)
        # An alarm may have been found by a `watch` before this pass: it waits until it was looked into.
        measured, evaluation = _evaluated(hub, ref, alarmed or (memory.alarm or {}).get("evaluated") is False, dry_run)
        if memory.alarm is not None:
            memory = replace(memory, alarm={**memory.alarm, "evaluated": True})
        corrected = _corrected_of(hub, ref, memory, spoken)
        decision = decide(_health(hub, ref, memory, corrected, measured), memory, policy_of(hub), now)
        done = Done(ref, decision.step, decision.reason, evaluation=evaluation)
        if dry_run:
            return done
        _remember(hub, ref.name, decision.memory)
        return _acted(hub, done, decision.memory, spoken, config)
    except Exception as error:    # whatever one of them raises, the others go on
        log.error("%s could not be maintained: %s", ref, error, exc_info=None if isinstance(error, HubError) else error)
        with suppress(Exception):
            if not dry_run and (pending := (memory := _memory_of(hub, ref)).pending) is not None and pending.step is not Step.ROLL_BACK:
                _remember(hub, ref.name, replace(memory, pending=None))    # an update is tried again after the cool-down, a rollback stays pending
        return Done(ref, Step.FAILED, str(error) or type(error).__name__)


def _acted(hub: Hub, done: Done, memory: Memory, spoken: Sequence[Observation], config: TrainConfig | str | None) -> Done:
    """End the step that is pending. Each of its parts may have been done by a pass that was cut off."""
    ref, pending = done.ref, memory.pending
    if pending is None:
        return done
    begun = AdapterRef(ref.name, pending.of)
    moves = _moves(hub, ref.name)[pending.moves :]
    if moves:    # by a pass that was cut off behind its act, or by somebody
        own = len(moves) == 1 and moves[0].reason.startswith(OWN)
        why = done.reason if own else f"{done.reason}; nothing is done: {ref} has come meanwhile"
        done = replace(done, result=ref if own else None, promoted=own, reason=why)
        proof = Proof.BETTER if own and pending.step is Step.UPDATE else Proof.VOID
    else:
        try:
            done, proof = _rolled_back(hub, done, pending) if pending.step is Step.ROLL_BACK else _updated(
                hub, done, pending, spoken, _corrected_of(hub, begun, memory, spoken, pending.until), config
            )
        except ProductionMoved as error:
            done, proof = replace(done, reason=f"{done.reason}; nothing is done: {error}"), Proof.VOID
    memory = judged(memory, proof)
    detail = {"step": str(pending.step), "result": str(done.result), "promoted": done.promoted}
    hub.registry.remark(begun, f"{pending.step}: {done.reason}"[:REASON_CHARS_MAX], detail)
    _remember(hub, ref.name, memory)
    return done


def _moves(hub: Hub, name: str) -> list[Event]:
    return [event for event in hub.registry.history(name) if event.alias == PRODUCTION]


def _rolled_back(hub: Hub, done: Done, pending: Pending) -> tuple[Done, Proof]:
    target = hub.registry.rollback_target(done.ref.name)
    if target is None or target.version != pending.target:
        return replace(done, reason=f"{done.reason}; nothing is done: {pending.target} can go live no more"), Proof.VOID
    try:
        back = hub.rollback(done.ref.name, f"{OWN}{pending.reason}", expected=done.ref.version)
    except (NotRoutable, ModelChanged) as error:
        return replace(done, reason=f"{done.reason}; nothing is done: {error}"), Proof.VOID
    return replace(done, result=back, promoted=True), Proof.VOID


def _updated(
    hub: Hub, done: Done, pending: Pending, spoken: Sequence[Observation], corrected: _Corrected, config: TrainConfig | str | None
) -> tuple[Done, Proof]:
    begun = done.ref
    rows = corrected.agreeing if pending.routine else corrected.rows
    if len(rows) < 2:
        raise InvalidInput("the rows that it was to learn from are gone.", hint="They left the log; the next ones are awaited.")
    train, held = hold_out(rows, min(HELD_SHARE, HELD_ROWS / len(rows)), SPLIT_SEED)
    if not held:
        raise InvalidInput("none of the corrected rows can be held back to prove a gain.", hint="All of a label read alike.")
    candidate = _candidate_of(hub, begun, pending, train) or hub.learn(begun.name, train, config=config, promote="never").ref
    proof, why = _proof_of(hub, begun, candidate, held, corrected, pending, spoken)
    if proof is Proof.BETTER:
        hub.promote(candidate, f"{OWN}{why}", expected=begun.version)
    if proof is Proof.AGAINST:
        hub.retire(candidate, f"{OWN}{why}")
    said = f"{done.reason}; {candidate} {'goes live' if proof is Proof.BETTER else 'is held'}: {why}"
    return replace(done, result=candidate, promoted=proof is Proof.BETTER, reason=said), proof


def _candidate_of(hub: Hub, begun: AdapterRef, pending: Pending, train: Sequence[Example]) -> AdapterRef | None:
    """What a pass that was cut off made of these rows."""
    for row in hub.registry.versions(begun.name):
        if (row.ref.version or 0) > pending.newest and row.state is not VersionState.PURGED:
            manifest = hub.registry.manifest(row.ref)
            texts = {one.text for one in hub.kept(row.ref, EXEMPLARS_FILE)}
            if manifest.parent == str(begun) and GATE_FILE in manifest.files and texts.issuperset(one.text for one in train):
                return manifest.ref
    return None


def _proof_of(
    hub: Hub, begun: AdapterRef, candidate: AdapterRef, held: Sequence[Example], corrected: _Corrected, pending: Pending,
    spoken: Sequence[Observation],
) -> tuple[Proof, str]:    # fmt: skip
    """By the gate's verdict, which was stored with the candidate, and by the answers to rows that had no part in making either version.

    Where inputs are routed, an answer is right that reaches the adapter and has the label, with the router that there is or would be.
    """
    gate = json.loads((hub.registry.open_version(candidate) / GATE_FILE).read_text(encoding="utf-8"))
    known = {row.text for ref in (begun, candidate) for file in (EVALUATION_FILE, EXEMPLARS_FILE) for row in hub.kept(ref, file)}
    rows = [row for row in held if row.text not in known]
    named = sum(row.reason == Reason.NAMED for row, _ in corrected.answers) * 2 > len(corrected.answers)
    routed = hub.registry.manifest(begun).routed and not named
    others = [one for one in hub.registry.production() if one.name != begun.name]
    theirs, mine = (
        hub.answered(rows, [version] * len(rows), [*others, version] if routed else None) for version in (begun, candidate)
    )
    gained, lost = _apart(mine, theirs)
    if not pending.routine:
        return proof_of(gate["verdict"], len(rows), gained, lost, pending.level)
    apart = (0, 0)
    if routed:    # what others have yet to learn; what they know is hardly ever lost
        beside = [(row, ref) for ref in others for row in _corrected_of(hub, ref, _memory_of(hub, ref), spoken).rows[-RECENT:]]
        asked, homes = [row for row, _ in beside], [ref for _, ref in beside]
        before, after = (hub.reached(asked, homes, [*others, version]) for version in (begun, candidate))
        apart = _apart(after, before)
    wanted = min(pending.rows // WANTED_PART, HELD_ROWS // 2)
    return no_worse(gate["verdict"], wanted, len(rows), gained, lost, apart, _kept_apart(hub, begun, candidate), hub.config.maintain_level)


def _kept_apart(hub: Hub, begun: AdapterRef, candidate: AdapterRef) -> dict[str, tuple[int, int]]:
    """Of the rows that are kept with a version, evenly spread, by label: how many only a candidate has right, and only that version."""
    kept = [row for file in (EVALUATION_FILE, EXEMPLARS_FILE) for row in hub.kept(begun, file) if row.label is not None]
    kept = [*{row.text: row for row in kept}.values()]
    kept = kept[:: math.ceil(len(kept) / KEPT_ROWS) or 1]
    theirs, mine = (hub.answered(kept, [version] * len(kept)) for version in (begun, candidate))
    found: dict[str, tuple[int, int]] = {}
    for row, now, then in zip(kept, theirs, mine, strict=True):
        gained, lost = found.get(str(row.label), (0, 0))
        found[str(row.label)] = (gained + (then and not now), lost + (now and not then))
    return found


def _apart(mine: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int]:
    """How many only the first have right, and only the second."""
    pairs = list(zip(mine, theirs, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


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
        return _accuracy(last["figures"]), None
    figures: dict[str, JSON] = hub.evaluate(names=[str(ref)], max_false_reject=None)["adapters"][str(ref)]
    shown = ", ".join(f"{one} {figures[one]['accuracy']:.4f}" for one in ("oracle", "routed") if "accuracy" in figures.get(one, {}))
    if not dry_run:
        shown += f" with max_false_reject {hub.config.max_false_reject}" if "accuracy" in figures.get("routed", {}) else ""
        hub.registry.remark(ref, f"evaluate: {shown or 'measured'}", {"step": "evaluate", "adapter": str(ref), "router": router, "figures": figures})
    return _accuracy(figures), figures


def _accuracy(figures: Mapping[str, JSON]) -> float | None:
    """As routed; of an adapter that only its name reaches when it is named."""
    found: float | None = figures.get("routed", figures.get("oracle", {})).get("accuracy")
    return found


def _said(row: Observation) -> tuple[str, str]:
    return (row.feedback.at, row.id) if row.feedback else NEVER


def _corrected_of(
    hub: Hub, ref: AdapterRef, memory: Memory, spoken: Sequence[Observation], until: tuple[str, str] | None = None
) -> _Corrected:
    """Inputs that are its own, as people say or because it answered them, up to `until`; one that did not reach it was not answered right.

    Of labels that it does not know nothing is learned here: they are for a person to teach.
    """
    manifest, moves = hub.registry.manifest(ref), _moves(hub, ref.name)
    since = first_id(moves[-1].at) if moves else ""
    answers: dict[str, tuple[Observation, bool]] = {}
    rows: dict[str, Example] = {}
    last = memory.set_aside
    for row in spoken if manifest.task_type == TaskType.SEQ_CLS and manifest.problem_type in (None, ProblemType.SINGLE) else ():
        said = row.feedback
        home = None if said is None else said.correct_adapter or (row.adapter.name if row.adapter else None)
        if said is None or home != ref.name or _said(row) <= memory.set_aside or (until is not None and _said(row) > until):
            continue
        last = _said(row)
        if row.text and said.correct_label in (manifest.labels or ()):
            rows.pop(row.text, None)
            rows[row.text] = Example(row.text, said.correct_label)    # the last word counts
        elsewhere = manifest.routed and (row.adapter is None or row.adapter.name != ref.name)
        if row.id >= since and (row.adapter == ref or (elsewhere and row.reason != Reason.NAMED)) and (elsewhere or said.correct_label is not None):
            answers.pop(row.text or row.id, None)
            answers[row.text or row.id] = (row, row.adapter == ref and row.label == said.correct_label)
    # What did not reach it is like the answers that were spoken of before it.
    like, agrees, agreeing = iter(alike([right for row, right in answers.values() if row.adapter == ref], hub.config.maintain_level)), True, []
    for row, _ in answers.values():
        agrees = next(like) if row.adapter == ref else agrees
        if agrees and row.text and row.feedback and row.feedback.correct_label in (manifest.labels or ()):
            agreeing.append(Example(row.text, row.feedback.correct_label))
    return _Corrected(tuple(answers.values()), tuple(rows.values()), tuple(agreeing), last)


def _health(hub: Hub, ref: AdapterRef, memory: Memory, corrected: _Corrected, expected: float | None) -> Health:
    recent = [right for _, right in corrected.answers[-RECENT:]]
    since = [right for row, right in corrected.answers if _said(row) > memory.alarmed_at]
    own = [(row, right) for row, right in corrected.answers if row.adapter == ref and row.text][-RECENT:]
    previous, compared, measured = hub.registry.rollback_target(ref.name), (0, 0), (0, 0)
    if previous is not None and own and corrected.latest > memory.seen and memory.pending is None:
        rows = [Example(row.text or "", row.feedback.correct_label if row.feedback else None) for row, _ in own]
        try:
            compared = _apart([right for _, right in own], hub.answered(rows, [previous] * len(rows)))
            older = [row for row in measuring(hub.kept(previous, EVALUATION_FILE)) if row.label is not None]
            measured = _apart(*(hub.answered(older, [version] * len(older)) for version in (ref, previous)))
        except CorruptVersion as error:    # nothing goes back to it
            log.warning("%s is not compared with %s: %s", ref, previous, error)
            compared, measured = (0, 0), (0, 0)
    newest = max((row.ref.version or 0) for row in hub.registry.versions(ref.name))
    return Health(
        ref, newest, len(_moves(hub, ref.name)), corrected.latest, sum(recent), len(recent), sum(since), len(since), len(corrected.rows),
        len(corrected.agreeing), corrected.until, expected, previous, compared, measured,
    )  # fmt: skip
