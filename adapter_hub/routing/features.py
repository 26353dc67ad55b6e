"""What the router sees of a text: its sentence embedding (meaning) and a hashed sketch of its words and characters (form).

No vocabulary is fitted: a new task changes no feature of the old ones. `Hidden` and `Kernel` are the two bases that a head is
linear in.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from adapter_hub.routing.encoder import WORD, Encoder, Vectors

# n texts, d encoder width, s sketch width, r random projections, h hidden width
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Sparse = Any                # scipy.sparse.csr_matrix float32

SKETCH_DIM = 2048
# Chosen on validation splits (CLINC150, BANKING77) with all-MiniLM-L6-v2: benchmarks/LOG.md.
SKETCH_WEIGHT = 0.5         # of the sketch beside an embedding of length 1
LINEAR = 0.1                # of the products beside their kernel
HIDDEN_DIM = 4096           # random projections
HIDDEN_SEED = 0

_SKIP = 255                 # in a packed sketch: 127 empty places
_STEP = 127


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """n texts as the router sees them."""

    dense: F32          # (n, d), unit rows
    lexical: Sparse     # (n, s), unit rows; a text without words still has its characters

    def __len__(self) -> int:
        return len(self.dense)

    def __getitem__(self, rows: Any) -> Features:
        """The chosen rows, always as rows."""
        chosen = np.atleast_1d(np.arange(len(self))[rows])
        return Features(self.dense[chosen], self.lexical[chosen])

    def distinct(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(which rows are the first of their kind, for each row which of those it equals)."""
        place: dict[tuple[bytes, ...], int] = {}
        parts = ([row.tobytes() for row in np.split(part, self.lexical.indptr[1:-1])] for part in (self.lexical.indices, self.lexical.data))
        same = np.array([place.setdefault(key, len(place)) for key in zip((row.tobytes() for row in self.dense), *parts, strict=True)], np.int64)
        return np.unique(same, return_index=True)[1].astype(np.int64), same

    @classmethod
    def concatenate(cls, parts: Sequence[Features]) -> Features:
        return cls(np.concatenate([part.dense for part in parts]), sparse.vstack([part.lexical for part in parts], format="csr"))

    @classmethod
    def empty(cls, dim: int) -> Features:
        return cls(np.empty((0, dim), np.float32), sparse.csr_matrix((0, SKETCH_DIM), dtype=np.float32))


def extract(encoder: Encoder, texts: Sequence[str]) -> Features:
    """The features of each text. Raises InvalidInput where the encoder does: an empty text, a vector that is not finite."""
    texts = list(texts) if not isinstance(texts, str) else texts
    if not texts:
        return Features.empty(encoder.dim)
    dense: Vectors = encoder.encode(texts)
    return Features(dense, sketch(texts))


# ---- the sketch: words 1-2 and characters 2-5, each hashed to a signed place ----------------------------------------------


def sketch(texts: Sequence[str]) -> Sparse:
    """(n, s), unit rows: the sign in each place of the sum of the features that fall there; how often one occurs does not count."""
    indptr, indices, signs = [0], [], []
    for text in texts:
        hashes = np.fromiter(hashed(text), np.int64)
        sums = np.bincount((hashes >> 1) % SKETCH_DIM, np.where(hashes & 1, 1.0, -1.0), SKETCH_DIM)
        places = np.flatnonzero(sums)
        if not len(places):     # two features that cancel, in a text of one or two characters
            places = (hashes[:1] >> 1) % SKETCH_DIM
            sums[places] = 1.0
        indices.append(places)
        signs.append(np.sign(sums[places]))
        indptr.append(indptr[-1] + len(places))
    return _unit_sketch(np.array(indptr), np.concatenate(indices), np.concatenate(signs))


def hashed(text: str) -> set[int]:
    """crc32 of each distinct feature of a text; crc32 runs on, so the prefix that names the kind is hashed once."""
    words = WORD.findall(text.casefold())
    found = {_crc(word, _WORD_SEED) for word in words}
    found |= {_crc(f"{first} {second}", _WORD_SEED) for first, second in pairwise(words)}
    letters = f" {' '.join(words) or text} "
    if letters.isascii():
        data = letters.encode()
        return found | {zlib.crc32(data[i : i + size], _CHARACTER_SEED) for size in range(2, 6) for i in range(len(data) - size + 1)}
    return found | {_crc(letters[i : i + size], _CHARACTER_SEED) for size in range(2, 6) for i in range(len(letters) - size + 1)}


def _crc(text: str, seed: int) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"), seed)


_WORD_SEED, _CHARACTER_SEED = zlib.crc32(b"w "), zlib.crc32(b"c ")


def _unit_sketch(indptr: NDArray[np.int64], indices: NDArray[np.int64], signs: NDArray[np.float64]) -> Sparse:
    lengths = np.diff(indptr)
    values = (signs / np.sqrt(np.repeat(lengths, lengths))).astype(np.float32)
    return sparse.csr_matrix((values, indices.astype(np.int32), indptr.astype(np.int32)), shape=(len(lengths), SKETCH_DIM))


