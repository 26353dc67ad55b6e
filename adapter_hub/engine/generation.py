"""Which generation settings may be given, and what they are when nobody says. No model here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from adapter_hub.errors import InvalidInput

DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 64, "do_sample": False, "num_beams": 1}

# transformers' own names. Each with what it must be.
_ALLOWED: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "max_new_tokens": (int, "a whole number of at least 1"),
    "min_new_tokens": (int, "a whole number"),
    "do_sample": (bool, "true or false"),
    "temperature": ((int, float), "a number above 0"),
    "top_k": (int, "a whole number"),
    "top_p": ((int, float), "a share above 0, at most 1"),
    "min_p": ((int, float), "a share, 0 to 1"),
    "num_beams": (int, "a whole number of at least 1"),
    "length_penalty": ((int, float), "a number"),
    "early_stopping": (bool, "true or false"),
    "repetition_penalty": ((int, float), "a number above 0"),
    "no_repeat_ngram_size": (int, "a whole number"),
    "stop_strings": ((list, tuple, str), "texts that are not empty"),
    "seed": (int, "a whole number, for do_sample"),    # of every row's own draws
}
_AT_LEAST_ONE = ("max_new_tokens", "num_beams")
_ABOVE_ZERO = ("temperature", "top_p", "repetition_penalty")
_AT_MOST_ONE = ("top_p", "min_p")
_SEED_MAX = 2**63 - 1    # torch's


def check_generation(settings: Any, source: str = "generation") -> dict[str, Any]:
    """The settings, checked by name and type. Raises InvalidInput."""
    if not isinstance(settings, Mapping):
        raise InvalidInput(f"{source}: {type(settings).__name__} holds no settings.", hint='Give a mapping: {"max_new_tokens": 64}.')
    for key, value in settings.items():
        if key not in _ALLOWED:
            closest = difflib.get_close_matches(str(key), _ALLOWED, n=1)
            hint = f"Closest: {closest[0]!r}." if closest else f"There are: {', '.join(_ALLOWED)}."
            raise InvalidInput(f"{source}: {key!r} is not a generation setting.", hint=hint)
        kind, wanted = _ALLOWED[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not _in_range(key, value):
            raise InvalidInput(f"{source}: {key}={value!r} is not {wanted}.")
    # transformers refuses a whole number where it wants a float.
    return {key: float(value) if _ALLOWED[key][0] == (int, float) else value for key, value in settings.items()}


def _in_range(key: str, value: Any) -> bool:
    if isinstance(value, str | list | tuple):
        return all(isinstance(text, str) and text for text in ([value] if isinstance(value, str) else value))
    low = 1 if key in _AT_LEAST_ONE else -math.inf if key == "length_penalty" else 0
    high = 1 if key in _AT_MOST_ONE else _SEED_MAX
    return math.isfinite(value) and low <= value <= high and not (key in _ABOVE_ZERO and value <= 0)


def merged(adapter: Mapping[str, Any], call: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Defaults, then the adapter's own, then the call's; as sorted pairs, so that equal settings can share a batch."""
    settings = {**DEFAULTS, **adapter, **(call or {})}
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items()))
