"""Find the rows with the greatest inner product. `FaissIndex` answers fast; `ExactIndex` is the plain reference, right by reading.

Knows neither adapters nor decisions: the router scores what is found here again, exactly. An index is made once from all of its rows.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapter_hub.errors import CorruptIndex, InvalidInput
from adapter_hub.registry.artifacts import CHUNK_BYTES, storage_errors, sync_folder

# n queries, p stored rows, d width, k results
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]
Stored = NDArray[np.float16] | NDArray[np.float32]

# Chosen by benchmarks/routing_scale.py.
FLAT_MAX = 20_000            # rows searched one by one, exactly: some 2 ms a query
LISTS_PER_ROOT = 4.5         # inverted lists for each √p
PROBES = 40                  # lists read for a query
SAMPLE_PER_LIST = 32         # rows that place the centre of a list
ITERATIONS = 6               # of k-means
GROUPS_READ = 8              # groups of lists in which a row looks for its own
SEED = 20_240
BYTE_MAX = 127
PEAK_MIN = 1e-30             # what is smaller throughout counts as zero: its scale would not be a float32
BLOCK = 65_536               # rows that are float32 at a time while building
PARALLEL_MIN = 8             # queries; fewer would wait for threads longer than they work
MAGIC = b"adapter_hub index 1\n"
SCALE = struct.Struct("<d")
DIGEST_BYTES = 32


class Index(Protocol):
    """Rows 0, 1, 2, … to search by inner product; nothing is added after it is made."""

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Return (scores, rows), both (n, k), best first, the lower row first where scores are equal; -inf and -1 where fewer exist.

        Raises InvalidInput for queries that are not finite rows of the index's width, and for k below 1.
        """
        ...

    def __len__(self) -> int: ...


class ExactIndex:
    """One float64 product and one stable sort."""

    def __init__(self, rows: Stored) -> None:
        """Over rows (p, d). Raises InvalidInput."""
        _check_rows(rows)
        self._rows = rows.astype(np.float64)

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        products = _checked(queries, self._rows.shape[1], k).astype(np.float64) @ self._rows.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :k]
        scores, rows = _nothing(len(queries), k)
        scores[:, : order.shape[1]] = np.take_along_axis(products, order, axis=1)
        rows[:, : order.shape[1]] = order
        return scores, rows

    def __len__(self) -> int:
        return len(self._rows)


