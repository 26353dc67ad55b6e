"""What a version is learned from, and the evidence on what came of it. `gate` judges, `hub` trains, measures and registers.

A name that is in production already is learned on: the new rows together with the kept examples of the version in production (replay),
from its weights where they fit (warm). Rows that this version knows cannot say which of the two is better: both are compared on rows that
are new to both, and on those that were kept to evaluate it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from adapter_hub.continual.gate import Evidence, Routed
from adapter_hub.continual.measures import ONE_LABEL, Answers, Kind
from adapter_hub.engine.engine import Output
from adapter_hub.errors import InvalidInput, counted
from adapter_hub.examples import Example, chose, measuring
from adapter_hub.refs import AdapterRef
from adapter_hub.training.config import ALL_LINEAR, TrainConfig, module_pattern
from adapter_hub.training.data import check_held_out, hold_out, task_seed
from adapter_hub.training.tasks import Task

if TYPE_CHECKING:
    from adapter_hub.adapters.weights import Adapter
    from adapter_hub.base_model import FrozenBase
    from adapter_hub.registry.manifest import Manifest
    from adapter_hub.routing.effect import Effect
    from adapter_hub.training.transfer import Transfer
    from adapter_hub.training.warm import Start

# n rows, d width of the encoder
STARTS = ("auto", "warm", "cold", "transfer")
SLICE_ROWS_MAX = 1_000        # of the old inputs that both versions are asked
EXEMPLARS_MAX = 2_000         # of all adapters together, on which the effect of a newcomer is estimated: its cost grows with their cube
PROBE_CELLS_MAX = 20_000_000  # rows x labels; beyond, the class means are the probe
PENALTY_INVERSE = 10.0        # sklearn's C, on unit vectors
LABELS_SHOWN = 5               # in one message
REPLAYED = "replayed examples"
EVALUATION = "old evaluation inputs"


@dataclass(frozen=True, slots=True)
class Current:
    """The version in production, as far as learning on needs it."""

    ref: AdapterRef
    folder: Path
    labels: tuple[str, ...]
    peft: Mapping[str, Any]                  # adapter_config.json
    kind: Kind = ONE_LABEL                   # what it gives
    exemplars: tuple[Example, ...] = ()      # those whose texts are kept, with a target of its kind and none but its labels
    evaluation: tuple[Example, ...] = ()     # likewise, of its evaluation inputs

    @classmethod
    def of(cls, manifest: Manifest, folder: Path, exemplars: Sequence[Example], evaluation: Sequence[Example]) -> Self:
        """`exemplars` and `evaluation` are all that are kept."""
        kind, labels = Kind.of(manifest), manifest.labels or ()
        known = (tuple(row for row in rows if kind.knows(row, labels)) for rows in (exemplars, evaluation))
        return cls(manifest.ref, folder, labels, manifest.peft, kind, *known)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What to train on, from what, and what to ask afterwards."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...] | None
    config: TrainConfig
    kind: Kind = ONE_LABEL
    start: Start | None = None                      # warm
    transfer: Transfer | None = None                # of a new name, what starting from others' weights was found to give
    parent: AdapterRef | None = None                # whose weights or examples are in it
    unseen: bool = False                            # the version in production was not trained on all of the validation rows
    known: frozenset[str] = frozenset()             # texts that it was trained on, or whose rows chose its epoch
    again: tuple[Example, ...] = ()                 # rows that measured it, or chose its epoch, and were given to learn from: they do so again
    slices: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    lost_labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def started_from(self) -> tuple[AdapterRef, ...]:
        """Adapters of other names whose weights it begins with."""
        return self.transfer.origins if self.transfer else ()


def plan_lesson(
    name: str,
    rows: Sequence[Example],
    validation: Sequence[Example] | None,
    config: TrainConfig | None,
    current: Current | None,
    start: str,
    seen: Callable[[], Collection[int]] = tuple,
    kind: Kind = ONE_LABEL,
) -> Lesson:
    """How `rows` are learned. `seen` gives the positions (from 0) of rows that are examples of `current` already, when all else is in order.

    "cold" starts from the base and replays nothing: the new rows take the place of the old. "warm" starts from the weights in production, or
    is refused with the reason; "auto" does so where they fit. Both replay what texts are kept; where none are, the rows must have every
    label that there was. What is of another kind than `current` is learned by "cold" alone, and as a new name is. A new name starts cold, by
    "transfer" from its nearest where that helps: see `transferred`. Raises InvalidInput with the position of the row that is at fault.
    """
    if start not in STARTS:
        raise InvalidInput(f"start={start!r} is not a way to start.", hint=f"Use {', '.join(map(repr, STARTS))}.")
    if not rows:
        raise InvalidInput("there is nothing to learn: no rows were given.", hint='A row to learn from is {"text": …, "label": …}.')
    if current is None:
        if start == "warm":
            raise InvalidInput(f"{name} has nothing in production to start from.", hint='Use start="auto" (`--start auto`).')
        if start == "transfer" and kind.task is not Task:
            fact = f'start="transfer" is for one label among several, and this is {kind}'
            raise InvalidInput(f"{fact}.", hint='Use start="auto" (`--start auto`).')
        if start == "transfer" and (kind.prompt_template is not None or (config is not None and (config.pissa or config.lora))):
            what = "a prompt template: trials leave it out" if kind.prompt_template else "pissa, which begins with the base's singular vectors"
            if config is not None and config.lora:
                what = f"lora={config.lora!r}: others' weights have one rank, and their own modules"
            raise InvalidInput(f'start="transfer" does not go with {what}.', hint='Use start="auto" (`--start auto`).')
        _job(kind, rows, validation)
        return Lesson(tuple(rows), _given(validation), config or TrainConfig(), kind)
    if start == "transfer":
        raise InvalidInput(f"{current.ref} is in production: it is learned on from its own weights.", hint='Use start="auto" (`--start auto`).')
    if current.kind != kind:
        if start != "cold":
            hint = 'Learn what it gives, or replace it: start="cold" (`--start cold`).'
            raise InvalidInput(f"{current.ref} is {current.kind}, and what is to be learned {kind}.", hint=hint)
        _job(kind, rows, validation)
        note = f"a cold start: {current.ref} is {current.kind}, and not compared with"
        return Lesson(tuple(rows), _given(validation), config or TrainConfig(), kind, notes=(note,))
    if start == "cold":
        job = _job(kind, rows, validation)
        lost = sorted(set(current.labels) - set(job.labels)) if job.labels else []
        lesson = Lesson(
            tuple(rows), _given(validation), config or TrainConfig(), kind, lost_labels=tuple(lost), notes=("a cold start: nothing is replayed",)
        )
        return _compared(lesson, job, rows, current, seen)
    # What is said now holds against what was said before; and what measures it stays out of training.
    key = kind.task.key
    said = {key(row) for row in (*rows, *current.evaluation, *(validation or ()))}
    replayed = [row for row in current.exemplars if key(row) not in said]
    labels = {row.label or "" for row in (*rows, *replayed)}
    if kind.task is Task and len(labels) == 1 and "" not in labels:    # of which no classifier is made
        _check_none_lost(current, labels)
    job = _job(kind, [*rows, *replayed], validation)
    if job.labels:
        _check_none_lost(current, job.labels)
    fault = _warm_fault(current, config)
    if fault and start == "warm":
        raise InvalidInput(f"{current.ref} is nothing to start from: {fault}.", hint='Use start="auto" (`--start auto`).')
    none = f"no text of {current.ref} is kept that could be replayed"
    if current.exemplars:
        none = f"no example of {current.ref} is replayed: those kept are among the rows"
    again = counted(len(replayed), f"example of {current.ref} is replayed", f"examples of {current.ref} are replayed")
    notes = [again if replayed else none]
    notes.append(f"its weights are not: {fault}" if fault else f"it starts from the weights of {current.ref}")
    lesson = Lesson(
        (*rows, *replayed), _given(validation), _shaped(config, None if fault else current), kind,
        start=None if fault else _start(current, job), parent=current.ref, notes=tuple(notes),
    )  # fmt: skip
    lesson = _compared(lesson, job, rows, current, seen)
    slices = {REPLAYED: _spread(replayed)} | dict(lesson.slices)
    return replace(lesson, slices={what: given for what, given in slices.items() if given})


def transferred(
    name: str,
    lesson: Lesson,
    ranked: Sequence[tuple[AdapterRef, float]],
    base: FrozenBase,
    load: Callable[[AdapterRef], Adapter],
    folder: Path,
) -> Lesson:
    """The lesson of a new name that starts from its nearest adapters, where trials on a part of its rows say that this helps.

    `ranked` are (adapter, closeness), closest first; no more are loaded than it takes to find NEIGHBOURS_MAX that fit.
    """
    from adapter_hub.training.transfer import NEIGHBOURS_MAX, Neighbour, fault_of, transfer

    neighbours: list[Neighbour] = []
    unfit: dict[AdapterRef, str] = {}
    for ref, closeness in ranked:
        if len(neighbours) == NEIGHBOURS_MAX:
            break
        adapter = load(ref)
        if fault := fault_of(adapter, base, lesson.config):
            unfit[ref] = fault
        else:
            neighbours.append(Neighbour(ref, closeness, adapter))
    validated = lesson.validation is not None
    start, found = transfer(
        base, lesson.train, neighbours, task=name, config=lesson.config, folder=folder, unfit=unfit, validated=validated
    )
    return replace(lesson, start=start, transfer=found, notes=(*lesson.notes, found.note))


def _given(validation: Sequence[Example] | None) -> tuple[Example, ...] | None:
    return None if validation is None else tuple(validation)


def _job(kind: Kind, rows: Sequence[Example], validation: Sequence[Example] | None) -> Task:
    """The task of these rows. Raises InvalidInput with the position of a row that will not do."""
    job = kind.task.of(rows, validation, kind.prompt_template)
    if validation is None:
        check_held_out(rows, job.strata(rows))
    return job


def _check_none_lost(current: Current, labels: Collection[str]) -> None:
    """Raises InvalidInput where `current` has labels that are not among those to learn."""
    if lost := sorted(set(current.labels).difference(labels)):
        shown = ", ".join(map(repr, lost[:LABELS_SHOWN]))
        what = f"{counted(len(lost), 'label')} of {current.ref} would be lost ({shown})"
        several = 'start="cold" (`--start cold`) makes a version without them.' if len(labels) > 1 else "Rows of one label alone make no classifier."
        keep = "" if current.exemplars else ' With keep = "text" in hub.toml a version keeps its texts, and is learned on with them.'
        hint = f"Give rows of these labels too. {several}{keep}"
        raise InvalidInput(f"{what}: no row has them, and no other text of theirs is kept.", hint=hint)


def _start(current: Current, job: Task) -> Start:
    from adapter_hub.training.warm import Start

    return Start(current.folder, current.labels if job.labels else job.outputs)


def _compared(lesson: Lesson, job: Task, rows: Sequence[Example], current: Current, seen: Callable[[], Collection[int]]) -> Lesson:
    """With rows that tell which is better, and with the old ones that are none of either.

    These are given; or some of those that are new, held out; or, where none is new, those that measured `current` or chose its epoch. Such rows,
    which it was not trained on, are no training rows now either where no validation rows are given, unless a label would be lost, or they have
    another target now. Those that chose count as known: the best of many epochs is flattered by them.
    """
    task, key = lesson.kind.task, lesson.kind.task.key
    known = {key(row) for row in (*current.exemplars, *(rows[position] for position in seen()), *filter(chose, current.evaluation))}
    known -= set(map(key, measuring(current.evaluation)))
    unseen = lesson.validation is not None and not known.issuperset(map(key, lesson.validation))
    if lesson.validation is None:
        said = {key(row): task.shown(row) for row in rows}
        again = [row for row in current.evaluation if said.get(key(row)) == task.shown(row)]
        rest = _beside(again, lesson.train, key)
        if again and _teaches(rest, lesson.train, job):
            note = f"{len(again)} of the rows measured {current.ref} or chose its epoch: they do so again, and are not trained on"
            lesson = replace(lesson, train=tuple(rest), again=tuple(again), notes=(*lesson.notes, note))
        new = _beside(lesson.again, [row for row in rows if key(row) not in known], key)
        share, seed = min(0.5, 2 * lesson.config.validation_share), task_seed(lesson.config.seed, str(current.ref), ())
        try:
            _, held = hold_out(new, share, seed, job.strata(new))    # half of it will choose the epoch
        except InvalidInput:
            held = []
        if type(job) is not Task:    # a row of many labels may be the only one of some: it is trained on
            known_labels = {label for row in _beside(held, lesson.train, key) for label in job.named(row)}
            held = [row for row in held if known_labels.issuperset(job.named(row))]
        rest = _beside(held, lesson.train, key)
        if held and _teaches(rest, lesson.train, job):
            lesson, unseen = replace(lesson, train=tuple(rest), validation=tuple(held)), True
        elif lesson.again:
            lesson, unseen = replace(lesson, validation=lesson.again), True
    learned = {key(row) for row in (*lesson.train, *(lesson.validation or ()))}
    old = [row for row in current.evaluation if key(row) not in learned]
    return replace(lesson, unseen=unseen, known=frozenset(known), slices={EVALUATION: _spread(old)} if old else {})


def _teaches(rest: Sequence[Example], rows: Sequence[Example], job: Task) -> bool:
    """Whether all labels of the rows are left, and more than one row."""
    left, all_ = ({label for row in some for label in job.named(row)} for some in (rest, rows))
    return len(rest) > 1 and left == all_


def _beside(held: Sequence[Example], rows: Sequence[Example], key: Callable[[Example], str]) -> list[Example]:
    """Those of the rows that are not held out."""
    out = set(map(key, held))
    return [row for row in rows if key(row) not in out]


def _spread(rows: Sequence[Example]) -> tuple[Example, ...]:
    """At most SLICE_ROWS_MAX of them, evenly spread."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), SLICE_ROWS_MAX)).astype(int)
    return tuple(rows[place] for place in places)


