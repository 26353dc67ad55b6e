"""What a registry knows as a graph: adapters, and what joins them. Pure numpy; `survey` gathers the facts, `pictures` and `report` draw them.

| edge | joins | value |
|---|---|---|
| lineage | an adapter and one of another name that was made or started from a version of it | 1 |
| routing | adapters whose exemplars lie close: see `routing.nearest`, the lesser of both ways | -1 to 1 |
| weights | adapters, joined by one of these two, that change the base alike: the cosine of what they add to it, all modules one vector | -1 to 1 |
| confusion | an adapter and one that the router would give inputs of it to: see `routing.effect.confusion` | share, 0-1 |
| corrected | an adapter and one that answered what people said belongs to it | share of what they gave to it, 0-1 |

Only what reaches a limit is an edge, and of each kind only the strongest of each adapter: a map of a thousand can still be read.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_hub.refs import AdapterRef

# n adapters, r rank, i inputs of a module, o its outputs
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

ROUNDS, ROUNDS_LEAST = 300, 60    # of the layout; fewer where there are more than ROUNDED adapters
ROUNDED = 200
SPRING = 0.35             # how strongly an edge pulls, beside the push of every node
PULL_MAX = 0.6            # of the edges of one pair together: twins too are two nodes


class EdgeKind(StrEnum):
    LINEAGE = "lineage"
    ROUTING = "routing"
    WEIGHTS = "weights"
    CONFUSION = "confusion"
    CORRECTED = "corrected"


DIRECTED = (EdgeKind.LINEAGE, EdgeKind.CONFUSION, EdgeKind.CORRECTED)
# Okabe and Ito's colours, that are told apart by the colour-blind too.
COLOURS = {
    EdgeKind.LINEAGE: "#666666", EdgeKind.ROUTING: "#0072B2", EdgeKind.WEIGHTS: "#009E73", EdgeKind.CONFUSION: "#D55E00",
    EdgeKind.CORRECTED: "#CC79A7",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is an edge, and how many of each kind an adapter keeps. Set by hand.

    Halves of one CLINC150 domain have a closeness of 0.97 and more, two of its domains 0.17 to 0.50 (all-MiniLM-L6-v2).
    """

    routing: float = 0.4
    weights: float = 0.1
    confusion: float = 0.02
    corrected: float = 0.02
    strongest: int = 4          # of each kind, of each adapter; an edge stays where either end keeps it
    duplicate: float = 0.8      # closeness in routing of near-duplicates
    labels: float = 0.5         # share of the fewer labels, 0-1, that near-duplicates have in common


@dataclass(frozen=True, slots=True)
class Node:
    """One adapter in production."""

    ref: AdapterRef
    task: str                        # what it gives, in PEFT's and transformers' words
    labels: tuple[str, ...] = ()
    exemplars: int = 0
    created_at: str = ""             # ISO 8601, UTC
    answers: int = 0                 # in the log, of this version
    origins: tuple[str, ...] = ()    # the versions that it was made and started from

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"adapter": str(self.ref), "task": self.task, "labels": list(self.labels), "exemplars": self.exemplars}
        return facts | {"created_at": self.created_at, "answers": self.answers, "origins": list(self.origins)}