class FaissIndex:
    """Flat and exact while that is fast; above, inverted lists of one byte a number. Make one with `build` or `open`.

    Any number of threads may search one index.
    """

    def __init__(self, index: Any, scale: float) -> None:
        self._index = index    # faiss.IndexFlatIP or faiss.IndexIVFScalarQuantizer
        self._scale = scale    # stored bytes over the caller's rows; 0 where rows are stored as they are

    @classmethod
    def build(cls, rows: Stored, *, flat_max: int = FLAT_MAX) -> FaissIndex:
        """Over rows (p, d); up to `flat_max` of them exactly. Raises InvalidInput for rows that are not finite."""
        import faiss

        _check_rows(rows)
        if len(rows) > max(flat_max, 0):
            return cls(*_inverted(rows))
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(np.ascontiguousarray(rows, np.float32))
        return cls(index, 0.0)

    @classmethod
    def open(cls, path: Path) -> FaissIndex:
        """What `save` wrote. Raises CorruptIndex where it is missing, cut short, changed or something else: then build it again."""
        import faiss

        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
                head = file.read(len(MAGIC) + SCALE.size)
                if size < len(head) or not head.startswith(MAGIC):
                    raise CorruptIndex(path, "not an index")
                hasher, left = hashlib.sha256(head), size - len(head)
                while chunk := file.read(min(CHUNK_BYTES, left)):
                    hasher.update(chunk)
                    left -= len(chunk)
                # Before FAISS parses it: a wrong length in the file would be an allocation.
                if file.read() != hasher.digest():
                    raise CorruptIndex(path, "cut short or changed")
                file.seek(len(head))
                reader = faiss.PyCallbackIOReader(file.read, CHUNK_BYTES)    # type: ignore[attr-defined]
                index = faiss.read_index(reader)
        except OSError as error:
            raise CorruptIndex(path, f"cannot be read: {error.strerror or error}") from error
        except RuntimeError as error:
            raise CorruptIndex(path, "written by another FAISS") from error
        return cls(index, *SCALE.unpack(head[len(MAGIC) :]))

    def save(self, path: Path) -> None:
        """Write the file, durably: all of it or nothing. Raises RegistryError, StorageFull, ReadOnlyRegistry."""
        import faiss

        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        head = MAGIC + SCALE.pack(self._scale)
        hasher = hashlib.sha256(head)

        with storage_errors(path):
            try:
                with temporary.open("xb") as file:

                    def write(data: bytes) -> None:
                        hasher.update(data)
                        file.write(data)

                    file.write(head)
                    writer = faiss.PyCallbackIOWriter(write, CHUNK_BYTES)    # type: ignore[attr-defined]
                    faiss.write_index(self._index, writer)
                    file.write(hasher.digest())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        queries = _checked(queries, self._index.d, k)
        scores, rows = _nothing(len(queries), k)
        count = min(k, len(self))
        # One more than wanted: it shows whether the last place has rivals of the same score, among whom FAISS chooses as it likes.
        asked, open_queries = min(count + 1, len(self)), np.arange(len(queries) if count else 0)
        while len(open_queries):
            found_scores, found = self._found(queries[open_queries], asked)
            tied = (found_scores[:, count - 1] == found_scores[:, -1]) if asked > count and asked < len(self) else np.zeros(len(found), bool)
            done = open_queries[~tied]
            scores[done, :count], rows[done, :count] = found_scores[~tied, :count], found[~tied, :count]
            open_queries, asked = open_queries[tied], min(4 * asked, len(self))
        return scores, rows

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def _found(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """The k ≤ p best of each query, equal scores by row."""
        import faiss

        scales: Floats | None = None
        if self._scale:
            queries, scales = _whole(queries)
        with _threads(len(queries)):
            scores, rows = self._index.search(queries, k) if scales is None else self._read(queries, k)
            short = np.flatnonzero(rows[:, -1] < 0)    # the lists that were read hold fewer than k
            if len(short):
                every = faiss.SearchParametersIVF()
                every.nprobe = self._index.nlist
                scores[short], rows[short] = self._index.search(queries[short], k, params=every)
        if scales is not None:
            scores = scores / scales / np.float32(self._scale)
        equal = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
        order = np.lexsort((rows[equal], -scores[equal]), axis=1)
        rows[equal] = np.take_along_axis(rows[equal], order, axis=1)
        return scores, rows

    def _read(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Search the nearest lists. Queries of the same first list go one after another: what they read is still in the cache."""
        centre_scores, lists = self._index.quantizer.search(queries, self._index.nprobe)
        order = np.argsort(lists[:, 0], kind="stable")
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        scores[order], rows[order] = self._index.search_preassigned(queries[order], k, lists[order], centre_scores[order])
        return scores, rows


def _inverted(rows: Stored) -> tuple[Any, float]:
    """(inverted lists around the centres of k-means (Sivic and Zisserman 2003), what rows were multiplied by to be whole bytes).

    Bytes hold the rows themselves, not what is left after the list's centre, so that products are of whole numbers: the fastest
    to read, and the same in any order.
    """
    import faiss

    width = rows.shape[1]
    lists = min(1 << round(math.log2(LISTS_PER_ROOT * math.sqrt(len(rows)))), len(rows))
    chosen = np.random.default_rng(SEED).choice(len(rows), min(SAMPLE_PER_LIST * lists, len(rows)), replace=False)
    centres, finder = _centres(np.ascontiguousarray(rows[np.sort(chosen)], np.float32), lists)
    homes = np.concatenate([finder.assign(block, 1)[:, 0] for block in _blocks(rows)])
    if len(lost := np.flatnonzero(homes < 0)):    # the groups that were read have no list: most rows are alike
        homes[lost] = centres.assign(np.ascontiguousarray(rows[lost], np.float32), 1)[:, 0]
    scale = BYTE_MAX / max(PEAK_MIN, *(float(np.abs(block).max()) for block in _blocks(rows)))

    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
    index: Any = faiss.IndexIVFScalarQuantizer(centres, width, lists, kind, faiss.METRIC_INNER_PRODUCT, False)
    index.train(np.zeros((1, width), np.float32))    # nothing is left to learn
    index.nprobe = min(PROBES, lists)
    # Lists that grow row by row take up to twice their size: give each its room first.
    for number, length in enumerate(np.bincount(homes, minlength=lists).tolist()):
        index.invlists.resize(number, length)
        index.invlists.resize(number, 0)
    for block in _blocks(rows):
        home, whole = homes[index.ntotal : index.ntotal + len(block)], np.rint(block * np.float32(scale))
        index.add_core(len(whole), faiss.swig_ptr(whole), None, faiss.swig_ptr(home))
    return index, scale


def _centres(sample: Floats, count: int) -> tuple[Any, Any]:
    """(all `count` centres to read for a query, the same in groups to place a row quickly): FAISS indexes.

    k-means of groups, then of each group's members: a tenth of the time of one k-means, for the same recall.
    """
    import faiss

    width, groups = sample.shape[1], max(1, round(math.sqrt(count)))
    top = _kmeans(sample, groups)
    home = top.assign(sample, 1)[:, 0]
    quotas = np.bincount(home, minlength=groups) * (count / len(sample))
    shares = np.floor(quotas).astype(np.int64)
    shares[np.argsort(shares - quotas, kind="stable")[: count - shares.sum()]] += 1
    centres = faiss.IndexFlatIP(width)
    for group in np.flatnonzero(shares):
        part = _kmeans(sample[home == group], int(shares[group]))
        centres.add(part.reconstruct_n(0, part.ntotal))
    finder: Any = faiss.IndexIVFFlat(top, width, groups, faiss.METRIC_INNER_PRODUCT)
    finder.nprobe = min(GROUPS_READ, groups)
    finder.train(sample[:1])
    finder.add(centres.reconstruct_n(0, count))
    return centres, finder


def _kmeans(points: Floats, count: int) -> Any:
    """An inner-product index of `count` unit centres."""
    import faiss

    centres = faiss.IndexFlatIP(points.shape[1])
    clustering = faiss.Clustering(points.shape[1], count)
    clustering.spherical, clustering.niter, clustering.seed = True, ITERATIONS, SEED
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(points)
    clustering.train(points, centres)
    return centres


def _whole(queries: Floats) -> tuple[Floats, Floats]:
    """(whole numbers up to BYTE_MAX, what each row was multiplied by (n, 1)): FAISS reads a query of such lists as bytes too."""
    peaks = np.abs(queries).max(axis=1, keepdims=True)
    scales: Floats = np.asarray(BYTE_MAX / np.maximum(peaks, PEAK_MIN), np.float32)
    return np.rint(queries * scales), scales


@contextmanager
def _threads(queries: int) -> Iterator[None]:
    """One thread for a few queries. FAISS's number of threads belongs to the thread that calls, so others do not notice."""
    import faiss

    usual = faiss.omp_get_max_threads()
    if queries < PARALLEL_MIN:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(usual)


def _blocks(rows: Stored) -> Iterator[Floats]:
    for start in range(0, len(rows), BLOCK):
        yield np.ascontiguousarray(rows[start : start + BLOCK], np.float32)


def _check_rows(rows: Stored) -> None:
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32) or not rows.shape[1]:
        raise InvalidInput(f"rows of shape {rows.shape} and type {rows.dtype} are not rows of float16 or float32.")
    for number, block in enumerate(_blocks(rows)):
        if not np.isfinite(block).all():
            bad = number * BLOCK + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise InvalidInput(f"row {bad} of {len(rows)} is not finite.")


def _checked(queries: Floats, width: int, k: int) -> Floats:
    queries = np.ascontiguousarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise InvalidInput(f"queries of shape {queries.shape} do not fit an index of width {width}.")
    if not np.isfinite(queries).all():
        bad = int(np.flatnonzero(~np.isfinite(queries).all(axis=1))[0])
        raise InvalidInput(f"query {bad + 1} of {len(queries)} is not finite.")
    if k < 1:
        raise InvalidInput(f"k={k} is not a positive count of results.")
    return queries


def _nothing(queries: int, k: int) -> tuple[Floats, Rows]:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)
