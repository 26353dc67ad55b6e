"""Check an adapter against the base, tell what it would take from the others, and store it as the next version of its name.

What `register`, `learn` and `teach` have in common, and what a version costs the others (`Hub.effect`). Nothing is stored before all of it is
checked.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_hub.adapters.config import ProblemType
from adapter_hub.adapters.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, fetch_adapter
from adapter_hub.arguments import texts_of
from adapter_hub.errors import CorruptVersion, InvalidInput, ModelNotFound, NotRoutable, WrongBase, counted
from adapter_hub.examples import Example, jsonl_of, measuring_digest
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.layout import EVALUATION_FILE, EXEMPLARS_FILE, NEGATIVES_FILE
from adapter_hub.registry.manifest import VersionFacts

# What needs torch is imported by the functions that need it, as in `hub`, which imports this.
if TYPE_CHECKING:
    from peft import PeftModel

    from adapter_hub.adapters.weights import Adapter
    from adapter_hub.hub import Hub
    from adapter_hub.routing.effect import Effect, Taken
    from adapter_hub.routing.router import Router
    from adapter_hub.routing.statistics import RoutingState

log = logging.getLogger("adapter_hub")

LABELS_SHOWN = 6    # in one warning


# ---- check ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter that was checked, and all that is stored of it."""

    adapter: Adapter
    facts: VersionFacts
    files: dict[str, Path | bytes]
    state: RoutingState


def prepare(
    hub: Hub,
    name: str,
    source: str | Path | PeftModel,
    rows: Sequence[Example],
    held_out: Sequence[Example],
    refused: Sequence[Example],
    *,
    description: str = "",
    labels: Sequence[str] | None = None,
    tags: Iterable[str] = (),
    assume_base: bool = False,
    license: str | None = None,
    prompt_template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    parent: AdapterRef | None = None,
    started_from: Sequence[AdapterRef] = (),
    training_data_digest: str | None = None,
    problem_type: str | None = None,
    state: RoutingState | None = None,
) -> Prepared:
    """What `register` stores, checked. `state` is that of the rows where there is one already. Raises as `register`; stores nothing."""
    with hub.importing:
        from adapter_hub.adapters.checks import check_acts, check_fits, without_copies
        from adapter_hub.adapters.weights import adapter_of, settings_of
        from adapter_hub.routing.statistics import build_state, unknown

    tags = texts_of("tags", tags)
    names = texts_of("labels", labels) if labels is not None else None
    found = fetch_adapter(source)
    _check_named_base(hub, settings_of(found).base_model_name_or_path, assume_base)
    found = without_copies(found, hub.base)
    adapter = adapter_of(
        found,
        labels=names or found.labels,
        prompt_template=prompt_template,
        generation=generation,
        problem_type=problem_type or found.problem_type,
    )
    settings = hub.engine.check(adapter)
    check_fits(adapter, hub.base)
    check_acts(adapter, hub.base)
    # Tags of tokens name pieces of an input, and a number's name says what is measured: not what an input is about.
    names_topics = adapter.problem_type in (ProblemType.SINGLE, ProblemType.MULTI)
    label_names = (adapter.labels or ()) if names_topics else ()
    state = state or build_state(hub.encoder, rows, description, held_out, label_names, refused)
    facts = VersionFacts(
        base_model=hub.base.id,
        base_fingerprint=hub.base.fingerprint,
        encoder_fingerprint=hub.encoder.fingerprint,
        peft=adapter.settings.raw,
        task_type=str(adapter.settings.task_type) if adapter.settings.task_type else None,
        labels=adapter.labels,
        problem_type=None if adapter.problem_type in (None, ProblemType.SINGLE) else str(adapter.problem_type),
        prompt_template=prompt_template,
        generation=settings,
        metrics=dict(metrics or {}),
        training_data_digest=training_data_digest,
        parent=str(parent) if parent else None,
        started_from=tuple(map(str, started_from)),
        license=license,
        description=description,
        tags=tags,
        source=found.repository,
        revision=found.revision,
    )
    warn_of_labels(name, rows, label_names)
    for what, given, kept in (("evaluation inputs", held_out, state.evaluation), ("negatives", refused, state.negatives)):
        if dropped := len(given) - len(kept):
            all_, are = counted(len(given), what.removesuffix("s"), what), "is" if dropped == 1 else "are"
            log.warning("%d of the %s of %s %s among its examples or negatives, and dropped.", dropped, all_, name, are)
    if not state.count:
        log.warning("%s has no examples and no description: the router never chooses it, only its name reaches it.", name)
    if len(state.evaluation) < len(held_out):
        held_out = unknown(hub.encoder, held_out, state.exemplars, state.negatives)
    facts = replace(facts, evaluation_digest=measuring_digest(held_out))
    files: dict[str, Path | bytes] = {ADAPTER_CONFIG: found.config, ADAPTER_WEIGHTS: found.weights}
    return Prepared(adapter, facts, files | routing_files(hub, state, rows, held_out, refused), state)


