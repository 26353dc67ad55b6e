"""The report: a well-formed page that escapes every text, loads nothing, and says what there is. Pure."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from adapter_hub.continual.knowledge_map import Edge, EdgeKind, KnowledgeMap, Node
from adapter_hub.continual.report import DAYS_MAX, PASSES_MAX, ROWS_MAX, Facts, Judged, Measured, page
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.observations import Traffic

A, B = AdapterRef("a", 1), AdapterRef("b", 1)
EVIL = """<script>alert("x")</script>' onload='y' & <img src=http://evil.example/x>"""
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Tags that close in order, the text between them, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag} /> closes nothing outside of SVG"
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def evaluated(seq: int, ref: AdapterRef, oracle: float, routed: float) -> Event:
    figures = {"oracle": {"accuracy": oracle}, "routed": {"accuracy": routed}, "routing_accuracy": 0.9, "abstained": 0.05}
    detail = {"step": "evaluate", "adapter": str(ref), "router": "x", "figures": figures}
    return Event(seq, f"2026-03-{seq % 28 + 1:02}T10:00:00+00:00", EventKind.MAINTAINED, ref.name, ref.version or 0, reason="evaluate", detail=detail)


def told(**more: object) -> Facts:
    """A little of everything, in texts that would like to be markup."""
    nodes = [Node(A, EVIL, ("x",), 10, "2026-03-01T10:00:00+00:00", 5), Node(B, EVIL, ("x",), 8, "2026-03-01T10:00:00+00:00")]
    edges = [Edge(EdgeKind.ROUTING, A, B, 0.95), Edge(EdgeKind.CONFUSION, A, B, 0.1, 20), Edge(EdgeKind.LINEAGE, A, B, 1.0)]
    at = "2026-03-02T10:00:00+00:00"
    events = [
        Event(1, at, EventKind.ADDED, "a", 1, reason=EVIL), Event(2, at, EventKind.MOVED, "a", 1, "production", reason=EVIL),
        Event(3, at, EventKind.ROLLED_BACK, "a", 1, "production", 2, reason=EVIL), Event(4, at, EventKind.CALIBRATED, None, 1, reason=EVIL),
        Event(5, at, EventKind.MAINTAINED, "a", 1, reason=EVIL, detail={"step": EVIL}), evaluated(6, A, 0.9, 0.8), evaluated(7, B, 0.7, 0.6),
    ]  # fmt: skip
    facts = {
        "registry": EVIL, "made_at": at, "base_model": EVIL, "encoder": EVIL, "map": KnowledgeMap.of(nodes, edges, notes=[EVIL]),
        "events": tuple(events), "judged": (Judged(at, A, "hold", EVIL, False),),
        "traffic": (Traffic("2026-03-01", A, "accepted", 3, 0.5), Traffic("2026-03-04", None, "below_threshold", 2, -0.5)),
        "calibration": {"calibration": 1, "measured_on": EVIL, "max_false_reject": {"5 %": {"threshold": -0.1, "expect": EVIL}}},
        "alarms": ({"kind": "alarm", "adapter": "a", "signal": EVIL, "reason": EVIL, "noted_at": at},),
        "open_alarms": {"a": {"signal": EVIL, "reason": EVIL, "at": 3}}, "proposals": {EVIL: {"name": EVIL, "reason": EVIL}, "odd": 7},
    }  # fmt: skip
    return Facts(**(facts | more))    # type: ignore[arg-type]


def test_every_text_is_escaped_and_the_page_loads_and_runs_nothing() -> None:
    text = page(told())
    found = Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert "@import" not in text and "url(" not in text
    assert sum(EVIL in piece for piece in found.texts) >= 10, "it is shown as it was written"


def test_it_says_what_was_measured_learned_and_held() -> None:
    found = " ".join(Page(page(told())).texts)
    for said in ("90.0 %", "60.0 %", "rolled back", "calibration 1", "hold", "2026-03-04", "40.0 %", "adapter-hub merge a b --into a"):
        assert said in found, said


def test_of_an_empty_registry_it_says_so() -> None:
    found = " ".join(Page(page(Facts("registry", "2026-03-01T10:00:00+00:00", "base", "hash", KnowledgeMap.of([], [])))).texts)
    assert "This registry is empty" in found and "0" in found


@pytest.mark.parametrize("field", ["events", "judged", "traffic", "calibration", "alarms", "open_alarms", "proposals"])
def test_whatever_there_is_nothing_of_it_is_a_page(field: str) -> None:
    nothing = {"calibration": None, "open_alarms": {}, "proposals": {}}.get(field, ())
    Page(page(told(**{field: nothing})))


def test_a_pass_is_a_column_and_a_version_stands_in_its_cell() -> None:
    events = tuple(evaluated(seq, ref, seq / 100, 0.5) for seq, ref in enumerate([A, B, A, AdapterRef("b", 2), B], 1))
    text = page(told(events=events))
    rows = re.findall(r"<tr><td>(a|b)</td>(.*?)</tr>", text.split("When it is named")[1].split("As routed")[0])
    cells = {name: [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", rest)] for name, rest in rows}
    assert cells == {"a": ["1.0 %@1", "3.0 %@1", ""], "b": ["2.0 %@1", "4.0 %@2", "5.0 %@1"]}


def test_what_grows_without_end_is_cut_and_that_is_said() -> None:
    many = tuple(evaluated(seq, A, 0.5, 0.5) for seq in range(1, 3 * PASSES_MAX))
    alarms = tuple({"kind": "warning", "adapter": "a", "reason": str(number), "noted_at": "x"} for number in range(3 * ROWS_MAX))
    traffic = tuple(Traffic(f"2026-{day // 28 + 1:02}-{day % 28 + 1:02}", A, "accepted", 1, 0.1) for day in range(3 * DAYS_MAX))
    text = page(told(events=many, alarms=alarms, traffic=traffic))
    Page(text)
    assert f"The last {PASSES_MAX} of {3 * PASSES_MAX - 1} passes are shown." in text
    assert f"{ROWS_MAX} of {3 * ROWS_MAX} are shown." in text and f"{DAYS_MAX} of {3 * DAYS_MAX} are shown." in text
    assert len(text) < 2_000_000


@pytest.mark.parametrize("detail", [{}, {"step": "evaluate"}, {"step": "evaluate", "figures": 7}, {"step": "update", "figures": {}}])
def test_an_event_of_another_form_is_no_evaluation(detail: dict[str, object]) -> None:
    assert Measured.of(Event(1, "x", EventKind.MAINTAINED, "a", 1, detail=detail)) is None
