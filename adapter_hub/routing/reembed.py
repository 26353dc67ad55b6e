"""A registry goes over to another encoder: what is in production is encoded anew from its texts, as new versions.

A crash at any point is made good by the same call: a version that was made already is found by its parent and its encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_hub.errors import AdapterNotFound, NotRoutable, RegistryError
from adapter_hub.examples import Example, read_examples
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry.layout import CARD, DATA_FILES, EVALUATION_FILE, EXEMPLARS_FILE, NEGATIVES_FILE
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.registry import Registry
from adapter_hub.registry.schema import VersionState
from adapter_hub.routing.encoder import Encoder
from adapter_hub.routing.live import ROUTING_FILE
from adapter_hub.routing.statistics import RoutingState, build_state

log = logging.getLogger("adapter_hub")

WEIGHTS_FILE = DATA_FILES[0]
TEXT_FILES = (EXEMPLARS_FILE, EVALUATION_FILE, NEGATIVES_FILE)
NAMES_MAX = 20    # said in one message


@dataclass(frozen=True, slots=True)
class Reembedded:
    """What a registry's change of encoder made."""

    encoder: str
    encoder_fingerprint: str
    versions: tuple[tuple[AdapterRef, AdapterRef], ...]    # (in production before, now), by name
    calibration: int | None                                # number of the record; None where there is nothing to measure

    def to_json(self) -> dict[str, Any]:
        versions = [{"before": str(before), "now": str(now)} for before, now in self.versions]
        return {"encoder": self.encoder, "encoder_fingerprint": self.encoder_fingerprint, "calibration": self.calibration, "versions": versions}


@dataclass(frozen=True, slots=True)
class _Source:
    """What a version is encoded from."""

    examples: list[Example]
    evaluation: list[Example]
    negatives: list[Example]
    description: str = ""                # only where it stands for the examples
    label_names: tuple[str, ...] = ()    # beside it


def reembed(registry: Registry, encoder: Encoder, reason: str) -> list[tuple[AdapterRef, AdapterRef]]:
    """(before, now) of each production version that another encoder had encoded, after hub.toml names this one. Not calibrated yet.

    Everything is made, then hub.toml is rewritten, then all are promoted: until then the registry routes as before.
    Raises RegistryError with the names of the versions whose texts are not kept, CorruptVersion, InvalidConfig; nothing has changed then.
    """
    moved: dict[AdapterRef, AdapterRef] = {}
    with registry.changing_encoder():
        registry.config_with(encoder.id, encoder.fingerprint)
        pending = _pending(registry, encoder.fingerprint)
        while True:
            made = {old: _made(registry, old, encoder.fingerprint) or _make(registry, old, encoder, reason) for old in pending}
            registry.name_encoder(encoder.id, encoder.fingerprint)
            for old, new in made.items():
                if registry.aliases(old.name).get(PRODUCTION) == old.version:    # else somebody moved it meanwhile
                    registry.promote(new, reason)
                    moved[old] = new
            pending = _pending(registry, encoder.fingerprint)    # what a process with the old encoder has put there meanwhile
            if not pending:
                return sorted(moved.items())


def _pending(registry: Registry, fingerprint: str) -> list[AdapterRef]:
    """The production versions that another encoder encoded. Raises RegistryError where texts of one are not kept, CorruptVersion."""
    foreign = [manifest.ref for manifest in _production(registry) if _fingerprint(registry, manifest) != fingerprint]
    bare = [str(ref) for ref in foreign if _source(registry, ref) is None]
    if bare:
        shown = ", ".join(bare[:NAMES_MAX]) + (f", … ({len(bare)})" if len(bare) > NAMES_MAX else "")
        hint = 'Set keep = "text" in hub.toml, register them again with their examples, or retire them; then run this again.'
        raise RegistryError(f"without all of their texts these cannot be encoded anew: {shown}.", hint=hint)
    return foreign


def _production(registry: Registry) -> Iterator[Manifest]:
    """Of the versions that have something to route by."""
    for ref in registry.production():
        try:
            manifest = registry.manifest(ref)
        except (AdapterNotFound, NotRoutable):    # purged meanwhile
            continue
        if ROUTING_FILE in manifest.files:
            yield manifest


def _state(registry: Registry, ref: AdapterRef) -> RoutingState:
    return RoutingState.from_bytes(registry.read(ref, ROUTING_FILE), source=f"{ref}/{ROUTING_FILE}")


def _fingerprint(registry: Registry, manifest: Manifest) -> str:
    return manifest.encoder_fingerprint or _state(registry, manifest.ref).encoder_fingerprint


def _source(registry: Registry, ref: AdapterRef) -> _Source | None:
    """None where texts are missing: of an exemplar, of an evaluation input, of a negative, or the description."""
    manifest, folder, state = registry.manifest(ref), registry.open_version(ref), _state(registry, ref)
    if not manifest.routed:
        return _Source([], [], [])
    examples, evaluation, negatives = (read_examples(folder / file) if file in manifest.files else [] for file in TEXT_FILES)
    # There may be more of these: those that are exemplars too are dropped.
    if len(evaluation) < len(state.evaluation) or len(negatives) < len(state.negatives):
        return None
    if state.from_description:
        names = tuple(label for label in manifest.labels or () if label in state.class_names)
        return _Source([], evaluation, negatives, manifest.description, names) if manifest.description.strip() else None
    return _Source(state.as_known(examples), evaluation, negatives) if len(examples) == state.count else None


def _made(registry: Registry, old: AdapterRef, fingerprint: str) -> AdapterRef | None:
    """What a run before this one has made of it."""
    before = registry.manifest(old)
    kept = {file: before.files.get(file) for file in (WEIGHTS_FILE, *TEXT_FILES)}
    for row in reversed(registry.versions(old.name)):
        if row.state is VersionState.LIVE:
            found = registry.manifest(row.ref)
            same = all(found.files.get(file, sha256) == sha256 for file, sha256 in kept.items())
            if found.parent == str(old) and found.encoder_fingerprint == fingerprint and same:
                return row.ref
    return None


def _make(registry: Registry, old: AdapterRef, encoder: Encoder, reason: str) -> AdapterRef:
    """A new version with the same weights, stored once, and the routing state by this encoder."""
    source = _source(registry, old)
    assert source is not None
    manifest, folder = registry.manifest(old), registry.open_version(old)
    state = build_state(encoder, source.examples, source.description, source.evaluation, source.label_names, source.negatives)
    kept = [file for file in manifest.files if file not in (CARD, ROUTING_FILE) and (file not in TEXT_FILES or registry.config.keep == "text")]
    files: dict[str, Path | bytes] = {file: folder / file for file in kept}
    facts = manifest.facts(parent=str(old), encoder_fingerprint=encoder.fingerprint)
    new = registry.add(old.name, facts, files | {ROUTING_FILE: state.to_bytes()}, promote=False, reason=reason)
    log.info("%s is encoded anew as %s", old, new)
    return new
