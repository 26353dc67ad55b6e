"""Tell people of alarms: to the log, a function, a webhook or a command (one that sends mail, say), and less often while one goes on.

Decides nothing: what an alarm leads to besides is the caller's. A sink that fails is logged and never stops the one who observes.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapter_hub.continual.drift import Alarm, Kind, Signal
from adapter_hub.errors import InvalidInput

log = logging.getLogger("adapter_hub")

FIRST_PAUSE_S = 600.0       # between an alert and the next of its adapter, signal and kind
LONGEST_PAUSE_S = 86_400.0
TIMEOUT_S = 10.0            # of a webhook or a command
FORMAT = 1

Sink = Callable[["Alert"], None]    # tells somebody; may raise


@dataclass(frozen=True, slots=True)
class Alert:
    """An alarm that is told, and how many of its adapter, signal and kind were held back since the last one that was."""

    alarm: Alarm
    held_back: int = 0

    @property
    def text(self) -> str:
        """One line for people."""
        more = f"; {self.held_back} more since the last alert" if self.held_back else ""
        return f"drift {self.alarm.kind} ({self.alarm.detector}, after {self.alarm.at:,} inputs): {self.alarm.reason}{more}"

    def to_json(self) -> dict[str, Any]:
        return self.alarm.to_json() | {"held_back": self.held_back, "text": self.text}


# ---- sinks ------------------------------------------------------------------------------------------------------


def to_log(alert: Alert) -> None:
    """A line of the logger "adapter_hub": alarms as errors, warnings as warnings."""
    log.log(logging.ERROR if alert.alarm.kind is Kind.ALARM else logging.WARNING, "%s", alert.text)


def webhook(url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S) -> Sink:
    """A sink that POSTs `Alert.to_json()` as JSON; a status of 400 and more is a failure. Raises InvalidInput for a URL that is not http(s)."""
    # Checked here: urllib opens file:// too, and an alert that goes nowhere is found out too late.
    if urllib.parse.urlsplit(url).scheme not in ("http", "https") or not urllib.parse.urlsplit(url).hostname:
        raise InvalidInput(f"{url!r} is no URL of a webhook.", hint="Give one that begins with https:// or http://.")

    def send(alert: Alert) -> None:
        body = json.dumps(alert.to_json()).encode()
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json", **(headers or {})}, method="POST")
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            answer.read()

    return send


def command(arguments: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> Sink:
    """A sink that runs a program, never through a shell, with `Alert.to_json()` on stdin: one that mails it, say.

    Another exit code than 0 is a failure. Raises InvalidInput where `arguments` is no list of a program and its arguments.
    """
    if isinstance(arguments, str) or not arguments or not all(isinstance(argument, str) for argument in arguments):
        raise InvalidInput(f"{arguments!r} is no command.", hint='Give the program and its arguments apart: ["mail-alert", "--to", "team"].')
    argv = list(arguments)
    if shutil.which(argv[0]) is None:
        raise InvalidInput(f"there is no program {argv[0]!r}.", hint="Give its path, or install it.")

    def send(alert: Alert) -> None:
        subprocess.run(argv, input=json.dumps(alert.to_json()).encode(), check=True, timeout=timeout_s, stdout=subprocess.DEVNULL)

    return send


def checked(sinks: Iterable[Sink]) -> tuple[Sink, ...]:
    """Raises InvalidInput for what cannot be called: an alert that nobody gets is found out too late."""
    found = tuple(sinks)
    for sink in found:
        if not callable(sink):
            raise InvalidInput(f"{sink!r} is no sink: it cannot be called.", hint="Give webhook(url), command([…]) or a function of an alert.")
    return found


# ---- back-off ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Pause:
    """What is being held back."""

    until_s: float
    pause_s: float      # how long this one is
    held_back: int = 0


class Alerts:
    """Tells each sink of alarms, with back-off for each adapter, signal and kind.

    After an alert the next one of its kind waits ten minutes, then twice as long each time, at most a day; the one that comes then says
    how many were held back. One that comes later than a pause after the pause begins anew with ten minutes. An alarm is never held back by
    warnings. Not for several threads at once.
    """

    def __init__(self, sinks: Iterable[Sink], *, first_pause_s: float = FIRST_PAUSE_S, longest_pause_s: float = LONGEST_PAUSE_S) -> None:
        self.sinks = tuple(sinks)
        if not 0 < first_pause_s <= longest_pause_s:
            raise InvalidInput(f"pauses from {first_pause_s!r} to {longest_pause_s!r} s.", hint="Give a first one above 0 and a longest of no less.")
        self.first_pause_s, self.longest_pause_s = first_pause_s, longest_pause_s
        self._pauses: dict[tuple[str, Signal, Kind], _Pause] = {}

    def send(self, alarms: Iterable[Alarm], *, now_s: float) -> list[Alert]:
        """Tell those whose time it is, at `now_s` of a clock that outlives the process (`time.time()`); the alerts that were told."""
        due = [alert for alarm in alarms if (alert := self._due(alarm, now_s))]
        for alert in due:
            for sink in self.sinks:
                try:
                    sink(alert)
                except Exception as error:    # whatever it is: those who observe go on
                    log.error("an alert could not be told (%s: %s): %s", type(error).__name__, error, alert.text)
        return due

    def _due(self, alarm: Alarm, now_s: float) -> Alert | None:
        key = (alarm.adapter, alarm.signal, alarm.kind)
        last = self._pauses.get(key)
        if last and now_s < last.until_s:
            last.held_back += 1
            return None
        held_back, pause_s = 0, self.first_pause_s
        if last:
            held_back = last.held_back
            if now_s < last.until_s + last.pause_s:
                pause_s = min(2 * last.pause_s, self.longest_pause_s)
        self._pauses[key] = _Pause(now_s + pause_s, pause_s)
        return Alert(alarm, held_back)

    def to_json(self) -> str:
        """The pauses, so that a later process holds back what this one would."""
        pauses = [[*key, *asdict(pause).values()] for key, pause in sorted(self._pauses.items())]
        return json.dumps({"format": FORMAT, "pauses": pauses})

    def restore(self, text: str) -> None:
        """Go on with the pauses of `to_json`. Raises InvalidInput for anything else, and has changed nothing then."""
        try:
            state = json.loads(text)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']!r}")
            pauses = {
                (str(adapter), Signal(signal), Kind(kind)): _Pause(float(until_s), float(pause_s), int(held_back))
                for adapter, signal, kind, until_s, pause_s, held_back in state["pauses"]
            }
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"these are no pauses of alerts: {error}.", hint=f"Give what `to_json` wrote (format {FORMAT}).") from error
        self._pauses = pauses
