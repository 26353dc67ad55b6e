"""Does a new adapter that starts from its nearest ones learn better than one that starts from noise? Few-shot tasks, paired.

    python benchmarks/transfer.py --data DIR [--tasks clinc150 banking77 …] [--shots 20 100] [--seeds 0 1] [--targets 4] [--no-trials]
    python benchmarks/transfer.py --data DIR --starts aligned --no-trials --out FILE

DIR holds clinc150, banking77, standard_cl and cl_benchmark. A task is a domain of CLINC150, a seventh of BANKING77's intents in alphabetical
order, or one of standard_cl or of the long sequence, known by so many examples a label (of standard_cl by the 16 that there are). The adapters
to start from are those of `--registry` but the task's own. Each start is trained in full (90 steps at 20 examples of each of 15 labels, three
epochs at 100), then asked the validation splits of CLINC150 and standard_cl, of the others training rows that were not drawn (40 a label); no
test split is read. Beside them `transfer` itself: the start that its trials choose; and `aligned`, a cold start after 100 `align_steps`.
Gains are over the cold start of the same rows and seed; their standard error is over tasks and seeds. Each finished task is kept in
`--out`, and not measured again by the same config unless a start is asked for that it lacks. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from continual_data import LONG, STANDARD_ORDERS
from rich.console import Console
from rich.table import Table

from adapter_hub import Hub
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.nearest import nearest
from adapter_hub.routing.statistics import build_state
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_classifier
from adapter_hub.training.transfer import NEIGHBOURS_MAX, Neighbour, fault_of, start_of, transfer
from adapter_hub.training.warm import Start

RESULTS = Path(__file__).parent / "results" / "transfer.json"
GROUPS = 7          # of BANKING77's intents
ASKED_EACH = 40     # rows of an intent of BANKING77
TARGETS = ("credit_cards", "meta", "work", "utility", "home", "kitchen_and_dining", "small_talk", "travel", "auto_and_commute", "banking")
TRAINED = ("nearest", "combined")    # whichever is chosen
ALIGNED = "aligned"
ALIGN_STEPS = 100
CONFIG = TrainConfig(epochs=3, steps_min=90)
Cell = dict[str, Any]


class Rows(NamedTuple):
    train: list[Example]    # all there are
    asked: list[Example]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of public data")
    parser.add_argument("--registry", type=Path, default=Path(__file__).parent.parent / "registry", metavar="DIR")
    parser.add_argument("--tasks", nargs="+", choices=tuple(SETS), default=["clinc150", "banking77"])
    parser.add_argument("--shots", nargs="+", type=int, default=[20], help="examples an intent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--targets", type=int, default=4, help="tasks of each set")
    parser.add_argument("--starts", nargs="*", choices=(*TRAINED, ALIGNED), default=TRAINED, help="to be trained in full beside the cold one")
    parser.add_argument("--trials", action=argparse.BooleanOptionalAction, default=True, help="which start `transfer` would choose, too")
    parser.add_argument("--device", default="cpu", help="of torch (default: cpu)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    before = json.loads(arguments.out.read_text(encoding="utf-8"))["cells"] if arguments.out.exists() else []
    cells: dict[tuple[Any, ...], Cell] = {key_of(cell): cell for cell in before}
    with Hub.open(arguments.registry, device=arguments.device) as hub:
        for name in arguments.tasks:
            for target, rows in list(SETS[name](arguments.data / name).items())[: arguments.targets]:
                for shots in arguments.shots:
                    for seed in arguments.seeds:
                        few, config = drawn(rows, shots, seed), dataclasses.replace(CONFIG, seed=seed)
                        cell: Cell = {"set": name, "target": target, "shots": shots, "seed": seed, "config": repr(config)}
                        cell["machine"] = machine_of(arguments.device)    # no part of the key: gains are paired within a cell
                        known = cells.get(key_of(cell), {}).get("starts", {}).keys()
                        if not known >= {*arguments.starts, *(["transfer"] if arguments.trials else [])}:
                            wanted = {*arguments.starts, *known} & {*TRAINED, ALIGNED}
                            cells[key_of(cell)] = cell | measured(hub, target, few, config, wanted, arguments.trials or "transfer" in known)
                            write(arguments.out, [*cells.values()])
    report = write(arguments.out, [*cells.values()])
    show(report["gains"])
    print(json.dumps({key: report[key] for key in ("benchmark", "gains")}))
    return 0


def key_of(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("set", "target", "shots", "seed", "config"))


def clinc150(data: Path) -> dict[str, Rows]:
    splits = json.loads((data / "data_full.json").read_text(encoding="utf-8"))
    listed = json.loads((data / "domains.json").read_text(encoding="utf-8"))
    domains = {name.lower().replace("&", "and").replace(" ", "_"): set(intents) for name, intents in listed.items()}
    train, asked = ([Example(text, label) for text, label in splits[part]] for part in ("train", "val"))
    return {name: Rows(*([row for row in part if row.label in domains[name]] for part in (train, asked))) for name in TARGETS}


def banking77(data: Path) -> dict[str, Rows]:
    with (data / "train.csv").open(encoding="utf-8") as file:
        rows = [Example(row["text"], row["category"]) for row in csv.DictReader(file)]
    intents = sorted({row.label or "" for row in rows})
    size = math.ceil(len(intents) / GROUPS)
    found = {}
    for number in range(GROUPS):
        group = set(intents[number * size : (number + 1) * size])
        found[f"banking77_{number + 1}"] = parted([row for row in rows if row.label in group])
    return found


def standard_cl(data: Path) -> dict[str, Rows]:
    """The training rows of the first seed, asked the validation rows of all that are not among them."""
    found = {}
    for name in STANDARD_ORDERS[0]:
        train, asked = ([Example(row["text"], row["label"]) for row in jsonl(data / f"{name}.jsonl.gz", split)] for split in ("train", "valid"))
        first = train[: len(train) // 3]
        texts = {row.text for row in train}
        found[name] = Rows(first, [*{row.text: row for row in asked if row.text not in texts}.values()])
    return found


def cl_benchmark(data: Path) -> dict[str, Rows]:
    return {name: parted([Example(row["text"], row["label"]) for row in jsonl(data / f"{name}.jsonl.gz", "train")]) for name in LONG}


def jsonl(path: Path, split: str) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return sorted((row for row in map(json.loads, file) if row["split"] == split), key=lambda row: int(row.get("seed", 0)))


SETS: Mapping[str, Callable[[Path], dict[str, Rows]]] = {
    "clinc150": clinc150,
    "banking77": banking77,
    "standard_cl": standard_cl,
    "cl_benchmark": cl_benchmark,
}


def parted(rows: Sequence[Example]) -> Rows:
    """ASKED_EACH rows of each label are asked, of a rare one half of them, and none of their texts is trained on."""
    asked = drawn(Rows(list(rows), []), ASKED_EACH, 1_000, half=True).train
    texts = {row.text for row in asked}
    return Rows([row for row in rows if row.text not in texts], asked)


def drawn(rows: Rows, shots: int, seed: int, half: bool = False) -> Rows:
    """`shots` rows of each label to train on, in their order; fewer where there are fewer, or with `half` at most half of them."""
    chosen: set[int] = set()
    for label in sorted({row.label or "" for row in rows.train}):
        places = [place for place, row in enumerate(rows.train) if row.label == label]
        chosen.update(random.Random(f"{seed} {label}").sample(places, min(shots, len(places) // 2 if half else len(places))))
    return Rows([row for place, row in enumerate(rows.train) if place in chosen], rows.asked)


def measured(hub: Hub, target: str, rows: Rows, config: TrainConfig, wanted: Collection[str], trials: bool) -> Cell:
    """Accuracy and log loss of each start and, where `trials` are wanted, what `transfer` chooses."""
    state = build_state(hub.encoder, rows.train)
    ranked = nearest(state, ((ref, hub.state(ref)) for ref in hub.registry.production() if ref.name != target))
    found = [Neighbour(ref, near, read_adapter(hub.registry.open_version(ref), labels=hub.show(ref).labels)) for ref, near in ranked]
    neighbours = [one for one in found if not fault_of(one.adapter, hub.base, config)][:NEIGHBOURS_MAX]
    groups: dict[str, Sequence[Neighbour]] = {"nearest": neighbours[:1], "second": neighbours[1:2], "combined": neighbours}
    names = {tuple(one.ref for one in group): name for name, group in groups.items()} | {(): "cold"}
    cell: Cell = {"neighbours": {str(one.ref): round(one.closeness, 4) for one in neighbours}}
    with tempfile.TemporaryDirectory() as scratch:
        if trials:
            began = time.perf_counter()
            _, report = transfer(hub.base, rows.train, neighbours, task=target, config=config, folder=Path(scratch) / "trials")
            cell |= {"transfer": report.to_json(), "chosen": names[report.origins], "trial_s": round(time.perf_counter() - began, 1)}
        trained = {name: group for name, group in groups.items() if name in (*wanted, cell.get("chosen"))}
        starts = {name: start_of(group, hub.base, config, target, Path(scratch) / name) for name, group in trained.items()}
        figures = {name: result(hub, target, rows, config, start, Path(scratch)) for name, start in [("cold", None), *starts.items()]}
        if ALIGNED in wanted:
            figures[ALIGNED] = result(hub, target, rows, dataclasses.replace(config, align_steps=ALIGN_STEPS), None, Path(scratch))
    return cell | {"starts": figures | ({"transfer": figures[cell["chosen"]]} if trials else {})}


def result(hub: Hub, target: str, rows: Rows, config: TrainConfig, start: Start | None, scratch: Path) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    trained = train_classifier(hub.base, rows.train, task=target, config=config, folder=folder, start=start)
    engine = Engine(hub.base, lambda _: read_adapter(folder, labels=trained.labels))
    outputs = engine.predict([Request(row.text, AdapterRef(target, 1)) for row in rows.asked])
    right = np.array([output.label == row.label for output, row in zip(outputs, rows.asked, strict=True)])
    own = np.array([output.scores[row.label or ""] for output, row in zip(outputs, rows.asked, strict=True)])
    figures = {"accuracy": float(right.mean()), "log_loss": float(-np.log(np.maximum(own, 1e-12)).mean()), "seconds": trained.seconds}
    print(f"{target} {len(rows.train)} rows, start {start and start.folder.name}: {figures}", flush=True)
    return {name: round(value, 6) for name, value in figures.items()}


def gains_of(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Of each set, number of shots and start: mean gain over cold with its standard error over the cells."""
    groups: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in cells:
        for start in cell["starts"].keys() - {"cold", "second"}:
            groups.setdefault((cell["set"], cell["shots"], start), []).append(cell)
    found = []
    for (name, shots, start), members in sorted(groups.items()):
        row: dict[str, Any] = {"set": name, "shots": shots, "start": start, "cells": len(members)}
        row["cold_accuracy"] = float(np.mean([cell["starts"]["cold"]["accuracy"] for cell in members]))
        for measure, sign in (("accuracy", 1), ("log_loss", -1)):
            gains = np.array([sign * (cell["starts"][start][measure] - cell["starts"]["cold"][measure]) for cell in members])
            error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
            row |= {f"{measure}_gain": float(gains.mean()), f"{measure}_error": error}
        found.append(row)
    return found


def machine_of(device: str) -> str:
    shown = f", {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}{shown}"


def write(path: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    report = {"benchmark": "transfer", "gains": gains_of(cells), "cells": list(cells)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def show(gains: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Gain over a cold start, with its standard error over tasks and seeds")
    for column in ("set", "shots", "start", "tasks", "cold accuracy", "accuracy, points", "log loss, nats"):
        table.add_column(column, justify="left" if column in ("set", "start") else "right")
    for row in gains:
        accuracy = f"{100 * row['accuracy_gain']:+.2f} ± {100 * (row['accuracy_error'] or math.nan):.2f}"
        log_loss = f"{row['log_loss_gain']:+.3f} ± {row['log_loss_error'] or math.nan:.3f}"
        cold = f"{100 * row['cold_accuracy']:.1f}"
        table.add_row(row["set"], str(row["shots"]), row["start"], str(row["cells"]), cold, accuracy, log_loss)
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
