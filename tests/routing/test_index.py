"""The FAISS index against plain numpy, by value; its file against what happens to files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from adapter_hub.errors import CorruptIndex, InvalidInput, RegistryError
from adapter_hub.routing.index import ExactIndex, FaissIndex, Floats, Index

WIDTH = 64


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def clustered(count: int, seed: int) -> Floats:
    """Unit rows around the same 100 centres, whatever the seed."""
    centres = unit(np.random.default_rng(0).normal(size=(100, WIDTH)).astype(np.float32))
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(100, size=count)] + 0.8 / np.sqrt(WIDTH) * rng.normal(size=(count, WIDTH)).astype(np.float32))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return clustered(20_000, 1).astype(np.float16)


@pytest.fixture(scope="module")
def inverted(rows: np.ndarray) -> FaissIndex:
    return FaissIndex.build(rows, flat_max=1000)


@pytest.mark.parametrize("count", [0, 1, 7, 500])
@pytest.mark.parametrize("queries", [0, 1, 40])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_flat_search_equals_exact_search_also_beyond_the_count(count: int, queries: int, kind: type) -> None:
    rng = np.random.default_rng(count)
    stored, asked = rng.normal(size=(count, 24)).astype(kind), rng.normal(size=(queries, 24)).astype(np.float32)
    fast, slow = FaissIndex.build(stored), ExactIndex(stored)
    assert len(fast) == len(slow) == count
    (scores, found), (expected, places) = fast.search(asked, 10), slow.search(asked, 10)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert (found[:, count:] == -1).all() and np.isneginf(scores[:, count:]).all()


@pytest.mark.parametrize("flat_max", [10_000, 10], ids=["flat", "inverted"])
@pytest.mark.parametrize("queries", [1, 30])
def test_of_equal_rows_the_lowest_are_found(flat_max: int, queries: int) -> None:
    # Whole numbers, so that equal rows have equal products however they are summed.
    stored = np.tile(np.random.default_rng(0).integers(-3, 4, size=(5, 16)), (40, 1)).astype(np.float32)
    asked = np.random.default_rng(1).integers(-3, 4, size=(queries, 16)).astype(np.float32)
    _, found = FaissIndex.build(stored, flat_max=flat_max).search(asked, 12)
    np.testing.assert_array_equal(found, ExactIndex(stored).search(asked, 12)[1])


def test_inverted_lists_find_the_best_row_of_99_in_100_queries(rows: np.ndarray, inverted: FaissIndex) -> None:
    asked = clustered(1000, 2)
    expected, best = ExactIndex(rows).search(asked, 1)
    scores, found = inverted.search(asked, 64)
    assert (found == best).any(axis=1).mean() >= 0.99
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores[:, 0], expected[:, 0], atol=0.02)


def test_inverted_lists_reach_every_row(rows: np.ndarray) -> None:
    few = rows[:3000]
    scores, found = FaissIndex.build(few, flat_max=1000).search(clustered(2, 3), 3005)
    np.testing.assert_array_equal(np.sort(found[:, :3000], axis=1), np.tile(np.arange(3000), (2, 1)))
    assert (found[:, 3000:] == -1).all() and np.isneginf(scores[:, 3000:]).all()


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_inverted_lists_do_not_mind_the_length_of_vectors(rows: np.ndarray, factor: float) -> None:
    stored, asked = (rows[:3000].astype(np.float32) * factor).astype(np.float32), clustered(200, 4) / np.float32(factor)
    expected, best = ExactIndex(stored).search(asked, 1)
    scores, found = FaissIndex.build(stored, flat_max=0).search(asked, 32)
    assert (found == best).any(axis=1).mean() >= 0.99
    np.testing.assert_allclose(scores[:, 0], expected[:, 0], atol=0.02)


def test_inverted_lists_answer_the_same_alone_and_in_a_batch(inverted: FaissIndex) -> None:
    asked = clustered(64, 5)
    scores, found = inverted.search(asked, 20)
    alone = [inverted.search(asked[i : i + 1], 20) for i in range(len(asked))]
    np.testing.assert_array_equal(scores, np.concatenate([s for s, _ in alone]))
    np.testing.assert_array_equal(found, np.concatenate([r for _, r in alone]))


def test_eight_threads_find_what_one_finds(inverted: FaissIndex) -> None:
    asked = [clustered(count, seed) for seed, count in enumerate([1, 1, 3, 40] * 16, 10)]
    expected = [inverted.search(queries, 30) for queries in asked]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda queries: inverted.search(queries, 30), asked))
    for (scores, found), (scores_alone, found_alone) in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(scores, scores_alone)
        np.testing.assert_array_equal(found, found_alone)


@pytest.mark.parametrize("count", [0, 300, 20_000])
def test_an_opened_index_answers_as_the_saved_one(rows: np.ndarray, count: int, tmp_path: Path) -> None:
    built = FaissIndex.build(rows[:count], flat_max=1000)
    built.save(tmp_path / "rows.index")
    opened = FaissIndex.open(tmp_path / "rows.index")
    assert len(opened) == count and [path.name for path in tmp_path.iterdir()] == ["rows.index"]
    for queries in (clustered(1, 6), clustered(50, 7)):
        for mine, theirs in zip(opened.search(queries, 10), built.search(queries, 10), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("flat_max", [1000, 10], ids=["flat", "inverted"])
def test_a_file_that_was_cut_or_changed_anywhere_is_refused(rows: np.ndarray, flat_max: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.index"
    FaissIndex.build(rows[:500], flat_max=flat_max).save(path)
    data = path.read_bytes()
    wrong = [b"", b"\0" * 1000, b"another file", data[:-1], data + b"\0", *(data[:end] for end in range(0, len(data), 1 + len(data) // 20))]
    for place in range(0, len(data), 1 + len(data) // 20):
        wrong.append(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    for changed in wrong:
        path.write_bytes(changed)
        with pytest.raises(CorruptIndex, match=r"rows\.index: .* It is derived: delete it, and it is built again\."):
            FaissIndex.open(path)


def test_an_index_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.index", tmp_path):
        with pytest.raises(CorruptIndex, match="cannot be read"):
            FaissIndex.open(path)


def test_a_failed_save_leaves_the_file_that_was_there(rows: np.ndarray, tmp_path: Path) -> None:
    FaissIndex.build(rows[:10]).save(tmp_path / "rows.index")
    with pytest.raises(RegistryError):
        FaissIndex.build(rows[:20]).save(tmp_path / "absent" / "rows.index")
    (tmp_path / "taken").mkdir()
    with pytest.raises(RegistryError):
        FaissIndex.build(rows[:20]).save(tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.index", "taken"]
    assert len(FaissIndex.open(tmp_path / "rows.index")) == 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_and_queries_that_are_not_finite_are_refused_by_number(value: float) -> None:
    bad = clustered(40, 8)
    bad[7, 3] = value
    for make in (ExactIndex, FaissIndex.build, lambda stored: FaissIndex.build(stored, flat_max=0)):
        with pytest.raises(InvalidInput, match="row 7 of 40 is not finite"):
            make(bad)
        with pytest.raises(InvalidInput, match="query 8 of 40 is not finite"):
            make(clustered(50, 9)).search(bad, 3)


@pytest.mark.parametrize("flat_max", [1000, 0], ids=["flat", "inverted"])
def test_queries_that_do_not_fit_are_refused(flat_max: int) -> None:
    indexes: list[Index] = [FaissIndex.build(clustered(50, 9), flat_max=flat_max), ExactIndex(clustered(50, 9))]
    for index in indexes:
        for queries, k in ((np.ones((2, WIDTH - 1), np.float32), 3), (np.ones(WIDTH, np.float32), 3), (np.ones((2, WIDTH), np.float32), 0)):
            with pytest.raises(InvalidInput):
                index.search(queries, k)


def test_zero_rows_and_zero_queries_score_zero() -> None:
    stored = np.zeros((100, 8), np.float32)
    scores, found = FaissIndex.build(stored, flat_max=0).search(np.zeros((2, 8), np.float32), 5)
    np.testing.assert_array_equal(scores, np.zeros((2, 5)))
    np.testing.assert_array_equal(found, np.tile(np.arange(5), (2, 1)))


def test_inverted_lists_hold_every_row_where_most_are_the_same() -> None:
    stored = np.concatenate([np.tile(clustered(1, 11), (6000, 1)), clustered(300, 12)])
    index = FaissIndex.build(stored, flat_max=0)
    _, found = index.search(stored[6000:], 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(6000, 6300))
    np.testing.assert_array_equal(index.search(stored[:2], 5)[1], np.tile(np.arange(5), (2, 1)))
