"""Prototypes, closeness and the scores of a segment: each against a slow loop over adapters and exemplars."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adapter_hub.refs import AdapterRef
from adapter_hub.routing import prototypes as prototypes_module
from adapter_hub.routing import segment as segment_module
from adapter_hub.routing.features import Hidden
from adapter_hub.routing.head import Head
from adapter_hub.routing.prototypes import COHERENCE, SHARPNESS, Prototypes, closeness, coherences, left_out_products
from adapter_hub.routing.scoring import SCARCE, TYPICAL_PRODUCT, Scoring, columns_of
from adapter_hub.routing.segment import CANDIDATES, Entry, Segment
from adapter_hub.routing.statistics import Exemplars, build_state
from tests.routing.conftest import DIM, ENCODER, World, unit

HIDDEN = Hidden.of(DIM, 8)
SCORING = Scoring(closeness=0.75, slope=1.4, intercept=-0.4, typical_count=20.0)


def exemplars_of(world: World, each: int, place: int = 0) -> Exemplars:
    return Exemplars.of(world.state(place, each))


# ---- prototypes ---------------------------------------------------------------------------------------------------------


def test_with_many_exemplars_a_product_is_the_cosine_with_the_class_mean() -> None:
    world = World(1, 3, noise=0.9, seed=1)
    one = exemplars_of(world, 800)
    made = Prototypes.of(one, described=False)
    queries = world.sample(0, 5)[0].dense.astype(np.float64)
    cosines = queries @ unit(one.sums).T
    np.testing.assert_allclose(queries @ made.means.astype(np.float64).T, cosines, atol=4e-3)


def test_a_class_of_one_and_a_class_of_many_are_measured_alike() -> None:
    """A mean of few exemplars is long, for it holds their noise; products of fresh inputs must not show how many there were."""
    world = World(1, 1, noise=1.0, seed=2)
    fresh = world.sample(0, 200)[0].dense
    by_count = {}
    for count in (1, 3, 10, 200):
        products = [fresh @ Prototypes.of(exemplars_of(world, count), described=False).means[0] for _ in range(20)]
        by_count[count] = float(np.mean(products))
    plain = fresh @ np.mean([exemplars_of(world, 1).features.dense[0] for _ in range(30)], axis=0)
    assert by_count[10] == pytest.approx(by_count[200], abs=0.05) and by_count[3] == pytest.approx(by_count[200], abs=0.08)
    assert float(np.mean(plain)) < by_count[200] - 0.1


def test_coherence_is_the_mean_cosine_of_pairs_drawn_to_what_is_usual() -> None:
    world = World(1, 1, noise=1.2, seed=3)
    for count in (1, 2, 5, 300):
        rows = world.sample(0, count)[0].dense.astype(np.float64)
        pairs = [float(rows[i] @ rows[j]) for i in range(count) for j in range(count) if i != j]
        seen, weight = (float(np.mean(pairs)) if pairs else 0.0), count - 1
        expected = (weight * seen + 3 * COHERENCE) / (weight + 3)
        assert coherences(rows.sum(axis=0)[None], np.array([float(count)]))[0] == pytest.approx(max(expected, 0.2), abs=1e-6)
    opposed = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert coherences(opposed.sum(axis=0)[None], np.array([2.0]))[0] >= prototypes_module.COHERENCE_MIN


def test_an_exemplar_left_out_meets_the_prototype_of_the_others() -> None:
    world = World(1, 3, noise=0.9, seed=4)
    for each in (2, 3, 9):
        one = exemplars_of(world, each)
        found = left_out_products(one, np.arange(len(one)))
        for row in range(len(one)):
            others = [i for i in range(len(one)) if i != row and one.classes[i] == one.classes[row]]
            total = one.features.dense[others].astype(np.float64).sum(axis=0)
            scale = len(others) * np.sqrt(coherences(total[None], np.array([float(len(others))]))[0])
            assert found[row] == pytest.approx(float(one.features.dense[row] @ total) / scale, abs=1e-5)


def test_nothing_is_left_of_a_class_of_one() -> None:
    assert np.isneginf(left_out_products(exemplars_of(World(1, 3), 1), np.arange(3))).all()


# ---- closeness ----------------------------------------------------------------------------------------------------------


def slow_closeness(products: Any) -> float:
    return float(np.log(np.mean(np.exp(SHARPNESS * products.astype(np.float64)))) / SHARPNESS)


def test_closeness_is_a_soft_maximum_of_each_adapters_classes() -> None:
    products = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32) / 2
    spans = [(0, 1), (1, 4), (4, 9)]
    expected = [[slow_closeness(row[start:stop]) for start, stop in spans] for row in products]
    found = closeness(products, np.array([0, 1, 4]))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for column, (start, stop) in enumerate(spans):
        assert (found[:, column] <= products[:, start:stop].max(axis=1) + 1e-6).all()
        assert (found[:, column] >= products[:, start:stop].mean(axis=1) - 1e-6).all()
    np.testing.assert_allclose(found[:, 0], products[:, 0], atol=1e-6)


def test_closeness_lies_between_the_centroid_and_the_nearest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    products = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32) / 2
    starts = np.array([0, 3])
    means = np.stack([products[:, :3].mean(axis=1), products[:, 3:].mean(axis=1)], axis=1)
    greatest = np.stack([products[:, :3].max(axis=1), products[:, 3:].max(axis=1)], axis=1)
    monkeypatch.setattr(prototypes_module, "SHARPNESS", 1e-3)
    np.testing.assert_allclose(closeness(products, starts), means, atol=2e-3)
    monkeypatch.setattr(prototypes_module, "SHARPNESS", 40.0)
    np.testing.assert_allclose(closeness(products, starts), greatest, atol=0.05)


# ---- responses ----------------------------------------------------------------------------------------------------------


def test_the_head_speaks_for_what_it_solved_and_a_line_for_the_rest() -> None:
    products = np.array([[0.9, 0.9, 0.9, 0.1]], np.float32)
    solved = np.array([[0.2, 0.3]], np.float32)
    expected = 1.4 * 0.9 - 0.4
    columns, counts = np.array([0, 1, -1, -1]), np.array([20.0, 20 * SCARCE - 1, 1.0, 1.0], np.float32)
    found = SCORING.responses(products, solved, columns, counts)
    np.testing.assert_allclose(found, [[0.2, expected, expected, 0.0]], atol=1e-6)
    np.testing.assert_allclose(SCORING.responses(products, None, columns, counts), [[expected, expected, expected, 0.0]], atol=1e-6)
    scarce_but_sure = SCORING.responses(products, np.array([[0.2, 0.99]], np.float32), columns, counts)
    assert scarce_but_sure[0, 1] == pytest.approx(0.99)


def test_columns_follow_the_prototypes_of_solved_adapters() -> None:
    refs = tuple(AdapterRef(name, 1) for name in "abc")
    head = Head(HIDDEN, np.zeros((HIDDEN.width, 5), np.float32), {refs[0]: 3, refs[2]: 0}, "x")
    assert columns_of(head, refs, np.array([2, 1, 3]), np.array([2, 1, 3])).tolist() == [3, 4, -1, 0, 1, 2]
    # Prototypes without a label share one column, after those of the labels.
    assert columns_of(head, refs, np.array([2, 1, 3]), np.array([0, 0, 1])).tolist() == [3, 3, -1, 0, 1, 1]
    assert columns_of(None, refs, np.array([2, 1, 3]), np.array([2, 1, 3])).tolist() == [-1] * 6


# ---- segments -----------------------------------------------------------------------------------------------------------

MANY = World(90, 3, noise=0.5, seed=9)
STATES = {ref: MANY.state(i, 1 + i % 5) for i, ref in enumerate(MANY.refs)}
ENTRIES = [Entry(ref, Prototypes.of(Exemplars.of(state), described=False), i / 8, state.digest) for i, (ref, state) in enumerate(STATES.items())]
NEAR = np.concatenate([MANY.sample(i, 2)[0].dense for i in range(0, 90, 3)])


def some_head(segment: Segment) -> Head:
    """Every second adapter is solved."""
    columns: Mapping[AdapterRef, int] = {ref: 3 * place for place, ref in enumerate(segment.refs[::2])}
    return Head(HIDDEN, np.zeros((HIDDEN.width, 3 * len(columns)), np.float32), columns, "x")


def slow_scores(entries: list[Entry], dense: Any, solved: Any, head: Head | None) -> Any:
    found = np.zeros((len(dense), len(entries)))
    for row, query in enumerate(dense.astype(np.float64)):
        for place, entry in enumerate(sorted(entries, key=lambda entry: entry.ref)):
            responses, products = [], entry.prototypes.means.astype(np.float64) @ query
            for c, product in enumerate(products):
                line = min(max(SCORING.slope * product + SCORING.intercept, 0.0), 1.0)
                column = None if head is None else head.columns.get(entry.ref)
                by_head = line if column is None else float(solved[row, column + c])
                scarce = entry.prototypes.counts[c] < SCARCE * SCORING.typical_count
                responses.append(max(by_head, line) if scarce else by_head)
            found[row, place] = max(responses) + SCORING.closeness * slow_closeness(products)
    return found


@pytest.mark.parametrize("with_head", [True, False])
def test_dense_scores_are_those_of_a_slow_loop(with_head: bool) -> None:
    segment = Segment.of(ENTRIES[::-1])
    head = some_head(segment) if with_head else None
    solved = np.random.default_rng(5).normal(size=(len(NEAR), 3 * 45)).astype(np.float32) if head else None
    adapters, scores = segment.scores(NEAR, solved, segment.columns(head), SCORING, 2)
    assert segment.refs == tuple(sorted(STATES)) and (adapters == np.arange(90)).all()
    np.testing.assert_allclose(scores, slow_scores(ENTRIES, NEAR, solved, head), atol=1e-5)


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("gather_max", [1, 2**25])
def test_candidates_score_what_they_score_among_all(with_head: bool, gather_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment.of(ENTRIES)
    head = some_head(segment) if with_head else None
    solved = np.random.default_rng(5).normal(size=(len(NEAR), 3 * 45)).astype(np.float32) if head else None
    _, dense = segment.scores(NEAR, solved, segment.columns(head), SCORING, 2)
    monkeypatch.setattr(segment_module, "DENSE_MAX", 8)
    monkeypatch.setattr(segment_module, "GATHER_MAX", gather_max)
    adapters, scores = segment.scores(NEAR, solved, segment.columns(head), SCORING, 2)
    assert adapters.shape == scores.shape == (len(NEAR), 2 + CANDIDATES)
    for row in range(len(NEAR)):
        real = adapters[row][adapters[row] >= 0]
        assert len(set(real.tolist())) == len(real) >= 2
        np.testing.assert_allclose(scores[row][adapters[row] >= 0], dense[row, real], atol=1e-5)
        assert np.isneginf(scores[row][adapters[row] < 0]).all()


def test_the_best_of_all_is_among_the_candidates_of_queries_near_the_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment.of(ENTRIES)
    _, dense = segment.scores(NEAR, None, segment.columns(None), SCORING, 2)
    monkeypatch.setattr(segment_module, "DENSE_MAX", 8)
    adapters, scores = segment.scores(NEAR, None, segment.columns(None), SCORING, 2)
    best = np.take_along_axis(adapters, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert (best == dense.argmax(axis=1)).all()


def test_a_tangent_gives_the_score_of_a_typical_input_of_its_class() -> None:
    means = np.concatenate([entry.prototypes.means for entry in ENTRIES[:4]]).astype(np.float32).reshape(4, 3, DIM)
    tangents = SCORING.tangents(means)
    for adapter in range(4):
        for c, mean in enumerate(means[adapter].astype(np.float64)):
            typical = TYPICAL_PRODUCT * mean / np.linalg.norm(mean)
            products = means[adapter].astype(np.float64) @ typical
            expected = SCORING.slope * products[c] + SCORING.closeness * slow_closeness(products)
            assert float(tangents[adapter, c] @ typical) == pytest.approx(expected, abs=1e-5)


def test_the_best_score_is_found_where_the_closest_prototypes_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 adapters own a class that is closer, and others far away; the best is near with all of its classes, of which it has most."""
    rng = np.random.default_rng(3)
    query = unit(rng.normal(size=DIM))
    near = unit(0.9 * query + 0.3 * unit(rng.normal(size=(200, DIM))))
    all_near = unit(query + 0.7 * unit(rng.normal(size=(5, DIM))))
    means = [*(np.concatenate([near[i : i + 1], unit(rng.normal(size=(3, DIM)))]) for i in range(200)), all_near]
    made = [Prototypes(rows.astype(np.float16), np.ones(len(rows), np.float32), len(rows), False) for rows in means]
    segment = Segment.of([Entry(AdapterRef(f"task{i:03d}", 1), one, 0.0, "x") for i, one in enumerate(made)])
    dense = query.astype(np.float32)[None]
    _, every = segment.scores(dense, None, segment.columns(None), SCORING, 2)
    assert every.argmax() == 200 and (near @ query > (all_near @ query).max()).sum() > 64
    monkeypatch.setattr(segment_module, "DENSE_MAX", 100)
    adapters, scores = segment.scores(dense, None, segment.columns(None), SCORING, 2)
    assert adapters[0, scores[0].argmax()] == 200 and scores.max() == pytest.approx(every.max(), abs=1e-5)


