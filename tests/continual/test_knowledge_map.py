"""The knowledge map: what is measured against slow references, what is kept of it, and how it is written. Pure."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import numpy as np
import pytest

from adapter_hub.continual.knowledge_map import Edge, EdgeKind, KnowledgeMap, Limits, Node, Pair, corrections, layout, lineage, weight_cosine
from adapter_hub.refs import AdapterRef

A, B, C, D = (AdapterRef(name, 1) for name in "abcd")
RNG = np.random.default_rng(3)


def pair(r: int, i: int = 7, o: int = 5, scaling: float = 1.0) -> Pair:
    return Pair(RNG.normal(size=(r, i)).astype(np.float32), RNG.normal(size=(o, r)).astype(np.float32), scaling)


def node(ref: AdapterRef, labels: tuple[str, ...] = ("x", "y"), task: str = "SEQ_CLS", exemplars: int = 10) -> Node:
    return Node(ref, task, labels, exemplars)


# ---- weights --------------------------------------------------------------------------------------------------------


def test_weight_similarity_is_that_of_the_full_products() -> None:
    one = {"q": pair(3, scaling=2.0), "k": pair(2), "only": pair(2)}
    other = {"q": pair(4), "k": pair(2, scaling=0.5), "else": pair(1)}

    def flat(delta: dict[str, Pair], names: list[str]) -> np.ndarray:
        zero = np.zeros((5, 7))
        return np.concatenate([(delta[name].scaling * delta[name].b @ delta[name].a if name in delta else zero).ravel() for name in names])

    a, b = (flat(delta, ["q", "k", "only", "else"]) for delta in (one, other))
    assert weight_cosine(one, other) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert weight_cosine(one, other) == pytest.approx(weight_cosine(other, one), abs=1e-12)


def test_an_adapter_is_like_itself_however_strong_it_is_and_opposed_to_its_negative() -> None:
    one = {"q": pair(3), "k": pair(2)}
    stronger = {name: Pair(each.a, each.b, 7 * each.scaling) for name, each in one.items()}
    opposed = {name: Pair(each.a, -each.b, each.scaling) for name, each in one.items()}
    assert weight_cosine(one, stronger) == pytest.approx(1.0) and weight_cosine(one, opposed) == pytest.approx(-1.0)


def test_modules_are_the_same_with_and_without_the_architectures_prefix_and_others_have_nothing_in_common() -> None:
    one = {"bert.layer.0.q": pair(2), "bert.layer.1.q": pair(2)}
    bare = {name.removeprefix("bert."): each for name, each in one.items()}
    assert weight_cosine(one, bare) == weight_cosine(bare, one) == pytest.approx(1.0)
    assert weight_cosine(one, {"decoder.0.q": pair(2)}) == 0.0
    assert weight_cosine({"q": pair(2)}, {"q": pair(2, i=9)}) == 0.0


# ---- edges ----------------------------------------------------------------------------------------------------------


def test_the_map_does_not_depend_on_the_order_in_which_things_come() -> None:
    refs = [AdapterRef(f"n{number:02}", 1) for number in range(12)]
    nodes = [node(ref) for ref in refs]
    edges = [Edge(kind, a, b, round(RNG.uniform(), 2)) for kind in EdgeKind for a in refs for b in refs if a < b]
    made = KnowledgeMap.of(nodes, edges)
    for seed in range(3):
        random.Random(seed).shuffle(nodes)
        random.Random(seed).shuffle(edges)
        again = KnowledgeMap.of(nodes, edges)
        assert again == made and again.to_dot() == made.to_dot() and json.dumps(again.to_json()) == json.dumps(made.to_json())
        assert np.array_equal(layout([one.ref for one in again.nodes], again.edges), layout([one.ref for one in made.nodes], made.edges))


def test_an_edge_reaches_the_limit_and_is_among_the_strongest_of_one_of_its_ends() -> None:
    refs = [AdapterRef(f"n{number:02}", 1) for number in range(20)]
    edges = [Edge(EdgeKind.ROUTING, a, b, float(RNG.uniform())) for a in refs for b in refs if a < b]
    limits = Limits(routing=0.3, strongest=2)
    found = KnowledgeMap.of(map(node, refs), edges, limits).edges
    for edge in edges:
        def rank(end: AdapterRef, edge: Edge = edge) -> int:
            return sum(other.value > edge.value for other in edges if end in (other.source, other.target))

        assert (edge in found) == (edge.value >= 0.3 and min(rank(edge.source), rank(edge.target)) < 2)
    assert len(found) <= 2 * len(refs)


def test_what_is_not_in_production_is_on_no_edge() -> None:
    assert KnowledgeMap.of([node(A)], [Edge(EdgeKind.ROUTING, A, B, 0.99)]).edges == ()


def test_lineage_leads_from_the_name_in_production_to_what_was_made_from_any_of_its_versions() -> None:
    newer = AdapterRef("b", 4)
    edges = lineage({A: ["c@9"], newer: ["b@3", "a@7", "gone@2"], C: []})
    assert [(edge.source, edge.target) for edge in edges] == [(A, newer), (C, A)]


def test_corrections_are_shares_of_what_people_said_belongs_to_an_adapter() -> None:
    said = [("a", "b"), ("a", "b"), (None, "b"), ("b", "b"), ("gone", "b"), ("b", "gone"), ("c", "c")]
    assert corrections(said, [A, B, C]) == [Edge(EdgeKind.CORRECTED, B, A, 0.4, 5)]


# ---- near-duplicates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "closeness", "found"),
    [
        (node(B), 0.9, True),
        (node(B), 0.79, False),                                      # not close
        (node(B, ("y", "z")), 0.9, True),                            # half of the labels
        (node(B, ("y", "z", "w")), 0.9, True),                       # of the fewer
        (node(B, ("u", "v")), 0.9, False),                           # other labels
        (node(B, ()), 0.9, False),
        (node(B, task="TOKEN_CLS"), 0.9, False),                     # another kind
    ],
)
def test_near_duplicates_are_close_of_one_kind_and_share_labels(second: Node, closeness: float, found: bool) -> None:
    made = KnowledgeMap.of([node(A), second], [Edge(EdgeKind.ROUTING, A, B, closeness), Edge(EdgeKind.WEIGHTS, A, B, 0.01)])
    assert bool(made.near_duplicates) is found
    if found:
        assert made.near_duplicates[0].weights == 0.01    # told, though it is no edge


def test_the_proposal_names_the_one_that_knows_more_and_is_a_command() -> None:
    made = KnowledgeMap.of([node(A, ()), node(B, (), exemplars=99)], [Edge(EdgeKind.ROUTING, A, B, 1.0)])
    assert made.near_duplicates[0].command == "adapter-hub merge a b --into b"
    assert made.to_json()["near_duplicates"][0]["proposal"] == "adapter-hub merge a b --into b"


# ---- written and drawn ----------------------------------------------------------------------------------------------


def test_dot_has_every_adapter_and_edge_and_quotes_what_it_is_given() -> None:
    made = KnowledgeMap.of([node(A, task='a "task" \\ of\nthem'), node(B)], [Edge(EdgeKind.CONFUSION, A, B, 0.25), Edge(EdgeKind.LINEAGE, B, A, 1.0)])
    dot = made.to_dot()
    lines = dot.splitlines()
    assert lines[0] == "digraph adapters {" and lines[-1] == "}" and all(line.endswith(";") for line in lines[1:-1])
    for line in lines:
        unescaped = line.replace("\\\\", "").replace('\\"', "")
        assert unescaped.count('"') % 2 == 0
    assert any(line.startswith('  "a@1" -> "b@1" [') and 'label="0.25"' in line and "dir=none" not in line for line in lines)
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=dot, text=True, check=True, capture_output=True)


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_a_layout_is_finite_and_within_the_circle(count: int) -> None:
    refs = [AdapterRef(f"n{number}", 1) for number in range(count)]
    at = layout(refs, [])
    assert at.shape == (count, 2) and np.isfinite(at).all() and (np.linalg.norm(at, axis=1) <= 1 + 1e-9).all()
    assert len(np.unique(at.round(6), axis=0)) == count


def test_what_is_joined_lies_together() -> None:
    refs = [AdapterRef(f"n{number}", 1) for number in range(9)]
    groups = [refs[start::3] for start in range(3)]
    at = dict(zip(refs, layout(refs, [Edge(EdgeKind.ROUTING, a, b, 0.8) for group in groups for a in group for b in group if a < b]), strict=True))
    within = [np.linalg.norm(at[a] - at[b]) for group in groups for a in group for b in group if a < b]
    between = [np.linalg.norm(at[a] - at[b]) for one, other in ((0, 1), (0, 2), (1, 2)) for a in groups[one] for b in groups[other]]
    assert max(within) < min(between)
