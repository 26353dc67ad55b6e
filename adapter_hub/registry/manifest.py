"""The facts of a version, its digest, and its model card. Pure: manifests are JSON here, files elsewhere."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from adapter_hub.errors import CorruptVersion, InvalidInput, InvalidName, SchemaTooNew
from adapter_hub.refs import AdapterRef, check_name
from adapter_hub.registry.layout import check_file_name

JSON = Any
MANIFEST_SCHEMA = 1
NESTING_MAX = 50    # of a fact: Python's own JSON writer gives up some hundreds deep
SHA256_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFacts:
    """What the caller of `add` knows of a version. Raises InvalidInput for what JSON or a manifest cannot hold."""

    base_model: str
    base_fingerprint: str
    peft: Mapping[str, JSON]                        # adapter_config.json
    encoder_fingerprint: str | None = None
    task_type: str | None = None                    # PEFT's word, e.g. SEQ_CLS
    labels: tuple[str, ...] | None = None           # names of the head's outputs, in their order
    problem_type: str | None = None                 # of SEQ_CLS, transformers' word; None: one label among them
    prompt_template: str | None = None              # text with {text} in it
    generation: Mapping[str, JSON] = field(default_factory=dict)
    metrics: Mapping[str, JSON] = field(default_factory=dict)
    training_data_digest: str | None = None
    evaluation_digest: str | None = None            # of the rows that were held out to measure it
    parent: str | None = None                       # the version that it was made from
    started_from: tuple[str, ...] = ()              # versions of other names whose weights its training began with
    routed: bool = True                             # False: only its name reaches it, though it has examples
    license: str | None = None
    description: str = ""
    tags: tuple[str, ...] = ()
    source: str | None = None                       # the hub repository that the adapter was fetched from
    revision: str | None = None                     # and the commit of it

    def __post_init__(self) -> None:
        for key in ("base_model", "base_fingerprint", "description"):
            _check(isinstance(getattr(self, key), str), key, getattr(self, key), "text")
        optional = ("encoder_fingerprint", "task_type", "problem_type", "prompt_template", "training_data_digest", "parent", "license")
        for key in (*optional, "evaluation_digest", "source", "revision"):
            _check(getattr(self, key) is None or isinstance(getattr(self, key), str), key, getattr(self, key), "text or None")
        texts = [value for item in fields(VersionFacts) if isinstance(value := getattr(self, item.name), str)]
        _check(not any("\0" in text for text in texts), "a text", "\0", "without NUL characters")
        _check(isinstance(self.routed, bool), "routed", self.routed, "true or false")
        for key in ("peft", "generation", "metrics"):
            _check(isinstance(getattr(self, key), Mapping), key, getattr(self, key), "a mapping")
        for key in ("labels", "tags", "started_from"):
            value = getattr(self, key)
            if value is not None or key != "labels":
                _check(isinstance(value, tuple | list) and all(isinstance(item, str) for item in value), key, value, "a tuple of texts")
                object.__setattr__(self, key, tuple(value))
        _check(all(tag and tag.isprintable() for tag in self.tags), "tags", self.tags, "a tuple of printable texts")
        object.__setattr__(self, "tags", tuple(dict.fromkeys(self.tags)))
        for item in fields(VersionFacts):
            value = _as_json(item.name, getattr(self, item.name))
            if isinstance(value, dict):
                object.__setattr__(self, item.name, value)    # a copy that nobody else can change


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(VersionFacts):
    """One immutable version. `digest` covers every other field, and through `files` every byte.

    A tombstone (`purged_at` is set) keeps the digest that the version had and names no files.
    """

    name: str
    version: int
    created_at: str                 # ISO 8601, UTC
    files: Mapping[str, str]        # file name -> sha256 in hex
    digest: str = ""                # "sha256:…"
    purged_at: str | None = None

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.name, self.version)

    @property
    def origins(self) -> tuple[str, ...]:
        """The versions whose data are in this one: what it was made and started from."""
        return (*([self.parent] if self.parent is not None else []), *self.started_from)

    def facts(self, **changes: Any) -> VersionFacts:
        """What the caller of `add` knew, with changes: the start of a version that is made from this one."""
        known = {item.name: getattr(self, item.name) for item in fields(VersionFacts)}
        return VersionFacts(**known | changes)

    def computed_digest(self) -> str:
        row = self.to_json()
        del row["digest"]
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def sealed(self) -> Manifest:
        return replace(self, digest=self.computed_digest())

    def tombstone(self, purged_at: str) -> Manifest:
        """What stays after `purge`: which version it was, and nothing that was learned or said."""
        return Manifest(
            name=self.name,
            version=self.version,
            created_at=self.created_at,
            files={},
            digest=self.digest,
            base_model=self.base_model,
            base_fingerprint=self.base_fingerprint,
            task_type=self.task_type,
            peft={},
            purged_at=purged_at,
        )

    @classmethod
    def lost(cls, name: str, version: int, *, digest: str, created_at: str, purged_at: str) -> Manifest:
        """The tombstone of a version whose manifest is gone."""
        return cls(
            name=name, version=version, created_at=created_at, files={}, digest=digest,
            base_model="", base_fingerprint="", peft={}, purged_at=purged_at,
        )

    def to_json(self) -> dict[str, JSON]:
        row = {"schema": MANIFEST_SCHEMA, "name": self.name, "version": self.version, "digest": self.digest} | asdict(self)
        row["labels"] = None if self.labels is None else list(self.labels)
        row["tags"], row["started_from"] = list(self.tags), list(self.started_from)
        for key in ("purged_at", "source", "revision", "problem_type", "evaluation_digest", "started_from"):    # what most versions lack
            if row[key] in (None, []):
                del row[key]
        if self.routed:
            del row["routed"]
        return row

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_json(), ensure_ascii=False, indent=2, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, row: object, *, source: object) -> Manifest:
        """Raises CorruptVersion, naming `source`; SchemaTooNew."""
        if not isinstance(row, dict):
            raise CorruptVersion(f"{source} is not a manifest.", hint="See `adapter-hub verify`.")
        values = dict(row)
        schema = values.pop("schema", None)
        if isinstance(schema, int) and schema > MANIFEST_SCHEMA:
            known = f"this adapter_hub knows up to {MANIFEST_SCHEMA}"
            raise SchemaTooNew(f"{source} has manifest schema {schema}; {known}.", hint="Upgrade adapter_hub.")
        try:
            manifest = cls(**values)
            valid = isinstance(manifest.version, int) and isinstance(manifest.digest, str) and isinstance(manifest.created_at, str)
            check_name(manifest.name)
            for file, sha256 in manifest.files.items():
                check_file_name(file)
                valid = valid and isinstance(sha256, str) and len(sha256) == SHA256_CHARS
        except (TypeError, AttributeError, InvalidInput, InvalidName) as error:
            raise CorruptVersion(f"{source} is not a manifest: {error}", hint="See `adapter-hub verify`.") from error
        if schema != MANIFEST_SCHEMA or not valid:
            raise CorruptVersion(f"{source} is not a manifest: a field has the wrong type.", hint="See `adapter-hub verify`.")
        return manifest

    @classmethod
    def from_bytes(cls, data: bytes, *, source: object) -> Manifest:
        """Raises CorruptVersion where the bytes are no manifest or its digest does not cover them; SchemaTooNew."""
        try:
            row = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptVersion(f"{source} is not JSON.", hint="See `adapter-hub verify`.") from error
        manifest = cls.from_json(row, source=source)
        if manifest.purged_at is None and manifest.digest != manifest.computed_digest():
            raise CorruptVersion(f"{source} was changed: its digest does not cover its fields.", hint="Restore it from a copy.")
        return manifest


def _check(holds: bool, key: str, value: object, wanted: str) -> None:
    if not holds:
        raise InvalidInput(f"{key}={value!r} is not {wanted}.")


def _as_json(key: str, value: object) -> JSON:
    _check_depth(key, value, NESTING_MAX)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
        text.encode()
    except (TypeError, ValueError) as error:    # UnicodeEncodeError (a lone surrogate) is a ValueError
        raise InvalidInput(f"{key} is not plain JSON: {error}.", hint="Use texts, finite numbers, lists and mappings.") from error
    return json.loads(text)


def _check_depth(key: str, value: object, left: int) -> None:
    _check(left > 0, key, "a value", f"nested less than {NESTING_MAX} deep")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _check_depth(key, item, left - 1)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(manifest: Manifest) -> str:
    """README.md of a version: the front matter that model hubs read, what it is, how to load it."""
    front = {"base_model": manifest.base_model, "library_name": "peft", "license": manifest.license, "tags": list(manifest.tags) or None}
    header = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items() if value)
    rows = [
        ("base model", f"`{_cell(manifest.base_model)}`"),
        ("base fingerprint", manifest.base_fingerprint and f"`{manifest.base_fingerprint}`"),
        ("task", _cell(manifest.task_type or "features")),
        ("problem", _cell((manifest.problem_type or "").replace("_", " "))),
        ("labels", _cell(", ".join(manifest.labels or ()))),
        ("metrics", _cell(", ".join(f"{key} {_figure(value)}" for key, value in manifest.metrics.items()))),
        ("made from", _cell(", ".join(manifest.origins))),
        ("licence", _cell(manifest.license or "not stated")),
        ("registered", manifest.created_at),
    ]
    table = "".join(f"| {key} | {value} |\n" for key, value in rows if value)
    description = manifest.description.strip() or f"Adapter `{manifest.name}`, version {manifest.version}."
    return f"""---
{header}---

# {manifest.ref}

{description}

| | |
|---|---|
{table}
This folder is a plain PEFT adapter:

```python
from peft import PeftModel
from transformers import {_auto_class(manifest)}

base = {_auto_class(manifest)}.from_pretrained({json.dumps(manifest.base_model, ensure_ascii=False)}{_head_size(manifest)})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def _auto_class(manifest: Manifest) -> str:
    return _AUTO_CLASSES.get(manifest.task_type or "", "AutoModel")


def _head_size(manifest: Manifest) -> str:
    if manifest.problem_type == "regression":
        return ", num_labels=1"
    more = f', problem_type="{manifest.problem_type}"' if manifest.problem_type else ""
    return f", num_labels={len(manifest.labels)}{more}" if manifest.labels and manifest.task_type in ("SEQ_CLS", "TOKEN_CLS") else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _figure(value: JSON) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