@dataclass(frozen=True, slots=True)
class Edge:
    """What joins two adapters. Of the kinds without a direction `source` comes before `target`."""

    kind: EdgeKind
    source: AdapterRef
    target: AdapterRef
    value: float
    inputs: int | None = None    # that a share is of

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"kind": str(self.kind), "source": str(self.source), "target": str(self.target), "value": round(self.value, 4)}
        return facts | ({} if self.inputs is None else {"inputs": self.inputs})


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two adapters that know much the same, and what could be done about it."""

    first: AdapterRef
    second: AdapterRef
    closeness: float
    labels: tuple[str, ...]       # in common; empty where neither has any
    weights: float | None         # cosine, where it was measured
    into: str                     # the name that knows more

    @property
    def command(self) -> str:
        return f"adapter-hub merge {self.first.name} {self.second.name} --into {self.into}"

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"adapters": [str(self.first), str(self.second)], "closeness": round(self.closeness, 4)}
        facts |= {"labels": list(self.labels), "weights": None if self.weights is None else round(self.weights, 4)}
        return facts | {"into": self.into, "proposal": self.command}


@dataclass(frozen=True, slots=True)
class KnowledgeMap:
    """Adapters in the order of their names, what joins them, and who may be one."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    near_duplicates: tuple[NearDuplicate, ...]
    limits: Limits
    notes: tuple[str, ...] = ()    # what could not be measured, in words

    @classmethod
    def of(cls, nodes: Iterable[Node], edges: Iterable[Edge], limits: Limits | None = None, notes: Iterable[str] = ()) -> KnowledgeMap:
        """The map of all that was measured, in whatever order it comes."""
        limits = limits or Limits()
        known = {node.ref: node for node in sorted(nodes, key=lambda node: node.ref)}
        measured = sorted((edge for edge in edges if edge.source in known and edge.target in known), key=_place)
        kept = [edge for kind in EdgeKind for edge in strongest([edge for edge in measured if edge.kind is kind], limits)]
        return cls(tuple(known.values()), tuple(kept), tuple(_near_duplicates(known, measured, limits)), limits, tuple(notes))

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"adapters": [one.to_json() for one in self.nodes], "edges": [one.to_json() for one in self.edges]}
        return shown | {"near_duplicates": [one.to_json() for one in self.near_duplicates], "limits": asdict(self.limits), "notes": list(self.notes)}

    def to_dot(self) -> str:
        """For Graphviz: `adapter-hub map --dot | sfdp -Tsvg > map.svg`."""
        lines = ["digraph adapters {", '  graph [overlap=false, splines=true, outputorder=edgesfirst, fontname="sans-serif"];']
        lines.append('  node [shape=box, style="rounded,filled", fillcolor=white, fontname="sans-serif"];')
        lines.append('  edge [fontname="sans-serif", fontsize=9];')
        for node in self.nodes:
            said = f"{node.ref}\n{len(node.labels)} labels, {node.exemplars} exemplars, {node.answers} answers"
            lines.append(f"  {_quoted(node.ref)} [label={_quoted(said)}, tooltip={_quoted(node.task)}];")
        for edge in self.edges:
            colour, ends = COLOURS[edge.kind], "" if edge.kind in DIRECTED else ", dir=none"
            label = "" if edge.kind is EdgeKind.LINEAGE else f"{edge.value:.2f}"
            drawn = f'color="{colour}", fontcolor="{colour}", label="{label}", tooltip="{edge.kind}"'
            drawn += f", penwidth={1 + 3 * max(0.0, edge.value):.2f}{ends}"
            lines.append(f"  {_quoted(edge.source)} -> {_quoted(edge.target)} [{drawn}];")
        return "\n".join([*lines, "}", ""])


def _quoted(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)    # what Graphviz escapes, JSON escapes so too


def _place(edge: Edge) -> tuple[AdapterRef, AdapterRef, str]:
    return edge.source, edge.target, edge.kind


def strongest(edges: Sequence[Edge], limits: Limits) -> list[Edge]:
    """Of edges of one kind those that reach the limit, and of these the strongest of each end."""
    ends: defaultdict[AdapterRef, list[Edge]] = defaultdict(list)
    for edge in edges:
        if edge.kind is EdgeKind.LINEAGE or edge.value >= getattr(limits, edge.kind):
            ends[edge.source].append(edge)
            ends[edge.target].append(edge)
    kept = {edge for own in ends.values() for edge in sorted(own, key=lambda edge: (-edge.value, _place(edge)))[: limits.strongest]}
    return sorted(kept, key=_place)


def _near_duplicates(nodes: Mapping[AdapterRef, Node], edges: Sequence[Edge], limits: Limits) -> Iterator[NearDuplicate]:
    weights = {(edge.source, edge.target): edge.value for edge in edges if edge.kind is EdgeKind.WEIGHTS}
    close = [edge for edge in edges if edge.kind is EdgeKind.ROUTING and edge.value >= limits.duplicate]
    for edge in sorted(close, key=lambda edge: (-edge.value, _place(edge))):
        first, second = nodes[edge.source], nodes[edge.target]
        common = sorted(set(first.labels) & set(second.labels))
        fewer = min(len(set(first.labels)), len(set(second.labels)))
        agree = len(common) >= limits.labels * fewer if fewer else not first.labels and not second.labels
        if first.task == second.task and agree:
            more = max((first, second), key=lambda node: node.exemplars).ref.name    # the first of equals
            yield NearDuplicate(edge.source, edge.target, edge.value, tuple(common), weights.get((edge.source, edge.target)), more)


# ---- what is measured here ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What an adapter adds to one module: `scaling · B A`. DoRA's magnitudes are left out."""

    a: F32    # (r, i)
    b: F32    # (o, r)
    scaling: float


Delta = Mapping[str, Pair]    # by the module's name


