"""An immutable snapshot that decides: every adapter's prototypes in segments, one calibration, one head. It never embeds a text of its own.

Readers hold a snapshot while the next one is built; `with_added` and `without` share what stays the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from adapter_hub.errors import CorruptIndex, InvalidInput, InvalidName, ModelChanged
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import Calibration, check_encoder, check_rate, fit
from adapter_hub.routing.contrast import Contrast
from adapter_hub.routing.decision import Decision, Method, Reason
from adapter_hub.routing.encoder import Encoder
from adapter_hub.routing.features import F32, Features, Kernel, extract
from adapter_hub.routing.head import Head, digest_of, fits
from adapter_hub.routing.index import FaissIndex
from adapter_hub.routing.prototypes import Prototypes
from adapter_hub.routing.segment import DENSE_MAX, Entry, Segment
from adapter_hub.routing.statistics import F64, I64, Exemplars, RoutingState, read_tensors

# n inputs, d encoder width, c candidates
SCHEMA = 5
CONTRAST = ".contrast.safetensors"
SUMS = "SHA256SUMS"     # of a saved router's other files, as `sha256sum` writes and checks them
CHUNK = 512             # inputs scored at once
CONTRASTED = 8          # candidates beyond those wanted whose negatives are asked at first
SCATTERED = 2           # times DENSE_MAX: prototypes in small segments, all of them scored, from which an index over them pays
SCORE_DECIMALS = 5      # sums run in another order in a batch than alone: a score may differ by the last of them


class Router:
    """Make one with `build`, or `open` a saved one."""

    def __init__(
        self,
        segments: Sequence[Segment],
        calibration: Calibration | None,
        head: Head | None,
        unroutable: Mapping[AdapterRef, str] | None = None,
        gone: Collection[AdapterRef] = frozenset(),
        centres: Mapping[AdapterRef, float] | None = None,
        contrasts: Mapping[AdapterRef, Contrast] | None = None,
    ) -> None:
        self.calibration = calibration      # None: no adapter has an exemplar
        self.head = head                    # None: prototypes alone
        self.centres = dict(centres or {})  # on the scale of this head, of versions that the calibration does not know
        self._contrasts = dict(contrasts or {})    # of the versions that have negatives
        self._segments = tuple(segments)
        self._columns: list[I64] = [segment.columns(head) for segment in self._segments]
        self._unroutable = dict(unroutable or {})    # digests of states without exemplars
        self._gone = frozenset(gone)                 # of a segment too large to make again
        self._absent = [segment.absent(self._gone) if self._gone else None for segment in self._segments]

    # ---- make -------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, states: Mapping[AdapterRef, RoutingState], calibration: Calibration | None = None, head: Head | None = None) -> Router:
        """The router over these versions. Without a calibration, calibration and head are made from them. Raises ModelChanged."""
        if calibration is None and any(state.count for state in states.values()):
            fitted = fit(states)
            calibration, head = fitted.calibration, fitted.head
        return cls((), calibration, head)._with(states)

    def _with(self, states: Mapping[AdapterRef, RoutingState]) -> Router:
        """This router and one segment more."""
        unroutable = {ref: state.digest for ref, state in states.items() if not state.count}
        exemplars = {ref: Exemplars.of(state) for ref, state in states.items() if state.count}
        entries = [self._entry(ref, states[ref], one) for ref, one in exemplars.items()]
        segments = [*self._segments, Segment.of(entries)] if entries else self._segments
        contrasts = self._contrasts | _contrasts(exemplars)
        return self._replaced(segments=segments, unroutable=self._unroutable | unroutable, contrasts=contrasts)

    def _entry(self, ref: AdapterRef, state: RoutingState, exemplars: Exemplars) -> Entry:
        assert self.calibration is not None
        check_encoder(str(ref), state, self.calibration.encoder_fingerprint, self.calibration.encoder)
        prototypes = Prototypes.of(exemplars, state.from_description)
        return Entry(ref, prototypes, self.calibration.centre_of(ref, state, exemplars, prototypes), state.digest)

    def with_added(self, states: Mapping[AdapterRef, RoutingState]) -> Router:
        """The next snapshot, under the same calibration and head: nothing moves for the adapters that were there. Raises ModelChanged.

        Costs what the newcomers and their like cost, not what all cost: small segments merge like the digits of a binary counter.
        """
        if not states:
            return self
        rest = self.without(*states)
        if self.calibration is None:
            none = all(not state.count for state in states.values())
            return rest._with(states) if none else Router.build(states)._with_unroutable(rest._unroutable)
        there = {ref: segment.digests[segment.place[ref]] for ref in rest._gone.intersection(states) for segment in [rest._segment_of(ref)]}
        kept = {ref for ref, digest in there.items() if digest == states[ref].digest}    # as after a rollback
        contrasts = _contrasts({ref: Exemplars.of(states[ref]) for ref in kept if len(states[ref].negatives)})
        rest = rest._replaced(gone=rest._gone - kept, contrasts=rest._contrasts | contrasts).erased(states)
        added = rest._with({ref: state for ref, state in states.items() if ref not in kept})
        segments = list(added._segments)
        while len(segments) > 1 and len(segments[-2]) <= 2 * len(segments[-1]) and len(segments[-1]) + len(segments[-2]) <= DENSE_MAX:
            last = segments.pop()
            segments[-1] = Segment.merged([segments[-1], last])
        return added._replaced(segments=segments)

    def _with_unroutable(self, unroutable: Mapping[AdapterRef, str]) -> Router:
        return self._replaced(unroutable={**unroutable, **self._unroutable})


    def without(self, *refs: AdapterRef) -> Router:
        """The next snapshot, under the same calibration and head. Unknown references change nothing."""
        known = set(refs).intersection(self.versions)
        if not known:
            return self
        unroutable = {ref: digest for ref, digest in self._unroutable.items() if ref not in known}
        large = {ref for segment in self._segments if len(segment) > DENSE_MAX for ref in known if ref in segment.place}
        contrasts = {ref: contrast for ref, contrast in self._contrasts.items() if ref not in known}
        segments = _cut(self._segments, known - large)
        return self._replaced(segments=segments, gone=self._gone | large, unroutable=unroutable, contrasts=contrasts)

    def erased(self, refs: Collection[AdapterRef]) -> Router:
        """The same decisions, and no vectors of those among `refs` that were removed: a large segment, which only masked them, is made again."""
        masked = self._gone.intersection(refs)
        if not masked:
            return self
        return self._replaced(segments=_cut(self._segments, masked), gone=self._gone - masked)

    @property
    def scattered(self) -> bool:
        """Whether so many prototypes lie in small segments, where all are scored, that `compaction` pays."""
        return sum(len(segment) for segment in self._segments if len(segment) <= DENSE_MAX) >= SCATTERED * DENSE_MAX

    def compaction(self) -> Segment | None:
        """The small segments as one, with its index, for `compacted`; None while they are few.

        Large ones that are not much larger go in: segments double, and each prototype is read again as seldom as a binary counter carries.
        """
        if not self.scattered or self.calibration is None:
            return None
        by_size = sorted(self._segments, key=len)
        chosen: list[Segment] = []
        for segment in by_size:
            if len(segment) <= max(DENSE_MAX, 2 * sum(map(len, chosen))):
                chosen.append(segment)
        merged = Segment.merged(chosen, self._gone)
        merged.index(self.calibration.scoring)
        return merged

    def compacted(self, merged: Segment) -> Router:
        """The same decisions, with `merged` in the place of the segments that it was made of; what was removed since is masked in it."""
        stale = {ref for ref, digest in zip(merged.refs, merged.digests, strict=True) if self.digests.get(ref) != digest}
        if not stale.isdisjoint(self.digests):    # a version has another state than it had: not what these are segments of
            return self
        # What is made again anyway loses what was masked in it: a remnant of masked adapters alone would stay for ever.
        remade = [segment for segment in self._segments if len(segment) <= DENSE_MAX or not set(merged.refs).isdisjoint(segment.place)]
        rest = _cut(self._segments, set(merged.refs) | {ref for segment in remade for ref in self._gone if ref in segment.place})
        gone = {ref for ref in self._gone for segment in rest if ref in segment.place} | stale
        large, small = ([segment for segment in rest if (len(segment) > DENSE_MAX) is is_large] for is_large in (True, False))
        return self._replaced(segments=[*large, merged, *small], gone=gone)

    def with_head(self, head: Head | None, centres: Mapping[AdapterRef, float] | None = None) -> Router:
        """The same adapters, under another head; `centres` as of `calibration.solved_centres`."""
        return self._replaced(head=head, centres=centres or {})

    def numbered(self, calibration: Calibration) -> Router:
        """The same decisions, under the same calibration by its number in the registry and with what else is told of it."""
        return self._replaced(calibration=calibration)

    def _replaced(self, **changes: Any) -> Router:
        parts: dict[str, Any] = {"segments": self._segments, "calibration": self.calibration, "head": self.head}
        parts |= {"unroutable": self._unroutable} | {"gone": self._gone, "centres": self.centres, "contrasts": self._contrasts}
        return Router(**parts | changes)

    # ---- look -------------------------------------------------------------------------------------------------------

    @cached_property
    def refs(self) -> tuple[AdapterRef, ...]:
        """The adapters that can be routed to, sorted; those without exemplars are not among them."""
        return tuple(sorted(ref for segment in self._segments for ref in segment.refs if ref not in self._gone))

    @cached_property
    def versions(self) -> tuple[AdapterRef, ...]:
        """All adapters it was made of, sorted, those without exemplars too."""
        return tuple(sorted([*self.refs, *self._unroutable]))

    @cached_property
    def digests(self) -> Mapping[AdapterRef, str]:
        """Of the routing states of the adapters that can be routed to."""
        pairs = ((ref, digest) for segment in self._segments for ref, digest in zip(segment.refs, segment.digests, strict=True))
        return {ref: digest for ref, digest in pairs if ref not in self._gone}

    @cached_property
    def head_digest(self) -> str:
        """Names the head that knows all of these adapters."""
        return digest_of(self.digests)

    @cached_property
    def has_head(self) -> bool:
        """Whether the head that knows all of these adapters exists: what `head.can_solve` says of their exemplars."""
        classes = exemplars = 0
        for segment, absent in zip(self._segments, self._absent, strict=True):
            counts = segment.solved_counts if absent is None else segment.solved_counts[~absent]
            classes, exemplars = classes + int(counts[:, 0].sum()), exemplars + int(counts[:, 1].sum())
        return fits(classes, exemplars)

    @cached_property
    def digest(self) -> str:
        """Changes with anything that a decision depends on."""
        parts = [self.calibration.digest if self.calibration else "", self.head.digest if self.head else ""]
        parts += [f"{ref} {digest}" for ref, digest in sorted({**self.digests, **self._unroutable}.items())]
        return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()

    # ---- decide -----------------------------------------------------------------------------------------------------

    def route(self, encoder: Encoder, texts: Sequence[str], k: int = 1, max_false_reject: float = 0.05) -> list[Decision]:
        """Encode and decide. Raises InvalidInput, and ModelChanged for another encoder than the exemplars'."""
        if self.calibration and encoder.fingerprint != self.calibration.encoder_fingerprint:
            raise ModelChanged(
                f"the router's exemplars were encoded by '{self.calibration.encoder}', not by '{encoder.id}' ({encoder.fingerprint[:19]}).",
                hint="Route with the registry's encoder.",
            )
        return self.route_features(extract(encoder, texts), k=k, max_false_reject=max_false_reject)

    def route_features(self, features: Features, k: int = 1, max_false_reject: float = 0.05) -> list[Decision]:
        """Decide for each of n texts. `k` is how many candidates each decision shows. Raises InvalidInput."""
        rate = check_rate(max_false_reject)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidInput(f"k={k!r} is not a positive count of candidates.")
        norms = np.linalg.norm(features.dense, axis=1)
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if len(bad):
            raise InvalidInput(f"vector {bad[0] + 1} of {len(features)} is zero or not finite.")
        if self.calibration is None or not self._segments:
            number = self.calibration.id if self.calibration else None
            return [Decision(None, None, -math.inf if rate == 0 else None, None, Reason.NO_CANDIDATES, (), number)] * len(features)
        if features.dense.shape[1] != self.dim:
            raise InvalidInput(f"vectors of width {features.dense.shape[1]} do not fit a router of width {self.dim}.")
        threshold = self.calibration.threshold(rate)
        decisions: list[Decision] = []
        for start in range(0, len(features), CHUNK):
            decisions += self._decide(features[start : start + CHUNK], k, threshold)
        return decisions

    @property
    def dim(self) -> int:
        return int(self._segments[0].means.shape[1]) if self._segments else 0

    def _decide(self, features: Features, k: int, threshold: float) -> list[Decision]:
        assert self.calibration is not None
        decisions, wanted = [], max(k, 2)
        searched = any(segment.searches(self._looked_at(wanted)) for segment in self._segments)
        for found in self._candidates(features, wanted):
            if not found:
                decisions.append(Decision(None, None, None, None, Reason.NO_CANDIDATES, (), self.calibration.id))
                continue
            best, best_score = found[0]
            score = round(best_score - self._centre_of(best), SCORE_DECIMALS)
            accepted = score >= threshold
            decisions.append(
                Decision(
                    adapter=best if accepted else None,
                    score=score,
                    threshold=threshold,
                    margin=round(best_score - found[1][1], SCORE_DECIMALS) if len(found) > 1 else None,
                    reason=Reason.ACCEPTED if accepted else Reason.BELOW_THRESHOLD,
                    candidates=tuple(found[:k]),
                    calibration=self.calibration.id,
                    method=self._method_of(best),
                    searched=searched,
                )
            )
        return decisions

    def _method_of(self, ref: AdapterRef) -> Method:
        if self.head and ref in self.head.columns:
            return Method.KERNEL_RIDGE if isinstance(self.head.basis, Kernel) else Method.RANDOM_FEATURES
        segment = self._segment_of(ref)
        return Method.DESCRIPTION if segment.singles[segment.place[ref]] else Method.PROTOTYPES

    def _centre_of(self, ref: AdapterRef) -> float:
        if ref in self.centres:
            return self.centres[ref]
        segment = self._segment_of(ref)
        return float(segment.centres[segment.place[ref]])

    def _segment_of(self, ref: AdapterRef) -> Segment:
        return next(segment for segment in self._segments if ref in segment.place)

    def label_responses(self, features: Features, refs: Sequence[AdapterRef]) -> list[F32]:
        """Of each of n inputs the responses (c,) to the labels of the adapter beside it, in alphabetical order, less what its negatives take off."""
        assert self.calibration is not None
        solved, found = self.head.responses(features) if self.head else None, []
        for row, ref in enumerate(refs):
            number = next(number for number, segment in enumerate(self._segments) if ref in segment.place)
            own = slice(row, row + 1)
            responses = self._segments[number].label_responses(
                features.dense[own], None if solved is None else solved[own], self._columns[number], self.calibration.scoring, ref
            )[0]
            found.append(responses - self._contrasts[ref].penalties(features[own])[0] if ref in self._contrasts else responses)
        return found

    def _candidates(self, features: Features, wanted: int) -> list[list[tuple[AdapterRef, float]]]:
        """For each input the `wanted` best adapters and their scores, best first; ties go to the first in name order."""
        solved: F32 | None = self.head.responses(features) if self.head else None
        found: list[list[tuple[AdapterRef, float]]] = [[] for _ in range(len(features))]
        for number, segment in enumerate(self._segments):
            adapters, scores = self._best_of(number, features, solved, wanted)
            for row, row_adapters, row_scores in zip(found, adapters.tolist(), scores.tolist(), strict=True):
                row += [
                    (segment.refs[adapter], score)
                    for adapter, score in zip(row_adapters, row_scores, strict=True)
                    if adapter >= 0
                ]
        for row in found:
            row.sort(key=lambda candidate: (-candidate[1], candidate[0]))
            del row[wanted:]
        return found

    def _best_of(self, number: int, features: Features, solved: F32 | None, wanted: int) -> tuple[I64, F64]:
        """((n, c) adapters, (n, c) scores): the best of one segment, `wanted` at least, or all; -1 fills up."""
        assert self.calibration is not None
        segment, columns, absent = self._segments[number], self._columns[number], self._absent[number]
        looked = self._looked_at(wanted)
        while True:
            adapters, raw = segment.scores(features.dense, solved, columns, self.calibration.scoring, looked, absent)
            # Rounded in float64, as it will be shown: ties are then ties.
            rounded = np.asarray(np.round(raw.astype(np.float64), SCORE_DECIMALS), np.float64)
            order = np.argsort(-rounded, axis=1, kind="stable")[:, :looked]
            adapters, scores = np.take_along_axis(adapters, order, 1), np.take_along_axis(rounded, order, 1)
            if not self._contrasts:
                return adapters, scores
            least = scores[:, -1]
            scores = np.round(scores - self._penalties(segment, features, adapters), SCORE_DECIMALS)
            # Penalties only take off: whoever was not looked at has at most `least`.
            if looked >= len(segment.refs) or (np.sort(scores, axis=1)[:, -min(wanted, scores.shape[1])] >= least).all():
                return adapters, scores
            looked *= 4

    def _looked_at(self, wanted: int) -> int:
        return wanted + (CONTRASTED if self._contrasts else 0)

    def _penalties(self, segment: Segment, features: Features, adapters: I64) -> F64:
        """(n, c): what the negatives of these adapters take off."""
        found = np.zeros(adapters.shape)
        for ref, contrast in self._contrasts.items():
            rows, nth = np.nonzero(adapters == segment.place.get(ref, -2))
            if len(rows):
                found[rows, nth] = contrast.penalties(features[rows])
        return found

    # ---- keep -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write a snapshot that opens without the versions, wholly or not at all. Replaces what lies there.

        Files of segments that the replaced one has too are checked and linked, not written again.
        """
        staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        staging.mkdir(parents=True)
        sums: dict[str, str] = {}
        try:
            for name, digest in _sums_in(folder).items():
                with suppress(OSError):    # written again
                    if name in self._segment_files and _digest_of(folder / name) == digest:
                        os.link(folder / name, staging / name)
                        sums[name] = digest
            for name, write in self._files():
                if name not in sums:
                    write(staging / name)
                    sums[name] = _digest_of(staging / name)
            _write(_sums_text(sums))(staging / SUMS)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _files(self) -> Iterable[tuple[str, Callable[[Path], None]]]:
        names = [self._name_of(segment) for segment in self._segments]
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "digest": self.digest,
            "segments": names,
            "unroutable": {str(ref): digest for ref, digest in self._unroutable.items()},
            "gone": sorted(map(str, self._gone)),
            "centres": {str(ref): centre for ref, centre in self.centres.items()},
            "contrasts": sorted(map(str, self._contrasts)),
        }
        yield "router.json", _write(json.dumps(facts, sort_keys=True).encode())
        if self.head:
            yield "head.safetensors", _write(self.head.to_bytes())
        for name, segment in zip(names, self._segments, strict=True):
            yield f"{name}.safetensors", partial(_write_segment, segment)
            if len(segment) > DENSE_MAX:
                assert self.calibration is not None
                yield f"{name}.faiss", segment.index(self.calibration.scoring).save    # type: ignore[attr-defined]
        for ref, contrast in self._contrasts.items():
            yield f"{ref}{CONTRAST}", _write(contrast.to_bytes())

    def _name_of(self, segment: Segment) -> str:
        """By its content, which follows from the states of its adapters and the calibration."""
        assert self.calibration is not None
        lines = [f"segment {SCHEMA}", self.calibration.digest]
        lines += [f"{ref} {digest}" for ref, digest in zip(segment.refs, segment.digests, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    @cached_property
    def _segment_files(self) -> frozenset[str]:
        return frozenset(f"{self._name_of(segment)}.{kind}" for segment in self._segments for kind in ("safetensors", "faiss"))

    @classmethod
    def open(cls, folder: Path, calibration: Calibration | None) -> Router:
        """What `save` wrote, under the calibration that it was made with. Raises CorruptIndex where it is damaged or another's."""
        try:
            found = {path.name: _digest_of(path) for path in folder.iterdir() if path.name != SUMS}
            if (folder / SUMS).read_bytes() != _sums_text(found):
                raise CorruptIndex(folder, "a file is missing, or not as it was saved")
            facts = json.loads((folder / "router.json").read_bytes())
            head_file = folder / "head.safetensors"
            head = Head.from_bytes(head_file.read_bytes(), head_file) if head_file.exists() else None
            segments = [_read_segment(folder, str(name)) for name in facts["segments"]]
            unroutable = {AdapterRef.parse(ref): str(digest) for ref, digest in facts["unroutable"].items()}
            gone = frozenset(AdapterRef.parse(ref) for ref in facts["gone"])
            centres = {AdapterRef.parse(ref): float(centre) for ref, centre in facts["centres"].items()}
            contrasts = {AdapterRef.parse(ref): Contrast.from_bytes((folder / f"{ref}{CONTRAST}").read_bytes(), folder) for ref in facts["contrasts"]}
            router = cls(segments, calibration, head, unroutable, gone, centres, contrasts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidName) as error:
            raise CorruptIndex(folder, f"not a saved router ({error})") from error
        if facts.get("schema") != SCHEMA or facts["digest"] != router.digest:
            raise CorruptIndex(folder, "not the router of these versions and this calibration")
        return router


