"""Regular expressions that an adapter brings: each is refused before it could run for ever. Standard library only.

Python's matcher goes back over every choice that a pattern leaves it. A file from elsewhere may hold a pattern with more choices than
there is time for, and PEFT matches it as it stands: so the choices are counted here, from the parsed pattern, before it is used.
"""

from __future__ import annotations

import math
import re
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

REPEATS = 20               # ways that one `.*` may stop in the name of a module: its parts count more than its letters
CHOICES_MAX = 100_000      # `.*layers\.(1|2|…|40)\..*\.(q|k|v|o)_proj` has 16,000 of them

_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def matches_end(pattern: str, module: str) -> bool:
    """Whether it matches the whole name or its end after a dot, as PEFT's get_pattern_key does."""
    return re.match(_at_end(pattern), module) is not None


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is no regular expression, also not at the end of another, or leaves more than CHOICES_MAX choices."""
    try:
        re.compile(_at_end(pattern))
        choices = _choices(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from error
    if choices > CHOICES_MAX:
        raise ValueError(f"the regular expression {pattern[:80]!r} could run for ever: write it with fewer repetitions")


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _choices(parsed: Any) -> float:
    """How often the matcher may go back over this sequence; infinite where a repetition holds a choice: `(a+)+`, `(a|ab)*`."""
    return math.prod(_of_one(code, value) for code, value in parsed)


def _of_one(code: Any, value: Any) -> float:
    if code in _REPEATS:
        least, most, body = value
        within = _choices(body)
        if most == 1:
            return within if least else 1 + within
        return min(most - least + 1, REPEATS) if within == 1 else math.inf
    if code is op.BRANCH:
        return sum(_choices(alternative) for alternative in value[1])
    # Groups, assertions and conditions hold sequences at one place or another.
    parts = value if isinstance(value, tuple) else (value,)
    return math.prod(_choices(part) for part in parts if isinstance(part, _parser.SubPattern))