def by_name(hub: Hub, prepared: Prepared) -> Prepared:
    """The same, and the router knows nothing of it."""
    from adapter_hub.routing.live import ROUTING_FILE
    from adapter_hub.routing.statistics import build_state

    nothing = build_state(hub.encoder, ())
    return replace(
        prepared, facts=replace(prepared.facts, routed=False), files=prepared.files | {ROUTING_FILE: nothing.to_bytes()}, state=nothing
    )


def routing_files(
    hub: Hub, state: RoutingState, rows: Sequence[Example], held_out: Sequence[Example], refused: Sequence[Example]
) -> dict[str, Path | bytes]:
    """What is stored beside the weights: the routing state, and where hub.toml keeps texts, the rows themselves."""
    from adapter_hub.routing.live import ROUTING_FILE

    files: dict[str, Path | bytes] = {ROUTING_FILE: state.to_bytes()}
    if hub.config.keep == "text":
        texts = ((EXEMPLARS_FILE, rows), (EVALUATION_FILE, held_out), (NEGATIVES_FILE, refused))
        files |= {file: jsonl_of(given) for file, given in texts if given}
    return files


def warn_of_labels(name: str, rows: Sequence[Example], labels: Sequence[str]) -> None:
    """Of a text classifier. Labels that its head has not may be meant: the router may know finer classes."""
    unknown = Counter(row.label for row in rows if row.label is not None and row.label not in labels) if labels else Counter()
    if unknown:
        shown = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(LABELS_SHOWN))
        more, one = f", … ({len(unknown)} labels)" if len(unknown) > LABELS_SHOWN else "", unknown.total() == 1
        log.warning(
            "%d of the %s of %s %s for the router alone: %s%s.", unknown.total(), counted(len(rows), "example"), name,
            f"{'has' if one else 'have'} a label that its head does not know, and {'is a class' if one else 'are classes'}", shown, more,
        )    # fmt: skip


def _check_named_base(hub: Hub, named: str | None, assume_base: bool) -> None:
    """The base that adapter_config.json names must have this base's content. Raises WrongBase."""
    if assume_base or named == hub.base.id:
        return
    hint = "If it was trained on the same weights, pass assume_base=True (`--assume-base`)."
    if not named:
        raise WrongBase("adapter_config.json does not name its base model.", hint=hint)
    from adapter_hub.base_model import FrozenBase

    try:
        other = FrozenBase.load(named, local=True)    # a file from elsewhere names it: nothing is downloaded for that
    except ModelNotFound:
        raise WrongBase(f"the adapter was made for {named!r}, this registry serves {hub.base.id!r}.", hint=hint) from None
    if other.fingerprint != hub.base.fingerprint:
        differing = hub.base.differences(other)
        if not {"weights", "config", "tokenizer"} & set(differing):
            hint = "The weights are the same: to run it with this base's, pass assume_base=True (`--assume-base`)."
        else:
            hint = "Open its registry."
        fact = f"the adapter was made for {named!r}, which differs from {hub.base.id!r} in its {' and '.join(differing)}"
        raise WrongBase(f"{fact}.", hint=hint)


# ---- what it takes from the others ----------------------------------------------------------------------------------


