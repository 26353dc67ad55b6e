"""Learn: rows with text and target become an adapter, judged by the gate and stored with its verdict. Or teach: its router alone learns.

What is learned next goes on from what is in production: its weights, its kept examples, what the router knows. `training` makes the
weights, `continual` plans the lesson and judges, `registering` checks and stores.
"""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.adapters.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from adapter_hub.arguments import rows_of, task_type_of
from adapter_hub.continual.gate import Evidence, GatePolicy, GateReport, Verdict, judge
from adapter_hub.engine.generation import check_generation, merged
from adapter_hub.errors import InvalidInput, counted
from adapter_hub.examples import CHOSE, Example, as_examples, check_targets, chose, digest_of, measuring_digest, read_examples
from adapter_hub.refs import PRODUCTION, AdapterRef, check_name
from adapter_hub.registering import Prepared, by_name, effect_of_next, prepare, routing_files, sound_states, store, warn_of_labels, warn_of_twins
from adapter_hub.registry.layout import EVALUATION_FILE, EXEMPLARS_FILE, GATE_FILE, NEGATIVES_FILE

# What needs torch is imported by the functions that need it, as in `hub`, which imports this.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from adapter_hub.continual.learner import Current, Lesson
    from adapter_hub.hub import Hub
    from adapter_hub.routing.statistics import RoutingState
    from adapter_hub.training.config import TrainConfig
    from adapter_hub.training.report import DataReport, Relabelled
    from adapter_hub.training.tasks import Task
    from adapter_hub.training.train import TrainResult
    from adapter_hub.training.transfer import Transfer

log = logging.getLogger("adapter_hub")

PASSES_LONG = 20_000    # rows times epochs: more take minutes on few cores, and are told of before they begin
FACTS = frozenset(("description", "tags", "license", "evaluation", "negatives", "metrics", "generation"))    # that `learn` passes on


@dataclass(frozen=True, slots=True)
class LearnReport:
    """What `learn` made, and why it was or was not promoted."""

    ref: AdapterRef
    promoted: bool
    reason: str
    metrics: Mapping[str, float]
    gate: GateReport    # stored with the version as gate.json
    data: DataReport    # contradictions, also of the version before, leaks and imbalance among the rows; not stored
    transfer: Transfer | None = None    # with start="transfer": what each start gained

    @property
    def verdict(self) -> Verdict:
        """The gate's: what "auto" does."""
        return self.gate.verdict

    def to_json(self) -> dict[str, Any]:
        facts = {"ref": str(self.ref), "promoted": self.promoted, "verdict": str(self.verdict), "reason": self.reason}
        facts |= {"metrics": dict(self.metrics), "gate": self.gate.to_json(), "data": self.data.to_json()}
        return facts | ({"transfer": self.transfer.to_json()} if self.transfer else {})


# ---- learn ----------------------------------------------------------------------------------------------------------


