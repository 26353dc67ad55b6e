"""What hub.toml may say: read strictly, written with comments for the people who edit it. Knows no catalogue."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from adapter_hub.errors import InvalidConfig, RegistryNotFound, storage_error
from adapter_hub.registry.artifacts import write_atomic

MAX_TOKENS_MAX = 1_000_000
KEEP = ("vectors", "text")
OBSERVE = ("off", "decisions", "hash", "text")
OBSERVATIONS_MAX = 100_000_000
DAYS_MAX = 3650
# Keys of the [policy] table; the others stand at the top.
POLICY = (
    "max_false_reject", "max_taken", "keep", "gate_level", "gate_margin", "gate_routed_margin", "observe", "observe_share", "observations_max",
    "accuracy_floor", "update_rows", "refresh_rows", "cooldown_days", "maintain_level",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """One base model, one encoder and the rules of this registry. Raises InvalidConfig for a value out of range."""

    base_model: str                   # hub id or folder
    encoder: str                      # hub id, folder or "hash"
    max_tokens: int                   # longest input, in the base model's tokens; the rest is cut off
    base_fingerprint: str = ""        # "sha256:…" of the base model's content; empty until known
    encoder_fingerprint: str = ""
    max_false_reject: float = 0.05    # share of belonging inputs that the router may turn away, 0-1
    max_taken: float = 1.0            # share of another adapter's inputs that a newcomer may take and still be promoted, 0-1; 1: no limit
    keep: str = "vectors"             # what is stored of the examples: "vectors", or "text" as well
    gate_level: float = 0.05          # how rarely the gate may see harm where there is none, above 0 to 0.5
    gate_margin: float = 0.02         # share of an adapter's old inputs, and of all others' inputs, that a learned version may lose, 0-1
    gate_routed_margin: float = 0.05    # share of one other adapter's inputs that it may lose, 0-1
    observe: str = "off"              # what is logged of each answer: "off" nothing, "decisions" no text, "hash" its sha256, "text"
    observe_share: float = 1.0        # share of the answers that are logged, 0-1
    observations_max: int = 100_000   # rows of the log; the oldest go first
    accuracy_floor: float = 0.7       # share of right answers below which maintenance updates an adapter, 0-1
    update_rows: int = 50             # new labelled rows that an update takes at least
    refresh_rows: int = 200           # new labelled rows from which an update is tried where nothing is wrong; 0: none is
    cooldown_days: float = 1.0        # between two updates of one adapter
    maintain_level: float = 0.05      # how rarely maintenance may, in all of its looks at one version, see harm where there is none

    def __post_init__(self) -> None:
        for key, (allowed, test) in _RULES.items():
            value = getattr(self, key)
            if not test(value):
                raise InvalidConfig(f"hub.toml: {_shown_key(key)} = {value!r} is not {allowed}.", hint=f"Set it to {allowed}.")
        if self.observe == "text" and self.keep != "text":    # what people ask is no less theirs than what they teach by
            raise InvalidConfig(
                f'hub.toml: policy.observe = "text" keeps texts, and policy.keep = "{self.keep}" forbids it.',
                hint='Set observe to "hash" or "decisions", or keep to "text".',
            )


def _text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_RULES: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "base_model": ("the id or folder of a model", lambda value: _text(value) and value != ""),
    "encoder": ("the id or folder of a text encoder", lambda value: _text(value) and value != ""),
    "max_tokens": (
        f"a whole number from 1 to {MAX_TOKENS_MAX}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS_MAX,
    ),
    "base_fingerprint": ("a fingerprint, or empty", _text),
    "encoder_fingerprint": ("a fingerprint, or empty", _text),
    **dict.fromkeys(
        ("max_false_reject", "max_taken", "gate_margin", "gate_routed_margin", "observe_share", "accuracy_floor"),
        ("a number from 0 to 1", lambda value: _number(value) and 0 <= float(str(value)) <= 1),
    ),
    **dict.fromkeys(
        ("gate_level", "maintain_level"), ("a number above 0, at most 0.5", lambda value: _number(value) and 0 < float(str(value)) <= 0.5)
    ),
    "cooldown_days": (f"a number from 0 to {DAYS_MAX}", lambda value: _number(value) and 0 <= float(str(value)) <= DAYS_MAX),
    "update_rows": (
        f"a whole number from 2 to {OBSERVATIONS_MAX}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= OBSERVATIONS_MAX,
    ),
    "refresh_rows": (
        f"0, or a whole number from 2 to {OBSERVATIONS_MAX}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and (value == 0 or 2 <= value <= OBSERVATIONS_MAX),
    ),
    "keep": ('"vectors" or "text"', lambda value: value in KEEP),
    "observe": ('"off", "decisions", "hash" or "text"', lambda value: value in OBSERVE),
    "observations_max": (
        f"a whole number from 1 to {OBSERVATIONS_MAX}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= OBSERVATIONS_MAX,
    ),
}


def _shown_key(key: str) -> str:
    return f"policy.{key}" if key in POLICY else key


def read_config(path: Path) -> RegistryConfig:
    """The configuration in a hub.toml. Raises RegistryNotFound, InvalidConfig with the key, the value and what is allowed."""
    try:
        document = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "Name its folder with --registry, or make one with `adapter-hub init`."
        raise RegistryNotFound(f"there is no registry at {path.parent}: {path.name} is missing.", hint=hint) from error
    except OSError as error:
        raise RegistryNotFound(f"{path} cannot be read: {error.strerror}.", hint="Ask its owner for read permission.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} is not TOML: {error}.", hint="Correct that line.") from error
    top, policy = set(_RULES) - set(POLICY), document.pop("policy", {})
    if not isinstance(policy, dict):
        raise InvalidConfig(f"hub.toml: policy = {policy!r} is not a table.", hint="Write a [policy] section.")
    _refuse_unknown(document, top, "")
    _refuse_unknown(policy, set(POLICY), "policy.")
    values = document | policy
    for field in fields(RegistryConfig):
        if field.name in ("base_model", "encoder", "max_tokens") and field.name not in values:
            raise InvalidConfig(f"hub.toml: {field.name} is missing.", hint=f"Set it to {_RULES[field.name][0]}.")
    return RegistryConfig(**values)


def check_policy(policy: Mapping[str, object]) -> None:
    """Raises InvalidConfig where a [policy] table may not say this: a key that does not exist, a value out of range."""
    _refuse_unknown(policy, set(POLICY), "policy.")
    RegistryConfig("-", "-", 1, **policy)    # type: ignore[arg-type]


def _refuse_unknown(table: Mapping[str, object], known: set[str], prefix: str) -> None:
    for key in table:
        if key not in known:
            closest = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"Did you mean {prefix}{closest[0]}?" if closest else f"Known keys: {', '.join(prefix + k for k in sorted(known))}."
            raise InvalidConfig(f"hub.toml: {prefix}{key} is not a key.", hint=hint)


def render_config(config: RegistryConfig) -> str:
    """hub.toml as text: what `read_config` reads back to the same value."""
    return f"""\
