"""What was shown to be none of an adapter's: ridge regression that tells its negatives from its own exemplars. Pure numpy and scipy.

It is the adapter's alone: no other adapter's exemplars are in it, and nothing of it is in theirs. What it answers, about 1 for inputs
like the negatives and about 0 for inputs like the exemplars, is taken off the adapter's score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import linalg

from adapter_hub.errors import CorruptIndex
from adapter_hub.routing.features import F32, Features, Kernel, pack, unpack
from adapter_hub.routing.statistics import F64, I64, Exemplars, read_tensors

# n inputs, m exemplars and negatives that were solved
SCHEMA = 2
RIDGE = 0.01            # of the mean eigenvalue; from 0.003 to 0.1 nothing changes on CLINC150's validation split
MET_MAX = 512           # of an adapter's exemplars, evenly spread, and of its negatives


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """Of one adapter."""

    basis: Kernel       # m
    weights: F32        # (m,)

    @classmethod
    def of(cls, exemplars: Exemplars) -> Contrast | None:
        """None where there are no negatives."""
        if not len(exemplars.negatives):
            return None
        basis, factor, met = _factored(exemplars)
        return cls(basis, _weights(factor, len(met)))

    def penalties(self, features: Features) -> F32:
        """(n,), 0 or more."""
        return np.asarray(np.maximum(self.basis(features) @ self.weights, 0), np.float32)

    def to_bytes(self) -> bytes:
        offsets, sketches = pack(self.basis.exemplars.lexical)
        tensors: dict[str, NDArray[Any]] = {"dense": self.basis.exemplars.dense, "offsets": offsets, "sketches": sketches, "weights": self.weights}
        return safetensors.numpy.save(tensors, {"contrast": json.dumps({"schema": SCHEMA})})

    @classmethod
    def from_bytes(cls, data: bytes, source: Path) -> Contrast:
        """Raises CorruptIndex if these are not the bytes of one."""
        tensors, _ = read_tensors(data, "contrast", SCHEMA, source, CorruptIndex)
        try:
            made = cls(Kernel(Features(tensors["dense"], unpack(tensors["offsets"], tensors["sketches"]))), tensors["weights"])
        except (KeyError, ValueError) as error:
            raise CorruptIndex(source, f"{error} is missing or has another form") from error
        if made.weights.dtype != np.float32 or made.weights.shape != (len(made.basis.exemplars.dense),) or not np.isfinite(made.weights).all():
            raise CorruptIndex(source, f"weights {made.weights.dtype} {made.weights.shape} do not fit")
        return made


def left_out_penalties(exemplars: Exemplars, rows: I64) -> F32:
    """(n,): of these exemplars, each by the regression without it; as `Solver.left_out`."""
    basis, factor, met = _factored(exemplars)
    weights = _weights(factor, len(met))
    inverse = linalg.solve_triangular(factor, np.eye(len(factor)), lower=True, check_finite=False)
    found = np.maximum(basis(exemplars.features[rows]) @ weights, 0)
    places = np.searchsorted(met, rows)
    known = places < len(met)
    known[known] = met[places[known]] == rows[known]
    found[known] = np.maximum(-(weights / (inverse**2).sum(axis=0))[places[known]], 0)    # the target is 0
    return np.asarray(found, np.float32)


def _factored(exemplars: Exemplars) -> tuple[Kernel, F64, I64]:
    """(basis, Cholesky factor of its kernel matrix and the ridge, which exemplars are the first of the basis)."""
    met, negatives = (np.arange(count)[:: max(1, -(-count // MET_MAX))] for count in (len(exemplars), len(exemplars.negatives)))
    basis = Kernel(Features.concatenate([exemplars.features[met], exemplars.negatives[negatives]]))
    gram = basis(basis.exemplars).astype(np.float64)
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    return basis, linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False), met


def _weights(factor: F64, met: int) -> F32:
    targets = (np.arange(len(factor)) >= met).astype(np.float64)
    return np.asarray(linalg.cho_solve((factor, True), targets, check_finite=False), np.float32)