def effect_of(hub: Hub, ref: str | AdapterRef) -> Effect:
    """See `Hub.effect`."""
    newcomer = hub.registry.resolve(ref)
    state = hub.live.state(newcomer)
    if not state.count:
        raise InvalidInput(f"{newcomer} has no examples and no description: it takes nothing.", hint="Only its name reaches it.")
    return _effect(hub, hub.live.snapshot(thresholds=False), newcomer, state)


def effect_of_next(hub: Hub, name: str, state: RoutingState, exemplars_max: int | None = None, gone: Collection[AdapterRef] = ()) -> Effect:
    """Of a version that is not stored yet; with `exemplars_max` estimated on so many exemplars of all adapters together."""
    now = hub.live.snapshot(thresholds=False)
    version = max((ref.version or 0 for ref in now.versions if ref.name == name), default=0)
    return _effect(hub, now, AdapterRef(name, version + 1), state, exemplars_max, gone)    # the number it gets is not known yet


def _effect(
    hub: Hub, now: Router, newcomer: AdapterRef, state: RoutingState, exemplars_max: int | None = None, gone: Collection[AdapterRef] = ()
) -> Effect:
    from adapter_hub.routing.effect import effect
    from adapter_hub.routing.scoring import Scoring

    others = [ref for ref in now.refs if ref != newcomer and ref not in gone]
    # An estimate may go without a damaged one; a limit is held to exactly, or not at all.
    states = {ref: hub.live.state(ref) for ref in others} if exemplars_max is None else dict(sound_states(hub, others))
    states[newcomer] = state
    if exemplars_max is not None:
        share = exemplars_max / max(1, sum(one.count for one in states.values()))
        states = {ref: one.thinned(share) for ref, one in states.items()}
    state = states.pop(newcomer)
    return effect(states, newcomer, state, now.calibration.scoring if now.calibration else Scoring())


def sound_states(hub: Hub, refs: Iterable[AdapterRef]) -> Iterator[tuple[AdapterRef, RoutingState]]:
    """Their states, one after the other; one that is damaged or was purged meanwhile is left out with a warning."""
    for ref in refs:
        try:
            state = hub.live.state(ref)
        except (CorruptVersion, NotRoutable) as error:
            log.warning("%s is left out of the comparison: %s", ref, error)
        else:
            yield ref, state


# ---- store ----------------------------------------------------------------------------------------------------------


def store(
    hub: Hub, name: str, facts: VersionFacts, files: Mapping[str, Path | bytes], state: RoutingState, *, promote: bool, reason: str = ""
) -> AdapterRef:
    """Stored, and promoted if that is wanted and takes no more from the others than hub.toml allows: decided first, then one act."""
    warn_of_twins(hub, name, state)
    worst = _loses_too_much(hub, name, state) if promote else None
    ref = hub.registry.add(name, facts, files, promote=promote and worst is None, reason=reason)
    if worst is not None:
        log.warning("%s is registered and not promoted: %s.", ref, _losing(hub, worst))
    return ref


def warn_of_twins(hub: Hub, name: str, state: RoutingState, gone: Collection[AdapterRef] = ()) -> None:
    found = sorted(((count, other) for other, count in hub.live.twins(name, state).items() if other not in gone), key=lambda one: -one[0])
    if not found:
        return
    count, other = found[0]
    also = f"is one of {other} too, and goes" if count == 1 else f"are those of {other} too, and go"
    more = f" (of {counted(len(found) - 1, 'more adapter')} as many or fewer)" if len(found) > 1 else ""
    log.warning("%d of the examples of %s %s to either%s: an example should belong to one.", count, name, also, more)


def _loses_too_much(hub: Hub, name: str, state: RoutingState) -> Taken | None:
    """Of the adapters in production, the one that loses most to a newcomer, if that is more than hub.toml allows."""
    if hub.config.max_taken >= 1 or not state.count:    # without exemplars it takes nothing
        return None
    found = effect_of_next(hub, name, state)
    return found.others[0] if found.most_taken > hub.config.max_taken else None


def _losing(hub: Hub, worst: Taken) -> str:
    allowed = f"hub.toml allows {100 * hub.config.max_taken:.1f} %"
    return f"it would take {100 * worst.taken:.1f} % of the inputs of {worst.adapter}, {allowed}"
