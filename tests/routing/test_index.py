"""The FAISS index against plain numpy, by value."""

from __future__ import annotations

import numpy as np
import pytest

from adapter_hub.routing.index import ExactIndex, FaissIndex


@pytest.mark.parametrize("count", [0, 1, 7, 500])
@pytest.mark.parametrize("queries", [1, 40])
def test_faiss_equals_exact(count: int, queries: int) -> None:
    rng = np.random.default_rng(count)
    rows, asked = rng.normal(size=(count, 24)).astype(np.float32), rng.normal(size=(queries, 24)).astype(np.float32)
    fast, slow = FaissIndex(24), ExactIndex(24)
    for index in (fast, slow):
        index.add(rows[: count // 2])
        index.add(rows[count // 2 :])
    assert len(fast) == len(slow) == count
    (scores, found), (expected, places) = fast.search(asked, 10), slow.search(asked, 10)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert (found[:, count:] == -1).all() and np.isneginf(scores[:, count:]).all()
