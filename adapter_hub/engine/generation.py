"""Which generation settings may be given, and what they are when nobody says. No model here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from adapter_hub.errors import InvalidInput

DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 64, "do_sample": False, "num_beams": 1}

# transformers' own names. Each with what it must be.
_ALLOWED: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "max_new_tokens": (int, "a whole number of at least 1"),
    "min_new_tokens": (int, "a whole number"),
    "do_sample": (bool, "true or false"),
    "temperature": ((int, float), "a number of at least 0.001"),
    "top_k": (int, "a whole number"),
    "top_p": ((int, float), "a share above 0, at most 1"),
    "min_p": ((int, float), "a share, 0 to 1"),
    "num_beams": (int, "a whole number of at least 1"),
    "length_penalty": ((int, float), "a number"),
    "early_stopping": (bool, "true or false"),
    "repetition_penalty": ((int, float), "a number of at least 0.001"),
    "no_repeat_ngram_size": (int, "a whole number"),
    "stop_strings": ((list, tuple, str), "texts that are not empty"),
    "seed": (int, "a whole number, for do_sample"),    # of every row's own draws
    "chat": (bool, "true or false"),                   # a text is one user's message in the tokenizer's chat template
    "system": (str, "a text that is not empty"),       # before a conversation that brings none itself
}
# What a row has for itself, whoever stands beside it in a batch. Beams of a batch end together, so they share all but the chat.
_CHAT = ("chat", "system")
_PER_ROW = ("max_new_tokens", "stop_strings", "seed", *_CHAT)
# What draws are made by: without do_sample there are none.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
# A row that is done is run along until the last one is: at most so many times longer than it asked for.
RIDE_MAX = 8
_AT_LEAST_ONE = ("max_new_tokens", "num_beams")
_ABOVE_ZERO = ("top_p",)
_DIVISORS, _DIVISOR_LEAST = ("temperature", "repetition_penalty"), 1e-3    # of scores, which smaller ones make infinite
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
    low = 1 if key in _AT_LEAST_ONE else _DIVISOR_LEAST if key in _DIVISORS else -math.inf if key == "length_penalty" else 0
    high = 1 if key in _AT_MOST_ONE else _SEED_MAX
    return math.isfinite(value) and low <= value <= high and not (key in _ABOVE_ZERO and value <= 0)


Settings = Mapping[str, Any]


def for_model(settings: Settings) -> dict[str, Any]:
    """Those that a whole batch shares, by transformers' names: what rows that share a forward must agree in."""
    own = _CHAT if settings["num_beams"] > 1 else _PER_ROW
    return {key: value for key, value in settings.items() if key not in own}


def kinds(rows: Sequence[Settings], tokens: Sequence[int], tokens_limit: int | None) -> list[Hashable]:
    """What rows of one kind have in common, so that they can share a forward; `tokens` is each prompt's length.

    Greedy and sampled rows differ freely in limits of like size, stop strings and seeds. Where a model takes only `tokens_limit`
    tokens in all, a prompt too long for its neighbours' limit keeps to rows of its own.
    """
    shared = [tuple(sorted(for_model(row).items())) for row in rows]
    limits = {(own, int(row["max_new_tokens"])) for own, row in zip(shared, rows, strict=True)}
    leaders: dict[tuple[Any, int], int] = {}
    leader: dict[Any, int] = {}
    for own, new in sorted(limits, key=lambda pair: -pair[1]):
        if own not in leader or leader[own] > RIDE_MAX * new:
            leader[own] = new
        leaders[own, new] = leader[own]
    found: list[Hashable] = []
    for own, row, prompt in zip(shared, rows, tokens, strict=True):
        new = int(row["max_new_tokens"])
        most = leaders[own, new]
        fits = tokens_limit is None or prompt + most <= tokens_limit
        found.append((own, most if fits else ("full", new)))
    return found


def merged(adapter: Mapping[str, Any], call: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Defaults, then the adapter's own, then the call's; as sorted pairs, so that they can be compared.

    Where nothing is drawn, what an adapter draws by is left out, and raises InvalidInput where the call says it.
    """
    call = call or {}
    settings = {**DEFAULTS, **adapter, **call}
    if not settings["do_sample"]:
        for key in _SAMPLING:
            if key in call:
                hint = 'Give {"do_sample": true} as well, or leave it out.'
                raise InvalidInput(f"{key}={call[key]!r} only matters with do_sample=True.", hint=hint)
            settings.pop(key, None)
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items()))
