"""What one version brings to the router: its exemplars as small vectors, and the class of each. Stored as routing.safetensors.

Every number the router uses is derived from these bytes, so memory and disk agree exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from adapter_hub.errors import CorruptVersion, InvalidInput, ModelChanged
from adapter_hub.examples import Example
from adapter_hub.routing.encoder import Encoder

# m exemplars, c classes, d encoder width
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SCHEMA = 1
PROTOTYPES_MAX = 32
SINGLE_WORTH = 0.1             # exemplars; with 1, a description loses every input to adapters with real examples
EXEMPLARS_PER_PROTOTYPE = 8    # of an adapter without labels, until PROTOTYPES_MAX


@dataclass(frozen=True, slots=True, eq=False)
class RoutingState:
    """The exemplars of one version, in the order they were given. Row i is `scales[i] * codes[i]`."""

    encoder: str                             # id, for messages
    encoder_fingerprint: str                 # only vectors of one encoder may meet
    dim: int                                 # d
    codes: NDArray[np.int8]                  # (m, d), -127 to 127
    scales: NDArray[np.float32]              # (m,), above 0
    classes: NDArray[np.int32]               # (m,), indices into class_names
    class_names: tuple[str | None, ...]      # a label; None is a prototype found by k-means
    from_description: bool = False           # the one exemplar is the description

    @property
    def count(self) -> int:
        """Exemplars. 0: this version is reached by name only."""
        return len(self.codes)

    @property
    def vectors(self) -> F64:
        """(m, d), dequantised."""
        return self.codes.astype(np.float64) * self.scales.astype(np.float64)[:, None]

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def extended(self, encoder: Encoder, rows: Sequence[Example]) -> RoutingState:
        """The state that also knows `rows`, after the old ones. A description gives way to real examples. Raises ModelChanged."""
        if encoder.fingerprint != self.encoder_fingerprint:
            raise ModelChanged(
                f"this version was encoded by '{self.encoder}' ({self.encoder_fingerprint[:19]}), "
                f"not by '{encoder.id}' ({encoder.fingerprint[:19]}).",
                hint="Register it again from its texts.",
            )
        codes, scales = quantise(encoder.encode([row.text for row in rows]) if rows else np.empty((0, self.dim), np.float32))
        labels: list[str | None] = [row.label for row in rows]
        if not self.from_description:
            codes, scales = np.vstack([self.codes, codes]), np.concatenate([self.scales, scales])
            labels = [*(self.class_names[c] for c in self.classes), *labels]
        return _classified(encoder, codes, scales, labels)

    def to_bytes(self) -> bytes:
        """The same bytes for the same state."""
        facts = {
            "schema": SCHEMA,
            "encoder": self.encoder,
            "encoder_fingerprint": self.encoder_fingerprint,
            "class_names": self.class_names,
            "from_description": self.from_description,
        }
        tensors: dict[str, NDArray[Any]] = {"codes": self.codes, "scales": self.scales, "classes": self.classes}
        # One key: safetensors writes several in no fixed order.
        return safetensors.numpy.save(tensors, {"routing": json.dumps(facts, sort_keys=True, ensure_ascii=True)})

    @classmethod
    def from_bytes(cls, data: bytes, source: Path | str = "routing.safetensors") -> RoutingState:
        """Raises CorruptVersion if these are not the bytes of a state."""
        tensors, facts = read_tensors(data, "routing", SCHEMA, source)
        try:
            state = cls(
                encoder=str(facts["encoder"]),
                encoder_fingerprint=str(facts["encoder_fingerprint"]),
                dim=int(tensors["codes"].shape[-1]),
                codes=tensors["codes"],
                scales=tensors["scales"],
                classes=tensors["classes"],
                class_names=tuple(None if name is None else str(name) for name in facts["class_names"]),
                from_description=bool(facts["from_description"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise corrupt(source, f"{error} is missing or has another form") from error
        state._check(source)
        return state

    def _check(self, source: Path | str) -> None:
        m, classes = len(self.codes), len(self.class_names)
        types = f"{self.codes.dtype}, {self.scales.dtype}, {self.classes.dtype}"
        if types != "int8, float32, int32":
            raise corrupt(source, f"the types are {types}, not int8, float32, int32")
        if self.codes.ndim != 2 or self.dim < 1 or self.scales.shape != (m,) or self.classes.shape != (m,):
            raise corrupt(source, f"the shapes are {self.codes.shape}, {self.scales.shape}, {self.classes.shape}")
        if not (np.isfinite(self.scales) & (self.scales > 0)).all() or not self.codes.any(axis=1).all():
            raise corrupt(source, "an exemplar is zero or not finite")
        if set(np.unique(self.classes).tolist()) != set(range(classes)):
            raise corrupt(source, f"the class ids are not 0 to {classes - 1}, each used")
        if self.from_description and m != 1:
            raise corrupt(source, f"a description is one exemplar, not {m}")


@dataclass(frozen=True, slots=True, eq=False)
class Exemplars:
    """What the router computes with: the distinct exemplars, in an order that depends on their content alone.

    A repeated exemplar says nothing new, and would vouch for itself when it is left out.
    """

    vectors: F64                    # (m, d)
    classes: I64                    # (m,)
    counts: F64                     # (c,), distinct exemplars of each class
    sums: F64                       # (c, d)
    labelled: NDArray[np.bool_]     # (c,), False for a k-means prototype
    known: F64                      # (c,), what the counts are worth; below 1 where one text stands for a whole adapter
    single: bool                    # a description, or one unlabelled example: nothing says how wide the adapter is

    @classmethod
    def of(cls, state: RoutingState) -> Exemplars:
        parts = (state.classes.astype(">i4"), state.scales, state.codes)
        keys = np.hstack([np.ascontiguousarray(part).view(np.uint8).reshape(state.count, -1) for part in parts])
        _, first = np.unique(keys.view(f"V{keys.shape[1]}").ravel(), return_index=True)
        vectors, classes = state.vectors[first], state.classes[first].astype(np.int64)
        labelled = np.array([name is not None for name in state.class_names], bool)
        counts = np.bincount(classes, minlength=len(labelled)).astype(np.float64)
        sums = np.array([vectors[classes == c].sum(axis=0) for c in range(len(labelled))])
        single = state.from_description or (len(vectors) == 1 and not labelled.any())
        return cls(vectors, classes, counts, sums, labelled, np.full(len(counts), SINGLE_WORTH) if single else counts, single)

    @property
    def means(self) -> F64:
        return self.sums / self.counts[:, None]

    def testable(self) -> I64:
        """The exemplars that can be left out: something of their adapter, and of their label, stays behind."""
        if self.single:
            return np.empty(0, np.int64)
        lonely = (self.counts[self.classes] < 2) & self.labelled[self.classes]
        return np.flatnonzero(~lonely)


def build_state(encoder: Encoder, examples: Sequence[Example], description: str = "") -> RoutingState:
    """Encode the examples; without any, the description; without both, a state with no exemplars (reached by name only).

    Raises InvalidInput where the encoder does.
    """
    described = not examples and bool(description.strip())
    texts = [description] if described else [example.text for example in examples]
    labels: list[str | None] = [None] if described else [example.label for example in examples]
    vectors = encoder.encode(texts) if texts else np.empty((0, encoder.dim), np.float32)
    return state_of(encoder, vectors, labels, from_description=described)


def state_of(
    encoder: Encoder, vectors: NDArray[np.float32], labels: Sequence[str | None], *, from_description: bool = False
) -> RoutingState:
    """The state of exemplars that are encoded already, aligned with their labels. Raises InvalidInput for a zero or NaN row."""
    return _classified(encoder, *quantise(vectors), labels, from_description=from_description)


def quantise(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(codes, scales): one byte a number; the largest of each row becomes ±127. Raises InvalidInput for zero or NaN rows."""
    peaks = np.abs(vectors).max(axis=1, initial=0.0)
    if not (np.isfinite(peaks) & (peaks > 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(peaks) & (peaks > 0)))[0])
        raise InvalidInput(f"exemplar {bad + 1} of {len(vectors)} is zero or not finite.")
    scales = (peaks / 127).astype(np.float32)
    return np.clip(np.rint(vectors / scales[:, None]), -127, 127).astype(np.int8), scales


