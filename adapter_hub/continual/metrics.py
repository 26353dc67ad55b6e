"""What is kept and what is gained over a sequence of tasks: numbers from a matrix of accuracies. Pure numpy.

R[i, j] is the accuracy on task j, 0-1, after the i-th task was learned (both from 0, in the order they were learned); not a number where
it was not measured. Means are over tasks, each counting the same, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapter_hub.errors import InvalidInput

# t tasks
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """R, and what follows from it. Raises InvalidInput for what is none."""

    tasks: tuple[str, ...]    # in the order they were learned
    values: F64               # (t, t); at and below the diagonal all are measured

    def __init__(self, tasks: Sequence[str], values: ArrayLike) -> None:
        object.__setattr__(self, "tasks", tuple(tasks))
        object.__setattr__(self, "values", _numbers("accuracies", values))
        if not self.tasks or self.values.shape != (len(self.tasks), len(self.tasks)):
            fact = f"accuracies of shape {self.values.shape} are none of {len(self.tasks)} tasks"
            raise InvalidInput(f"{fact}.", hint="Give a row a stage and a column a task, as many as tasks.")
        learned = self.values[np.tril_indices(len(self.tasks))]
        if not ((learned >= 0) & (learned <= 1)).all():
            raise InvalidInput("an accuracy of a task that was learned is missing, or not from 0 to 1.", hint="Only tasks to come may be NaN.")

    @property
    def acc(self) -> float:
        """ACC: the mean accuracy over all tasks after the last (Lopez-Paz and Ranzato 2017, eq. 2)."""
        return float(self.values[-1].mean())

    @property
    def curve(self) -> tuple[float, ...]:
        """The mean accuracy over the tasks learned so far, after each stage."""
        return tuple(float(row[: stage + 1].mean()) for stage, row in enumerate(self.values))

    @property
    def average_incremental_accuracy(self) -> float:
        """The mean of `curve` (Rebuffi et al. 2017, section 4)."""
        return float(np.mean(self.curve))

    @property
    def backward_transfer(self) -> float:
        """BWT: mean of R[t−1, j] − R[j, j] over all tasks but the last (Lopez-Paz and Ranzato 2017, eq. 3); 0 for one task."""
        return _mean(self.values[-1, :-1] - self._learned[:-1])

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy that was ever had, minus that after the last (Chaudhry et al. 2018, eq. 3).

        Best: after any stage from the task's own on, the last excepted. Below 0 where later tasks helped.
        """
        best = [self.values[task:-1, task].max() for task in range(len(self.tasks) - 1)]
        return _mean(np.array(best) - self.values[-1, :-1])

    def forward_transfer(self, cold: Sequence[float]) -> float:
        """FWT: mean of R[j, j] − cold[j] over all tasks but the first: what the earlier tasks gave beyond a cold start.

        `cold` (t,) are the accuracies of each task learned alone, from the base, with the same examples and steps. This is the
        reference of Wołczyk et al. (2021), on final accuracies; Lopez-Paz and Ranzato's FWT asks for a task before it was learned.
        """
        if len(cold) != len(self.tasks):
            raise InvalidInput(f"{len(cold)} cold starts stand beside {len(self.tasks)} tasks.", hint="Give one a task, in their order.")
        alone = _numbers("cold starts", cold)
        if not ((alone[1:] >= 0) & (alone[1:] <= 1)).all():
            raise InvalidInput("the accuracy of a cold start is missing, or not from 0 to 1.", hint="Only that of the first task may be NaN.")
        return _mean((self._learned - alone)[1:])

    @property
    def _learned(self) -> F64:
        """(t,): R[j, j]"""
        return np.diagonal(self.values)


def routing_gap(routed: AccuracyMatrix, named: AccuracyMatrix) -> float:
    """What it costs not to be told the task: ACC with the adapter named minus ACC routed. Raises InvalidInput for matrices of other tasks."""
    if sorted(routed.tasks) != sorted(named.tasks):
        fact = f"accuracies of {', '.join(routed.tasks)} stand beside those of {', '.join(named.tasks)}"
        raise InvalidInput(f"{fact}.", hint="Compare both ways over the same tasks.")
    return named.acc - routed.acc


def _numbers(what: str, values: ArrayLike) -> F64:
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"the {what} are not numbers of one shape: {error}.", hint="Give as many in each row, NaN for none.") from error


def _mean(values: F64) -> float:
    return float(values.mean()) if len(values) else 0.0
