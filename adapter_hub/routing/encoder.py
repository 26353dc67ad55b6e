"""Texts to unit vectors. Two encoders: a sentence-transformers model, and hashed words and character n-grams without a model.

Either may be shared by threads that have few texts each: `GatheringEncoder`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapter_hub.base_model import BUILDING, RANDOMNESS, check_device, resolve_model, without_bars
from adapter_hub.errors import InvalidInput, ModelNotFound

# n texts, d width
Vectors = NDArray[np.float32]

TOKENS_MAX = 2**16    # that are counted of a text, where its model has no limit
HASH_DIM = 256
HASH_DIM_MAX = 2048    # the metric takes d × d numbers and d³ steps
WORD = re.compile(r"\w+", re.UNICODE)
# What changes an encoder's vectors. Model cards, training facts and other weight formats beside the safetensors do not.
_WEIGHTS = ".safetensors"
_PROMPTS = "config_sentence_transformers.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt", "spiece.model")
_CONFIGS = frozenset({"config.json", "modules.json", "sentence_bert_config.json", "sentencepiece.bpe.model", _PROMPTS, *_TOKENIZERS})



class Encoder(Protocol):
    """Texts to unit vectors. One `fingerprint` always gives the same vectors."""

    @property
    def id(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit rows (n, d), aligned with `texts`. Raises InvalidInput for an empty text or a vector that is not finite."""
        ...


def load_encoder(id: str | Path, device: str = "cpu") -> Encoder:
    """The encoder with this id: "hash", "hash:512", or a sentence-transformers hub id or folder, whose model runs on `device`.

    Raises InvalidInput for an impossible hash width or device, ModelNotFound.
    """
    check_device(device)
    if str(id) == "hash":
        return HashEncoder()
    if isinstance(id, str) and id.startswith("hash:"):
        width = id.removeprefix("hash:")
        if not width.isascii() or not width.isdigit():
            raise InvalidInput(f"encoder {id!r} has no width.", hint='Write "hash" or "hash:512".')
        return HashEncoder(int(width))
    return SentenceEncoder(id, device=device)


