"""The head: ridge regression from features to the classes of all adapters, solved in closed form. Pure numpy and scipy.

Its parameters follow from sums over the exemplars (φφᵀ and φyᵀ), taken in a canonical order: the same adapters give the same
head, whatever was added or removed before. An exemplar's answer without itself costs no second solve. Few exemplars are met by
their exact kernel, many by random features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import linalg, sparse

from adapter_hub.errors import CorruptIndex, InvalidName
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.features import F32, HIDDEN_DIM, Features, Hidden, Kernel, pack, unpack
from adapter_hub.routing.statistics import F64, I64, Exemplars, read_tensors

# n exemplars, h hidden width, k classes of all solved adapters
SCHEMA = 4
RIDGE = 0.003              # of the mean eigenvalue; from 0.001 to 0.01 little changes on validation splits
CLASSES_MAX = 4096         # more: prototypes alone. h × k numbers are held
EXACT_MAX = 2**14          # exemplars that are met by their exact kernel: 2 GiB to solve; more by random features. Raise SCHEMA with another limit
EXEMPLARS_MAX = 200_000    # more: prototypes alone. A minute to solve on two cores
DIM_MAX = 2**14            # of an encoder whose head is read: more is damage, and would be an allocation
BLOCK = 4096               # exemplars that are worked on at once
ASKED = 1024               # inputs that are answered at once: of EXACT_MAX exemplars 200 MB


@dataclass(frozen=True, eq=False)
class Head:
    """response = basis(features) · weights: near 1 for inputs like a class's exemplars, near 0 for the rest."""

    basis: Hidden | Kernel
    weights: F32                          # (h, k)
    columns: Mapping[AdapterRef, int]     # the first class of each solved adapter
    digest: str                           # of what it was solved on

    def responses(self, features: Features) -> F32:
        """(n, k), added up in float64: where classes share exemplars large weights cancel, and a row alone gets what it gets in a batch."""
        blocks = (features[start : start + ASKED] for start in range(0, max(1, len(features)), ASKED))
        return np.concatenate([np.asarray(self.basis(block).astype(np.float64) @ self._weights64, np.float32) for block in blocks])

    @cached_property
    def _weights64(self) -> F64:
        return self.weights.astype(np.float64)

    def to_bytes(self) -> bytes:
        facts = {"schema": SCHEMA, "digest": self.digest, "columns": {str(ref): column for ref, column in self.columns.items()}}
        tensors: dict[str, NDArray[Any]] = {"weights": self.weights}
        if isinstance(self.basis, Kernel):
            offsets, sketches = pack(self.basis.exemplars.lexical)
            tensors |= {"dense": self.basis.exemplars.dense, "offsets": offsets, "sketches": sketches}
        else:
            facts["dim"], facts["drawn"] = self.basis.dense.shape
        return safetensors.numpy.save(tensors, {"head": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, source: Path | str = "head.safetensors") -> Head:
        """Raises CorruptIndex if these are not the bytes of a head."""
        tensors, facts = read_tensors(data, "head", SCHEMA, source, CorruptIndex)
        try:
            weights = tensors["weights"]
            if weights.dtype != np.float32 or weights.ndim != 2 or not np.isfinite(weights).all():
                raise ValueError("the weights are not finite float32 in two dimensions, what they should be")
            columns = {AdapterRef.parse(ref): int(column) for ref, column in facts["columns"].items()}
            basis: Hidden | Kernel
            if "dense" in tensors:
                dense, lexical = tensors["dense"], unpack(tensors["offsets"], tensors["sketches"])
                if dense.dtype != np.float32 or dense.ndim != 2 or len(dense) != lexical.shape[0] or not np.isfinite(dense).all():
                    raise ValueError("an exemplar")
                basis = Kernel(Features(dense, lexical))
            else:
                dim, drawn = int(facts["dim"]), int(facts["drawn"])
                if not (1 <= dim <= DIM_MAX and 1 <= drawn <= len(weights)):
                    raise ValueError("the width")
                basis = Hidden.of(dim, drawn)
            head = cls(basis, weights, columns, str(facts["digest"]))
        except (KeyError, TypeError, ValueError, AttributeError, InvalidName) as error:
            raise CorruptIndex(source, f"{error} is missing or has another form") from error
        if basis.width != len(weights) or not all(0 <= column < weights.shape[1] for column in columns.values()):
            raise CorruptIndex(source, f"weights {weights.shape} do not fit a basis of {basis.width} or its columns")
        return head


def can_solve(exemplars: Mapping[AdapterRef, Exemplars]) -> bool:
    """Whether these have a head: a router that knows no more than their counts says the same."""
    solved = [one for one in exemplars.values() if not one.single]
    return fits(sum(one.target_count for one in solved), sum(map(len, solved)))


def fits(classes: int, exemplars: int) -> bool:
    """Two classes at least, and not more than a head can hold. What is single, see `Exemplars`, is not counted."""
    return 2 <= classes <= CLASSES_MAX and exemplars <= EXEMPLARS_MAX


def digest_of(digests: Mapping[AdapterRef, str]) -> str:
    """Names the head of these versions, by the digests of their routing states."""
    lines = [f"{ref} {digests[ref]}" for ref in sorted(digests)]
    return "sha256:" + hashlib.sha256("\n".join([f"head {SCHEMA} {RIDGE}", *lines]).encode()).hexdigest()


class Solver:
    """The normal equations of some adapters, factored once: in the space of exemplars up to `exact_max`, else of `drawn` random features."""

    def __init__(self, exemplars: Mapping[AdapterRef, Exemplars], dim: int, *, exact_max: int = EXACT_MAX, drawn: int = HIDDEN_DIM) -> None:
        refs = sorted(ref for ref, one in exemplars.items() if not one.single)
        parts = [exemplars[ref] for ref in refs]
        firsts = np.cumsum([0, *(part.target_count for part in parts)])
        self.columns = dict(zip(refs, firsts[:-1].tolist(), strict=True))
        self.targets: I64 = np.concatenate([part.targets + first for part, first in zip(parts, firsts[:-1], strict=True)])
        self.features = Features.concatenate([part.features for part in parts])
        self.basis = Kernel(self.features) if len(self.features) <= exact_max else Hidden.of(dim, drawn)
        self._class_count = int(firsts[-1])
        # Symmetric, and LAPACK's order is the transposed one: so it is factored where it lies.
        self._factor = linalg.cholesky(self._gram().T, lower=True, overwrite_a=True, check_finite=False)

    def _gram(self) -> F64:
        """φᵀφ, or the kernel matrix, and the ridge."""
        gram = np.zeros((self.basis.width, self.basis.width))
        for start in range(0, len(self.features), BLOCK):
            block = self.basis(self.features[start : start + BLOCK])
            if isinstance(self.basis, Kernel):
                gram[start : start + BLOCK] = block
            else:
                gram += block.T @ block
        if isinstance(self.basis, Kernel):
            first, same = self._distinct
            for row in np.flatnonzero(first[same] != np.arange(len(same))):
                # The upper triangle is read. Equal exemplars differ there by rounding, which the solution magnifies.
                met = first[same[row]]
                products = np.concatenate([gram[:met, met], gram[met, met:]])
                products[row] = gram[met, met]
                gram[:row, row], gram[row, row:] = products[:row], products[row:]
        gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
        return gram

    @cached_property
    def _distinct(self) -> tuple[I64, I64]:
        return self.features.distinct()

    @cached_property
    def _weights(self) -> F64:
        if isinstance(self.basis, Kernel):
            moments = np.eye(self._class_count)[self.targets]
        else:
            moments = np.zeros((self.basis.width, self._class_count))
            for start in range(0, len(self.features), BLOCK):
                targets = self.targets[start : start + BLOCK]
                chosen = sparse.csr_matrix((np.ones(len(targets), np.float32), (targets, np.arange(len(targets)))), (self._class_count, len(targets)))
                moments += (chosen @ self.basis(self.features[start : start + BLOCK])).T
        return np.asarray(linalg.cho_solve((self._factor, True), moments, check_finite=False))

    @cached_property
    def _inverse_diagonal(self) -> F32:
        """(n,), of the kernel matrix and the ridge: the squared columns of the factor's inverse, each zero above its own row."""
        found = np.empty(len(self._factor32), np.float32)
        for start in range(0, len(found), BLOCK):
            rest = self._factor32[start:, start:]
            columns = np.eye(len(rest), min(BLOCK, len(rest)), dtype=np.float32, order="F")
            columns = linalg.solve_triangular(rest, columns, lower=True, overwrite_b=True, check_finite=False)
            found[start : start + BLOCK] = (columns**2).sum(axis=0)
        return found

    @cached_property
    def _factor32(self) -> F32:
        return np.asarray(self._factor, np.float32)

    def head(self, digest: str) -> Head:
        basis, weights = self.basis, self._weights
        if isinstance(basis, Kernel):    # equal exemplars of several adapters are one row of the basis: their weights nearly cancel
            first, same = self._distinct
            basis, weights = Kernel(self.features[first]), np.zeros((len(first), self._class_count))
            np.add.at(weights, same, self._weights)
        # safetensors writes memory as it lies, and LAPACK's lies by columns
        return Head(basis, np.ascontiguousarray(weights, np.float32), self.columns, digest)

    def left_out(self, rows: I64) -> F32:
        """(n, k): the responses to these exemplars, each by the head solved without it.

        y - αᵢ / (K + λ)⁻¹ᵢᵢ in the space of exemplars; y - (y - ŷ) / (1 - hᵢ) with hᵢ = φᵢᵀ(φᵀφ + λ)⁻¹φᵢ in that of features (Hastie,
        Tibshirani and Friedman 2009, section 7.10).
        """
        targets = np.eye(self._class_count, dtype=np.float32)[self.targets[rows]]
        if isinstance(self.basis, Kernel):
            return np.asarray(targets - self._weights[rows] / self._inverse_diagonal[rows, None], np.float32)
        hidden = self.basis(self.features[rows])
        solved = linalg.solve_triangular(self._factor32, hidden.T, lower=True, check_finite=False)
        leverage = np.minimum((solved**2).sum(axis=0), 1 - 1e-6)
        return np.asarray(targets - (targets - hidden @ self._weights) / (1 - leverage)[:, None], np.float32)
