"""Find the rows with the greatest inner product. `FaissIndex` answers; `ExactIndex` is the plain reference, right by reading."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# n queries, m stored rows, f width, k results
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class Index(Protocol):
    """Add and search. Rows are numbered 0, 1, 2, … in the order of `add`."""

    def add(self, rows: Floats) -> None: ...

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Return (scores, rows), both (n, k), best first; score -inf and row -1 where fewer than k exist."""
        ...

    def __len__(self) -> int: ...


class FaissIndex:
    """Exact flat search by FAISS. Not to be shared with a writer: a router builds its own and never adds to it again."""

    def __init__(self, width: int) -> None:
        import faiss

        self._index = faiss.IndexFlatIP(width)

    def add(self, rows: Floats) -> None:
        self._index.add(np.ascontiguousarray(rows, np.float32))

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        # FAISS pads with the lowest float, which a later subtraction would overflow.
        return np.where(rows < 0, np.float32(-np.inf), scores), rows

    def __len__(self) -> int:
        return int(self._index.ntotal)


class ExactIndex:
    """The same by one float64 product and one stable sort."""

    def __init__(self, width: int) -> None:
        self._rows = np.empty((0, width), np.float64)

    def add(self, rows: Floats) -> None:
        self._rows = np.vstack([self._rows, rows.astype(np.float64)])

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        products = queries.astype(np.float64) @ self._rows.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :k]
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        scores[:, : order.shape[1]] = np.take_along_axis(products, order, axis=1)
        rows[:, : order.shape[1]] = order
        return scores, rows

    def __len__(self) -> int:
        return len(self._rows)