def learn(
    hub: Hub,
    name: str,
    train: str | Path | Iterable[Mapping[str, Any] | Example],
    *,
    validation: str | Path | Iterable[Mapping[str, Any] | Example] | None,
    config: TrainConfig | Mapping[str, Any] | str | None,
    promote: str,
    start: str,
    checkpoint_folder: str | Path | None,
    task_type: str | None,
    problem_type: str | None,
    prompt_template: str | None,
    instead_of: Iterable[str | AdapterRef],
    routed: bool | None,
    facts: dict[str, Any],
) -> LearnReport:
    """See `Hub.learn`."""
    if promote not in ("auto", "always", "never"):
        raise InvalidInput(f"promote={promote!r} is not a rule.", hint="Use 'auto', 'always' or 'never'.")
    check_name(name)
    with hub.importing:
        from adapter_hub.continual.learner import plan_lesson, transferred
        from adapter_hub.continual.measures import Kind
        from adapter_hub.routing.statistics import build_state
        from adapter_hub.training.config import TrainConfig
        from adapter_hub.training.train import train_adapter

    config = None if config is None else TrainConfig.of(config)
    if unknown := sorted(set(facts) - FACTS):    # before it is trained
        hint = f"Facts to register with it: {', '.join(sorted(FACTS))}."
        if unknown[0] in TrainConfig.__dataclass_fields__:
            hint = f"It is a setting of the training: config={{{unknown[0]!r}: …}}."
        raise InvalidInput(f"learn takes no {unknown[0]!r}.", hint=hint)
    merged({}, check_generation(facts.get("generation") or {}))
    rows, held_out = rows_of(train), rows_of(validation) if validation is not None else None
    gone = [hub.registry.resolve(ref) for ref in instead_of]
    evaluation, refused = rows_of(facts.pop("evaluation", held_out or ())), rows_of(facts.pop("negatives", ()))
    current = _current(hub, name)
    if task_type is not None:
        task_type = task_type_of(task_type)
    kind = Kind.wanted(task_type, problem_type, prompt_template, None if current is None else current.kind)
    key = kind.task.key
    evaluation = [*{key(row): row for row in evaluation}.values()]
    if current is not None and current.kind == kind and start != "cold":
        check_targets(rows, "training", kind.task.fields)    # while no kept example is among them, which has one
        # What reads like a new row to the router, and asks for something else, is given again: the router keeps one side of equal texts.
        texts, keys = {row.text for row in rows}, set(map(key, rows))
        rows = [*rows, *(row for row in current.exemplars if row.text in texts and key(row) not in keys)]
    learned_on = None if current is None or start in ("cold", "transfer") else current.ref
    replayed = current.exemplars if current is not None and learned_on is not None else ()

    @cache
    def encoded() -> RoutingState:
        _announce(name, [*{key(row): row for row in (*replayed, *rows)}.values()], kind.task, config or TrainConfig())
        return build_state(hub.encoder, kind.routed(rows), "", evaluation, (), refused)

    before = cache(lambda: None if learned_on is None else _known(hub, learned_on))

    def seen() -> list[int]:
        known = frozenset() if (old := before()) is None else frozenset(old.exemplars.keys)
        keys = encoded().exemplars.keys if known else ()
        return [position for position, key in enumerate(keys) if key in known] if len(keys) == len(rows) else []

    lesson = plan_lesson(name, rows, held_out, config, current, start, seen, kind)    # what is refused is refused before it is encoded
    newer = encoded()
    if routed is None:
        routed = current is None or hub.registry.manifest(current.ref).routed
    if current is not None and current.kind != kind:
        current = None    # nothing of it compares
    labels: Sequence[str] = ()
    if lesson.parent is not None:
        manifest = hub.registry.manifest(lesson.parent)
        kept = {"description": manifest.description, "tags": manifest.tags, "license": manifest.license}
        facts = kept | ({"generation": manifest.generation} if manifest.generation else {}) | facts
        labels = manifest.labels or ()    # a number may have a name
    with tempfile.TemporaryDirectory(prefix="learn-") as folder:
        if start == "transfer":
            lesson = transferred(name, lesson, _nearest(hub, name, newer), hub.base, hub.adapter, Path(folder) / "starts")
        result = train_adapter(
            hub.base, lesson.train, task=name, validation=lesson.validation, config=lesson.config, folder=Path(folder), start=lesson.start,
            checkpoint_folder=None if checkpoint_folder is None else Path(checkpoint_folder),
            task_type=kind.task.task_type, problem_type=kind.problem_type, prompt_template=kind.prompt_template,
        )  # fmt: skip
        relabelled = () if lesson.parent is None or current is None else _relabelled(rows, current, before(), newer, seen())
        data = result.report.beside(relabelled, given=held_out is not None)
        for said in data.warnings:
            log.warning("%s: %s.", name, said)
        started_from = tuple(dict.fromkeys((*lesson.started_from, *gone)))
        lineage = {"training_data_digest": digest_of(lesson.train), "parent": lesson.parent, "started_from": started_from}
        facts = {"metrics": result.metrics} | lineage | facts
        prepared = prepare(
            hub, name, result.folder, rows, evaluation, refused, labels=result.labels or labels or None, assume_base=True, state=newer,
            problem_type=result.problem_type, prompt_template=result.prompt_template, **facts,
        )  # fmt: skip
    prepared = _with_memory(hub, prepared, lesson, result, before(), rows, evaluation, refused, given=held_out is not None)
    prepared = prepared if routed else by_name(hub, prepared)
    report = judge(_evidence(hub, name, prepared, lesson, result, current, gone), _policy(hub))
    good = promote != "never" and not report.forbidden and (promote == "always" or report.verdict is Verdict.PROMOTE)
    reason = report.reason if promote == "auto" else f"{promote}; the gate: {report.verdict}; {report.reason}"
    warn_of_twins(hub, name, prepared.state, gone)
    stored = report.to_json() | {"start": lesson.start is not None, "training": asdict(lesson.config)}
    stored |= {"transfer": lesson.transfer.to_json()} if lesson.transfer else {}
    gate = json.dumps(stored, ensure_ascii=False, indent=2).encode() + b"\n"
    ref = hub.registry.add(name, prepared.facts, prepared.files | {GATE_FILE: gate}, promote=good, reason=reason)
    return LearnReport(ref, good, reason, result.metrics, report, data, lesson.transfer)