class HashEncoder:
    """Words 1-2 and characters 2-5, each hashed to a signed place. Needs no model, no vocabulary and no training."""

    def __init__(self, dim: int = HASH_DIM) -> None:
        if not 8 <= dim <= HASH_DIM_MAX:
            raise InvalidInput(f"a hash encoder of {dim} dimensions is not possible.", hint=f"Choose 8 to {HASH_DIM_MAX}.")
        self.dim = dim
        self.id = "hash" if dim == HASH_DIM else f"hash:{dim}"
        self.fingerprint = "sha256:" + hashlib.sha256(f"adapter_hub.hash/1 words 1-2 characters 2-5 crc32 dim {dim}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dim), np.float64)
        for row, text in zip(vectors, _checked(texts), strict=True):
            hashes = np.fromiter((zlib.crc32(feature.encode("utf-8", "surrogatepass")) for feature in _features(text)), np.int64)
            # Half of the features count negatively, so that features which share a place cancel instead of adding up.
            places, counts = np.unique(hashes, return_counts=True)
            np.add.at(row, (places >> 1) % self.dim, np.where(places & 1, 1.0, -1.0) * np.sqrt(counts))
        return _unit_rows(vectors, self.id)


class SentenceEncoder:
    """A sentence-transformers model from a local folder, with its own pooling; rows are made unit length."""

    def __init__(self, source: str | Path, *, device: str = "cpu", batch_size: int = 64) -> None:
        self.id = str(source)
        self.path = resolve_model(source)
        # The weights themselves are loaded at the first encode: opening a registry does not need them.
        self.fingerprint = _folder_fingerprint(self.path)
        self._device = device
        self._batch_size = batch_size

    @property
    def dim(self) -> int:
        return _sentence_dim(self.path, self._device)

    def encode(self, texts: Sequence[str]) -> Vectors:
        texts = _checked(texts)
        model = _sentence_model(self.path, self._device)
        # Sorted by length, so that a batch is padded little; ties keep their order, so the batches are the same every time.
        lengths = _token_counts(self.path, self._device)(texts)
        order = sorted(range(len(texts)), key=lambda i: -lengths[i])
        vectors = np.zeros((len(texts), self.dim), np.float64)
        for start in range(0, len(texts), self._batch_size):
            batch = order[start : start + self._batch_size]
            vectors[batch] = model.encode(
                [texts[i] for i in batch], batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
            )
        return _unit_rows(vectors, self.id)


class GatheringEncoder:
    """Another encoder, for many threads with a text or two each: who comes first encodes what comes while he waits for his turn.

    A text's vector agrees with what it gets alone within 1e-5, not byte for byte: who shares its batch depends on timing.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.id, self.fingerprint, self._encoder = encoder.id, encoder.fingerprint, encoder
        self._turn = threading.Lock()
        self._waiting: deque[tuple[list[str], Future[Vectors]]] = deque()

    @property
    def dim(self) -> int:
        return self._encoder.dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        future: Future[Vectors] = Future()
        self._waiting.append((_checked(texts), future))
        with self._turn:
            if not future.done():
                self._answer([self._waiting.popleft() for _ in range(len(self._waiting))])
        return future.result()

    def _answer(self, asked: Sequence[tuple[list[str], Future[Vectors]]]) -> None:
        try:
            vectors = self._encoder.encode([text for texts, _ in asked for text in texts])
        except BaseException as error:    # to each its own; of what stops this thread all learn
            for one in asked:
                if len(asked) > 1 and isinstance(error, Exception):
                    self._answer([one])
                else:
                    one[1].set_exception(error)
            return
        ends = np.cumsum([len(texts) for texts, _ in asked])
        for (_, future), own in zip(asked, np.split(vectors, ends[:-1]), strict=True):
            future.set_result(own)


@lru_cache(maxsize=2)
def _sentence_model(path: Path, device: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        with RANDOMNESS, BUILDING, without_bars():    # a layer of it may be drawn before it is read: not while another thread trains
            model = SentenceTransformer(
                str(path), device=device, local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(f"{path} does not load as a sentence encoder: {error}.", hint="Name a sentence-transformers model.") from error
    return model.eval()


@lru_cache(maxsize=2)
def _token_counts(path: Path, device: str) -> Callable[[Sequence[str]], list[int]]:
    """How long each text is, in tokens, or in characters where the model has no fast tokenizer."""
    model = _sentence_model(path, device)
    backend = getattr(getattr(model[0], "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return lambda texts: list(map(len, texts))
    counter = copy.deepcopy(backend)    # the model's own keeps a limit and padding in itself, which another thread may be using
    counter.no_padding()
    counter.enable_truncation(model.max_seq_length or TOKENS_MAX)
    return lambda texts: list(map(len, counter.encode_batch_fast(list(texts))))


@lru_cache(maxsize=8)
def _sentence_dim(path: Path, device: str) -> int:
    # By looking: the name of the method that says it changed between releases.
    return int(_sentence_model(path, device).encode(["width"], show_progress_bar=False).shape[1])


def _folder_fingerprint(folder: Path) -> str:
    """sha256 over the content of the files that decide the vectors, by their path in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and (p.suffix == _WEIGHTS or p.name in _CONFIGS))
    if not any(p.suffix == _WEIGHTS for p in files):
        raise ModelNotFound(f"{folder} has no safetensors weights.", hint="Name a sentence-transformers model saved as safetensors.")
    facts = {p.relative_to(folder).as_posix(): _file_digest(p, p.stat().st_size, p.stat().st_mtime_ns) for p in files}
    return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    if path.name == _PROMPTS:
        # Beside the prompts it names the library versions that wrote it, which change nothing.
        facts = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "__version__"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _features(text: str) -> Iterator[str]:
    words = WORD.findall(text.casefold())
    yield from (f"w {word}" for word in words)
    yield from (f"w {first} {second}" for first, second in pairwise(words))
    letters = f" {' '.join(words) or text} "    # a text of punctuation alone still has its characters
    for size in range(2, 6):
        yield from (f"c {letters[i : i + size]}" for i in range(len(letters) - size + 1))


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise InvalidInput("one text was given where a list of texts is expected.", hint="Put it in a list.")
    texts = list(texts)
    for position, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InvalidInput(f"text {position} of {len(texts)} is {type(text).__name__}, not text.")
        if not text.strip():
            raise InvalidInput(f"text {position} of {len(texts)} is empty.", hint="An empty text belongs nowhere; leave it out.")
    return texts


def _unit_rows(vectors: NDArray[np.float64], encoder: str) -> Vectors:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 1e-12)))
    if len(bad):
        what = "zero" if norms[bad[0], 0] <= 1e-12 else "not finite"
        raise InvalidInput(f"encoder '{encoder}' gave a vector that is {what} for text {bad[0] + 1} of {len(vectors)}.")
    return np.asarray(vectors / norms, np.float32)