def weight_cosine(one: Delta, other: Delta) -> float:
    """The cosine of what two adapters add to the base, all modules in one long vector: -1 to 1; 0 where they change different modules.

    <B1 A1, B2 A2> = sum of the entries of (B1ᵀ B2) ∘ (A1 A2ᵀ): no product (o, i) is formed. A module that one of them leaves alone is 0 there.
    """
    return _inner(one, other) / max(math.sqrt(_inner(one, one) * _inner(other, other)), 1e-30)


def _inner(one: Delta, other: Delta) -> float:
    total = 0.0
    for module, pair in one.items():
        theirs = other.get(module) if one is other else _found(module, one, other)
        if theirs is not None and pair.a.shape[1] == theirs.a.shape[1] and pair.b.shape[0] == theirs.b.shape[0]:
            product = np.vdot(pair.b.T @ theirs.b, pair.a @ theirs.a.T)
            total += pair.scaling * theirs.scaling * float(product)
    return total


def _found(module: str, one: Delta, other: Delta) -> Pair | None:
    """The other's pair of a module. Models of several tasks call one module alike but for the architecture's prefix, `bert.` say."""
    if one.keys() & other.keys():
        return other.get(module)
    bare = module.partition(".")[2]
    return other.get(bare) or next((pair for name, pair in other.items() if name.partition(".")[2] == module), None)


def corrections(said: Iterable[tuple[str | None, str]], nodes: Iterable[AdapterRef]) -> list[Edge]:
    """Edges of pairs (name that answered, or None; name that should have), as people said."""
    in_production = {ref.name: ref for ref in nodes}
    pairs = [(answered, right) for answered, right in said if right in in_production]
    given, wrong = Counter(right for _, right in pairs), Counter((right, answered) for answered, right in pairs)
    return [
        Edge(EdgeKind.CORRECTED, in_production[right], in_production[answered], count / given[right], given[right])
        for (right, answered), count in wrong.items()
        if answered in in_production and answered != right
    ]


def lineage(origins: Mapping[AdapterRef, Iterable[str]]) -> list[Edge]:
    """From each name in production to those that were made or started from one of its versions; `origins` are of all generations."""
    in_production = {ref.name: ref for ref in origins}
    found = set()
    for ref, before in origins.items():
        names = {AdapterRef.parse(one).name for one in before}
        found |= {Edge(EdgeKind.LINEAGE, in_production[name], ref, 1.0) for name in names if name in in_production and name != ref.name}
    return sorted(found, key=_place)


# ---- where to draw it -----------------------------------------------------------------------------------------------


def layout(nodes: Sequence[AdapterRef], edges: Iterable[Edge]) -> F64:
    """(n, 2), centred, the farthest node at distance 1: what is joined lies together. The same for the same map.

    Springs and charges (Fruchterman and Reingold 1991), from places drawn with a fixed seed: an even circle may be a balance of its own.
    """
    n, place = len(nodes), {ref: number for number, ref in enumerate(nodes)}
    at = np.random.default_rng(0).uniform(-1, 1, (n, 2))
    if n < 2:
        return at * 0.0
    pulls: defaultdict[tuple[int, int], float] = defaultdict(float)
    for edge in edges:
        pair = sorted((place[edge.source], place[edge.target]))
        pulls[pair[0], pair[1]] += max(0.0, edge.value)
    ends = np.array(list(pulls), np.int64).reshape(-1, 2)
    pull = np.array(list(pulls.values()))[:, None]
    distance = 1.6 / math.sqrt(n)
    rounds = min(ROUNDS, max(ROUNDS_LEAST, ROUNDS * ROUNDED // n))
    for turn in range(rounds):
        norms = (at**2).sum(axis=1)
        square = np.maximum(norms[:, None] + norms[None, :] - 2 * (at @ at.T), 1e-6)    # (n, n) of squared distances
        np.fill_diagonal(square, np.inf)
        push = distance**2 / square
        # A little towards the middle: parts that nothing joins stay in sight.
        force = at * push.sum(axis=1, keepdims=True) - push @ at - 0.15 * at
        if len(ends):
            along = at[ends[:, 1]] - at[ends[:, 0]]
            pulled = SPRING * np.minimum(pull, PULL_MAX) * along * np.linalg.norm(along, axis=1, keepdims=True) / distance
            np.add.at(force, ends[:, 0], pulled)
            np.add.at(force, ends[:, 1], -pulled)
        length = np.maximum(np.linalg.norm(force, axis=1, keepdims=True), 1e-9)
        at = at + force / length * np.minimum(length, 0.1 * (1 - turn / rounds))
    at = at - at.mean(axis=0)
    return np.asarray(at / max(float(np.linalg.norm(at, axis=1).max()), 1e-9))
