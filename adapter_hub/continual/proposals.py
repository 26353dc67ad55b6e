"""What is proposed to people, from one look through the log to the next: which clusters are the same as before, what was decided of them.

Notes hold ids of observations and, of their texts, only the two words of a suggested name: what is forgotten in the log is forgotten here.
How clusters are found is `continual.discovery`'s part; to train and to teach is the hub's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import numpy as np

from adapter_hub.continual.discovery import Cluster, DiscoveryConfig, discover, is_of, joins, suggest_name
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.notes import Notes
from adapter_hub.registry.observations import Observation, ObservationLog
from adapter_hub.routing.decision import Decision, Reason
from adapter_hub.routing.encoder import Encoder
from adapter_hub.routing.features import Features, extract

KIND, COUNT = "proposals", "proposals.count"    # of notes
SHOWN = 5                # examples, and adapters, of a proposal
REMEMBERED = 20          # inputs of each dismissed group that later ones are compared with
SAME = 0.5               # share of the smaller one's inputs that two proposals have in common, and are one
RIVALS, ASKED = 3, 60    # the nearest adapters, and the inputs of each side, by which it is told whether one of them answers well already
SURE, SURER = 0.8, 0.2   # probabilities: chosen on CLINC150's validation split (benchmarks/README.md)
OTHERS_MIN = 20          # inputs on the other side
SAID_MIN, SAID_SHARE = 3, 0.8    # inputs of which somebody said who should have answered, and share of them that name one
SPOKEN_SHARE = 0.5       # of the inputs, so that what was said of some speaks for all
TURNED_AWAY = (Reason.BELOW_THRESHOLD, Reason.NO_CANDIDATES)

Route = Callable[[Features], Sequence[Decision]]
Knows = Callable[[str, str | None], bool]    # an adapter's name and a label, None where nobody named one
Answers = Callable[[str, Sequence[str]], Sequence[float]]    # an adapter's name, texts -> the probability of each one's likeliest label


class State(StrEnum):
    OPEN = "open"
    ACCEPTED = "accepted"
    DISMISSED = "dismissed"


@dataclass(frozen=True, slots=True)
class Group:
    """Inputs of one kind: likely one label."""

    id: str                          # "3.2", the second of proposal 3
    observations: tuple[str, ...]    # ids, the most typical first
    texts: tuple[str, ...]           # aligned with them
    suggested: str                   # a label, of words

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "size": len(self.observations), "suggested": self.suggested, "examples": list(self.texts[:SHOWN])}


@dataclass(frozen=True, slots=True)
class Proposal:
    """Inputs that no adapter took and that look like one task; or, once it was decided, what became of it."""

    id: str
    state: State
    groups: tuple[Group, ...]                    # largest first; their numbers stay as long as they do
    suggested: str                               # a valid name of an adapter that is not registered
    nearest: tuple[tuple[str, float], ...]       # adapters' names by the share of the inputs that came nearest to them
    teach: str | None                            # the adapter that answers them already: its router is to learn of them, and nothing else
    why: str                                     # why that, or why not
    cohesion: float
    stability: float
    at: str                                      # when it was first proposed, ISO 8601, UTC
    decided_at: str | None = None
    reason: str = ""                             # that a person gave
    result: str | None = None                    # the version that came of it

    @property
    def size(self) -> int:
        return sum(len(group.observations) for group in self.groups)

    @property
    def observations(self) -> tuple[str, ...]:
        return tuple(id for group in self.groups for id in group.observations)

    @property
    def examples(self) -> tuple[str, ...]:
        """Texts, in turn one of each group."""
        deepest = max((len(group.texts) for group in self.groups), default=0)
        return tuple(group.texts[place] for place in range(deepest) for group in self.groups if place < len(group.texts))[:SHOWN]

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"id": self.id, "state": str(self.state), "size": self.size, "suggested": self.suggested}
        facts |= {"examples": list(self.examples), "nearest": [{"adapter": name, "share": round(share, 3)} for name, share in self.nearest]}
        facts |= {"teach": self.teach, "why": self.why, "cohesion": round(self.cohesion, 3), "stability": round(self.stability, 3), "at": self.at}
        facts |= {"groups": [group.to_json() for group in self.groups]}
        if self.state is not State.OPEN:
            facts |= {"decided_at": self.decided_at, "reason": self.reason, "result": self.result}
        return facts


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of proposals that somebody named. Without labels nothing is learned yet: `rows` are to be labelled."""

    ids: tuple[str, ...]
    name: str
    ref: AdapterRef | None = None      # the version that was learned, or taught
    report: Any = None                 # of `Hub.learn`
    rows: tuple[Example, ...] = ()     # to be labelled: text, id of the observation, group, suggested

    def to_json(self) -> dict[str, Any]:
        facts = {"ids": list(self.ids), "name": self.name, "ref": str(self.ref) if self.ref else None}
        rows = [{"text": row.text, "label": row.label, "id": row.id, **row.extra} for row in self.rows]
        return facts | ({"learned": self.report.to_json()} if self.report else {}) | ({"rows": rows} if rows else {})


