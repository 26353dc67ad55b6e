"""The head: one solution in two spaces, exact without an exemplar, the same bytes for the same adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_hub.errors import CorruptIndex
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing import head as head_module
from adapter_hub.routing.features import LINEAR, SKETCH_WEIGHT, Features, Hidden, Kernel
from adapter_hub.routing.head import RIDGE, Head, Solver, can_solve, digest_of
from adapter_hub.routing.statistics import Exemplars, build_state
from tests.routing.conftest import DIM, ENCODER, World

EXEMPLARS: Mapping[AdapterRef, Exemplars] = {ref: Exemplars.of(state) for ref, state in World(3, 2, noise=0.9, seed=4).states(8).items()}
N, CLASSES = 48, 6
DRAWN = 16    # random features
FORMS = {"kernel": N, "random features": 0}    # how many exemplars may be met by their exact kernel


@pytest.fixture(params=FORMS.values(), ids=list(FORMS))
def exact_max(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def joined(features: Features) -> Any:
    """(n, d + s) in float64"""
    return np.hstack([features.dense.astype(np.float64), SKETCH_WEIGHT * features.lexical.toarray().astype(np.float64)])


def slow_kernel(a: Features, b: Features) -> Any:
    return np.exp(-((joined(a)[:, None] - joined(b)[None]) ** 2).sum(axis=2) / 2) + LINEAR * joined(a) @ joined(b).T


def slow_responses(solver: Solver, kept: Any, asked: Features) -> Any:
    """(n, k) in float64, solved on the kept exemplars alone under the penalty of all."""
    targets = np.eye(CLASSES)[solver.targets]
    if isinstance(solver.basis, Kernel):
        gram = slow_kernel(solver.features, solver.features)
        penalty = RIDGE * np.trace(gram) / N
        dual = np.linalg.solve(gram[np.ix_(kept, kept)] + penalty * np.eye(len(kept)), targets[kept])
        return slow_kernel(asked, solver.features[kept]) @ dual
    phi = solver.basis(solver.features).astype(np.float64)
    penalty = RIDGE * float((phi**2).sum()) / phi.shape[1]
    weights = np.linalg.solve(phi[kept].T @ phi[kept] + penalty * np.eye(phi.shape[1]), phi[kept].T @ targets[kept])
    return solver.basis(asked).astype(np.float64) @ weights


def test_the_kernel_is_of_the_joined_features() -> None:
    features = next(iter(EXEMPLARS.values())).features
    # In float32, whose last bits follow the processor.
    np.testing.assert_allclose(Kernel(features)(features[:5]), slow_kernel(features[:5], features), atol=1e-5)


def test_responses_are_those_of_the_plain_equations(exact_max: int) -> None:
    solver = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN)
    assert isinstance(solver.basis, Kernel if exact_max == N else Hidden) and len(solver.features) == N
    fresh = World(3, 2, noise=0.9, seed=4).sample(1, 4)[0]
    np.testing.assert_allclose(solver.head("x").responses(fresh), slow_responses(solver, np.arange(N), fresh), atol=1e-3)


def test_what_is_left_out_is_solved_without(exact_max: int) -> None:
    """Exactly, under the same penalty."""
    solver = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN)
    rows = np.arange(N)
    some = rows[::4]
    expected = np.concatenate([slow_responses(solver, rows[rows != i], solver.features[i]) for i in some])
    np.testing.assert_allclose(solver.left_out(rows)[::4], expected, atol=2e-3)
    np.testing.assert_allclose(solver.left_out(some[[7, 3]]), expected[[7, 3]], atol=2e-3)
    assert np.abs(solver.left_out(rows) - slow_responses(solver, rows, solver.features)).max() > 0.05


def test_what_is_left_out_is_what_a_new_solver_without_it_gives(exact_max: int) -> None:
    """Up to the penalty, which follows the mean length of the features."""
    solver = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN)
    ref, one = next(iter(EXEMPLARS.items()))
    kept = np.arange(len(one)) != 3
    counts = one.counts - np.bincount(one.classes[[3]], minlength=2)
    rest = Exemplars(one.features[kept], one.negatives, one.classes[kept], counts, one.sums, one.labelled, False)
    again = Solver({**EXEMPLARS, ref: rest}, DIM, exact_max=exact_max, drawn=DRAWN).head("x").responses(one.features[3])
    np.testing.assert_allclose(solver.left_out(np.array([3])), again, atol=2e-2)


def test_the_size_of_blocks_changes_nothing(exact_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = World(3, 2, noise=0.9, seed=4).sample(1, 4)[0]
    expected = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN)
    monkeypatch.setattr(head_module, "BLOCK", 7)
    again = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN)
    np.testing.assert_allclose(again.head("x").responses(fresh), expected.head("x").responses(fresh), atol=1e-3)
    np.testing.assert_allclose(again.left_out(np.arange(N)), expected.left_out(np.arange(N)), atol=1e-3)


def test_adapters_with_the_same_exemplars_are_answered_alike_and_alone_as_in_a_batch() -> None:
    """Their weights are large and nearly cancel; an exemplar that several have is one row of the basis."""
    world = World(4, 3, noise=0.5, seed=5)
    states = world.states(60)
    twins = {AdapterRef(f"z-{ref.name}", 1): state for ref, state in states.items()}
    exemplars = {ref: Exemplars.of(state) for ref, state in {**states, **twins}.items()}
    head = Solver(exemplars, DIM).head("x")
    assert isinstance(head.basis, Kernel) and len(head.basis.exemplars) == sum(map(len, exemplars.values())) // 2
    fresh = World(4, 3, noise=0.5, seed=6).sample(1, 40)[0]
    found = head.responses(fresh)
    half = found.shape[1] // 2
    np.testing.assert_allclose(found[:, :half], found[:, half:], atol=1e-5)
    np.testing.assert_allclose(found, np.concatenate([head.responses(fresh[row]) for row in range(len(fresh))]), atol=1e-5)


def test_equal_rows_are_found_by_both_of_their_parts() -> None:
    features = next(iter(EXEMPLARS.values())).features[np.array([3, 1, 3, 2, 1])]
    first, same = features.distinct()
    assert first.tolist() == [0, 1, 3] and same.tolist() == [0, 1, 0, 2, 1]
    other = Features(features.dense, features.lexical[np.array([0, 1, 1, 3, 4])])
    assert other.distinct()[1].tolist() == [0, 1, 2, 3, 1]


def test_exemplars_are_met_exactly_while_they_are_few() -> None:
    assert isinstance(Solver(EXEMPLARS, DIM, exact_max=N).basis, Kernel)
    assert isinstance(Solver(EXEMPLARS, DIM, exact_max=N - 1, drawn=DRAWN).basis, Hidden)


@settings(max_examples=10)
@given(st.permutations(sorted(EXEMPLARS)), st.sampled_from(sorted(FORMS.values())))
def test_any_order_of_the_adapters_gives_the_same_bytes(order: list[AdapterRef], exact_max: int) -> None:
    expected = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN).head("x").to_bytes()
    assert Solver({ref: EXEMPLARS[ref] for ref in order}, DIM, exact_max=exact_max, drawn=DRAWN).head("x").to_bytes() == expected


def test_a_head_survives_its_bytes_exactly(exact_max: int) -> None:
    head = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN).head("sha256:x")
    again = Head.from_bytes(head.to_bytes())
    fresh = World(3, 2, seed=5).sample(1, 4)[0]
    assert (again.responses(fresh) == head.responses(fresh)).all()
    assert (again.weights == head.weights).all() and again.columns == head.columns and again.digest == head.digest
    features = Solver(EXEMPLARS, DIM).features
    assert (again.responses(features) == head.responses(features)).all()
    assert again.columns == {ref: 2 * place for place, ref in enumerate(sorted(EXEMPLARS))}


def test_responses_are_near_1_for_the_own_class_and_near_0_for_others() -> None:
    solver = Solver(EXEMPLARS, DIM)
    responses = solver.head("x").responses(solver.features)
    own = responses[np.arange(N), solver.targets]
    assert own.mean() > 0.8 and (responses.sum(axis=1) - own).mean() < 0.1 and (responses.argmax(axis=1) == solver.targets).all()


def test_descriptions_and_single_examples_are_not_solved() -> None:
    lonely = Exemplars.of(build_state(ENCODER, [Example("one text")]))
    described = Exemplars.of(build_state(ENCODER, [], "a description", label_names=["one", "another"]))
    more = {**EXEMPLARS, AdapterRef("aaa", 1): lonely, AdapterRef("zzz", 1): described}
    assert Solver(more, DIM).head("x").to_bytes() == Solver(EXEMPLARS, DIM).head("x").to_bytes()
    assert can_solve(more) and not can_solve({AdapterRef("aaa", 1): lonely, AdapterRef("zzz", 1): described}) and not can_solve({})


def test_too_many_classes_or_exemplars_are_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in (("CLASSES_MAX", CLASSES), ("EXEMPLARS_MAX", N)):
        monkeypatch.setattr(head_module, limit, most)
        assert can_solve(EXEMPLARS)
        monkeypatch.setattr(head_module, limit, most - 1)
        assert not can_solve(EXEMPLARS)
        monkeypatch.undo()
    one_class = Exemplars.of(build_state(ENCODER, [Example("a", "x"), Example("b", "x")]))
    assert not can_solve({AdapterRef("a", 1): one_class})


def test_the_name_of_a_head_follows_its_versions_in_any_order() -> None:
    digests = {AdapterRef("a", 1): "x", AdapterRef("b", 1): "y"}
    assert digest_of(digests) == digest_of(dict(reversed(digests.items())))
    others = [{AdapterRef("a", 2): "x", AdapterRef("b", 1): "y"}, {AdapterRef("a", 1): "x"}, {AdapterRef("a", 1): "y", AdapterRef("b", 1): "x"}]
    assert len({digest_of(digests), *map(digest_of, others)}) == 4


def tampered(change: Callable[[dict[str, Any], dict[str, Any]], Any], exact_max: int) -> bytes:
    data = Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN).head("x").to_bytes()
    facts = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["head"])
    tensors = {k: v.copy() for k, v in safetensors.numpy.load(data).items()}
    change(tensors, facts)
    return safetensors.numpy.save(tensors, {"head": json.dumps(facts)})


@pytest.mark.parametrize(
    "change",
    [
        lambda t, f: t["weights"].__setitem__((0, 0), np.nan),
        lambda t, f: t.update(weights=t["weights"].astype(np.float64)),
        lambda t, f: t.update(weights=t["weights"].ravel()),
        lambda t, f: t.pop("weights"),
        lambda t, f: f.pop("columns"),
        lambda t, f: f.update(columns=[1]),
        lambda t, f: f["columns"].update({"task-00@1": 99}),
        lambda t, f: f["columns"].update({"task-00@1": -1}),
        lambda t, f: f["columns"].update({"../up@1": 0}),
        lambda t, f: f["columns"].update({"task-00@1": "first"}),
        lambda t, f: f.pop("digest"),
        lambda t, f: f.update(schema=0),
    ],
)
def test_a_damaged_head_is_refused(change: Callable[[dict[str, Any], dict[str, Any]], Any], exact_max: int) -> None:
    with pytest.raises(CorruptIndex, match="somewhere/head"):
        Head.from_bytes(tampered(change, exact_max), source="somewhere/head.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda t, f: t["dense"].__setitem__((0, 0), np.nan),
        lambda t, f: t.update(dense=t["dense"].astype(np.float64)),
        lambda t, f: t.update(dense=t["dense"][:-1]),
        lambda t, f: t.update(dense=t["dense"].ravel()),
        lambda t, f: t.update(offsets=t["offsets"][:-1]),
        lambda t, f: t.update(offsets=t["offsets"][:1], sketches=t["sketches"][:0]),
        lambda t, f: t.update(weights=t["weights"][:-1]),
        lambda t, f: t.pop("offsets"),
        lambda t, f: t.pop("dense"),
    ],
)
def test_a_damaged_kernel_is_refused(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    with pytest.raises(CorruptIndex, match="somewhere/head"):
        Head.from_bytes(tampered(change, N), source="somewhere/head.safetensors")


@pytest.mark.parametrize("dim", [0, -3, "wide", None, 10**12])
def test_an_impossible_width_is_refused(dim: Any) -> None:
    with pytest.raises(CorruptIndex, match="somewhere/head"):
        Head.from_bytes(tampered(lambda t, f: f.update(dim=dim), 0), source="somewhere/head.safetensors")


@pytest.mark.parametrize("cut", [0, 1, 8, 60, -1])
def test_a_head_cut_short_is_refused(cut: int, exact_max: int) -> None:
    with pytest.raises(CorruptIndex):
        Head.from_bytes(Solver(EXEMPLARS, DIM, exact_max=exact_max, drawn=DRAWN).head("x").to_bytes()[:cut])
