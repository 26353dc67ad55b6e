"""The report on a registry as one HTML page: facts in, text out. Pure: no files, no network, no script; plots are SVG written here.

Every text that comes from a registry, a log or a person is escaped where it enters the page (`_text`), and the page forbids the browser
to load or run anything (Content-Security-Policy).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from html import escape
from typing import Any

from adapter_hub.continual.knowledge_map import COLOURS, DIRECTED, EdgeKind, KnowledgeMap, layout
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.observations import Traffic
from adapter_hub.routing.decision import Reason

JSON = Any
HEADLINES = ("accuracy", "span_f1", "chrf", "exact_match", "correlation")    # of an adapter's metrics the first of these that it has is drawn
ROWS_MAX = 200            # of a table that may grow without end; what is left out is said
PASSES_MAX = 24           # columns of the accuracy matrix
OPEN = "open"             # a proposal that says nothing of its state is so too
DAYS_MAX = 60             # of traffic
GRAPH_MAX = 80            # adapters that the map still draws
CHARS_MAX = 400           # of one text
LONG_CHARS = 60           # from which on a cell is kept wide enough to be read on a phone


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluation of one version. Shares and metrics as `Hub.evaluate` has them; None: it has no such number."""

    at: str
    ref: AdapterRef
    metric: str                         # which of HEADLINES
    oracle: float | None
    routed: float | None
    routing_accuracy: float | None
    abstained: float | None

    @classmethod
    def of(cls, event: Event) -> Measured | None:
        """None where a maintenance event is no evaluation, or one of another form."""
        detail = event.detail
        figures = detail.get("figures")
        if event.kind is not EventKind.MAINTAINED or detail.get("step") != "evaluate" or event.name is None or not isinstance(figures, Mapping):
            return None
        oracle, routed = (figures[way] if isinstance(figures.get(way), Mapping) else {} for way in ("oracle", "routed"))
        metric = next((name for name in HEADLINES if name in oracle), HEADLINES[0])
        found = (oracle.get(metric), routed.get(metric), figures.get("routing_accuracy"), figures.get("abstained"))
        return cls(event.at, AdapterRef(event.name, event.version), metric, *map(_number, found))


