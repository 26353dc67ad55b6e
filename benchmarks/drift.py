"""Does the drift monitor stay quiet where nothing changes, and how soon does it tell of a drop of 20 points?

    python benchmarks/drift.py --data DIR [--registry registry] [--cache FILE]

DIR holds clinc150/ and banking77/. Their test inputs go once through the registry that ships; streams are drawn from what it gave, with
replacement, so that they are stationary by construction. The settings were chosen on every second input (--half 0), the figures are of the
others. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clinc150 import CHUNK_ROWS, test_rows
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from adapter_hub import Hub
from adapter_hub.continual.drift import OVERALL, Alarm, DriftMonitor, Kind, Signal

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "drift.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter_hub-benchmarks" / "drift.npz"
DROP = 0.2                # of accuracy
FALSE_ALARMS_MOST = 1.0   # in 10,000 inputs: the bar
DELAY_MOST = 400          # inputs, median: the bar
BEFORE, AFTER, RAMP = 2_000, 2_000, 1_000    # inputs before a change and after it; a gradual one takes so many to be whole
BURST = 8                 # mean inputs in a row to one adapter, in the stream that comes in bursts
FRESH = 500               # inputs to each of the monitors that begin anew
TRIALS_VECTORS = 20       # changes that the comparison of embeddings is measured on
BANKING = ("banking", "credit_cards")    # the domains that BANKING77's inputs belong to
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """What the registry gave for each test input, n of them."""

    score: NDArray[np.float64]
    abstained: NDArray[np.bool_]
    error: NDArray[np.bool_]         # no right answer: another intent, or none; of BANKING77: neither of its two domains
    adapter: NDArray[np.str_]        # best candidate
    source: NDArray[np.str_]         # in (CLINC150's in-scope inputs), out (its others), bank (BANKING77)
    vector: NDArray[np.float16]      # (n, d)

    def of(self, *sources: str, half: int) -> Rows:
        return np.flatnonzero(np.isin(self.source, sources) & (np.arange(len(self.score)) % 2 == half))


@dataclass(frozen=True)
class Change:
    """A stream and what makes its accuracy drop."""

    stream: str
    cause: str
    before: Rows
    instead: Rows | None             # inputs that come instead of others; None: the same inputs, answered wrongly
    signals: tuple[Signal, ...]      # what it should move
    adapter: str | None = None       # the only one whose inputs are looked at; None: all


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with clinc150 and banking77")
    parser.add_argument("--registry", type=Path, default=ROOT / "registry", metavar="DIR")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FILE", help="what the registry gave")
    parser.add_argument("--inputs", type=int, default=60_000, metavar="N", help="of each stationary stream")
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="of each change")
    parser.add_argument("--half", type=int, choices=(0, 1), default=1, help="which inputs: 0, the settings were chosen on them; 1, they were not")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    if not arguments.cache.exists():
        ask(arguments.data, arguments.registry, arguments.cache)
    with np.load(arguments.cache) as kept:
        inputs = Inputs(**kept)
    rng = np.random.default_rng(100 + arguments.half)
    stationary = [quiet(inputs, name, rows) for name, rows in streams(inputs, arguments.inputs, arguments.half, rng)]
    stationary.append(fresh(inputs, inputs.of("in", "out", half=arguments.half), arguments.inputs, rng))
    changes = []
    for change in all_changes(inputs, arguments.half):
        for ramp in (0, RAMP):
            changes.append(delays(inputs, change, ramp, arguments.trials, rng))
    missed = bars_missed(stationary, changes)
    show(stationary, changes)
    report = {
        "benchmark": "drift",
        "half": arguments.half,
        "stationary": stationary,
        "changes": changes,
        "bars_missed": missed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    worst = max(stream["alarms_per_10k"] for stream in stationary)
    slowest = max(change["signals"]["error"]["median"] for change in changes if not change["ramp"])
    print(json.dumps({"benchmark": "drift", "alarms_per_10k_worst": worst, "delay_error_sudden_worst": slowest, "bars_missed": missed}))
    return 1 if missed else 0


# ---- what the registry gives ------------------------------------------------------------------------------------


def ask(data: Path, registry: Path, cache: Path) -> None:
    clinc = test_rows(data / "clinc150")
    with open(data / "banking77" / "test.csv", encoding="utf-8", newline="") as file:
        bank = [row["text"] for row in csv.DictReader(file)]
    texts = [row["text"] for row in clinc] + bank
    intents = [row["intent"] for row in clinc] + [None] * len(bank)
    source = ["out" if row["intent"] is None else "in" for row in clinc] + ["bank"] * len(bank)
    with Hub.open(registry) as hub:
        chunks = [texts[start : start + CHUNK_ROWS] for start in range(0, len(texts), CHUNK_ROWS)]
        answers = [answer for chunk in chunks for answer in hub.predict(chunk)]
        vectors = np.concatenate([hub.encoder.encode(chunk) for chunk in chunks])
    reached = [answer.adapter is not None and answer.adapter.name in BANKING for answer in answers]
    wrong = [intent is None or answer.label != intent for answer, intent in zip(answers, intents, strict=True)]
    from_bank = np.array(source) == "bank"
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        cache,
        score=[answer.decision.score for answer in answers],
        abstained=[answer.adapter is None for answer in answers],
        error=np.where(from_bank, ~np.array(reached), wrong),
        adapter=[answer.decision.candidates[0][0].name for answer in answers],
        source=source,
        vector=vectors.astype(np.float16),
    )


# ---- streams where nothing changes ------------------------------------------------------------------------------


def streams(inputs: Inputs, length: int, half: int, rng: np.random.Generator) -> Iterator[tuple[str, Rows]]:
    clinc = inputs.of("in", half=half)
    yield "CLINC150", rng.choice(clinc, length)
    yield "CLINC150, 18 % out of scope", rng.choice(inputs.of("in", "out", half=half), length)
    yield "BANKING77", rng.choice(inputs.of("bank", half=half), length)
    by_adapter = [clinc[inputs.adapter[clinc] == name] for name in np.unique(inputs.adapter[clinc])]
    bursts: list[Rows] = []
    while sum(map(len, bursts)) < length:
        bursts.append(rng.choice(by_adapter[rng.integers(len(by_adapter))], rng.geometric(1 / BURST)))
    yield f"CLINC150 in bursts of {BURST}", np.concatenate(bursts)[:length]


def quiet(inputs: Inputs, name: str, rows: Rows) -> dict[str, Any]:
    """Alarms and warnings, all false, of every detector of all adapters together."""
    monitor, started = DriftMonitor(), time.perf_counter()
    found = [alarm for row in rows for alarm in observed(inputs, monitor, row, embedding=True)]
    return counted(name, len(rows), found) | {"us_per_input": round((time.perf_counter() - started) / len(rows) * 1e6, 1)}


def fresh(inputs: Inputs, pool: Rows, length: int, rng: np.random.Generator) -> dict[str, Any]:
    """The same of monitors that have only begun."""
    found: list[Alarm] = []
    for _ in range(length // FRESH):
        monitor = DriftMonitor()
        found += [alarm for row in rng.choice(pool, FRESH) for alarm in observed(inputs, monitor, row)]
    return counted(f"the second, begun anew every {FRESH}", length // FRESH * FRESH, found)


def counted(name: str, length: int, found: Sequence[Alarm]) -> dict[str, Any]:
    alarms = Counter(str(alarm.signal) for alarm in found if alarm.kind is Kind.ALARM)
    warnings = sum(alarm.kind is Kind.WARNING for alarm in found)
    per_10k = 10_000 / length
    return {
        "stream": name,
        "inputs": length,
        "alarms": dict(alarms),
        "alarms_per_10k": round(alarms.total() * per_10k, 3),
        "warnings_per_10k": round(warnings * per_10k, 1),
        "warnings_over_all_per_10k": round(sum(a.kind is Kind.WARNING and a.adapter == OVERALL for a in found) * per_10k, 1),
    }


def observed(inputs: Inputs, monitor: DriftMonitor, row: int, *, error: bool | None = None, embedding: bool = False) -> list[Alarm]:
    return monitor.observe(
        str(inputs.adapter[row]),
        score=float(inputs.score[row]),
        abstained=bool(inputs.abstained[row]),
        error=bool(inputs.error[row]) if error is None else error,
        embedding=inputs.vector[row] if embedding else None,
    )


# ---- streams that change ----------------------------------------------------------------------------------------


def all_changes(inputs: Inputs, half: int) -> list[Change]:
    clinc, out, bank = inputs.of("in", half=half), inputs.of("out", half=half), inputs.of("bank", half=half)
    every = (Signal.SCORE, Signal.ABSTAINED, Signal.ERROR, Signal.EMBEDDING)
    own = clinc[inputs.adapter[clinc] == "banking"]
    return [
        Change("CLINC150", "out of scope", clinc, out, every),
        Change("CLINC150", "BANKING77's inputs", clinc, bank, every),
        Change("CLINC150", "wrong answers", clinc, None, (Signal.ERROR,)),
        Change("CLINC150, 18 % out of scope", "out of scope", inputs.of("in", "out", half=half), out, every),
        Change("BANKING77", "out of scope", bank, out, every),
        Change("CLINC150's `banking` alone", "wrong answers", own, None, (Signal.ERROR,), adapter="banking"),
    ]


def delays(inputs: Inputs, change: Change, ramp: int, trials: int, rng: np.random.Generator) -> dict[str, Any]:
    """Inputs from the beginning of the change to the first alarm, of each signal and of any; what comes before it counts nowhere."""
    after: dict[str, list[float]] = {str(signal): [] for signal in change.signals} | {"first alarm": [], "first warning": []}
    for trial in range(trials):
        first = first_alarms(inputs, change, ramp, rng, vectors=False)
        for name in after.keys() - {Signal.EMBEDDING}:
            after[name].append(first.get(name, np.inf))
        if trial < TRIALS_VECTORS and Signal.EMBEDDING in change.signals:
            after[Signal.EMBEDDING].append(first_alarms(inputs, change, ramp, rng, vectors=True).get(Signal.EMBEDDING, np.inf))
    signals = {name: quartiles(values) for name, values in after.items()}
    return {"stream": change.stream, "cause": change.cause, "ramp": ramp, "signals": signals}


def first_alarms(inputs: Inputs, change: Change, ramp: int, rng: np.random.Generator, *, vectors: bool) -> dict[str, int]:
    """By signal, over all inputs (or of the one adapter), and "first alarm", "first warning" of any detector."""
    monitor = DriftMonitor()
    share = DROP / (1 - inputs.error[change.before].mean())
    rows = rng.choice(change.before, BEFORE + AFTER)
    chance = share * (np.minimum(np.arange(1, AFTER + 1) / ramp, 1) if ramp else np.ones(AFTER))
    struck = np.concatenate([np.zeros(BEFORE, bool), rng.random(AFTER) < chance])
    if change.instead is not None:
        rows[struck] = rng.choice(change.instead, struck.sum())
    first: dict[str, int] = {}
    watched = change.adapter or OVERALL
    start = BEFORE - int(rng.integers(1_400, 1_700)) if vectors else 0    # enough for a reference and a window, out of step with the tests
    for number in range(start, len(rows)):
        row, error = rows[number], bool(inputs.error[rows[number]] or struck[number])
        if vectors:
            found = monitor.observe(None, embedding=inputs.vector[row])
        else:
            found = observed(inputs, monitor, row, error=error)
        if number < BEFORE:
            continue
        for alarm in found:
            first.setdefault(f"first {alarm.kind}", number - BEFORE + 1)
            if alarm.kind is Kind.ALARM and alarm.adapter == watched:
                first.setdefault(alarm.signal, number - BEFORE + 1)
        if (vectors and first) or len(first) >= len(change.signals) + 1 + (Signal.EMBEDDING not in change.signals):
            break
    return first


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """A change that was not found counts as later than any."""
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf"))
    names = {"median": median, "lower": low, "upper": high}
    missed = int(np.isinf(values).sum())
    return {name: int(value) if np.isfinite(value) else None for name, value in names.items()} | {"missed": missed, "trials": len(values)}


# ---- report -----------------------------------------------------------------------------------------------------


def bars_missed(stationary: Sequence[dict[str, Any]], changes: Sequence[dict[str, Any]]) -> list[str]:
    missed = [f"false alarms, {stream['stream']}" for stream in stationary if stream["alarms_per_10k"] > FALSE_ALARMS_MOST]
    for change in changes:
        median = change["signals"]["error"]["median"]
        if not change["ramp"] and (median is None or median > DELAY_MOST):
            missed.append(f"delay, {change['stream']}, {change['cause']}")
    return missed


def show(stationary: Sequence[dict[str, Any]], changes: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Nothing changes: in 10,000 inputs, all detectors together")
    for column in ("stream", "inputs", "alarms", "of them", "warnings", "over all"):
        table.add_column(column)
    for stream in stationary:
        alarms = ", ".join(f"{count} {signal}" for signal, count in stream["alarms"].items())
        rates = (str(stream[f"{name}_per_10k"]) for name in ("warnings", "warnings_over_all"))
        figures = (f"{stream['inputs']:,}", str(stream["alarms_per_10k"]), alarms, *rates)
        table.add_row(stream["stream"], *figures)
    Console().print(table)
    table = Table(title="Accuracy drops by 20 points: inputs until an alarm, median (quartiles), missed")
    names = ("error", "score", "abstained", "embedding", "first alarm", "first warning")
    for column in ("stream", "by", "change", *names):
        table.add_column(column)
    for change in changes:
        cells = [cell(change["signals"][name]) if name in change["signals"] else "–" for name in names]
        table.add_row(change["stream"], change["cause"], "gradual" if change["ramp"] else "sudden", *cells)
    Console(width=200).print(table)


def cell(delay: dict[str, Any]) -> str:
    low, median, high = ("∞" if delay[name] is None else delay[name] for name in ("lower", "median", "upper"))
    return f"{median} ({low}–{high})" + (f", {delay['missed']} missed" if delay["missed"] else "")


if __name__ == "__main__":
    raise SystemExit(main())
