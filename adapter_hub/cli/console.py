"""What people and programs see of a verb's result: JSON documents, tables, lines, a progress bar. Knows nothing of the hub.

It draws plain JSON values, so a new field of a report appears without a change here. rich is imported when something is drawn.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adapter_hub.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

JSON = Any
CELL_CHARS_MAX = 60
WHOLE_CHARS_MAX = 10_000     # of a cell that is not cut
ROW_CHARS_MAX = 100_000      # of a row that is piped
LIST_ITEMS_MAX = 6
EMPTY: tuple[JSON, ...] = (None, "", [], {})


def emit(value: object, as_json: bool, people: Callable[[Any], None]) -> None:
    """Write a result to stdout: one JSON document for programs, else whatever `people` draws of the same document."""
    document = plain(value)
    if as_json:
        print(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False))
    else:
        people(document)


def plain(value: object) -> JSON:
    """JSON values of a fact: what its `to_json` says, numbers that JSON lacks as null, everything else as its text."""
    to_json = getattr(value, "to_json", None)
    if callable(to_json):
        value = to_json()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


# ---- lines and tables -----------------------------------------------------------------------------------------------


def line(text: str) -> None:
    print(shown(text, chars_max=10_000))


def piece(text: str) -> None:
    """A part of a text as it comes, without bytes that a terminal would obey."""
    print("".join(char for char in text if char.isprintable() or char in "\n\t"), end="", flush=True)


def facts(document: Mapping[str, JSON]) -> None:
    """One field a line, nested fields indented."""
    width = max((len(key) for key in document), default=0)
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {shown(name)}: {shown(item)}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            print(f"{key}:")
            rows(value)
        else:
            print(f"{key:{width}}  {shown(value, chars_max=400)}")


def in_full(document: Mapping[str, JSON]) -> None:
    """As `facts`, but of a list every item, one a line and uncut: what is wrong is said at the end of a long line."""
    facts({key: value for key, value in document.items() if not isinstance(value, list)})
    for key, items in document.items():
        if isinstance(items, list):
            print(f"{key}: {len(items)}")
            for item in items:
                said = ": ".join(str(part) for part in item.values()) if isinstance(item, Mapping) else str(item)
                print(f"  {shown(said, chars_max=10_000)}")


def learned(document: Mapping[str, JSON]) -> None:
    """What `learn` made, whether it is in production, and what each check of the gate found."""
    gate = document["gate"]
    facts({key: value for key, value in document.items() if key not in ("gate", "reason", "transfer", "data")})
    line(f"reason: {document['reason']}")
    tried = document.get("transfer", {"trials": (), "unfit": {}})
    for trial in tried["trials"]:
        gained = f"{trial['advantage']:+.3f} ± {trial['error']:.3f} nats a row on all {counted(tried['rows'], 'row')}"
        line(f"  start from {' and '.join(trial['origins'])}: {gained}")
    for ref, why in tried["unfit"].items():
        line(f"  no start from {ref}: {why}")
    for finding in gate["findings"]:
        if finding["reason"] and finding["reason"] not in document["reason"]:    # which is made of those that decided
            line(f"  {finding['verdict']}: {finding['check']}: {finding['reason']}")
    for note in gate["notes"]:
        line(f"  note: {note}")


def verified(document: Mapping[str, JSON]) -> None:
    """What `verify` found. A folder that no reader sees is no damage, and not all that is well."""
    unregistered = document["unregistered"]
    line("no damage was found" if document["ok"] else "DAMAGED: see the problems")
    if unregistered:
        line(f"unregistered folders: {len(unregistered)}; no reader sees them until `adapter-hub adopt` takes them in")
    in_full({key: value for key, value in document.items() if key != "ok"})


def rows(documents: Sequence[Mapping[str, JSON]], whole: str = "") -> None:
    """A table with a column for each field that is filled anywhere, in the order of the fields; of `whole` nothing is cut."""
    filled = {key for document in documents for key, value in document.items() if value not in EMPTY}
    columns = [key for key in dict.fromkeys(key for document in documents for key in document) if key in filled]
    table(columns, [[document.get(column) for column in columns] for document in documents], whole)


def table(columns: Sequence[str], cells: Sequence[Sequence[JSON]], whole: str = "") -> None:
    """A table with its numbers to the right. Piped, a row stays one line however long it is."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    piped = not sys.stdout.isatty()
    drawn = Table(box=None if piped else box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        values = [row[index] for row in cells if row[index] is not None]
        number = bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        drawn.add_column(Text(column), justify="right" if number else "left", overflow="fold", no_wrap=number)
    longest = [WHOLE_CHARS_MAX if column == whole else CELL_CHARS_MAX for column in columns]
    for row in cells:
        # Text, not str: markup in a description or an input must stay text.
        drawn.add_row(*(Text(shown(value, chars_max=most)) for value, most in zip(row, longest, strict=True)))
    console = _console()
    if not piped:
        console.print(drawn)
        return
    with console.capture() as captured:
        console.print(drawn)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))    # a long last cell would fill up all rows


