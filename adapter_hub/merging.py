"""Make one adapter of several that know much the same, behind the gate. Acts; `continual.gate` decides.

What was there stays: the merged names are taken out of production where the new version takes their place, and a person can promote them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapter_hub.continual.gate import Paired, Verdict, is_worse
from adapter_hub.continual.measures import Kind
from adapter_hub.errors import InvalidInput, ProductionMoved
from adapter_hub.examples import Example, measuring
from adapter_hub.refs import PRODUCTION, AdapterRef, check_name
from adapter_hub.registry.layout import EVALUATION_FILE, EXEMPLARS_FILE
from adapter_hub.registry.moves import REASON_CHARS_MAX, check_reason

if TYPE_CHECKING:
    from adapter_hub.hub import Hub
    from adapter_hub.learning import LearnReport
    from adapter_hub.training.config import TrainConfig

log = logging.getLogger("adapter_hub")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge made, and what became of those that it was made from."""

    learned: LearnReport                  # its `promoted` is of before the comparison below: False
    compared: Mapping[AdapterRef, Paired]  # with each of them, on its own evaluation set
    promoted: bool
    withdrawn: tuple[AdapterRef, ...]    # from production
    reason: str

    @property
    def ref(self) -> AdapterRef:
        return self.learned.ref

    def to_json(self) -> dict[str, Any]:
        counts = {str(ref): dict(zip(("rows", "better", "worse"), pairs.counts, strict=True)) for ref, pairs in self.compared.items()}
        facts = {"ref": str(self.ref), "promoted": self.promoted, "withdrawn": [str(ref) for ref in self.withdrawn], "reason": self.reason}
        return facts | {"compared": counts, "gate": self.learned.gate.to_json()}


def merge(hub: Hub, names: Iterable[str], into: str, *, config: TrainConfig | str | None = None, reason: str = "") -> MergeReport:
    """See `Hub.merge`."""
    check_reason(reason)    # before it is learned
    with hub.registry.maintaining():    # no pass goes over the names meanwhile
        merged, kind = _merged(hub, names, into)
        key = kind.task.key
        sets = {ref: measuring(hub.kept(ref, EVALUATION_FILE)) for ref in merged}
        kept = {ref: {key(row): row for row in hub.kept(ref, EXEMPLARS_FILE) if kind.task.fault(row) is None} for ref in merged}
        # What measures them stays out of training: the new one and each of them are compared on rows that neither learned.
        measured = {key(row) for rows in sets.values() for row in rows}
        train = [row for rows in kept.values() for known, row in rows.items() if known not in measured]
        train = [*{key(row): row for row in train}.values()]
        if not train:
            raise InvalidInput(f"all kept examples of {_listed(merged)} measure them: nothing is left to learn from.", hint="Register more examples.")
        evaluation = [row for ref in merged for row in sets[ref]]
        gone = [ref for ref in merged if ref.name != into]
        learned = hub.learn(
            into, train, config=config, promote="never", evaluation=evaluation, instead_of=gone, task_type=kind.task_type,
            problem_type=kind.problem_type, prompt_template=kind.prompt_template, routed=hub.registry.manifest(merged[0]).routed,
        )  # fmt: skip
        known = {text for ref in merged if ref.name == into for text in kept[ref]}    # its own weights may know what measures another
        sets |= {ref: [row for row in sets[ref] if key(row) not in known] for ref in gone}
        compared = dict(_compared(hub, learned.ref, kind, sets, train))
        against = _against(learned, compared, hub.config.gate_level)
        if against:
            return MergeReport(learned, compared, False, (), against)
        said = f"{_listed(merged)} are one" + (f": {reason}" if reason else "")
        current = next((ref.version for ref in merged if ref.name == into), None)
        hub.promote(learned.ref, f"merged: {said}; {learned.gate.reason}"[:REASON_CHARS_MAX], expected=current)
        why = (f"merged into {learned.ref}" + (f": {reason}" if reason else ""))[:REASON_CHARS_MAX]
        for ref in gone:
            try:
                hub.registry.withdraw(ref.name, why, expected=ref.version)
            except ProductionMoved as error:    # what came meanwhile is not in the one that was learned
                log.warning("%s stays in production: %s", ref.name, error)
        return MergeReport(learned, compared, True, tuple(gone), said)


def _merged(hub: Hub, names: Iterable[str], into: str) -> tuple[list[AdapterRef], Kind]:
    """The versions in production of these names, and what all of them give. Raises InvalidInput, AdapterNotFound, NotRoutable."""
    refs = list(dict.fromkeys(hub.registry.resolve(AdapterRef(AdapterRef.parse(name).name, alias=PRODUCTION)) for name in names))
    if len(refs) < 2:
        raise InvalidInput("to merge takes two adapters or more.", hint="`adapter-hub map` points out near-duplicates.")
    if check_name(into) not in [ref.name for ref in refs] and into in [ref.name for ref in hub.registry.production()]:
        raise InvalidInput(f"{into} is in production and none of those to merge.", hint=f"Name it too, or another name than {into!r}.")
    kinds = {ref: Kind.of(hub.registry.manifest(ref)) for ref in refs}
    first, *others = refs
    for ref in others:
        if kinds[ref] != kinds[first]:
            raise InvalidInput(f"{first} is {kinds[first]}, and {ref} {kinds[ref]}: they cannot be one.", hint="Merge adapters of one kind.")
    if len({hub.registry.manifest(ref).routed for ref in refs}) > 1:
        raise InvalidInput(f"of {_listed(refs)} some are routed and some reached by name only.", hint="Learn the ones as the others are first.")
    for ref in refs:
        if EXEMPLARS_FILE not in hub.registry.manifest(ref).files:
            fact = f"no text of the examples of {ref} is kept: there is nothing to learn from"
            raise InvalidInput(f"{fact}.", hint='keep = "text" in hub.toml keeps those of what is registered from then on.')
    return refs, kinds[first]


def _compared(
    hub: Hub, candidate: AdapterRef, kind: Kind, sets: Mapping[AdapterRef, list[Example]], train: list[Example]
) -> Iterable[tuple[AdapterRef, Paired]]:
    measure = kind.measure
    for ref, kept in sets.items():
        rows = [row for row in kept if kind.task.fault(row) is None]
        mine, theirs = (measure.asked(hub.engine, rows, one) for one in (candidate, ref))    # past the log: nobody asked
        yield ref, measure.paired(rows, mine, theirs, str(ref), train)


def _against(learned: LearnReport, compared: Mapping[AdapterRef, Paired], level: float) -> str:
    """Why it does not go live; empty where it does. The level is shared (Bonferroni): of many comparisons one would show harm by chance."""
    if learned.verdict is not Verdict.PROMOTE:
        return f"{learned.ref} is held: the gate says {learned.verdict}: {learned.gate.reason}"
    unknown = [str(ref) for ref, pairs in compared.items() if not pairs.candidate_right]
    if unknown:
        return f"{learned.ref} is held: no evaluation set of {' and '.join(unknown)} is kept to compare it on"
    for ref, pairs in compared.items():
        rows, gained, lost = pairs.counts
        if is_worse(rows, gained, lost, level / len(compared)):
            return f"{learned.ref} is held: of {rows} evaluation inputs of {ref} it answers {lost} worse than that one, and {gained} better"
    return ""


def _listed(refs: Iterable[AdapterRef]) -> str:
    return " and ".join(map(str, refs))