def _classified(
    encoder: Encoder, codes: NDArray[np.int8], scales: NDArray[np.float32], labels: Sequence[str | None], *, from_description: bool = False
) -> RoutingState:
    """Labels in alphabetical order are classes 0, 1, …; the unlabelled rows follow, one class a k-means prototype."""
    names = sorted({label for label in labels if label is not None})
    place = {name: i for i, name in enumerate(names)}
    classes = np.array([-1 if label is None else place[label] for label in labels], np.int32)
    loose = np.flatnonzero(classes < 0)
    prototypes = 0
    if len(loose):
        found = _prototypes(codes[loose] * scales[loose, None])
        classes[loose] = len(names) + found
        prototypes = int(found.max()) + 1
    return RoutingState(
        encoder=encoder.id,
        encoder_fingerprint=encoder.fingerprint,
        dim=codes.shape[1],
        codes=codes,
        scales=scales,
        classes=classes,
        class_names=(*names, *[None] * prototypes),
        from_description=from_description,
    )


def _prototypes(vectors: NDArray[np.float32]) -> NDArray[np.int32]:
    """The prototype of each row, 0 to k - 1; the same partition in whatever order the rows come."""
    distinct, back = np.unique(vectors, axis=0, return_inverse=True)    # sorted, so the seed meets the same rows
    k = min(PROTOTYPES_MAX, max(1, round(len(distinct) / EXEMPLARS_PER_PROTOTYPE)))
    if k == 1:
        return np.zeros(len(vectors), np.int32)
    from sklearn.cluster import KMeans

    found = KMeans(n_clusters=k, n_init=4, random_state=0).fit(distinct.astype(np.float64)).labels_
    _, first = np.unique(found, return_index=True)
    rank = np.empty(int(found.max()) + 1, np.int32)
    rank[found[np.sort(first)]] = np.arange(len(first))    # numbered by the first row that each holds
    return np.asarray(rank[found][back.ravel()], np.int32)


# ---- safetensors with one JSON fact sheet, shared with the calibration record -----------------------------------------


def corrupt(source: Path | str, fact: str) -> CorruptVersion:
    hint = "Restore it from a copy, or register again; `adapter-hub verify` lists what is damaged."
    return CorruptVersion(f"{source}: {fact}.", hint=hint)


def read_tensors(data: bytes, sheet: str, schema: int, source: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, facts). Raises CorruptVersion for anything but safetensors with this sheet and schema."""
    try:
        tensors = dict(safetensors.numpy.load(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"][sheet])
        found = facts["schema"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise corrupt(source, f"not a {sheet} file ({error})") from error
    if found != schema:
        raise corrupt(source, f"written with schema {found}, this version reads {schema}")
    return tensors, facts