def _contrasts(exemplars: Mapping[AdapterRef, Exemplars]) -> dict[AdapterRef, Contrast]:
    """Of those that have negatives."""
    return {ref: contrast for ref, one in exemplars.items() if (contrast := Contrast.of(one))}


def _cut(segments: Sequence[Segment], refs: Collection[AdapterRef]) -> list[Segment]:
    """Without these adapters, and without segments that are empty then."""
    rest = [segment.without(*refs) if any(ref in segment.place for ref in refs) else segment for segment in segments]
    return [segment for segment in rest if len(segment)]


def _read_segment(folder: Path, name: str) -> Segment:
    path = folder / f"{name}.safetensors"
    tensors, facts = read_tensors(path.read_bytes(), "segment", SCHEMA, path, CorruptIndex)
    names = ("centres", "sizes", "labelled", "singles", "means", "counts")
    centres, sizes, labelled, singles, means, counts = (tensors[name] for name in names)
    whole = len(means) == len(counts) == int(sizes.sum()) and len(sizes) == len(labelled) == len(singles) == len(centres) == len(facts["refs"])
    if means.dtype != np.float16 or means.ndim != 2 or not whole:
        raise CorruptIndex(path, f"{means.dtype} {means.shape} for {len(counts)} prototypes of {len(sizes)} adapters")
    index = FaissIndex.open(folder / f"{name}.faiss") if len(means) > DENSE_MAX else None
    if index is not None and len(index) != len(means):
        raise CorruptIndex(folder / f"{name}.faiss", f"{len(index)} rows for {len(means)} prototypes")
    refs = [AdapterRef.parse(ref) for ref in facts["refs"]]
    return Segment(refs, facts["digests"], centres, sizes, labelled, singles, means, counts, index)


def _write_segment(segment: Segment, path: Path) -> None:
    facts = {"schema": SCHEMA, "refs": [str(ref) for ref in segment.refs], "digests": segment.digests}
    names = ("centres", "sizes", "labelled", "singles", "means", "counts")
    tensors: dict[str, NDArray[Any]] = {name: getattr(segment, name) for name in names}
    _write(safetensors.numpy.save(tensors, {"segment": json.dumps(facts)}))(path)


def _sums_in(folder: Path) -> dict[str, str]:
    """File to digest, as SUMS says; nothing where there is none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _sums_text(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return write
