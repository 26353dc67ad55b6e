"""Verbs that look over the whole registry: its map, its report, and the merge of what the map points out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapter_hub.cli.arguments import AsJson, Reason, Registry, complete_ref
from adapter_hub.cli.console import emit, facts, line, mapped, merged
from adapter_hub.cli.verbs import SOME_FAILED, _open, _verb
from adapter_hub.errors import InvalidInput


@_verb("map", "adapter-hub map --picture map.png")
def map(
    ctx: typer.Context,
    dot: Annotated[bool, typer.Option("--dot", help="For Graphviz, on stdout.")] = False,
    picture: Annotated[str, typer.Option(metavar="FILE.png", help="Draw the graph.")] = "",
    space: Annotated[str, typer.Option(metavar="FILE.png", help="Draw the router's space: prototypes, thresholds, recent traffic.")] = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """What is known as a graph: lineage, closeness, confusion, traffic; near-duplicates and the merge to try. Pictures need matplotlib."""
    if dot and as_json:
        raise InvalidInput("both --dot and --json were given.", hint="Give one of them.")
    if picture or space:    # before the work
        from adapter_hub.continual.pictures import check_picture

        for path in filter(None, (picture, space)):
            check_picture(path)
    hub = _open(ctx, registry)
    found = hub.map()
    if picture or space:
        from adapter_hub.continual.pictures import draw_map, draw_space

        if picture:
            draw_map(found, picture)
        if space:
            draw_space(hub.space(), space)
    if dot:
        print(found.to_dot(), end="")
    else:
        emit(found, as_json, mapped)
        if not as_json:
            for path in filter(None, (picture, space)):
                line(f"drawn: {path}")


@_verb("report", "adapter-hub report --output report.html")
def report(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(help="The page to write; one that is there is replaced.")] = "report.html",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """One HTML page: what was learned when, accuracy over time, routing, drift, alarms, proposals, rollbacks. Needs no network."""
    path = _open(ctx, registry).report(output)
    emit({"report": str(path), "bytes": path.stat().st_size}, as_json, facts)


@_verb("merge", "adapter-hub merge cards credit_cards --into cards")
def merge(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME NAME...", help="Adapters that know much the same.", autocompletion=complete_ref)],
    into: Annotated[str, typer.Option(metavar="NAME", help="The name of the one: new, or one of them.")],
    config: Annotated[str, typer.Option(metavar="PRESET", help="Of the training: fast, balanced or thorough.")] = "",
    reason: Reason = "",
    registry: Registry = "registry", as_json: AsJson = False,
) -> None:
    """Learn one adapter from what several keep, and put it in their place where it is no worse than each. Exit code 1 where it is held."""
    done: Any = _open(ctx, registry).merge(names, into, config=config or None, reason=reason)
    emit(done, as_json, merged)
    if not done.promoted:
        raise typer.Exit(SOME_FAILED)