def _warm_fault(current: Current, config: TrainConfig | None) -> str:
    """Why its weights are no start for this config, to be read after a colon; empty where they are."""
    from adapter_hub.adapters.weights import adapted_modules

    peft = current.peft
    if peft.get("rank_pattern") or peft.get("alpha_pattern"):
        return "its rank differs from module to module"
    if config is None:
        return ""
    if config.pissa:
        return "pissa begins with the base's singular vectors"
    for ours, theirs in (("r", "r"), ("alpha", "lora_alpha"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora")):
        if (wanted := getattr(config, ours)) != (found := peft.get(theirs, False)):
            return f"it has {theirs}={found!r}, and the config says {wanted!r}"
    for name, wanted in (config.lora or {}).items():
        given = list(wanted) if isinstance(wanted, tuple) else wanted
        if name not in ("exclude_modules", "init_lora_weights") and (found := peft.get(name)) != given:
            return f"it has {name}={found!r}, and the config says {given!r}"
    if excluded := module_pattern((config.lora or {}).get("exclude_modules")):    # stored in another form, or among what else is left out
        for module in sorted(adapted_modules(current.folder)):
            if re.fullmatch(excluded, module):
                return f"it adapts {module}, and the config excludes it"
    targets = peft.get("target_modules")
    if config.target_modules in (ALL_LINEAR, targets):
        return ""
    of_expression = isinstance(config.target_modules, str)    # which only names in full can be held against
    adapted = adapted_modules(current.folder) if of_expression else [targets] if isinstance(targets, str) else targets or ()
    named = re.compile(module_pattern(config.target_modules))
    return "" if all(map(named.fullmatch, adapted)) else "it adapts modules that the config does not name"


def _shaped(config: TrainConfig | None, current: Current | None) -> TrainConfig:
    """The config, or where none was given the usual one in the shape of what it starts from."""
    if config is not None or current is None:
        return config or TrainConfig()
    peft, targets = current.peft, current.peft["target_modules"]
    # Not exclude_modules: of our own versions it is what layers_share left out for speed, and they are learned on in all layers.
    layers = {name: peft[name] for name in ("layers_pattern", "layers_to_transform") if peft.get(name) is not None}
    return replace(
        TrainConfig(), r=peft["r"], alpha=peft["lora_alpha"], use_rslora=bool(peft.get("use_rslora")), use_dora=bool(peft.get("use_dora")),
        target_modules=targets if isinstance(targets, str) else tuple(targets), lora=layers,
    )  # fmt: skip


# ---- evidence -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What the candidate and the version in production answered, by `Measure.key` of the row."""

    validation: Sequence[Example]
    slices: Mapping[str, Sequence[Example]]
    candidate: Answers
    current: Answers | None = None
    base: Answers = field(default_factory=dict)     # of the base model, where it writes
    routed: tuple[Routed, ...] = ()
    trained: Mapping[str, float] | None = None      # the metrics of the validation rows in training; None: not to be compared


def evidence_of(
    lesson: Lesson, asked: Asked, current: Current | None, vectors: Callable[[Sequence[str]], NDArray[np.float32]]
) -> Evidence:
    """What the gate judges by. `vectors` (texts to (n, d)) is the frozen encoder."""
    notes, rows, measure = list(lesson.notes), asked.validation, lesson.kind.measure
    fresh = [row for row in rows if measure.key(row) not in lesson.known]
    train = _beside(rows, lesson.train, measure.key)
    rival = asked.current if lesson.unseen and fresh else None
    if rival is not None and current is not None:
        rows = fresh
        if len(fresh) < len(asked.validation):
            notes.append(f"left out: {counted(len(asked.validation) - len(fresh), 'validation row')} that {current.ref} was made with")
    baseline = measure.beside_baseline(rows, asked.candidate, train, asked.base)
    if rival is not None and current is not None:
        validation = measure.paired(rows, asked.candidate, rival, str(current.ref), train)
    elif measure.words:
        validation = baseline
    else:
        found = vectors([row.text for row in (*train, *rows)])
        answers = linear_probe(found[: len(train)], [row.label for row in train], found[len(train) :])
        probed = {row.text: Output(label=answer) for row, answer in zip(rows, answers, strict=True)}
        validation = measure.paired(rows, asked.candidate, probed, "a linear probe of the encoder", train)
    if rival is None and current is not None:
        notes.append(f"{current.ref} may know the validation rows: on them it is not compared with")
    faults = [] if all(map(measure.finite, asked.candidate.values())) else ["its scores are not finite"]
    # What bfloat16 measured in training is no measure of scores in float32.
    exact = not measure.words or lesson.config.precision == "float32"
    if asked.trained is not None and exact and (unlike := measure.unlike_training(asked.validation, asked.candidate, asked.trained)):
        faults.append(unlike)
    slices = {}
    if current is not None and asked.current is not None:
        sides = asked.candidate, asked.current, str(current.ref), train
        slices = {what: measure.paired(given, *sides) for what, given in asked.slices.items() if given}
    return Evidence(
        validation, baseline if baseline.winnable else None, probed=rival is None, slices=slices,
        lost_labels=lesson.lost_labels, routed=asked.routed, faults=tuple(faults), notes=tuple(notes),
    )  # fmt: skip


def linear_probe(
    train: NDArray[np.floating[Any]], labels: Sequence[str | None], asked: NDArray[np.floating[Any]]
) -> list[str | None]:
    """What a logistic regression on the vectors (n, d) answers to `asked`: how far a skill gets without an adapter."""
    names, targets = np.unique(np.array([label or "" for label in labels]), return_inverse=True)
    if len(targets) * len(names) > PROBE_CELLS_MAX:
        means = np.array([train[targets == number].mean(axis=0) for number in range(len(names))])
        return list(names[(asked @ means.T - (means**2).sum(axis=1) / 2).argmax(axis=1)])
    if len(names) == 1:
        return [str(names[0])] * len(asked)
    from adapter_hub.training.probe import logistic_regression

    return list(names[logistic_regression(train, targets, PENALTY_INVERSE).predict(asked)])


def routed_of(effect: Effect) -> tuple[Routed, ...]:
    """What the router would change for each other adapter, in rows."""
    found = []
    for other in effect.others:
        net, lost = round((other.after - other.before) * other.inputs), round(other.taken * other.inputs)
        lost = max(lost, -net)    # what goes to a third one is lost too
        found.append(Routed(str(other.adapter), other.inputs, net + lost, lost, other.taken))
    return tuple(found)
