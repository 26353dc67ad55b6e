"""What the verbs take: options that several share, inputs from the command line, files and stdin, and completion.

Nothing here opens a registry: completion reads folder names, so that a press of Tab costs no import.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapter_hub.errors import InvalidInput

if TYPE_CHECKING:
    from adapter_hub.chat import Conversation

JSON = Any

# ---- completion: reads folder names, opens nothing ------------------------------------------------------------------


def complete_ref(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the registry; after an `@`, the versions of that name."""
    after_verb, before_verb = ctx.params.get("registry"), ctx.find_root().params.get("registry")
    adapters = Path(after_verb if after_verb not in (None, "registry") else before_verb or "registry") / "adapters"
    name, at, _ = incomplete.partition("@")
    try:
        if at:
            versions = sorted((int(entry.name) for entry in (adapters / name).iterdir() if entry.name.isdigit()), reverse=True)
            found = [f"{name}@{tail}" for tail in ("production", *versions)] if versions else []
        else:
            found = sorted(entry.name for entry in adapters.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return [candidate for candidate in found if candidate.startswith(incomplete)]


# ---- arguments that several verbs share -----------------------------------------------------------------------------


def _share(rate: float | None) -> float | None:
    if rate is not None and not 0 <= rate <= 1:
        raise typer.BadParameter(f"{rate:g} is not a share from 0 to 1: 5 % is 0.05.")
    return rate


Registry = Annotated[str, typer.Option("--registry", help="Registry folder, or database URL (or ADAPTER_HUB_REGISTRY).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="name, name@3 or name@alias.", autocompletion=complete_ref)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.", autocompletion=complete_ref)]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]
Rate = Annotated[
    float | None,
    typer.Option("--max-false-reject", metavar="RATE", callback=_share, help="Share of belonging inputs that may be turned away, 0-1."),
]
Proposed = Annotated[list[str], typer.Argument(metavar="ID", help="Of a proposal, or of a group of it: 3.2.")]
Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Inputs; without any, --file or one a line on stdin.")]
File = Annotated[str, typer.Option("--file", help="JSONL, CSV or Parquet with `text` or `messages`, or .txt with one input a line; - is stdin.")]
Truncate = Annotated[bool, typer.Option("--truncate/--no-truncate", help="Cut an input that is too long, or refuse it.")]
Generation = Annotated[str, typer.Option(help='Generation settings as JSON, e.g. {"max_new_tokens": 64}.')]


def read_inputs(texts: Sequence[str] | None, file: str) -> Sequence[str | Conversation]:
    """The inputs of route and predict: from the command line, a file, or stdin. Raises InvalidInput."""
    if texts and file:
        raise InvalidInput("both TEXT and --file were given.", hint="Give one of them.")
    if file and file != "-" and not file.endswith(".txt"):
        return list(_inputs(file))
    if not texts and not file and sys.stdin.isatty():
        raise InvalidInput("there is no input.", hint="Give TEXT, --file FILE, or lines on stdin.")
    try:
        found = list(texts) if texts else _lines(sys.stdin.read() if file in ("", "-") else read_utf8(file))
        "".join(found).encode("utf-8")    # bytes of an argument that are not UTF-8 arrive as lone surrogates
    except UnicodeError as error:
        raise InvalidInput(f"{file or 'the input'} is not UTF-8: {error}.") from error
    return found


def _inputs(file: str) -> Iterator[str | Conversation]:
    from adapter_hub.chat import input_of
    from adapter_hub.examples import BadRow, read_rows

    for number, row in read_rows(file):
        if isinstance(row, BadRow):
            raise InvalidInput(f"{file}, line {number}: the row {row.reason}.", hint="Mend or remove the row.")
        yield input_of(row, f"{file}, line {number}: the row")


def _lines(text: str) -> list[str]:
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def json_object(option: str, text: str) -> dict[str, JSON] | None:
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{option} is not JSON: {error}.", hint="""Write '{"key": value}' in single quotes.""") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{option} is not a JSON object.", hint="""Write '{"key": value}'.""")
    return value


def label_names(text: str) -> list[str] | None:
    """`a,b,c`, or a file that holds a JSON list or one name a line. Raises InvalidInput, also for the name of a file that is not there."""
    if not text:
        return None
    if not os.path.isfile(text):    # unlike Path.is_file, it takes names of any length
        if "," not in text and (text.endswith((".json", ".txt")) or os.sep in text):
            raise InvalidInput(f"there is no file {text[:200]!r}.", hint="Give the labels as a,b,c, or a file of them.")
        return [label.strip() for label in text.split(",")]
    content = read_utf8(text)
    if not content.lstrip().startswith("["):
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        return [str(label) for label in json.loads(content)]
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{text} is not a JSON list of label names: {error}.") from error


def read_utf8(path: str) -> str:
    """Raises InvalidInput for bytes that are not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8: {error}.", hint="Save it as UTF-8.") from error


def shown_url(registry: str) -> str:
    """A registry as it may stand on a screen: the password of a database URL is not for everyone who looks."""
    return re.sub(r"(://[^:/@]*:)[^/]*@", r"\1***@", registry)