class Encoded:
    """The features of the texts of the last look: each look encodes only what is new, and forgets what was not asked for again."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._places: dict[str, int] = {}    # by the observation's id
        self._features = Features.empty(encoder.dim)

    def __call__(self, rows: Sequence[Observation]) -> Features:
        new = [row for row in rows if row.id not in self._places]
        places = self._places | {row.id: len(self._features) + number for number, row in enumerate(new)}
        both = Features.concatenate([self._features, extract(self.encoder, [row.text or "" for row in new])])
        self._features = both[[places[row.id] for row in rows]] if rows else Features.empty(self.encoder.dim)
        self._places = {row.id: place for place, row in enumerate(rows)}
        return self._features


class Proposals:
    """The proposals of one registry, by its log and its notes."""

    def __init__(self, log: ObservationLog, notes: Notes, config: DiscoveryConfig | None = None) -> None:
        self._log, self._notes, self.config = log, notes, config or DiscoveryConfig()

    # ---- look -------------------------------------------------------------------------------------------------------

    def look(self, encoded: Encoded, route: Route, rate: float, taken: Collection[str], answers: Answers, knows: Knows) -> list[Proposal]:
        """Read the log, cluster what the router of today turns away, and note what is open now; returns that, largest first.

        What was accepted or dismissed is left out, and what is like a dismissed group too.
        """
        kept = self._notes.read(KIND)
        settled = {id: body for id, body in kept.items() if body["state"] != State.OPEN}
        rows, routed = self._turned_away({id for body in settled.values() for id in ids_in(body)})
        wanted = [group[:REMEMBERED] for body in settled.values() if body["state"] == State.DISMISSED for group in body["groups"].values()]
        logged = self._log.find_all([id for group in wanted for id in group])
        dismissed = [[logged[id] for id in group if id in logged] for group in wanted]
        features = encoded([*rows, *(one for group in dismissed for one in group)])
        decisions = route(features[: len(rows)]) if rows else []
        away = np.array([place for place, decision in enumerate(decisions) if decision.adapter is None], np.int64)
        parts = np.split(features.dense[len(rows) :], np.cumsum([len(group) for group in dismissed])[:-1]) if dismissed else []
        away = away[~joins(features.dense[away], [part for part in parts if len(part)], self.config.group_distance)]
        chosen = [
            Chosen(
                tuple(tuple(rows[away[place]] for place in group) for group in cluster.groups),
                nearest(decisions[away[row]] for row in cluster.rows),
                cluster,
            )
            for cluster in discover(features.dense[away], routed, rate, self.config)
        ]
        opened = {id: body for id, body in kept.items() if body["state"] == State.OPEN}
        clustered = {id for one in chosen for id in one.ids}
        others = [rows[place].text or "" for place in away if rows[place].id not in clustered]
        last = self._notes.read(COUNT).get(COUNT, 0)
        ids, now_last = numbered([one.ids for one in chosen], {id: ids_in(body) for id, body in opened.items()}, last)
        bodies: dict[str, Any] = {}
        for id, one in zip(ids, chosen, strict=True):
            before = opened.get(id, {"groups": {}, "last": 0, "at": _now()})
            members = [frozenset(row.id for row in group) for group in one.groups]
            places, last_place = numbered(members, {place: frozenset(group) for place, group in before["groups"].items()}, before["last"])
            teach, why = advice(one, others, answers, knows)
            bodies[id] = {
                "state": State.OPEN, "at": before["at"], "teach": teach, "why": why, "nearest": [list(pair) for pair in one.nearest],
                "groups": {place: [row.id for row in group] for place, group in zip(places, one.groups, strict=True)}, "last": last_place,
                "cohesion": one.cluster.cohesion, "stability": one.cluster.stability, "suggested": before.get("suggested"),
            }  # fmt: skip
        found = shown(bodies, {row.id: row for row in rows}, [row.text or "" for row in rows], taken)
        for proposal in found:
            bodies[proposal.id]["suggested"] = {proposal.id: proposal.suggested} | {group.id: group.suggested for group in proposal.groups}
        if now_last != last:
            self._notes.write(COUNT, {COUNT: now_last})
        if gone := dict.fromkeys(opened.keys() - bodies):
            self._notes.write(KIND, gone)
        if bodies:
            self._notes.write(KIND, bodies)
        return found

    def decided(self) -> list[Proposal]:
        """Those that were accepted or dismissed, with the texts that the log still has, latest decision first."""
        settled = {id: body for id, body in self._notes.read(KIND).items() if body["state"] != State.OPEN}
        logged = self._log.find_all([id for body in settled.values() for id in ids_in(body)])
        found = shown(settled, logged, [row.text or "" for row in logged.values()], ())
        return sorted(found, key=lambda one: one.decided_at or "", reverse=True)

    def _turned_away(self, settled: Collection[str]) -> tuple[list[Observation], int]:
        """The newest texts that the base model got, each once, by its first observation; and how many inputs were routed in that time."""
        found: dict[str, Observation] = {}
        routed = 0
        for row in self._log.read():
            routed += row.score is not None
            if row.adapter is None and row.reason in TURNED_AWAY and row.text and row.text.strip() and row.id not in settled:
                if row.text not in found and len(found) == self.config.rows_max:
                    break
                found[row.text] = row
        return list(found.values()), routed

    def forget(self, before: str | None = None) -> None:
        """Let go of the names that no text will bear out when what has ids below `before` has left the log; None: when all has."""
        bodies = self._notes.read(KIND)
        left = self._log.find_all([id for body in bodies.values() for id in ids_in(body) if before is not None and id >= before])
        for body in bodies.values():
            texts = [left[id].text or "" for id in ids_in(body) if id in left]
            body["suggested"] = {id: name for id, name in (body.get("suggested") or {}).items() if is_of(name, texts)}
        if bodies:
            self._notes.write(KIND, bodies)

    # ---- decide -----------------------------------------------------------------------------------------------------

    def rows(self, ids: Sequence[str]) -> list[Example]:
        """The inputs of open proposals, or of groups of them, as far as the log still has them: what is to be labelled.

        A row's label is what somebody said of the answer, its `id` the observation's. Raises InvalidInput for an id that is not open.
        """
        chosen = self._open(ids)
        logged = self._log.find_all([id for body in chosen.values() for id in ids_in(body)])
        return [
            Example(row.text or "", row.feedback.correct_label if row.feedback else None, row.id, {"group": group.id, "suggested": group.suggested})
            for proposal in shown(chosen, logged, [row.text or "" for row in logged.values()], ())
            for group in proposal.groups
            for row in (logged[id] for id in group.observations)
        ]

    def teach(self, ids: Sequence[str]) -> str | None:
        """The adapter that all of them are proposed to be taught to."""
        names = {body["teach"] for body in self._open(ids).values()}
        return names.pop() if len(names) == 1 else None

    def decide(self, ids: Sequence[str], state: State, reason: str = "", result: str | None = None) -> None:
        """Note that these were accepted or dismissed, by whom they were made and why. Groups leave their proposal. Raises InvalidInput."""
        chosen, kept = self._open(ids), self._notes.read(KIND)
        decided: dict[str, Any] = {"state": state, "decided_at": _now(), "reason": reason, "result": result}
        decided |= {"suggested": {}}    # words of texts that may leave the log
        bodies: dict[str, Any] = {id: body | decided for id, body in chosen.items()}
        for id in {id.partition(".")[0] for id in chosen} - chosen.keys():
            left = {place: group for place, group in kept[id]["groups"].items() if f"{id}.{place}" not in chosen}
            known = {of: name for of, name in (kept[id].get("suggested") or {}).items() if of not in chosen}
            bodies[id] = kept[id] | {"groups": left, "suggested": known} if left else None
        self._notes.write(KIND, bodies)

    def _open(self, ids: Sequence[str]) -> dict[str, Any]:
        """The bodies by the ids that were asked for; of a group a body with it alone. Raises InvalidInput."""
        kept = {id: body for id, body in self._notes.read(KIND).items() if body["state"] == State.OPEN}
        found = {}
        for id in ids:
            number, _, place = str(id).partition(".")
            groups = kept[number]["groups"] if number in kept else {}
            if not groups or (place and place not in groups):
                those = f"Open are {', '.join(sorted(kept, key=_order))}" if kept else "None is open"
                raise InvalidInput(f"there is no open proposal {str(id)[:40]!r}.", hint=f"{those}: `adapter-hub proposals`.")
            found[str(id)] = kept[number] | {"groups": {place: groups[place]}} if place else kept[number]
        if not found:
            raise InvalidInput("no proposal was named.", hint="`adapter-hub proposals` shows them.")
        if doubled := [id for id in found if "." in id and id.partition(".")[0] in found]:
            raise InvalidInput(f"{doubled[0]} is a part of {doubled[0].partition('.')[0]}.", hint="Name one of them.")
        return found


@dataclass(frozen=True, slots=True)
class Chosen:
    """A cluster of observations."""

    groups: tuple[tuple[Observation, ...], ...]
    nearest: tuple[tuple[str, float], ...]
    cluster: Cluster

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(row.id for group in self.groups for row in group)


def nearest(decisions: Iterable[Decision]) -> tuple[tuple[str, float], ...]:
    """Names of the best candidates by the share of decisions that they are the best of, greatest first."""
    names = Counter(decision.candidates[0][0].name for decision in decisions if decision.candidates)
    return tuple((name, count / names.total()) for name, count in sorted(names.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN])


def advice(chosen: Chosen, others: Sequence[str], answers: Answers, knows: Knows = lambda name, label: True) -> tuple[str | None, str]:
    """The adapter whose router alone should learn of these inputs, because it answers them well already, or None; and why.

    What people said counts first, where they spoke of half of the inputs and of labels that it `knows`. Else a head that knows inputs is
    sure of them, and not of everything: over the inputs its mean probability
    is SURE, and SURER more than over `others` that were turned away. How near the router thinks them tells nothing of it (benchmarks/LOG.md).
    """
    spoken = [row.feedback for group in chosen.groups for row in group if row.feedback and row.feedback.correct_adapter]
    said = Counter(one.correct_adapter for one in spoken if one.correct_adapter and knows(one.correct_adapter, one.correct_label))
    if said and len(spoken) >= SAID_MIN and said.most_common(1)[0][1] >= SAID_SHARE * len(spoken) and len(spoken) >= SPOKEN_SHARE * len(chosen.ids):
        name, count = said.most_common(1)[0]
        return name, f"of {len(spoken)} that somebody spoke of, {count} should have gone to it"
    cluster, rows = chosen.cluster, [row for group in chosen.groups for row in group]
    place = {row: number for number, row in enumerate(one for group in cluster.groups for one in group)}
    texts = [rows[place[row]].text or "" for row in cluster.typical[:ASKED]]
    best, why = 0.0, "no adapter's head can be asked"
    for name, _ in chosen.nearest[:RIVALS]:
        sure, usually = (_mean(answers(name, asked)) for asked in (texts, others[:ASKED]))
        if sure >= SURE and sure - usually >= SURER and len(others) >= OTHERS_MIN:
            return name, f"its labels get a mean probability of {sure:.2f} on them, {usually:.2f} on others that were turned away"
        if sure > best:
            best, why = sure, f"no adapter answers them surely: {name}'s labels get {sure:.2f}, {usually:.2f} on others that were turned away"
    return None, why


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def ids_in(body: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(id for group in body["groups"].values() for id in group)


def numbered(found: Sequence[frozenset[str]], before: Mapping[str, frozenset[str]], last: int) -> tuple[list[str], int]:
    """The number of each, and the last one given: that from before which it is, or a new one, which none ever had.

    Two are one where they have half of the smaller one's inputs in common, and neither has more in common with another.
    """
    shared = [(len(now & then), place, id) for place, now in enumerate(found) for id, then in before.items()]
    ids: dict[int, str] = {}
    for count, place, id in sorted(shared, key=lambda pair: (-pair[0], pair[1], _order(pair[2]))):
        if place not in ids and id not in ids.values() and count >= SAME * min(len(found[place]), len(before[id])):
            ids[place] = id
    new = [place for place in range(len(found)) if place not in ids]
    ids |= {place: str(number) for number, place in enumerate(new, last + 1)}
    return [ids[place] for place in range(len(found))], last + len(new)


def labelled(rows: Sequence[Example], labels: Mapping[str, str | None]) -> list[Example]:
    """The rows that have a label: by `labels` of the observation, the text, the group or the proposal, in this order, or their own.

    Raises InvalidInput for a key that names nothing, and for fewer than two labels: there is nothing to tell apart then.
    """
    def keys(row: Example) -> list[str]:
        group = str(row.extra["group"])
        return [str(row.id), row.text, group, group.partition(".")[0]]

    if unknown := sorted(set(labels) - {key for row in rows for key in keys(row)}):
        raise InvalidInput(f"{unknown[0][:60]!r} is no observation, text or group of what is accepted.", hint="A group is named 3.2, for example.")
    given = [next((labels[key] for key in keys(row) if key in labels), row.label) for row in rows]
    found = [replace(row, label=label, extra={}) for row, label in zip(rows, given, strict=True) if label]
    if (count := len({row.label for row in found})) < 2:
        few = f"{count} label{' is' if count == 1 else 's are'}"
        raise InvalidInput(f"{few} too few to learn from.", hint="Label groups or rows, by two labels at least.")
    return found


def shown(bodies: Mapping[str, Any], logged: Mapping[str, Observation], texts: Sequence[str], taken: Collection[str]) -> list[Proposal]:
    """Proposals as people see them, largest first. What is typical of their words is told by `texts`, theirs and others.

    A name that was suggested before stays, as long as the inputs have its words and nobody else has the name.
    """
    groups_of = {
        id: {f"{id.partition('.')[0]}.{place}": [logged[one] for one in group if one in logged] for place, group in body["groups"].items()}
        for id, body in bodies.items()
    }
    own_of = {id: {row.text or "" for group in groups.values() for row in group} for id, groups in groups_of.items()}
    names: dict[str, str] = {}
    for id, body in bodies.items():    # before any new one is chosen
        name = (body.get("suggested") or {}).get(id)
        if name and name not in {*taken, *names.values()} and is_of(name, own_of[id]):
            names[id] = name
    found = []
    for id, body in bodies.items():
        own, before = own_of[id], body.get("suggested") or {}
        others = [text for text in texts if text not in own]
        if id not in names:
            names[id] = suggest_name(sorted(own), others, {*taken, *names.values()})
        parts = []
        for group_id, group in groups_of[id].items():
            if group:
                said = tuple(row.text or "" for row in group)
                label = before.get(group_id) or ""
                label = label if label and is_of(label, said) else suggest_name(said, sorted(own - {*said}) or others)
                parts.append(Group(group_id, tuple(row.id for row in group), said, label))
        facts = {key: body.get(key) for key in ("teach", "why", "cohesion", "stability", "at", "decided_at", "result")}
        near = tuple((str(name), float(share)) for name, share in body["nearest"])
        found.append(Proposal(id, State(body["state"]), tuple(parts), names[id], near, reason=body.get("reason", ""), **facts))
    return sorted(found, key=lambda proposal: (-proposal.size, _order(proposal.id)))


def _order(id: str) -> tuple[int, ...]:
    return tuple(map(int, id.split(".")))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