@dataclass(frozen=True, slots=True)
class Judged:
    """What the gate said of a learned version."""

    at: str
    ref: AdapterRef
    verdict: str
    reason: str
    live: bool    # it was in production at some time


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the page tells."""

    registry: str
    made_at: str                              # ISO 8601, UTC
    base_model: str
    encoder: str
    map: KnowledgeMap
    events: tuple[Event, ...] = ()
    judged: tuple[Judged, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    calibration: Mapping[str, JSON] | None = None
    alarms: tuple[Mapping[str, JSON], ...] = ()               # noted, oldest first
    open_alarms: Mapping[str, Mapping[str, JSON]] = field(default_factory=dict)    # by name
    proposals: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def measured(self) -> list[Measured]:
        """Oldest first."""
        return [found for event in sorted(self.events, key=lambda event: event.seq) if (found := Measured.of(event))]


def page(facts: Facts) -> str:
    """A whole HTML document."""
    parts = [_heading(facts)]
    if not facts.map.nodes and not facts.events:
        parts.append(_section("Nothing is here yet", "<p>This registry is empty: no adapter was registered. "
                              "<code>adapter-hub register</code> and <code>adapter-hub learn</code> add some.</p>"))  # fmt: skip
    else:
        parts += [
            _section("What it knows now", _known(facts)),
            _section("What was learned when", _learned(facts)),
            _section("Accuracy over time", _accuracy(facts)),
            _section("Routing", _routing(facts)),
            _section("Drift", _drift(facts)),
            _section("Proposals", _proposed(facts)),
            _section("Held back and taken back", _held(facts)),
            _section("Knowledge map", _graph(facts.map)),
        ]
    title = f"adapter_hub: {facts.registry}"
    before, _, rest = _PAGE.partition("{title}")    # a text of the registry may hold such a mark itself
    between, _, after = rest.partition("{body}")
    return before + _text(title) + between + "\n".join(parts) + after


# ---- sections -------------------------------------------------------------------------------------------------------


def _heading(facts: Facts) -> str:
    answers = sum(row.answers for row in facts.traffic)
    away = sum(row.answers for row in facts.traffic if row.reason == Reason.BELOW_THRESHOLD)
    proposed = sum(not isinstance(body, Mapping) or body.get("state", OPEN) == OPEN for body in facts.proposals.values())
    versions = sum(event.kind in (EventKind.ADDED, EventKind.ADOPTED) for event in facts.events)
    tiles = [
        (f"{len(facts.map.nodes):,}", "adapters in production"),
        (f"{versions:,}", "versions registered"),
        (f"{answers:,}", "answers in the log"),
        (_percent(away / answers) if answers else "–", "of them turned away"),
        (f"{len(facts.open_alarms):,}", "open alarms"),
        (f"{proposed + len(facts.map.near_duplicates):,}", "open proposals"),
    ]
    shown = "".join(f"<div class=tile><b>{value}</b><span>{_text(name)}</span></div>" for value, name in tiles)
    about = f"Base model {_text(facts.base_model)} · encoder {_text(facts.encoder)} · {_moment(facts.made_at)} UTC"
    return f"<header><h1>{_text(facts.registry)}</h1><p class=faint>{about}</p><div class=tiles>{shown}</div></header>"


def _known(facts: Facts) -> str:
    latest = {one.ref: one for one in facts.measured}
    rows = []
    for node in facts.map.nodes[:ROWS_MAX]:
        found = latest.get(node.ref)
        figures = (_share(found.oracle, found.metric), _share(found.routed, found.metric)) if found else ("", "")
        rows.append((node.ref, node.task, len(node.labels) or "", f"{node.exemplars:,}", _moment(node.created_at), f"{node.answers:,}", *figures))
    columns = ("adapter", "task", "labels", "exemplars", "registered", "answers", "named", "routed")
    notes = "".join(f"<p class=faint>{_text(note)}</p>" for note in facts.map.notes)
    return _table(columns, rows, len(facts.map.nodes)) + "<p class=faint>Named and routed: the latest evaluation of this version.</p>" + notes


_SAID = {
    EventKind.ADDED: "registered", EventKind.ADOPTED: "adopted", EventKind.MOVED: "promoted", EventKind.ROLLED_BACK: "rolled back",
    EventKind.RETIRED: "retired", EventKind.PURGED: "purged", EventKind.CALIBRATED: "calibrated", EventKind.MAINTAINED: "maintained",
    EventKind.REMOVED: "taken out",
}  # fmt: skip


def _learned(facts: Facts) -> str:
    names, steps = dict[str, int](), list[tuple[str, float]]()
    for event in facts.events:
        if event.alias == PRODUCTION and event.name is not None:
            if event.kind is EventKind.REMOVED:
                names.pop(event.name, None)
            else:
                names[event.name] = event.version
            steps.append((event.at, len(names)))
    told = [event for event in facts.events if Measured.of(event) is None and (event.alias in (None, PRODUCTION))]
    rows: list[Sequence[object]] = []
    added = {(event.name, event.version, event.reason) for event in told if event.kind is EventKind.ADDED}
    for event in reversed(told[-ROWS_MAX:]):
        if event.kind is EventKind.MOVED and (event.name, event.version, event.reason) in added:
            rows.append((_moment(event.at), "promoted", f"{event.name}@{event.version}", "as it was registered"))    # the reason stands there
            continue
        what = f"{event.name}@{event.version}" if event.name else f"calibration {event.version}"
        before = f" (before: @{event.previous})" if event.previous else ""
        said = event.detail.get("step", "") if event.kind is EventKind.MAINTAINED else _SAID[event.kind]
        rows.append((_moment(event.at), said or _SAID[event.kind], what + before, event.reason))
    chart = _lines([("adapters in production", steps, "#0072B2", "")], "Adapters in production over time", stepped=True, low=0.0)
    return chart + _table(("when", "what", "adapter", "why"), rows, len(told))


def _accuracy(facts: Facts) -> str:
    measured = facts.measured
    if not measured:
        return "<p>Nothing was measured yet. <code>adapter-hub maintain</code> evaluates what has a kept evaluation set.</p>"
    passes: list[dict[str, Measured]] = []
    for each in measured:    # a pass looks at a name once
        if not passes or each.ref.name in passes[-1]:
            passes.append({})
        passes[-1][each.ref.name] = each
    shown = passes[-PASSES_MAX:]
    names = sorted({name for one in shown for name in one})[:ROWS_MAX]
    parts = []
    for way, said in (("oracle", "When it is named"), ("routed", "As routed")):
        rows = []
        for name in names:
            cells: list[object] = [name]
            for one in shown:
                found = one.get(name)
                value = None if found is None else getattr(found, way)
                cells.append("" if found is None or value is None else _Html(
                    f'<span class=heat style="--v:{max(0.0, min(1.0, value)):.3f}" title="{_text(f"{found.ref}, {found.metric}")}">'
                    f"{_share(value, found.metric)}<small>@{found.ref.version}</small></span>"))  # fmt: skip
            rows.append(cells)
        heads = ["adapter", *(_moment(min(found.at for found in one.values())) for one in shown)]
        parts.append(f"<h3>{said}</h3>" + _table(heads, rows, len(names)))
    dropped = f" The last {len(shown)} of {len(passes)} passes are shown." if len(passes) > len(shown) else ""
    parts.append(f"<p class=faint>A column is one pass over the registry; a cell is empty where nothing new was to be measured.{dropped} "
                 "Accuracy, or of other tasks F1 of spans, chrF, exact match or correlation.</p>")  # fmt: skip
    curves = []
    for name in names[:GRAPH_MAX]:
        own = [one for one in measured if one.ref.name == name]
        series = [
            (way, [(one.at, value) for one in own if (value := getattr(one, key)) is not None], colour, dash)
            for way, key, colour, dash in (("named", "oracle", "#0072B2", ""), ("routed", "routed", "#D55E00", "5 3"))
        ]
        curve = _lines(series, f"Accuracy of {name} over time", small=True, low=0.0, high=1.0)
        curves.append(f"<figure><figcaption>{_text(name)}</figcaption>{curve}</figure>")
    return "".join(parts) + f"<h3>Curves</h3><div class=curves>{''.join(curves)}</div>"


def _routing(facts: Facts) -> str:
    parts, rows = [], list[Sequence[object]]()
    latest = {one.ref.name: one for one in facts.measured if one.routing_accuracy is not None}
    if latest:
        rows = [(one.ref, _share(one.routing_accuracy), _share(one.abstained), _moment(one.at)) for _, one in sorted(latest.items())]
        parts.append("<h3>Where evaluation inputs go</h3>" + _table(("adapter", "reach it", "turned away", "measured"), rows[:ROWS_MAX], len(rows)))
    if facts.calibration:
        rates = facts.calibration.get("max_false_reject", {})
        rows = [(rate, told.get("threshold"), told.get("before", ""), told.get("expect", "")) for rate, told in rates.items()]
        about = f"Calibration {facts.calibration.get('calibration')}, measured on {facts.calibration.get('measured_on')}."
        columns = ("turned away at most", "threshold", "before", "to expect")
        parts.append(f"<h3>Thresholds</h3><p>{_text(about)}</p>" + _table(columns, rows, len(rows)))
    confused = [edge for edge in facts.map.edges if edge.kind in (EdgeKind.CONFUSION, EdgeKind.CORRECTED)]
    if confused:
        told = {EdgeKind.CONFUSION: "the router", EdgeKind.CORRECTED: "people"}
        rows = [(edge.source, edge.target, _percent(edge.value), edge.inputs, told[edge.kind])
                for edge in sorted(confused, key=lambda edge: -edge.value)]  # fmt: skip
        parts.append("<h3>Who is taken for whom</h3>" + _table(("inputs of", "go to", "share", "of", "says"), rows[:ROWS_MAX], len(rows)))
    return "".join(parts) + _traffic(facts.traffic)


def _traffic(traffic: Sequence[Traffic]) -> str:
    if not traffic:
        return '<h3>Traffic</h3><p>Nothing was logged: <code>observe</code> in hub.toml is "off", or nobody asked.</p>'
    answered, away = Counter[str](), Counter[str]()
    scores: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in traffic:
        (away if row.reason == Reason.BELOW_THRESHOLD else answered)[row.day] += row.answers
        if row.score is not None:
            scores[row.day].append((row.score, row.answers))
    days = sorted({row.day for row in traffic})[-DAYS_MAX:]
    score = [(day, sum(mean * count for mean, count in scores[day]) / sum(count for _, count in scores[day])) for day in days if scores[day]]
    rows = [(day, f"{answered[day] + away[day]:,}", _percent(away[day] / (answered[day] + away[day])), f"{dict(score).get(day, math.nan):.3f}")
            for day in reversed(days)]  # fmt: skip
    bars = _bars([(day, answered[day], away[day]) for day in days])
    line = _lines([("mean acceptance score", score, "#009E73", "")], "Mean acceptance score by day") if len(score) > 1 else ""
    return f"<h3>Traffic</h3>{bars}{line}" + _table(("day", "answers", "turned away", "mean score"), rows, len({row.day for row in traffic}))


def _drift(facts: Facts) -> str:
    parts = []
    rows = [(name, alarm.get("signal"), alarm.get("noted_at") or alarm.get("at"), alarm.get("reason")) for name, alarm in facts.open_alarms.items()]
    parts.append("<h3>Open alarms</h3>" + (_table(("adapter", "signal", "at", "what"), rows, len(rows)) if rows else "<p>None.</p>"))
    noted = [(_moment(str(alarm.get("noted_at", ""))), alarm.get("kind"), alarm.get("adapter"), alarm.get("signal"), alarm.get("reason"))
             for alarm in reversed(facts.alarms[-ROWS_MAX:])]  # fmt: skip
    shown = _table(("noted", "kind", "adapter", "signal", "what"), noted, len(facts.alarms)) if noted else "<p>None was noted.</p>"
    return "".join(parts) + "<h3>Alarms and warnings</h3>" + shown


def _proposed(facts: Facts) -> str:
    parts, rows = [], list[Sequence[object]]()
    bodies = {key: body if isinstance(body, Mapping) else {} for key, body in facts.proposals.items()}
    for state in sorted({str(body.get("state", OPEN)) for body in bodies.values()}, key=lambda state: (state != OPEN, state)):
        own = {key: body for key, body in bodies.items() if body.get("state", OPEN) == state}
        rows = [(key, _inputs(body) or "", _moment(str(body.get("decided_at") or body.get("at") or "")), body.get("teach"),
                 body.get("result"), body.get("reason") or body.get("why")) for key, body in own.items()]  # fmt: skip
        heads = ("proposal", "inputs", "when", "to teach to", "became", "why")
        parts.append(f"<h3>From traffic that nobody took: {_text(state)} ({len(rows)})</h3>" + _table(heads, rows[:ROWS_MAX], len(rows)))
    if facts.map.near_duplicates:
        rows = [(f"{one.first} and {one.second}", f"{one.closeness:.2f}", len(one.labels) or "", "" if one.weights is None else f"{one.weights:.2f}",
                 _Html(f"<code>{_text(one.command)}</code>")) for one in facts.map.near_duplicates[:ROWS_MAX]]  # fmt: skip
        columns = ("near-duplicates", "closeness", "labels in common", "weights", "merge them, behind the gate")
        parts.append("<h3>Near-duplicates</h3>" + _table(columns, rows, len(facts.map.near_duplicates)))
    return "".join(parts) or "<p>None.</p>"


def _inputs(body: Mapping[str, JSON]) -> int:
    """How many a proposal is made of."""
    groups = body.get("groups")
    return sum(len(group) for group in groups.values() if isinstance(group, list)) if isinstance(groups, Mapping) else 0


def _held(facts: Facts) -> str:
    rows: list[Sequence[object]]
    held = [one for one in facts.judged if not one.live]
    rows = [(_moment(one.at), one.ref, one.verdict, one.reason) for one in reversed(held[-ROWS_MAX:])]
    parts = ["<h3>Learned and not in production</h3>"]
    parts.append(_table(("when", "version", "verdict", "why"), rows, len(held)) if rows else "<p>None.</p>")
    gone = {(event.name, event.version) for event in facts.events if event.kind in (EventKind.RETIRED, EventKind.PURGED)}
    back = [
        event for event in facts.events
        if event.kind in (EventKind.ROLLED_BACK, EventKind.RETIRED, EventKind.PURGED)
        or (event.kind is EventKind.REMOVED and event.alias == PRODUCTION and (event.name, event.version) not in gone)
    ]  # fmt: skip
    rows = [(_moment(event.at), _SAID[event.kind], f"{event.name}@{event.version}", event.reason) for event in reversed(back[-ROWS_MAX:])]
    parts.append("<h3>Rolled back, taken out, retired, purged</h3>")
    parts.append(_table(("when", "what", "version", "why"), rows, len(back)) if rows else "<p>None.</p>")
    return "".join(parts)


# ---- pieces of a page -----------------------------------------------------------------------------------------------


class _Html(str):
    """Text that is markup already."""


def _text(value: object) -> str:
    """Escaped, on one line, without control characters, at most CHARS_MAX long."""
    text = "".join(char if char.isprintable() else " " for char in str(value)).strip()
    return escape(text if len(text) <= CHARS_MAX else text[: CHARS_MAX - 1] + "…", quote=True)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _table(columns: Sequence[object], rows: Iterable[Sequence[object]], of: int) -> str:
    table = [[cell if isinstance(cell, _Html) else _text("" if cell is None else cell) for cell in row] for row in rows]
    filled = [place for place in range(len(columns)) if not table or any(row[place] for row in table)]
    head = "".join(f"<th scope=col>{_text(columns[place])}</th>" for place in filled)
    body = "".join("<tr>" + "".join(_cell(row[place]) for place in filled) + "</tr>" for row in table)
    more = f"<p class=faint>{len(table):,} of {of:,} are shown.</p>" if of > len(table) else ""
    return f'<div class=scroll tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def _cell(content: str) -> str:
    return f"<td class=long>{content}</td>" if len(content) > LONG_CHARS and "<" not in content else f"<td>{content}</td>"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(value: float | None, metric: str = "accuracy") -> str:
    return "" if value is None else f"{value:.2f}" if metric == "correlation" else _percent(value)


def _moment(at: str) -> str:
    """2026-03-01 12:30."""
    return at[:16].replace("T", " ")


# ---- plots ----------------------------------------------------------------------------------------------------------

_Series = tuple[str, Sequence[tuple[str, float]], str, str]    # name, (moment, value), colour, dashes


def _seconds(at: str) -> float:
    try:
        return datetime.fromisoformat(at if "T" in at else f"{at}T00:00:00+00:00").timestamp()
    except ValueError:
        return 0.0


def _lines(
    series: Sequence[_Series], title: str, *, small: bool = False, stepped: bool = False, low: float | None = None, high: float | None = None
) -> str:
    """Values over time as SVG; nothing where no series has a point."""
    points = [(_seconds(at), value) for _, own, _, _ in series for at, value in own]
    if not points:
        return ""
    width, height, left, top, bottom = (320, 150, 40, 10, 24) if small else (820, 220, 48, 12, 26)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    bottom_value = min(value for _, value in points) if low is None else low
    top_value = max(value for _, value in points) if high is None else high
    if top_value - bottom_value < 1e-9:
        bottom_value, top_value = bottom_value - 0.5, top_value + 0.5

    def x(moment: float) -> float:
        return left + (width - left - 12) * ((moment - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - bottom_value) / (top_value - bottom_value)

    parts = []
    for value in (bottom_value, top_value) if stepped else (bottom_value, (bottom_value + top_value) / 2, top_value):
        written = f"{value:.0f}" if stepped or top_value - bottom_value > 4 else f"{value:.2f}"
        parts.append(_tick(left, width - 12, y(value), written))
    ends = [(first, "start", left)] if last - first < 1 else [(first, "start", left), (last, "end", width - 12)]
    parts += [f"<text x={place} y={height - 6} text-anchor={anchor}>{_day(moment)}</text>" for moment, anchor, place in ends]
    for name, own, colour, dashes in series:
        places = [(x(_seconds(at)), y(value)) for at, value in own]
        path = ""
        for number, (px, py) in enumerate(places):
            path += f"M{px:.1f} {py:.1f}" if number == 0 else f"H{px:.1f}V{py:.1f}" if stepped else f"L{px:.1f} {py:.1f}"
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<path d="{path}" fill=none stroke="{colour}" stroke-width=2{dash} />')
        if len(places) <= 60:
            for (px, py), (at, value) in zip(places, own, strict=True):
                tip = f"<title>{_text(f'{name} {value:.3f}, {_moment(at)}')}</title>"
                parts.append(f'<circle cx={px:.1f} cy={py:.1f} r={3 if dashes else 4.5} fill="{colour}">{tip}</circle>')
    legend = "".join(f'<span class=key><i style="background:{colour}"></i>{_text(name)}</span>' for name, _, colour, _ in series)
    return _svg(width, height, title, "".join(parts)) + f"<p class=keys>{legend}</p>"


def _tick(left: float, right: float, y: float, written: str) -> str:
    line = f"<line class=grid x1={left} x2={right} y1={y:.1f} y2={y:.1f} />"
    return line + f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{_text(written)}</text>"


def _bars(days: Sequence[tuple[str, int, int]]) -> str:
    """Answers by day, those that were turned away on top."""
    width, height, left, top, bottom = 820, 220, 48, 12, 26
    most = max(answered + away for _, answered, away in days)
    start = datetime.fromisoformat(days[0][0])
    span = (datetime.fromisoformat(days[-1][0]) - start) // timedelta(days=1) + 1
    each = min(60.0, (width - left - 12) / span)
    scale = (height - top - bottom) / most
    parts = [_tick(left, width - 12, height - bottom - scale * value, f"{value:,}") for value in (0, most)]
    for day, answered, away in days:
        x = left + each * ((datetime.fromisoformat(day) - start) // timedelta(days=1))
        tip = f"<title>{_text(f'{day}: {answered:,} answered, {away:,} turned away')}</title>"
        for count, below, colour in ((answered, 0, "#0072B2"), (away, answered, "#D55E00")):
            if count:
                parts.append(f'<rect x={x + 1:.1f} y={height - bottom - scale * (below + count):.1f} width={max(1.0, each - 2):.1f} '
                             f'height={scale * count:.1f} fill="{colour}">{tip}</rect>')  # fmt: skip
    parts.append(f"<text x={left} y={height - 6}>{_text(days[0][0])}</text>")
    if span > 1:
        parts.append(f"<text x={min(width - 12, left + each * span):.0f} y={height - 6} text-anchor=end>{_text(days[-1][0])}</text>")
    legend = '<span class=key><i style="background:#0072B2"></i>answered</span><span class=key><i style="background:#D55E00"></i>turned away</span>'
    return _svg(width, height, "Answers by day", "".join(parts)) + f"<p class=keys>{legend}</p>"


def _graph(found: KnowledgeMap) -> str:
    if not found.nodes:
        return "<p>No adapter is in production.</p>"
    if len(found.nodes) > GRAPH_MAX:
        return f"<p>{len(found.nodes):,} adapters are too many to draw here: <code>adapter-hub map --dot</code> gives them to Graphviz.</p>"
    width, height, margin = 820, 560, 70
    refs = [node.ref for node in found.nodes]
    places = layout(refs, found.edges)
    scale = (width / 2 - margin - 30, height / 2 - margin / 2)
    at = {ref: (width / 2 + scale[0] * x, height / 2 - scale[1] * y) for ref, (x, y) in zip(refs, places, strict=True)}
    twins = {ref for pair in found.near_duplicates for ref in (pair.first, pair.second)}
    parts, drawn = [], Counter[tuple[AdapterRef, AdapterRef]]()
    for edge in found.edges:
        pair = (min(edge.source, edge.target), max(edge.source, edge.target))
        (x1, y1), (x2, y2) = at[pair[0]], at[pair[1]]
        bend = 0.14 * ((drawn[pair] + 1) // 2) * (-1) ** drawn[pair]    # edges of one pair lie side by side
        drawn[pair] += 1
        middle = ((x1 + x2) / 2 + bend * (y2 - y1), (y1 + y2) / 2 - bend * (x2 - x1))
        dash = ' stroke-dasharray="6 4"' if edge.kind is EdgeKind.LINEAGE else ""
        to = "to" if edge.kind in DIRECTED else "and"
        tip = f"<title>{_text(f'{edge.kind}: {edge.source} {to} {edge.target}, {edge.value:.2f}')}</title>"
        parts.append(f'<path d="M{x1:.1f} {y1:.1f}Q{middle[0]:.1f} {middle[1]:.1f} {x2:.1f} {y2:.1f}" fill=none stroke="{COLOURS[edge.kind]}" '
                     f"stroke-width={1 + 3 * max(0.0, edge.value):.1f}{dash}>{tip}</path>")  # fmt: skip
    for node in found.nodes:
        x, y = at[node.ref]
        pulls = [at[edge.target][1] + at[edge.source][1] - 2 * y for edge in found.edges if node.ref in (edge.source, edge.target)]
        below = sum(pulls) <= 0    # its name stands where fewer edges leave
        colour = "#D55E00" if node.ref in twins else "currentColor"
        tip = f"<title>{_text(f'{node.ref}: {node.task}, {node.exemplars:,} exemplars, {node.answers:,} answers')}</title>"
        parts.append(f'<circle class=node cx={x:.1f} cy={y:.1f} r=8 stroke="{colour}" stroke-width={3 if node.ref in twins else 1.5}>{tip}</circle>'
                     f"<text x={x:.1f} y={y + (22 if below else -14):.1f} text-anchor=middle>{_text(node.ref)}</text>")  # fmt: skip
    kinds = [kind for kind in EdgeKind if any(edge.kind is kind for edge in found.edges)]
    legend = "".join(f'<span class=key><i style="background:{COLOURS[kind]}"></i>{kind}</span>' for kind in kinds)
    return _svg(width, height, "Knowledge map", "".join(parts)) + f"<p class=keys>{legend}</p>"


def _day(moment: float) -> str:
    from datetime import UTC

    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d}"


def _svg(width: int, height: int, title: str, body: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role=img aria-label="{_text(title)}">{body}</svg>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>{title}</title>
<style>
:root { --ink: #1b1b1b; --faint: #5c5c5c; --paper: #ffffff; --card: #f5f5f3; --line: #d9d9d5; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --faint: #a6a6a6; --paper: #161616; --card: #222222; --line: #3d3d3d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .5rem; }
.faint { color: var(--faint); font-size: .88rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.4rem; }
.tile span { color: var(--faint); font-size: .85rem; }
.scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { text-align: left; padding: .35rem .6rem; vertical-align: top; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); white-space: nowrap; }
td:first-child { white-space: nowrap; }
td { min-width: 3rem; font-variant-numeric: tabular-nums; }
td.long { min-width: 17rem; }
.heat { display: block; padding: 0 .3rem; border-radius: .25rem; white-space: nowrap; background: rgba(0, 114, 178, calc(var(--v) * .45)); }
.heat small { color: var(--faint); padding-left: .25rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: .9rem; font-weight: 600; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; color: var(--ink); }
svg text { fill: currentColor; }
svg .grid { stroke: var(--line); }
svg .node { fill: var(--paper); }
.keys { margin: .2rem 0 .8rem; font-size: .85rem; color: var(--faint); }
.key { margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .9rem; height: .35rem; margin-right: .35rem; vertical-align: middle; border-radius: .1rem; }
code { font-size: .9em; overflow-wrap: anywhere; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