def test_columns_follow_the_head_that_is_asked_for() -> None:
    """Those of the last head are kept."""
    segment = Segment.of(ENTRIES)
    head, other = some_head(segment), replace(some_head(segment), columns={segment.refs[1]: 7})
    for asked in (head, other, None, head):
        np.testing.assert_array_equal(segment.columns(asked), columns_of(asked, segment.refs, segment.sizes, segment.labelled))
    assert segment.columns(head) is segment.columns(head)


def test_as_many_candidates_as_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_module, "DENSE_MAX", 8)
    segment = Segment.of(ENTRIES)
    adapters, _ = segment.scores(NEAR[:3], None, segment.columns(None), SCORING, 60)
    assert ((adapters >= 0).sum(axis=1) >= 60).all()
    everything, _ = segment.scores(NEAR[:3], None, segment.columns(None), SCORING, 90)
    assert (everything == np.arange(90)).all()


@pytest.mark.parametrize("with_head", [True, False])
def test_absent_adapters_are_no_candidates_and_cost_no_others_their_place(with_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they own all that the index finds at first."""
    segment = Segment.of(ENTRIES)
    head = some_head(segment) if with_head else None
    solved = np.random.default_rng(5).normal(size=(len(NEAR), 3 * 45)).astype(np.float32) if head else None
    _, every = segment.scores(NEAR, solved, segment.columns(head), SCORING, 2)
    gone = [ref for place, ref in enumerate(segment.refs) if place % 8]
    absent = segment.absent([*gone, AdapterRef("nobody", 1)])
    assert absent is not None and [ref for ref, away in zip(segment.refs, absent, strict=True) if away] == gone
    for dense_max, found in ((4096, 64), (8, 64), (8, 4)):
        monkeypatch.setattr(segment_module, "DENSE_MAX", dense_max)
        monkeypatch.setattr(segment_module, "FOUND", found)
        adapters, scores = segment.scores(NEAR, solved, segment.columns(head), SCORING, 2, absent)
        for row in range(len(NEAR)):
            real = adapters[row][adapters[row] >= 0]
            assert len(real) >= 2 and (real % 8 == 0).all()
            np.testing.assert_allclose(scores[row][adapters[row] >= 0], every[row, real], atol=1e-5)


def test_an_adapter_that_owns_all_that_is_found_does_not_hide_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    query = unit(rng.normal(size=DIM))
    crowd = unit(query + 0.3 * unit(rng.normal(size=(300, DIM))))
    made = [crowd, *(unit(rng.normal(size=(2, DIM))) for _ in range(30))]
    prototypes = [Prototypes(rows.astype(np.float16), np.ones(len(rows), np.float32), len(rows), False) for rows in made]
    segment = Segment.of([Entry(AdapterRef(f"task{i:02d}", 1), one, 0.0, "x") for i, one in enumerate(prototypes)])
    monkeypatch.setattr(segment_module, "DENSE_MAX", 100)
    adapters, _ = segment.scores(query.astype(np.float32)[None], None, segment.columns(None), SCORING, 2)
    assert 0 in adapters and (adapters >= 0).sum() >= 2


def test_a_segment_of_parts_is_the_segment_of_the_whole() -> None:
    whole = Segment.of(ENTRIES)
    merged = Segment.merged([Segment.of(ENTRIES[1::2]), Segment.of(ENTRIES[::2])])
    fewer = merged.without(ENTRIES[4].ref)
    for a, b in ((merged, whole), (fewer, Segment.of([entry for entry in ENTRIES if entry is not ENTRIES[4]]))):
        assert a.refs == b.refs and a.digests == b.digests and (a.means == b.means).all() and (a.counts == b.counts).all()
        assert (a.starts == b.starts).all() and a.place == b.place and (a.centres == b.centres).all()
    assert len(Segment.of(ENTRIES[:1]).without(ENTRIES[0].ref)) == 0


def test_an_adapter_of_many_classes_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 inputs × 32 candidates × 200 classes × 256 numbers would be 1.2 GB at once, in float16 and float32."""
    rng = np.random.default_rng(7)
    sizes = [200, *[2] * 40]
    made = [Prototypes(unit(rng.normal(size=(size, 256))).astype(np.float16), np.ones(size, np.float32), size, False) for size in sizes]
    segment = Segment.of([Entry(AdapterRef(f"task{i:02d}", 1), one, 0.0, "x") for i, one in enumerate(made)])
    monkeypatch.setattr(segment_module, "DENSE_MAX", 100)
    queries = unit(rng.normal(size=(128, 256))).astype(np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    segment.scores(queries, None, segment.columns(None), SCORING, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000    # KiB


def test_descriptions_are_prototypes_of_their_own_length() -> None:
    """Inputs are less like a description, and like the name of a label, than like each other: these are made longer."""
    state = build_state(ENCODER, [], "questions about bank cards", label_names=["report_fraud"])
    described, plain = (Prototypes.of(Exemplars.of(state), described) for described in (True, False))
    coherences = [prototypes_module.LABEL_COHERENCE, prototypes_module.DESCRIPTION_COHERENCE, COHERENCE, COHERENCE]
    lengths = [np.linalg.norm(made.means.astype(np.float64), axis=1) for made in (described, plain)]
    assert np.concatenate(lengths) == pytest.approx(1 / np.sqrt(coherences), rel=1e-2)
    assert described.single and described.means.shape == (2, DIM)
