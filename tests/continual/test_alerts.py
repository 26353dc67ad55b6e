"""Alerts: every sink is told, by a real server and a real program too; a broken one stops nobody; what goes on is told less often."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapter_hub.continual.alerts import Alert, Alerts, checked, command, to_log, webhook
from adapter_hub.continual.drift import Alarm, Kind, Signal
from adapter_hub.errors import InvalidInput

ALARM = Alarm("banking", Signal.ERROR, Kind.ALARM, "ADWIN", 1_234, 0.05, 0.25, "25.0 % of inputs of 'banking' are answered wrongly, 5.0 % before")
TEXT = f"drift alarm (ADWIN, after 1,234 inputs): {ALARM.reason}"
MINUTE_S, DAY_S = 60.0, 86_400.0


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server on this machine: its address, and what was posted; whatever ends in /broken it answers with 500."""
    posted: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            posted.append((self.headers["Content-Type"], body))
            self.send_response(500 if self.path.endswith("/broken") else 204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", posted
        http.shutdown()
        thread.join()


def told(alerts: Alerts, *minutes: float, alarm: Alarm = ALARM) -> list[tuple[float, int]]:
    """When of the alarms at these minutes were told, and how many each said were held back."""
    return [(minute, alert.held_back) for minute in minutes for alert in alerts.send([alarm], now_s=minute * MINUTE_S)]


# ---- sinks ----------------------------------------------------------------------------------------------------------


def test_a_webhook_gets_the_alert_as_json(server: tuple[str, list[tuple[str, Any]]]) -> None:
    address, posted = server
    Alerts([webhook(f"{address}/alerts")]).send([ALARM], now_s=0)
    assert posted == [("application/json", ALARM.to_json() | {"held_back": 0, "text": TEXT})]


def test_a_command_gets_it_on_stdin_and_no_shell_reads_its_arguments(tmp_path: Path) -> None:
    out = tmp_path / "$(touch gone); alert.json"
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"
    Alerts([command([sys.executable, "-c", program, str(out)])]).send([ALARM], now_s=0)
    assert json.loads(out.read_text()) == ALARM.to_json() | {"held_back": 0, "text": TEXT}
    assert list(tmp_path.iterdir()) == [out]


def test_the_log_has_alarms_as_errors_and_warnings_as_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="adapter_hub"):
        Alerts([to_log]).send([ALARM, replace(ALARM, kind=Kind.WARNING, detector="Page-Hinkley")], now_s=0)
    assert [(record.levelname, record.message.partition(":")[0]) for record in caplog.records] == [
        ("ERROR", "drift alarm (ADWIN, after 1,234 inputs)"),
        ("WARNING", "drift warning (Page-Hinkley, after 1,234 inputs)"),
    ]


def test_sinks_that_fail_are_logged_and_the_others_are_told(server: tuple[str, list[tuple[str, Any]]], caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Alert] = []
    slow = command([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)
    broken = [webhook(f"{server[0]}/broken"), command([sys.executable, "-c", "raise SystemExit(3)"]), slow]
    assert Alerts([*broken, heard.append]).send([ALARM], now_s=0) == heard == [Alert(ALARM)]
    reasons = [record.message.partition("(")[2].partition(":")[0] for record in caplog.records]
    assert reasons == ["HTTPError", "CalledProcessError", "TimeoutExpired"]


def test_a_sink_that_could_never_tell_anybody_is_refused_at_once() -> None:
    with pytest.raises(InvalidInput, match="there is no program '/no/such/program'"):
        command(["/no/such/program"])
    with pytest.raises(InvalidInput, match="'team' is no sink"):
        checked(["team"])    # type: ignore[list-item]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/", "hooks.example", "https://"])
def test_a_url_that_is_no_webhook_is_refused_before_any_alert(url: str) -> None:
    with pytest.raises(InvalidInput, match="no URL of a webhook"):
        webhook(url)


@pytest.mark.parametrize("arguments", ["mail -s drift team", [], ["mail", 3]])
def test_a_command_line_for_a_shell_is_refused(arguments: Any) -> None:
    with pytest.raises(InvalidInput, match="is no command"):
        command(arguments)


# ---- back-off -------------------------------------------------------------------------------------------------------


def test_what_goes_on_is_told_at_doubling_pauses_with_the_number_held_back() -> None:
    assert told(Alerts([]), *range(0, 100)) == [(0, 0), (10, 9), (30, 19), (70, 39)]


def test_a_pause_is_at_most_a_day() -> None:
    days = [minute * MINUTE_S / DAY_S for minute, _ in told(Alerts([]), *range(0, 10 * 1_440, 5))]
    assert [round(later - earlier, 2) for earlier, later in zip(days[-4:], days[-3:], strict=False)] == [1.0, 1.0, 1.0]


def test_after_quiet_it_begins_anew_and_still_says_what_was_held_back() -> None:
    assert told(Alerts([]), 0, 1, 500, 505, 510) == [(0, 0), (500, 1), (510, 1)]


def test_each_adapter_signal_and_kind_has_a_pause_of_its_own() -> None:
    others = [replace(ALARM, adapter="travel"), replace(ALARM, signal=Signal.SCORE), replace(ALARM, kind=Kind.WARNING)]
    assert [alert.alarm for alert in Alerts([]).send([ALARM, ALARM, *others], now_s=0)] == [ALARM, *others]


def test_another_process_goes_on_with_the_pauses() -> None:
    first, second = Alerts([]), Alerts([])
    assert told(first, 0, 1, 2) == [(0, 0)]
    second.restore(first.to_json())
    assert second.to_json() == first.to_json()
    assert told(second, 5, 11) == [(11, 3)]
    with pytest.raises(InvalidInput, match="no pauses of alerts"):
        second.restore('{"format": 1, "pauses": [[1]]}')
    assert told(second, 12) == []


@pytest.mark.parametrize("pauses", [(0.0, 1.0), (2.0, 1.0)])
def test_pauses_that_cannot_be_are_refused(pauses: tuple[float, float]) -> None:
    with pytest.raises(InvalidInput, match="pauses from"):
        Alerts([], first_pause_s=pauses[0], longest_pause_s=pauses[1])
