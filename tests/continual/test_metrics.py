"""The metrics of continual learning, beside their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.continual.metrics import AccuracyMatrix, routing_gap
from adapter_hub.errors import InvalidInput

NAN = float("nan")
FORGETS = AccuracyMatrix(("a", "b", "c"), [[0.9, NAN, NAN], [0.6, 0.8, 0.2], [0.7, 0.5, 1.0]])


def test_the_numbers_of_a_sequence_that_forgets() -> None:
    assert FORGETS.acc == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert FORGETS.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert FORGETS.forgetting == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert FORGETS.curve == pytest.approx((0.9, 0.7, 2.2 / 3))
    assert FORGETS.average_incremental_accuracy == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)
    assert FORGETS.forward_transfer([0.5, 0.7, 0.8]) == pytest.approx(((0.8 - 0.7) + (1.0 - 0.8)) / 2)


def test_a_task_that_later_ones_made_better_is_not_forgotten() -> None:
    matrix = AccuracyMatrix(("a", "b", "c"), [[0.5, NAN, NAN], [0.6, 0.5, NAN], [0.9, 0.5, 0.5]])
    assert matrix.backward_transfer == pytest.approx((0.4 + 0) / 2)
    assert matrix.forgetting == pytest.approx(((0.6 - 0.9) + 0) / 2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_isolated_tasks_forget_nothing_and_transfer_nothing(accuracies: list[float]) -> None:
    matrix = AccuracyMatrix(tuple(map(str, range(len(accuracies)))), np.tile(accuracies, (len(accuracies), 1)))
    assert (matrix.backward_transfer, matrix.forgetting, matrix.forward_transfer(accuracies)) == (0, 0, 0)
    assert matrix.acc == pytest.approx(np.mean(accuracies))


def test_the_routing_gap_is_what_the_name_gives() -> None:
    named = AccuracyMatrix(("a",), [[0.9]])
    assert routing_gap(AccuracyMatrix(("a",), [[0.8]]), named) == pytest.approx(0.1)


@pytest.mark.parametrize("values", [[[0.5, 0.5]], [[0.5, 0], [NAN, 0.5]], [[1.5, 0], [0, 0]], [[-0.1, 0], [0, 0]]])
def test_what_is_no_matrix_of_accuracies_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(InvalidInput, match="accurac"):
        AccuracyMatrix(("a", "b"), values)
    with pytest.raises(InvalidInput, match="2 cold starts stand beside 3 tasks"):
        FORGETS.forward_transfer([0.1, 0.2])


def test_what_is_no_number_or_of_other_tasks_is_refused() -> None:
    """Previously numpy's own errors, NaN for an answer, and a gap between matrices of different tasks."""
    for values in ([[1], [1, 1]], [["x"]]):
        with pytest.raises(InvalidInput, match="the accuracies are not numbers of one shape"):
            AccuracyMatrix(("a", "b"), values)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="the accuracy of a cold start is missing"):
        FORGETS.forward_transfer([NAN, NAN, 0.5])
    with pytest.raises(InvalidInput, match="accuracies of a stand beside those of b"):
        routing_gap(AccuracyMatrix(("a",), [[0.8]]), AccuracyMatrix(("b",), [[0.9]]))