def _announce(name: str, rows: Sequence[Example], task: type[Task], config: TrainConfig) -> None:
    """Say how much there is to do, so that nobody waits for minutes without a word."""
    from adapter_hub.training.loop import epochs_of

    labels = len({label for row in rows for label in task.named(row)})
    epochs = epochs_of(config, len(rows))
    what = f"{counted(len(rows), 'row')}{f' of {labels} labels' if labels else ''} in {counted(epochs, 'epoch')}"
    if len(rows) * epochs <= PASSES_LONG or config.progress:
        log.info("%s: it is learned from %s.", name, what)
    else:
        bar = """progress=True in the config (`--config '{"progress": true}'`) shows how far it is"""
        log.warning("%s: it is learned from %s, which takes minutes; %s.", name, what, bar)


def _relabelled(
    rows: Sequence[Example], current: Current, before: RoutingState | None, newer: RoutingState, seen: Sequence[int]
) -> list[Relabelled]:
    """Texts that `current` was taught with another target: one label by what its router keeps of them, another target where the text is kept."""
    from adapter_hub.training.report import Relabelled
    from adapter_hub.training.tasks import Task

    task = current.kind.task
    told = {task.key(row): task.shown(row) for row in current.exemplars}
    if before is not None and not before.from_description and task is Task:
        labels = [before.class_names[number] for number in before.classes]
        of_key = dict(zip(before.exemplars.keys, labels, strict=True))
        keys = newer.exemplars.keys
        told |= {task.key(rows[place]): label for place in seen if (label := of_key[keys[place]]) is not None}
    found = {key: Relabelled(row.text, told[key], task.shown(row)) for row in rows if (key := task.key(row)) in told}
    return [one for one in found.values() if one.before != one.now]


def _known(hub: Hub, ref: AdapterRef) -> RoutingState:
    """What the router knows of a version, or would, were it routed."""
    from adapter_hub.continual.measures import Kind
    from adapter_hub.routing.statistics import build_state

    if (manifest := hub.registry.manifest(ref)).routed:
        return hub.live.state(ref)
    rows, held_out, refused = (hub.kept(ref, file) for file in (EXEMPLARS_FILE, EVALUATION_FILE, NEGATIVES_FILE))
    return build_state(hub.encoder, Kind.of(manifest).routed(rows), "", held_out, (), refused)


def _nearest(hub: Hub, name: str, state: RoutingState) -> Sequence[tuple[AdapterRef, float]]:
    """The closest to `state` of the adapters in production of other names."""
    from adapter_hub.routing.nearest import nearest

    return nearest(state, sound_states(hub, (ref for ref in hub.live.snapshot(thresholds=False).refs if ref.name != name)))


def _current(hub: Hub, name: str) -> Current | None:
    """The version in production."""
    from adapter_hub.continual.learner import Current

    version = hub.registry.aliases(name).get(PRODUCTION) if name in hub.registry.names() else None
    if version is None:
        return None
    manifest = hub.registry.manifest(AdapterRef(name, version))
    kept = (hub.kept(manifest.ref, file) for file in (EXEMPLARS_FILE, EVALUATION_FILE))
    return Current.of(manifest, hub.registry.open_version(manifest.ref), *kept)


def _with_memory(
    hub: Hub,
    prepared: Prepared,
    lesson: Lesson,
    result: TrainResult,
    before: RoutingState | None,
    rows: Sequence[Example],
    evaluation: Sequence[Example],
    refused: Sequence[Example],
    *,
    given: bool,
) -> Prepared:
    """What the version that it was learned from knew, it knows too; and where texts are kept, those that measured it.

    Where validation rows were `given`, those that chose the epoch are kept for the thresholds alone. Else training rows were held out:
    the router knows them, and they are kept all the same, so that no later training meets them.
    """
    from adapter_hub.routing.statistics import unknown

    newer, parent = prepared.state, lesson.parent
    state = before.succeeded(hub.encoder, newer) if before is not None and parent is not None else newer
    kept, held_out, negatives = (hub.kept(parent, file) if parent else [] for file in (EXEMPLARS_FILE, EVALUATION_FILE, NEGATIVES_FILE))
    if before is not None and len(kept) == before.count:
        kept = [kept[row] for row in before.rows_before(newer)]
    key = lesson.kind.task.key
    measured = set(map(key, result.validation))
    learned = set(map(key, lesson.train)) - measured
    old = unknown(hub.encoder, held_out, newer.exemplars, state.negatives)
    new = unknown(hub.encoder, [*evaluation, *result.validation] if given else evaluation, state.exemplars, state.negatives)
    choosing = set(map(key, (*(lesson.validation or ()), *filter(chose, (*old, *lesson.again))))) - measured
    held = {key(row): row for row in (*old, *new, *lesson.again, *(() if given else result.validation)) if key(row) not in learned}
    marked = [replace(row, extra={**row.extra, CHOSE: known in choosing}) for known, row in held.items()]
    files = routing_files(hub, state, [*kept, *rows], marked, [*negatives, *refused])
    facts = replace(prepared.facts, evaluation_digest=measuring_digest(marked))
    return replace(prepared, facts=facts, files=prepared.files | files, state=state)


