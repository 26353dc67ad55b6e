"""What one version brings to the router: its exemplars as small vectors, and the class of each. Stored as routing.safetensors.

Every number the router uses is derived from these bytes, so memory and disk agree exactly. Counts and sums of classes are not
stored beside the encodings they follow from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from adapter_hub.errors import CorruptVersion, HubError, InvalidInput, ModelChanged
from adapter_hub.examples import Example
from adapter_hub.routing.encoder import Encoder
from adapter_hub.routing.features import U8, Features, extract, pack, unpack

# m exemplars, e evaluation inputs, c classes, d encoder width
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SCHEMA = 2
PROTOTYPES_MAX = 32
EXEMPLARS_PER_PROTOTYPE = 8    # of an adapter without labels, until PROTOTYPES_MAX


@dataclass(frozen=True, slots=True, eq=False)
class Encodings:
    """Features at one byte a number: dense row i is `scales[i] * codes[i]`, made unit length; sketches are packed."""

    codes: NDArray[np.int8]         # (m, d), -127 to 127
    scales: NDArray[np.float32]     # (m,), above 0
    offsets: NDArray[np.uint32]     # (m + 1,), where each sketch begins
    sketches: U8                    # packed, see `features.pack`

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def of(cls, features: Features) -> Encodings:
        """Raises InvalidInput for a zero or NaN row."""
        return cls(*quantise(features.dense), *pack(features.lexical))

    @property
    def vectors(self) -> F64:
        """(m, d), dequantised, unit rows."""
        vectors = self.codes.astype(np.float64) * self.scales.astype(np.float64)[:, None]
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    @property
    def features(self) -> Features:
        return Features(self.vectors.astype(np.float32), unpack(self.offsets, self.sketches))

    @property
    def keys(self) -> list[bytes]:
        """The bytes of each row: equal for equal texts. Not the scale, whose last bit follows the batch that a text was encoded in."""
        rows = zip(self.codes, self.offsets[:-1], self.offsets[1:], strict=True)
        return [code.tobytes() + self.sketches[start:stop].tobytes() for code, start, stop in rows]

    def rows_without(self, others: Encodings) -> list[int]:
        """In their order, those whose texts are none of the others'."""
        known = set(others.keys)
        return [row for row, key in enumerate(self.keys) if key not in known]

    def without(self, others: Encodings) -> Encodings:
        return self[self.rows_without(others)]

    def __getitem__(self, rows: Sequence[int]) -> Encodings:
        if list(rows) == list(range(len(self))):
            return self
        spans = [self.sketches[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        offsets = np.cumsum([0, *map(len, spans)]).astype(np.uint32)
        return Encodings(self.codes[list(rows)], self.scales[list(rows)], offsets, np.concatenate([self.sketches[:0], *spans]))

    def __add__(self, other: Encodings) -> Encodings:
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]]).astype(np.uint32)
        pairs = ((self.codes, other.codes), (self.scales, other.scales), (self.sketches, other.sketches))
        codes, scales, sketches = (np.concatenate(pair) for pair in pairs)
        return Encodings(codes.astype(np.int8), scales.astype(np.float32), offsets, sketches.astype(np.uint8))

    def tensors(self, prefix: str = "") -> dict[str, NDArray[Any]]:
        return {prefix + name: getattr(self, name) for name in ("codes", "scales", "offsets", "sketches")}

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[Any]], prefix: str = "") -> Encodings:
        """Raises KeyError where one is missing, ValueError for impossible ones."""
        made = cls(*(tensors[prefix + name] for name in ("codes", "scales", "offsets", "sketches")))
        types = ", ".join(str(getattr(made, name).dtype) for name in ("codes", "scales", "offsets", "sketches"))
        if types != "int8, float32, uint32, uint8":
            raise ValueError(f"the types are {types}, not int8, float32, uint32, uint8")
        m = len(made.codes)
        if made.codes.ndim != 2 or made.codes.shape[1] < 1 or made.scales.shape != (m,) or made.offsets.shape != (m + 1,):
            raise ValueError(f"the shapes are {made.codes.shape}, {made.scales.shape}, {made.offsets.shape}")
        if not (np.isfinite(made.scales) & (made.scales > 0)).all() or not made.codes.any(axis=1).all():
            raise ValueError("an exemplar is zero or not finite")
        unpack(made.offsets, made.sketches)
        return made