# The settings of this adapter_hub registry. `adapter-hub init` wrote this file; people edit it.

# The frozen base model that every adapter here was made for, and the text encoder of the router: hub ids or folders.
# A fingerprint is a hash of the model's content. What was registered holds for these two models only: to change the
# encoder, see `adapter-hub reembed`; to change the base model, make a new registry and register again.
base_model = {_toml(config.base_model)}
base_fingerprint = {_toml(config.base_fingerprint)}
encoder = {_toml(config.encoder)}
encoder_fingerprint = {_toml(config.encoder_fingerprint)}

# Longest input in the base model's tokens; what is longer is cut, in training and in use alike.
max_tokens = {config.max_tokens}

[policy]
# Share of the inputs that belong to an adapter which the router may leave to the base model, 0 to 1. 0 never abstains.
max_false_reject = {config.max_false_reject!r}

# Share of the inputs of any other adapter that a newcomer may take over, 0 to 1. With more it is registered and not promoted.
# 1 sets no limit. `adapter-hub effect` shows what a version takes from whom.
max_taken = {config.max_taken!r}

# What is stored of the examples given to `register`: "vectors", or "text" to keep the texts as well.
keep = {_toml(config.keep)}

# The gate of `adapter-hub learn`. What a new version may lose and still be promoted: of the inputs that the version in production was made
# for, and of all other adapters' inputs together (gate_margin); of those of one other adapter (gate_routed_margin). gate_level is how
# rarely it may see harm where there is none, above 0 to 0.5: a smaller one promotes more.
gate_level = {config.gate_level!r}
gate_margin = {config.gate_margin!r}
gate_routed_margin = {config.gate_routed_margin!r}

