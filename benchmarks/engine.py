"""The engine beside the base alone and beside PEFT: one forward for many adapters, generation, loading, memory, threads, whole jobs.

    python benchmarks/engine.py [--data DIR] [--only forward,decode] [--rows 8,64] [--rounds 15] [--quick] [--device cuda] [--seven-b]
        [--no-peft] [--out FILE]

Every ratio is to the base's own forward of the same batch in the same round; rounds are interleaved, and medians with quartiles are
shown, because absolute times on a shared machine are noise. `--only` measures some parts: with `--out` the file keeps what others
brought, and each part is written as it ends. The last line is JSON; exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from engine_batches import classification, decode, forward, generation, prefill
from engine_rounds import Figures, Settings
from engine_slots import loading, memory, slots
from engine_traffic import jobs, threads
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[Settings, Path], Figures]] = {
    part.__name__: part for part in (forward, classification, generation, prefill, decode, loading, slots, memory, threads, jobs)
}
SIZES = (1, 8, 64)    # rows of a batch
CAUSAL = ("generation", "prefill", "decode")    # the parts that --seven-b is for
# What the project promises: at most, and for throughput at least.
BARS = {
    "forward, 64 rows, 64 adapters": 1.12,
    "forward, 64 rows, 1 adapter": 1.10,
    "forward, 64 rows, 1 adapter, merged for a job": 1.03,
    "forward, 64 rows, base rows beside 64 resident": 1.03,
    "generation, 16 adapters": 1.35,
    "cold load, ms": 5.0,
    "the 1,000th load over the 1st": 1.5,
    "bytes after 1,000 loads and evictions over before": 1.05,
    "seconds at a working set of 4 × the slots, over all resident": 1 / 0.6,
}
AT_LEAST = {
    "jobs, 10 adapters, rows a second of `run` over the bare forward's": 0.4,
    "jobs, 10 adapters, rows a second of `run` over the plain script's": 1.5,
    "jobs, 64 adapters, rows a second of `run` over the plain script's": 3.0,
}


def middle(value: Any) -> float:
    return float(value[1] if isinstance(value, list) else value)


def missed(name: str, value: Any) -> bool:
    return middle(value) > BARS.get(name, float("inf")) or middle(value) < AT_LEAST.get(name, 0.0)


def show(figures: Figures) -> None:
    table = Table(title="Over the base's own forward of the same batch, unless a unit is named")
    for column in ("figure", "median", "quartiles", "bar", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for name, value in figures.items():
        quartiles = f"{value[0]:.3f} – {value[2]:.3f}" if isinstance(value, list) else ""
        bar = f"≤ {BARS[name]:.3g}" if name in BARS else f"≥ {AT_LEAST[name]:.3g}" if name in AT_LEAST else ""
        table.add_row(name, f"{middle(value):.3f}", quartiles, bar, "" if not bar else "MISSED" if missed(name, value) else "met")
    Console(width=150).print(table)


def measured(name: str, settings: Settings) -> Figures:
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        figures = PARTS[name](settings, Path(scratch))
    return {f"7B bfloat16, {key}": value for key, value in figures.items()} if settings.seven_b else figures


def rounded(value: Any) -> Any:
    return [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4)


def sizes(text: str) -> tuple[int, ...]:
    if unknown := [size for size in text.split(",") if size not in map(str, SIZES)]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} is none of {','.join(map(str, SIZES))}")
    return tuple(map(int, text.split(",")))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=None, metavar="NAMES", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--rows", type=sizes, default=None, metavar="N,…", help="some of 1,8,64: sizes of a batch, where a part has several")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: does it run?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seven-b", action="store_true", help=f"{', '.join(CAUSAL)} of a 7B-shaped model in bfloat16; others are left out")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out, which takes most of the time")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with clinc150, for the jobs")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="where the figures go; results/engine.json (or _cuda) for a whole run")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else [*(CAUSAL if given.seven_b else PARTS)]
    if unknown := sorted(set(names) - set(CAUSAL if given.seven_b else PARTS)):
        parser.error(f"--only: there is no {', '.join(unknown)}{' with --seven-b' if given.seven_b else ''}")
    if "jobs" in names and given.only and given.data is None:    # a whole run leaves them out
        parser.error("--only jobs needs --data DIR, the folder with clinc150")
    if given.data and not (given.data / "clinc150").is_dir():
        parser.error(f"--data: there is no folder {given.data / 'clinc150'}")
    logging.getLogger("adapter_hub").setLevel(logging.ERROR)    # adapters that take turns are what `slots` measures
    rows = given.rows or ((8,) if given.quick else SIZES)
    settings = Settings(2 if given.quick else given.rounds, rows, given.quick, given.device, given.seven_b, given.data, not given.no_peft)
    out: Path | None = given.out
    if out is None and not (given.only or given.rows or given.quick):
        out = RESULTS / ("engine.json" if given.device == "cpu" else "engine_cuda.json")
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {"benchmark": "engine", "parts": {}}
    figures: Figures = {}
    for name in names:
        part = {"rounds": settings.rounds, "quick": settings.quick, "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 1)}
        found = measured(name, settings)
        figures |= found
        report |= {key: rounded(value) for key, value in found.items()}
        where = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, {where}"
        some = f", rows {','.join(map(str, rows))}" if given.rows else ""
        report["parts"][name + (" 7B" if given.seven_b else "") + some] = part | {"machine": machine}
        report["bars_missed"] = [key for key, value in report.items() if key in BARS | AT_LEAST and missed(key, value)]
        if out:
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(figures)
    print(json.dumps(report))
    return 1 if any(missed(key, value) for key, value in figures.items()) and not given.quick else 0


if __name__ == "__main__":
    sys.exit(main())