@dataclass(frozen=True, slots=True, eq=False)
class RoutingState:
    """The exemplars of one version, in the order they were given, and inputs held out to see how well they stand for it."""

    encoder: str                             # id, for messages
    encoder_fingerprint: str                 # only vectors of one encoder may meet
    exemplars: Encodings
    classes: NDArray[np.int32]               # (m,), indices into class_names
    class_names: tuple[str | None, ...]      # a label; None is a prototype found by k-means
    evaluation: Encodings                    # (e,), inputs that belong here and are no exemplars: thresholds are measured on them
    negatives: Encodings                     # inputs that do not belong here, whoever else they may belong to
    from_description: bool = False           # no exemplar is an input: they are the description and the names of labels

    @property
    def count(self) -> int:
        """Exemplars. 0: this version is reached by name only."""
        return len(self.exemplars)

    @property
    def dim(self) -> int:
        return int(self.exemplars.codes.shape[1])

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def as_known(self, rows: Sequence[Example]) -> list[Example]:
        """The rows, without their labels where no exemplar has one: numbers and texts to write are no classes of inputs."""
        return [*rows] if not self.count or any(name is not None for name in self.class_names) else [Example(row.text, id=row.id) for row in rows]

    def extended(self, encoder: Encoder, rows: Sequence[Example], negatives: Sequence[Example] = ()) -> RoutingState:
        """The state that also knows `rows`, after the old ones, and `negatives`. Raises ModelChanged.

        A description gives way to real examples. What is given now holds against what was given before: an evaluation input or a negative
        that is among `rows` is one no more, an exemplar or evaluation input that is among `negatives` neither.
        """
        if encoder.fingerprint != self.encoder_fingerprint:
            raise ModelChanged(
                f"this version was encoded by '{self.encoder}' ({self.encoder_fingerprint[:19]}), "
                f"not by '{encoder.id}' ({encoder.fingerprint[:19]}).",
                hint="Register it again from its texts; where they are kept, `adapter-hub reembed` does that.",
            )
        new = _encoded(encoder, rows)
        refused = _encoded(encoder, negatives).without(new)
        described = self.from_description and not rows
        kept = self._kept(refused) if described or not self.from_description else []
        exemplars = self.exemplars[kept] + new
        labels = [*(self.class_names[self.classes[row]] for row in kept), *(row.label for row in rows)]
        if not len(exemplars):
            fact = "every example of this version is among the negatives" if self.count else "this version has no examples"
            raise InvalidInput(f"{fact}.", hint="Give examples that belong to it.")
        refused = self.negatives.without(new + refused) + refused
        return _classified(encoder, exemplars, labels, self.evaluation, refused, from_description=described)

    def succeeded(self, encoder: Encoder, newer: RoutingState) -> RoutingState:
        """The state of a version that learned more: what `newer` knows, after those exemplars of this one that are none of newer's.

        `newer` holds against this one as in `extended`; `rows_before` says which exemplars stay. `encoder` is that of both.
        """
        before = self.rows_before(newer)
        exemplars = self.exemplars[before] + newer.exemplars
        labels = [state.class_names[state.classes[row]] for state, rows in ((self, before), (newer, range(newer.count))) for row in rows]
        evaluation, refused = self.evaluation.without(newer.evaluation) + newer.evaluation, self.negatives.without(newer.exemplars + newer.negatives)
        return _classified(encoder, exemplars, labels, evaluation, refused + newer.negatives)

    def rows_before(self, newer: RoutingState) -> list[int]:
        """The exemplars that stay in `succeeded`, in their order; a description gives way to real examples."""
        return [] if self.from_description else self.exemplars.rows_without(newer.exemplars + newer.negatives)

    def thinned(self, share: float) -> RoutingState:
        """With about `share` of the exemplars of each class, evenly spread, and at least two: for estimates that need not know all."""
        if share >= 1 or self.from_description:
            return self
        kept: list[int] = []
        for number in range(len(self.class_names)):
            rows = np.flatnonzero(self.classes == number)
            count = min(len(rows), max(2, round(share * len(rows))))
            kept += rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)].tolist()
        kept.sort()
        return replace(self, exemplars=self.exemplars[kept], classes=self.classes[kept])

    def _kept(self, refused: Encodings) -> list[int]:
        """The exemplars that are not refused. A description stays: it stands for the adapter."""
        return _and_first(self.exemplars.rows_without(refused)) if self.from_description else self.exemplars.rows_without(refused)

    def to_bytes(self) -> bytes:
        """The same bytes for the same state."""
        facts = {
            "schema": SCHEMA,
            "encoder": self.encoder,
            "encoder_fingerprint": self.encoder_fingerprint,
            "class_names": self.class_names,
            "from_description": self.from_description,
        }
        tensors = self.exemplars.tensors() | {"classes": self.classes} | self.evaluation.tensors("evaluation.")
        tensors |= self.negatives.tensors("negatives.") if len(self.negatives) else {}
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
                exemplars=Encodings.from_tensors(tensors),
                classes=tensors["classes"],
                class_names=tuple(None if name is None else str(name) for name in facts["class_names"]),
                evaluation=Encodings.from_tensors(tensors, "evaluation."),
                negatives=Encodings.from_tensors(tensors, "negatives.") if "negatives.codes" in tensors else _no_encodings(tensors["codes"].shape[1]),
                from_description=bool(facts["from_description"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise corrupt(source, f"{error} is missing or has another form") from error
        except ValueError as error:
            raise corrupt(source, str(error)) from error
        state._check(source)
        return state

    def _check(self, source: Path | str) -> None:
        m, classes = self.count, len(self.class_names)
        if self.classes.dtype != np.int32 or self.classes.shape != (m,):
            raise corrupt(source, f"the classes are {self.classes.dtype} {self.classes.shape}, not int32 ({m},)")
        for what, found in (("evaluation inputs", self.evaluation), ("negatives", self.negatives)):
            if found.codes.shape[1] != self.dim:
                raise corrupt(source, f"{what} of width {found.codes.shape[1]} stand beside exemplars of {self.dim}")
        if set(np.unique(self.classes).tolist()) != set(range(classes)):
            raise corrupt(source, f"the class ids are not 0 to {classes - 1}, each used")
        if self.from_description and m != classes:
            raise corrupt(source, f"a description and names of labels are a class each, and {m} exemplars have {classes}")


@dataclass(frozen=True, slots=True, eq=False)
class Exemplars:
    """What the router computes with: the distinct exemplars, in an order that depends on their content alone.

    A repeated exemplar says nothing new, and would vouch for itself when it is left out.
    """

    features: Features              # m
    negatives: Features             # distinct ones
    classes: I64                    # (m,)
    counts: F64                     # (c,), distinct exemplars of each class
    sums: F64                       # (c, d), of the dense vectors
    labelled: NDArray[np.bool_]     # (c,), False for a k-means prototype
    single: bool                    # a description with names of labels, or one unlabelled example: nothing says how wide the adapter is

    @classmethod
    def of(cls, state: RoutingState) -> Exemplars:
        keys = [bytes(c) + key for c, key in zip(state.classes.astype(">i4"), state.exemplars.keys, strict=True)]
        first = _first_rows(keys)
        features, classes = state.exemplars.features[first], state.classes[first].astype(np.int64)
        labelled = np.array([name is not None for name in state.class_names], bool)
        counts = np.bincount(classes, minlength=len(labelled)).astype(np.float64)
        vectors = state.exemplars.vectors[first]
        sums = np.array([vectors[classes == c].sum(axis=0) for c in range(len(labelled))]).reshape(len(labelled), -1)
        single = state.from_description or (len(first) == 1 and not labelled.any())
        negatives = state.negatives.features[_first_rows(state.negatives.keys)]
        return cls(features, negatives, classes, counts, sums, labelled, single)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def targets(self) -> I64:
        """(m,): the class of each exemplar for the head: its label's; all exemplars without a label are one class, after the labels'.

        What k-means found stands for the adapter in a mean; it is nothing that inputs should be told apart by.
        """
        return np.minimum(self.classes, int(self.labelled.sum()))

    @property
    def target_count(self) -> int:
        return min(len(self.counts), int(self.labelled.sum()) + 1)

    @property
    def testable(self) -> NDArray[np.bool_]:
        """(m,): what can be left out: something of its adapter, and of its label, stays behind."""
        if self.single:
            return np.zeros(len(self), bool)
        return np.asarray((self.counts[self.classes] >= 2) | ~self.labelled[self.classes]) & (len(self) > 1)


def _first_rows(keys: Sequence[bytes]) -> list[int]:
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return [first[key] for key in sorted(first)]


def build_state(
    encoder: Encoder,
    examples: Sequence[Example],
    description: str = "",
    evaluation: Sequence[Example] = (),
    label_names: Sequence[str] = (),
    negatives: Sequence[Example] = (),
) -> RoutingState:
    """Encode the examples; without any, the description and the names of labels beside it; without both, a state with no exemplars.

    Names alone are not enough ("True", "False"): without examples and description a version is reached by name only.
    `evaluation` rows are inputs that belong here, `negatives` inputs that do not; those of both that are examples are dropped, and names of
    labels and evaluation rows that are negatives. Raises InvalidInput where the encoder does.
    """
    described = not examples and bool(description.strip())
    rows = _described(description, label_names) if described else examples
    exemplars, held_out, refused = (_encoded(encoder, given) for given in (rows, evaluation, negatives))
    kept = _and_first(exemplars.rows_without(refused)) if described else range(len(rows))
    return _classified(encoder, exemplars[kept], [rows[row].label for row in kept], held_out, refused, from_description=described)


def unknown(encoder: Encoder, rows: Sequence[Example], *known: Encodings) -> list[Example]:
    """In their order, those of `rows` whose texts are none of the known. Raises InvalidInput where the encoder does."""
    encoded = _encoded(encoder, rows)
    for one in known:
        kept = encoded.rows_without(one)
        rows, encoded = [rows[row] for row in kept], encoded[kept]
    return list(rows)


def _and_first(rows: Sequence[int]) -> list[int]:
    return sorted({0, *rows})


def _described(description: str, label_names: Sequence[str]) -> list[Example]:
    """What stands in for examples: the description, and each name in words as an example of its label."""
    named = [Example(name.replace("_", " "), name) for name in label_names]
    return [Example(description), *(row for row in named if row.text.strip())]


def state_of(
    encoder: Encoder, features: Features, labels: Sequence[str | None], evaluation: Features | None = None, *, from_description: bool = False
) -> RoutingState:
    """The state of exemplars that are encoded already, aligned with their labels. Raises InvalidInput for a zero or NaN row."""
    width = features.dense.shape[1]
    held_out = Encodings.of(evaluation) if evaluation is not None else _no_encodings(width)
    return _classified(encoder, Encodings.of(features), labels, held_out, _no_encodings(width), from_description=from_description)


def _encoded(encoder: Encoder, rows: Sequence[Example]) -> Encodings:
    return Encodings.of(extract(encoder, [row.text for row in rows]))


def _no_encodings(dim: int) -> Encodings:
    return Encodings.of(Features.empty(dim))


def quantise(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(codes, scales): one byte a number; the largest of each row becomes ±127. Raises InvalidInput for zero or NaN rows."""
    peaks = np.abs(vectors).max(axis=1, initial=0.0)
    if not (np.isfinite(peaks) & (peaks > 0)).all():
        bad = int(np.flatnonzero(~(np.isfinite(peaks) & (peaks > 0)))[0])
        raise InvalidInput(f"exemplar {bad + 1} of {len(vectors)} is zero or not finite.")
    scales = (peaks / 127).astype(np.float32)
    # In the order of C: safetensors writes memory as it lies.
    return np.clip(np.rint(vectors / scales[:, None]), -127, 127).astype(np.int8, order="C"), scales


def _classified(
    encoder: Encoder,
    exemplars: Encodings,
    labels: Sequence[str | None],
    evaluation: Encodings,
    negatives: Encodings,
    *,
    from_description: bool = False,
) -> RoutingState:
    """Labels in alphabetical order are classes 0, 1, …; the unlabelled rows follow, one class a k-means prototype.

    An evaluation input that is an exemplar too is dropped: the head knows it, and what it scores is no measure of what others will. So is
    one that is a negative, and a negative that is an exemplar.
    """
    negatives = negatives.without(exemplars)
    names = sorted({label for label in labels if label is not None})
    place = {name: i for i, name in enumerate(names)}
    classes = np.array([-1 if label is None else place[label] for label in labels], np.int32)
    loose = np.flatnonzero(classes < 0)
    prototypes = 0
    if len(loose):
        found = _prototypes(exemplars.codes[loose] * exemplars.scales[loose, None])
        classes[loose] = len(names) + found
        prototypes = int(found.max()) + 1
    return RoutingState(
        encoder=encoder.id,
        encoder_fingerprint=encoder.fingerprint,
        exemplars=exemplars,
        classes=classes,
        class_names=(*names, *[None] * prototypes),
        evaluation=evaluation.without(exemplars + negatives),
        negatives=negatives,
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


# ---- safetensors with one JSON fact sheet, shared with calibration records and saved routers --------------------------


def corrupt(source: Path | str, fact: str) -> CorruptVersion:
    hint = "Restore it from a copy, or register again; `adapter-hub verify` lists what is damaged."
    return CorruptVersion(f"{source}: {fact}.", hint=hint)


def read_tensors(
    data: bytes, sheet: str, schema: int, source: Path | str, fault: Callable[[Path | str, str], HubError] = corrupt
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, facts). Raises what `fault` makes of a reason for anything but safetensors with this sheet and schema."""
    try:
        tensors = dict(safetensors.numpy.load(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"][sheet])
        found = facts["schema"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise fault(source, f"not a {sheet} file ({error})") from error
    if found != schema:
        raise fault(source, f"written with schema {found}, this version reads {schema}")
    return tensors, facts