# The log of what was answered, in the catalogue's database: "off"; "decisions", each with its version, score, margin, reason and latency and
# without its text; "hash", the text's sha256 as well, by which a text that one has is found (a short text can be guessed from it); "text",
# the text itself as well, only where keep is "text". observe_share is the share of the answers that are logged, 0 to 1. Of more than observations_max
# rows the oldest go, with their feedback. `adapter-hub observations` shows the log, and with --forget erases it.
observe = {_toml(config.observe)}
observe_share = {config.observe_share!r}
observations_max = {config.observations_max}

# `adapter-hub maintain`: an adapter whose share of right answers lies below accuracy_floor, as feedback tells, or that answers worse after an
# alarm, learns from the feedback: from at least update_rows rows with text and label, at most once in cooldown_days. From refresh_rows such
# rows on it does so where nothing is wrong, too; 0: never. This needs the texts in the log (observe, above). maintain_level is how rarely it
# may, in all its looks at one version, see harm where there is none, above 0 to 0.5.
accuracy_floor = {config.accuracy_floor!r}
update_rows = {config.update_rows}
refresh_rows = {config.refresh_rows}
cooldown_days = {config.cooldown_days!r}
maintain_level = {config.maintain_level!r}
"""


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)    # printable text: JSON's escapes are TOML's


def with_encoder(text: str, encoder: str, fingerprint: str) -> str:
    """A hub.toml that names another encoder, every other line and comment as it was. Raises InvalidConfig where it cannot be changed so."""
    wanted = {"encoder": encoder, "encoder_fingerprint": fingerprint}
    table = re.search(r"^[ \t]*\[", text, re.MULTILINE)
    top, rest = (text[: table.start()], text[table.start() :]) if table else (text, "")
    if re.search(_line_of("encoder_fingerprint"), top) is None:    # it is optional
        newline = "\r\n" if "\r\n" in text else "\n"
        top = re.sub(_line_of("encoder"), lambda line: f'{line[0]}{newline}encoder_fingerprint = ""', top, count=1)
    for key, value in wanted.items():
        written = _toml(value)
        top = re.sub(_line_of(key), rf"\g<1>{written.replace(chr(92), chr(92) * 2)}\g<3>", top, count=1)
    try:
        changed = tomllib.loads(top + rest) == tomllib.loads(text) | wanted
    except tomllib.TOMLDecodeError:
        changed = False
    if not changed:
        raise InvalidConfig("hub.toml: the line of the encoder cannot be changed.", hint='Write it as encoder = "…", on a line of its own.')
    return top + rest


def _line_of(key: str) -> str:
    """Groups: the key, the string, and what stands behind it."""
    return rf"""(?m)^([ \t]*{key}[ \t]*=[ \t]*)("(?:[^"\\\r\n]|\\.)*"|'[^'\r\n]*')([^\r\n]*)"""


def write_config(path: Path, config: RegistryConfig) -> None:
    """Write a new hub.toml, wholly or not at all. Raises FileExistsError where there is one."""
    try:
        write_atomic(path, render_config(config).encode(), path.parent, replace=False)
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error