def _evidence(
    hub: Hub, name: str, prepared: Prepared, lesson: Lesson, result: TrainResult, current: Current | None, gone: Collection[AdapterRef]
) -> Evidence:
    """What the gate judges by: the candidate is asked before it is stored."""
    from adapter_hub.continual.learner import EXEMPLARS_MAX, Asked, evidence_of, routed_of

    measure = lesson.kind.measure
    measured = set(map(measure.key, result.validation))
    slices = {what: [row for row in given if measure.key(row) not in measured] for what, given in lesson.slices.items()}
    rows = [*result.validation, *itertools.chain(*slices.values())]
    with hub.candidate(name, prepared.adapter) as ref:
        mine = measure.asked(hub.engine, rows, ref)
    theirs = None if current is None else measure.asked(hub.engine, rows, current.ref)
    base = measure.asked(hub.engine, result.validation, None) if lesson.kind.writes else {}
    whole = hub.config.max_taken < 1    # a limit is held to exactly
    effect = effect_of_next(hub, name, prepared.state, None if whole else EXEMPLARS_MAX, gone) if prepared.state.count else None
    # In fewer bits more rows go another way, and that is no fault.
    trained = result.metrics if hub.precision == "float32" else None
    asked = Asked(result.validation, slices, mine, theirs, base, routed_of(effect) if effect else (), trained)
    return evidence_of(lesson, asked, current, partial(_vectors, hub))


def _vectors(hub: Hub, texts: Sequence[str]) -> NDArray[np.float32]:
    from adapter_hub.routing.features import extract

    return extract(hub.encoder, texts).dense


def _policy(hub: Hub) -> GatePolicy:
    config = hub.config
    return GatePolicy(config.gate_level, config.gate_margin, config.gate_routed_margin, config.max_taken)


# ---- teach ----------------------------------------------------------------------------------------------------------


def teach(
    hub: Hub,
    ref: str | AdapterRef,
    texts: Iterable[str | Mapping[str, Any] | Example],
    negatives: Iterable[str | Mapping[str, Any] | Example],
    promote: bool | None,
) -> AdapterRef:
    """See `Hub.teach`."""
    with hub.importing:
        from adapter_hub.routing.statistics import unknown

    old = hub.registry.resolve(ref)
    manifest, rows, refused = hub.registry.manifest(old), as_examples(texts), as_examples(negatives)
    if not manifest.routed:
        hint = "To route it, learn or register its next version with routed=True (`--routed`)."
        raise InvalidInput(f"{old} is reached by its name alone, and the router is not to know it.", hint=hint)
    if not rows and not refused:
        raise InvalidInput("there is nothing to teach: no texts were given.")
    warn_of_labels(old.name, rows, (manifest.labels or ()) if manifest.task_type == TaskType.SEQ_CLS else ())
    before = hub.live.state(old)
    single = manifest.task_type == TaskType.SEQ_CLS and manifest.problem_type in (None, ProblemType.SINGLE)
    state = before.extended(hub.encoder, rows if single or before.from_description else before.as_known(rows), refused)
    folder = hub.registry.open_version(old)
    files: dict[str, Path | bytes] = {file: folder / file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    texts_of = {f: read_examples(folder / f) if f in manifest.files else [] for f in (EXEMPLARS_FILE, EVALUATION_FILE, NEGATIVES_FILE)}
    kept = texts_of[EXEMPLARS_FILE]
    kept = [kept[row] for row in before.exemplars.rows_without(state.negatives)] if len(kept) == before.count else kept
    # What is taught now measures no more; where the texts are not kept, nobody can say which are left.
    held_out = unknown(hub.encoder, texts_of[EVALUATION_FILE], state.exemplars.without(before.exemplars), state.negatives)
    fewer = len(state.evaluation) < len(before.evaluation)
    digest = measuring_digest(held_out) if texts_of[EVALUATION_FILE] else None if fewer else manifest.evaluation_digest
    files |= routing_files(hub, state, [*kept, *rows], held_out, [*texts_of[NEGATIVES_FILE], *refused])
    if promote is None:
        promote = hub.registry.aliases(old.name).get(PRODUCTION) == old.version
    reason = f"taught {counted(len(rows), 'text')}" + (f", and {len(refused)} that are none of its" if refused else "")
    facts = manifest.facts(parent=str(old), evaluation_digest=digest)
    return store(hub, old.name, facts, files, state, promote=promote, reason=reason)
