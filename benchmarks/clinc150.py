"""The main job on CLINC150's test split: 4,500 in-scope and 1,000 out-of-scope inputs through `adapter-hub run`, no task id.

    python benchmarks/clinc150.py --data DIR [--registry registry]

DIR holds upstream's data_full.json and domains.json. The test split is measured once and never tuned on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from adapter_hub import Hub

RESULTS = Path(__file__).parent / "results" / "clinc150.json"
CHUNK_ROWS = 512
Row = Mapping[str, Any]

# What the project promises: DESIGN and the issue name these figures. Each: (least, most), None where a side is open.
BARS: dict[str, tuple[float | None, float | None]] = {
    "domain_accuracy": (0.97, None),
    "intent_accuracy": (0.935, None),
    "false_rejection": (0.03, 0.07),
    "oos_auroc": (0.96, None),
}
MEANING = {
    "domain_accuracy": "domain routing, never abstaining",
    "intent_accuracy": "intent accuracy, never abstaining",
    "intent_accuracy_asked": "intent accuracy, never abstaining, near candidates asked (--ask 3)",
    "domain_accuracy_asked": "domain, never abstaining, near candidates asked",
    "intent_accuracy_named": "intent accuracy, the right adapter named",
    "false_rejection": "in-scope inputs turned away, default rate",
    "intent_accuracy_default": "intent accuracy, default rate (turned away = wrong)",
    "oos_auroc": "out-of-scope AUROC of the acceptance score",
    "oos_fpr95": "out-of-scope accepted where 95 % of in-scope is",
    "oos_kept_out": "out-of-scope inputs kept out, default rate",
    "rows_per_s": "rows a second, start of the process included",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with data_full.json and domains.json")
    parser.add_argument("--registry", type=Path, default=Path(__file__).parent.parent / "registry", metavar="DIR")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    figures = measure(arguments.data, arguments.registry)
    missed = [name for name, bar in BARS.items() if not within(figures[name], bar)]
    show(figures)
    report = {
        "benchmark": "clinc150",
        **{name: round(value, 5 if value < 10 else 1) for name, value in figures.items()},
        "bars_missed": missed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 1 if missed else 0


def measure(data: Path, registry: Path) -> dict[str, float]:
    rows = test_rows(data)
    in_scope = np.array([row["domain"] is not None for row in rows])
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "test.jsonl"
        write_jsonl(inputs, rows)
        started = time.perf_counter()
        forced = answered(registry, inputs, Path(scratch) / "forced.jsonl", ["--max-false-reject", "0"])
        seconds = time.perf_counter() - started
        asked = answered(registry, inputs, Path(scratch) / "asked.jsonl", ["--max-false-reject", "0", "--ask", "3"])
        default = answered(registry, inputs, Path(scratch) / "default.jsonl", [])
    with Hub.open(registry) as hub:
        named = named_labels(hub, [row for row in rows if row["domain"] is not None])
    # The score is the same at every rate; only the threshold moves.
    scores = np.array([row["score"] for row in default], dtype=float)
    cut = np.quantile(scores[in_scope], 0.05)
    kept_out = np.array([row["adapter"] is None for row in default])
    return {
        "domain_accuracy": share(forced, rows, in_scope, right_domain),
        "intent_accuracy": share(forced, rows, in_scope, right_intent),
        "intent_accuracy_asked": share(asked, rows, in_scope, right_intent),
        "domain_accuracy_asked": share(asked, rows, in_scope, right_domain),
        "intent_accuracy_named": float(np.mean([label == row["intent"] for label, row in zip(named, _where(rows, in_scope), strict=True)])),
        "false_rejection": float(kept_out[in_scope].mean()),
        "intent_accuracy_default": share(default, rows, in_scope, right_intent),
        "oos_auroc": float(roc_auc_score(in_scope, scores)),
        "oos_fpr95": float((scores[~in_scope] >= cut).mean()),
        "oos_kept_out": float(kept_out[~in_scope].mean()),
        "rows_per_s": len(rows) / seconds,
    }


def test_rows(data: Path) -> list[dict[str, Any]]:
    """The test split: id, text, and what is right: intent and domain, both None out of scope."""
    splits = json.loads((data / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((data / "domains.json").read_text(encoding="utf-8"))
    home = {intent: name.lower().replace("&", "and").replace(" ", "_") for name, intents in domains.items() for intent in intents}
    rows: list[dict[str, Any]] = [{"text": text, "intent": intent, "domain": home[intent]} for text, intent in splits["test"]]
    rows += [{"text": text, "intent": None, "domain": None} for text, _ in splits["oos_test"]]
    return [{"id": number} | row for number, row in enumerate(rows)]


def answered(registry: Path, inputs: Path, output: Path, options: Sequence[str]) -> list[Row]:
    """The rows as `adapter-hub run` wrote them."""
    command = [sys.executable, "-m", "adapter_hub.cli", "run", str(inputs), str(output), "--registry", str(registry), "--json", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    expected = [json.loads(line)["id"] for line in inputs.read_text(encoding="utf-8").splitlines()]
    if [row["id"] for row in rows] != expected:
        raise SystemExit("the output does not hold every input row in its order")
    return rows


def named_labels(hub: Hub, rows: Sequence[Row]) -> list[str | None]:
    """Labels with the right adapter named: what routing could reach at best."""
    labels: list[str | None] = []
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        labels += [p.label for p in hub.predict([row["text"] for row in chunk], adapters=[row["domain"] for row in chunk])]
    return labels


def share(answers: Sequence[Row], rows: Sequence[Row], chosen: np.ndarray, right: Callable[[Row, Row], bool]) -> float:
    return float(np.mean([right(answer, row) for answer, row in zip(_where(answers, chosen), _where(rows, chosen), strict=True)]))


def right_domain(answer: Row, row: Row) -> bool:
    return answer["adapter"] is not None and answer["adapter"].partition("@")[0] == row["domain"]


def right_intent(answer: Row, row: Row) -> bool:
    return answer["label"] == row["intent"]


def _where(rows: Sequence[Row], chosen: np.ndarray) -> list[Row]:
    return [row for row, wanted in zip(rows, chosen, strict=True) if wanted]


def within(value: float, bar: tuple[float | None, float | None]) -> bool:
    least, most = bar
    return (least is None or value >= least) and (most is None or value <= most)


def show(figures: Mapping[str, float]) -> None:
    table = Table(title="CLINC150 test split through `adapter-hub run`")
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    for name, value in figures.items():
        least, most = BARS.get(name, (None, None))
        bar = " ".join([*([f"≥ {100 * least:.1f}"] if least is not None else []), *([f"≤ {100 * most:.1f}"] if most is not None else [])])
        verdict = "" if name not in BARS else "met" if within(value, BARS[name]) else "MISSED"
        table.add_row(MEANING[name], f"{value:.0f}" if value > 1 else f"{100 * value:.2f} %", bar, verdict)
    Console().print(table)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