def pack(lexical: Sparse) -> tuple[NDArray[np.uint32], U8]:
    """(offsets (n + 1,), codes): one byte a place, its distance from the one before and its sign."""
    rows = np.repeat(np.arange(lexical.shape[0]), np.diff(lexical.indptr))
    first = np.ones(len(rows), bool)
    first[1:] = rows[1:] != rows[:-1]
    before = np.where(first, -1, np.concatenate([[-1], lexical.indices[:-1]]))
    gaps = lexical.indices.astype(np.int64) - before
    skips = (gaps - 1) // _STEP
    own = ((gaps - 1 - _STEP * skips) * 2 + (lexical.data < 0)).astype(np.uint8)
    ends = np.cumsum(skips + 1)
    codes = np.full(int(ends[-1]) if len(ends) else 0, _SKIP, np.uint8)
    codes[ends - 1] = own
    offsets = np.concatenate([[0], ends])[lexical.indptr]
    return offsets.astype(np.uint32), codes


def unpack(offsets: NDArray[np.uint32], codes: U8) -> Sparse:
    """What was packed. Raises ValueError for bytes that are no sketch."""
    offsets = offsets.astype(np.int64)
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(codes) or (np.diff(offsets) < 1).any():
        raise ValueError("the offsets of the sketches do not fit their codes")
    steps = np.where(codes == _SKIP, _STEP, (codes >> 1).astype(np.int64) + 1)
    total = np.concatenate([[0], np.cumsum(steps)])
    place = total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets)) - 1
    real = codes != _SKIP
    if (place[real] >= SKETCH_DIM).any() or not real[offsets[1:] - 1].all():
        raise ValueError("a sketch leaves its width")
    indptr = np.concatenate([[0], np.cumsum(real)])[offsets]
    return _unit_sketch(indptr, place[real], np.where(codes[real] & 1, -1.0, 1.0))


# ---- bases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """r rectified random projections of [dense, SKETCH_WEIGHT × sketch], and the two themselves: h = r + d + s numbers a text.

    The products of the projections approach the arc-cosine kernel of degree 1 (Cho and Saul 2009, "Kernel Methods for Deep Learning";
    Rahimi and Recht 2007 for the approximation). The linear part is free of their noise, and holds where inputs are unlike the exemplars.
    """

    dense: F32      # (d, r)
    lexical: F32    # (s, r)

    @classmethod
    def of(cls, dim: int, drawn: int = HIDDEN_DIM) -> Hidden:
        """The same numbers for the same widths, for ever."""
        return _hidden(dim, drawn)

    @property
    def width(self) -> int:
        return int(self.dense.shape[1]) + len(self.dense) + SKETCH_DIM

    def __call__(self, features: Features) -> F32:
        """(n, h)"""
        drawn, dim = self.dense.shape[1], len(self.dense)
        found = np.empty((len(features), self.width), np.float32)
        found[:, :drawn] = features.dense @ self.dense
        found[:, :drawn] += features.lexical @ self.lexical
        np.maximum(found[:, :drawn], 0, out=found[:, :drawn])
        found[:, drawn : drawn + dim] = features.dense
        found[:, drawn + dim :] = features.lexical.toarray()
        found[:, drawn + dim :] *= np.float32(SKETCH_WEIGHT)
        return found


@dataclass(frozen=True, eq=False)
class Kernel:
    """exp(-½ squared distance) + LINEAR × product, of [dense, SKETCH_WEIGHT × sketch] with each of h exemplars.

    The linear part holds where inputs are unlike the exemplars, as that of `Hidden`.
    """

    exemplars: Features     # h

    @property
    def width(self) -> int:
        return len(self.exemplars)

    def __call__(self, features: Features) -> F32:
        """(n, h)"""
        products = features.dense @ self.exemplars.dense.T
        lexical = self.exemplars.lexical @ features.lexical.toarray().T    # faster than of two sparse matrices
        lexical *= np.float32(SKETCH_WEIGHT**2)
        products += lexical.T
        found = products - np.float32(1 + SKETCH_WEIGHT**2)    # the length of every row, squared
        np.exp(found, out=found)
        products *= np.float32(LINEAR)
        return np.asarray(np.add(found, products, out=found), np.float32)


@lru_cache(maxsize=4)
def _hidden(dim: int, width: int) -> Hidden:
    # Signs from the raw stream, which numpy's policy fixes; sums over hundreds of places are as good as normal (Achlioptas 2003).
    count = (dim + SKETCH_DIM) * width
    bits = np.unpackbits(np.random.PCG64(HIDDEN_SEED).random_raw(-(-count // 64)).astype("<u8").view(np.uint8))[:count]
    signs = (bits.astype(np.float32) * 2 - 1).reshape(dim + SKETCH_DIM, width) * np.float32(np.sqrt(2 / width))
    return Hidden(np.ascontiguousarray(signs[:dim]), np.ascontiguousarray(signs[dim:] * np.float32(SKETCH_WEIGHT)))