def shown(value: JSON, *, chars_max: int = CELL_CHARS_MAX) -> str:
    """A value in a cell: short, on one line, and without bytes that a terminal would obey."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        items = [shown(item) for item in value[:LIST_ITEMS_MAX]]
        return ", ".join(items) + (f", … ({len(value)})" if len(value) > LIST_ITEMS_MAX else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(item)}" for key, item in value.items())
    text = "".join(char if char.isprintable() else " " for char in str(value)).strip()
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"


# ---- the tables of single verbs -------------------------------------------------------------------------------------


def versions(documents: Sequence[Mapping[str, JSON]]) -> None:
    """One line a version: what it is, where it stands, how to ask for it."""
    if not documents:
        line("nothing is registered here. `adapter-hub register` and `adapter-hub learn` add adapters.")
        return
    wanted = ("ref", "name", "version", "aliases", "state", "task_type", "labels", "tags", "created_at", "description")
    kept = [{key: document[key] for key in wanted if key in document} for document in documents]
    for document in kept:
        if isinstance(document.get("labels"), list):
            document["labels"] = len(document["labels"])
        if "ref" in document:
            document.pop("name", None)
            document.pop("version", None)
    rows(kept)


def events(documents: Sequence[Mapping[str, JSON]]) -> None:
    """What happened to a name, oldest first, and in full why."""
    rows([{key: document.get(key) for key in ("at", "kind", "version", "alias", "previous", "reason")} for document in documents], whole="reason")


def _worded(document: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """With a `text`: of a conversation its last message."""
    return document if "text" in document else {**document, "text": document["messages"][-1]["content"]}


def decisions(documents: Sequence[Mapping[str, JSON]]) -> None:
    columns = ("text", "adapter", "score", "threshold", "margin", "reason")
    table(columns, [[document.get(column) for column in columns] for document in map(_worded, documents)])


def explanations(documents: Sequence[Mapping[str, JSON]]) -> None:
    """Each decision in words: the score against its threshold, then the candidates, best first."""
    for document in documents:
        print(shown(_worded(document)["text"], chars_max=200))
        where = document.get("adapter") or "the base model (the router abstains)"
        print(f"  goes to {shown(where)}: {shown(document.get('reason'))}")
        if document.get("words"):
            print(f"  {shown(document['words'], chars_max=400)}")
        if document.get("score") is not None:
            measured = ", ".join(f"{key} {shown(document.get(key))}" for key in ("score", "threshold"))
            print(f"  acceptance {measured}: how far the best candidate's score lies above what inputs of its adapter usually score")
        neighbours, candidates = document.get("neighbours") or (), document.get("candidates") or ()
        if candidates:
            margin = f"; margin {shown(document['margin'])} between the first two" if document.get("margin") is not None else ""
            print(f"  candidate scores, around 1 for inputs like the exemplars{margin}:")
        for rank, candidate in enumerate(candidates, 1):
            print(f"  {rank}. {shown(candidate.get('adapter'))}  {shown(candidate.get('score'))}")
            for near in neighbours:
                if near.get("adapter") == candidate.get("adapter"):
                    print(f"       like {shown(near.get('likeness'))}: {_near(near)}")
        known = {"text", "messages", "adapter", "reason", "score", "threshold", "margin", "candidates", "words", "neighbours"}
        for key, value in document.items():
            if key not in known and value not in EMPTY:
                print(f"  {key}: {shown(value, chars_max=400)}")


def _near(near: Mapping[str, JSON]) -> str:
    """An exemplar by label and text; what stands for one says so."""
    parts = [shown(near[key]) for key in ("label", "text") if near.get(key)]
    if near.get("described"):
        parts.insert(0, "the name of its label stands for it" if near.get("label") else "its description stands for it")
    return " · ".join(parts) or "an exemplar without a label, whose text is not kept"


def effects(document: Mapping[str, JSON]) -> None:
    """Who would lose what to a newcomer, most first."""
    instead_of = document["instead_of"]
    where, beyond = (f" in place of {instead_of}", f", beyond what {instead_of} took") if instead_of else ("", "")
    line(f"{document['newcomer']}{where} takes at most {100 * document['most_taken']:.1f} % of another adapter's inputs{beyond}.")
    columns = ("adapter", "inputs", "taken", "before", "after", "contradictions")
    table(columns, [[other[column] for column in columns] for other in document["others"]])
    unknown = [other["adapter"] for other in document["others"] if not other["inputs"]]
    if unknown:
        line(f"Nothing is known of {', '.join(unknown)}: no evaluation inputs, and no example that can be left out.")


def evaluated(document: Mapping[str, JSON]) -> None:
    """Over all, then an adapter a line: what it answers when it is named (oracle), and what its rows get as routed."""
    nested = ("mean_of_adapters", "adapters", "without")
    facts({key: value for key, value in document.items() if key not in nested})
    columns = ("adapter", "task", "rows", "unlabelled", "routing_accuracy", "abstained", "oracle", "routed")
    each = [{"adapter": adapter, **told} for adapter, told in document.get("adapters", {}).items()]
    if len({told["task"] for told in each}) == 1 < len(each):    # else few have a metric in common
        each.append({"adapter": "mean of adapters", **document["mean_of_adapters"]})
    if each:
        rows([{column: told.get(column) for column in columns} for told in each])
    for one in each:
        if unknown := one.get("unknown_labels"):
            told = f"{one['adapter']} does not know what {unknown['rows']} of its {counted(one['rows'], 'row')} ask for"
            line(f"{told}, such as {unknown['labels'][0]!r}: these labels count as wrong.")
    if without := document.get("without"):
        line(f"No evaluation set is kept of {', '.join(without)}: give --data FILE, or keep texts (hub.toml) and register with --evaluation.")


def calibrated(document: Mapping[str, JSON]) -> None:
    """How a record was made, what each rate means and meant before, and whose inputs it lets in more or less often."""
    facts({key: value for key, value in document.items() if key not in ("max_false_reject", "changed")})
    print("thresholds, and what share of belonging inputs to expect turned away at each rate:")
    rows([{"rate": rate, **told} for rate, told in document["max_false_reject"].items()])
    if "changed" in document:
        print("share of their inputs that is let in at 5 %, where that changed most:")
        rows(document["changed"])


def reembedded(document: Mapping[str, JSON]) -> None:
    """What took whose place under which encoder."""
    line(f"the encoder is {document['encoder']}, the calibration {shown(document['calibration'])}; encoded anew: {len(document['versions'])}")
    if document["versions"]:
        rows(document["versions"])


def predictions(documents: Sequence[Mapping[str, JSON]]) -> None:
    columns = ("text", "adapter", "answer", "score", "reason")
    drawn = [{**_worded(document), "answer": _answer(document), "adapter": _answering(document)} for document in documents]
    table(columns, [[document.get(column) for column in columns] for document in drawn])


def observed(documents: Sequence[Mapping[str, JSON]]) -> None:
    """What was answered, newest first; what should have been stands beside it."""
    columns = ("at", "id", "adapter", "label", "score", "reason", "latency_ms", "text")
    said = [document.get("feedback") or {} for document in documents]
    rows([
        {column: document.get(column) for column in columns} | {key: one.get(key) for key in ("correct_label", "correct_adapter")}
        for document, one in zip(documents, said, strict=True)
    ])  # fmt: skip


def alarmed(documents: Sequence[Mapping[str, JSON]]) -> None:
    """What the detectors said, in the order it happened."""
    if not documents:
        line("nothing has changed for the worse")
    for document in documents:
        line(f"{document['kind']}  {document['adapter']}: {document['reason']} ({document['detector']})")


def attended(document: Mapping[str, JSON]) -> None:
    """What a pass did, adapter by adapter."""
    if document["alarms"]:
        alarmed(document["alarms"])
    for one in document["done"]:
        made = f" {one['result']} ({'live' if one['promoted'] else 'held'})" if one["result"] else ""
        line(f"{one['adapter']}  {one['step']}{made}: {one['reason']}")
        figures = one.get("evaluation") or {}
        if ways := [f"{way} {figures[way]['accuracy']:.3f}" for way in ("oracle", "routed") if "accuracy" in figures.get(way, {})]:
            line(f"  evaluated on {counted(figures['rows'], 'row')}: {', '.join(ways)}")
    if document["dry_run"]:
        line("a dry run: nothing was done")


def mapped(document: Mapping[str, JSON]) -> None:
    """The adapters, what joins them, and who may be one."""
    each = [{key: one[key] for key in ("adapter", "task", "labels", "exemplars", "answers", "origins")} for one in document["adapters"]]
    if not each:
        return line("nothing is in production yet: `adapter-hub register` or `adapter-hub learn`.")
    rows([{**one, "labels": len(one["labels"])} for one in each])
    if document["edges"]:
        rows([{key: edge.get(key) for key in ("kind", "source", "target", "value", "inputs")} for edge in document["edges"]])
    for pair in document["near_duplicates"]:
        common = f", {counted(len(pair['labels']), 'label')} in common" if pair["labels"] else ""
        line(f"near-duplicates: {' and '.join(pair['adapters'])} (closeness {shown(pair['closeness'])}{common}). To try: {pair['proposal']}")
    for note in document["notes"]:
        line(f"note: {note}")


def merged(document: Mapping[str, JSON]) -> None:
    """What a merge made, and how it compares with each that it was made from."""
    facts({key: document[key] for key in ("ref", "promoted", "withdrawn", "reason")})
    rows([{"on the set of": ref, **counts} for ref, counts in document["compared"].items()])


def proposed(documents: Sequence[Mapping[str, JSON]]) -> None:
    """Each proposal in words, then a group a line."""
    for document in documents:
        near = ", ".join(f"{one['adapter']} {100 * one['share']:.0f} %" for one in document["nearest"])
        size = f"{counted(document['size'], 'input')} in {counted(len(document['groups']), 'group')}"
        line(f"{document['id']}  {document['suggested']}: {size}; nearest {near or 'no adapter'}")
        line(f"  cohesion {document['cohesion']:.2f}, stability {document['stability']:.2f}, since {document['at']}")
        if document["state"] == "open":
            line(f"  {'teach ' + document['teach'] if document['teach'] else 'a new skill'}: {document['why']}")
        else:
            result = f" as {document['result']}" if document["result"] else ""
            line(f"  {document['state']}{result} on {document['decided_at']}{': ' + document['reason'] if document['reason'] else ''}")
        groups = document["groups"]
        rows([{"group": one["id"], "size": one["size"], "like": one["suggested"], "examples": " | ".join(one["examples"][:2])} for one in groups])
    if not documents:
        line("nothing is proposed: what was turned away is too little, too scattered, or explained by the false reject rate.")


def accepted(document: Mapping[str, JSON], output: str) -> None:
    """What was learned or taught; or where the rows are that somebody should label."""
    if "learned" in document:
        learned(document["learned"])
    elif document["ref"]:
        line(f"{document['ref']} was taught them.")
    elif output:
        again = f"adapter-hub accept {' '.join(document['ids'])} --name {document['name']} --train {output}"
        line(f"{counted(len(document['rows']), 'row is', 'rows are')} in {output}. Fill in their labels, then `{again}`.")
    else:
        rows(document["rows"])
        line("Label them: --label ID=LABEL for groups, or --output FILE and then --train FILE.")


def _answering(document: Mapping[str, JSON]) -> JSON:
    """The adapter; of a mixture each with its weight."""
    parts = [f"{shown(part['weight'])} {part['adapter']}" for part in document.get("mixture") or ()]
    return " + ".join(parts) or document.get("adapter")


def _answer(document: Mapping[str, JSON]) -> JSON:
    output = document.get("output")
    if isinstance(output, list) and output and isinstance(output[0], float):
        return f"vector of {len(output)}"
    return document.get("label") if output is None else output


# ---- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(title: str, visible: bool = True) -> Iterator[Callable[[int, float | None], None]]:
    """A bar on stderr with rows/s and the time left. Yields `show(rows, share)`, share 0-1 or None where unknown."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rows]:>9,} rows  {task.fields[rate]:>7,.0f} rows/s")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=_console(stderr=True), transient=True, disable=not visible) as bars:
        task = bars.add_task(title, total=None, rows=0, rate=0.0)

        def show(rows: int, share: float | None) -> None:
            elapsed_s = bars.tasks[0].elapsed or 0.0
            bars.update(task, total=None if share is None else 1.0, completed=share or 0.0, rows=rows, rate=rows / max(elapsed_s, 1e-9))

        yield show


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError    # the border of the CLI ends it quietly

    stream = sys.stderr if stderr else sys.stdout
    return Piped(file=stream, width=None if stream.isatty() else ROW_CHARS_MAX, highlight=False, soft_wrap=not stream.isatty())
