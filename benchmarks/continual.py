"""Continual learning, no task id at test: this hub beside one LoRA throughout, joint training, and heads on the frozen encoder.

    python benchmarks/continual.py --data DIR --work DIR [--budget small|full] [--only clinc_domains,banking] [--methods hub,joint] [--seeds 0]

DIR of `--data` holds the folders clinc150, banking77, standard_cl and cl_benchmark. `--work` keeps registries and one record a run: what is
there is not computed again, so that a run that was cut off goes on. Every method gets the same rows and passes over them; the joint LoRA,
which is the bound, adapts every layer at twice the rank. Accuracy is of the label, among those of all tasks learned so far; "named" tells
the method which task it is. The test split chooses nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import continual_plots as plots
import numpy as np
from continual_data import ORDERS, SEQUENCES, Task, TaskSequence, load
from continual_hub import HubRun
from continual_methods import (
    ClassMean,
    Elastic,
    JointLora,
    JointProbe,
    LabelNames,
    OrthogonalLora,
    RandomRidge,
    Replay,
    Scores,
    SequentialLora,
    Vectors,
)
from rich.console import Console
from rich.table import Table

from adapter_hub.base_model import DEFAULT_MODEL, FrozenBase
from adapter_hub.continual.metrics import AccuracyMatrix, routing_gap
from adapter_hub.examples import Example
from adapter_hub.routing.encoder import load_encoder
from adapter_hub.training.config import TrainConfig

RESULTS = Path(__file__).parent / "results"
HUB, ALONE, RANDOM, JOINT = "hub", "alone", "random", "joint"    # the second and the third are told by the hub's runs
TITLES = {
    HUB: "adapter_hub, near candidates asked",
    ALONE: "adapter_hub, routed alone",
    JOINT: "one joint LoRA (the bound)",
    "sequential": "sequential LoRA",
    "replay": "LoRA, 2 % replayed",
    "ewc": "EWC",
    "olora": "O-LoRA",
    "probe": "frozen encoder, joint logistic",
    "ridge": "frozen encoder, random-feature ridge",
    "means": "frozen encoder, class means",
    RANDOM: "adapters at random",
    "base": "base alone: nearest label name",
}
HEADLINE = (HUB, ALONE, JOINT)    # what `--budget full` runs unless told otherwise
SEEDS = {"small": (0, 1, 2), "full": (0,)}
CONFIGS = {
    "small": TrainConfig(layers_share=0.5, epochs=10, steps_min=0),
    "full": TrainConfig(layers_share=0.5, epochs=6, steps_min=0, patience=2),
}
BARS = {    # of `full`: what the project promises. (figure, least)
    "clinc_domains": (("acc", 0.965), ("minus_joint", -0.003), ("gap", -0.015)),
    "clinc_groups": (("minus_joint", -0.015),),
    "banking": (("acc", 0.945), ("minus_joint", -0.01)),
    "standard_cl": (("minus_joint", -0.01),),
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One method on one sequence."""

    sequence: TaskSequence
    budget: str
    seed: int
    order: int
    method: str
    work: Path

    @property
    def path(self) -> Path:
        return self.work / f"{self.sequence.name}-{self.budget}-{self.seed}-{self.order}-{self.method}.json"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.sequence.ordered(self.order)

    @property
    def config(self) -> TrainConfig:
        return replace(CONFIGS[self.budget], seed=self.seed)

    def mixture(self, tasks: Sequence[Task]) -> tuple[list[Example], list[int]]:
        """The test rows of these tasks, shuffled, and which task each is of."""
        rows = [(row, place) for place, task in enumerate(tasks) for row in task.test]
        random.Random(self.seed).shuffle(rows)
        return [row for row, _ in rows], [place for _, place in rows]


# ---- run ----------------------------------------------------------------------------------------------------------------


def run_hub(run: Run, say: Callable[[str], None]) -> Record:
    """Routed and named accuracies after each stage; adapters of the first order serve the others too, for order cannot change them."""
    folder = run.work / f"{run.sequence.name}-{run.budget}-{run.seed}-registry{run.order or ''}"
    first = run.work / f"{run.sequence.name}-{run.budget}-{run.seed}-registry"
    hub, facts, routed, alone, named, right = HubRun(folder, run.config), [], [], [], [], []
    for stage, task in enumerate(run.tasks):
        facts.append(hub.learn(task, None if run.order == 0 else first))
        rows, homes = run.mixture(run.tasks[: stage + 1])
        answers = hub.answered(rows, [run.tasks[home].name for home in homes])
        routed.append(_by_task(rows, homes, answers.routed, len(run.tasks)))
        alone.append(_by_task(rows, homes, answers.alone, len(run.tasks)))
        named.append(_by_task(rows, homes, answers.named, len(run.tasks)))
        right.append(float(np.mean(answers.right_adapter)))
        say(f"{task.name}: {facts[-1]['seconds']:.0f} s, routed {_mean(routed[-1]):.4f}, named {_mean(named[-1]):.4f}")
    rows, homes = run.mixture(run.tasks)
    chance = _by_task(rows, homes, hub.at_random(rows, run.seed), len(run.tasks))
    return {
        "routed": routed, "alone": alone, "named": named, "final": routed[-1], "routing": right, "random": chance,
        "seconds": [one["seconds"] for one in facts], "bytes": [one["bytes"] for one in facts],
        "verdicts": [one["verdict"] for one in facts],
        "golden_same": hub.golden_same(), "singles_same": hub.singles_same(rows),
    }  # fmt: skip


def run_scores(run: Run, method: Scores, labels: Sequence[str], say: Callable[[str], None]) -> Record:
    """The same of one model of all labels. Named: only the labels of its task compete."""
    place = {label: number for number, label in enumerate(labels)}
    stages = [run.tasks] if method.joint else [run.tasks[: stage + 1] for stage in range(len(run.tasks))]
    routed, named, seconds = [], [], []
    for tasks in stages:
        started = time.perf_counter()
        method.learn(tasks if method.joint else tasks[-1:])
        seconds.append(time.perf_counter() - started)
        rows, homes = run.mixture(tasks)
        scores = method.scores([row.text for row in rows])
        routed.append(_by_task(rows, homes, [labels[best] for best in scores.argmax(axis=1)], len(run.tasks)))
        own = np.full_like(scores, -np.inf)
        for row, home in enumerate(homes):
            known = [place[label] for label in tasks[home].labels]
            own[row, known] = scores[row, known]
        named.append(_by_task(rows, homes, [labels[best] for best in own.argmax(axis=1)], len(run.tasks)))
        say(f"{tasks[-1].name}: {seconds[-1]:.0f} s, {_mean(routed[-1]):.4f}, named {_mean(named[-1]):.4f}")
    found: Record = {"final": routed[-1], "final_named": named[-1], "seconds": seconds, "bytes": [method.bytes_stored]}
    return found if method.joint else found | {"routed": routed, "named": named}


def _by_task(rows: Sequence[Example], homes: Sequence[int], answers: Sequence[str | None], count: int) -> list[float | None]:
    """Accuracy of each task; None where no row is of it."""
    right = np.array([answer == row.label for answer, row in zip(answers, rows, strict=True)])
    where = np.array(homes)
    return [float(right[where == task].mean()) if (where == task).any() else None for task in range(count)]


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def methods_of(run: Run, base: FrozenBase, vectors: Vectors, labels: Sequence[str]) -> Scores:
    lora = (base, labels, run.config, run.seed)
    ways: Mapping[str, Callable[[], Scores]] = {
        "sequential": lambda: SequentialLora(*lora),
        "replay": lambda: Replay(*lora),
        "ewc": lambda: Elastic(*lora),
        "olora": lambda: OrthogonalLora(*lora),
        JOINT: lambda: JointLora(base, labels, replace(run.config, r=16, alpha=32, layers_share=1.0), run.seed, run.work),
        "probe": lambda: JointProbe(vectors, labels),
        "ridge": lambda: RandomRidge(vectors, labels, run.seed),
        "means": lambda: ClassMean(vectors, labels),
        "base": lambda: LabelNames(vectors, labels),
    }
    return ways[run.method]()


# ---- say ----------------------------------------------------------------------------------------------------------------


def figures_of(records: Sequence[Record], tasks: Sequence[Sequence[str]], cold: Sequence[Sequence[float]] | None) -> dict[str, list[float]]:
    """Each figure of each run of one method; `cold` (runs, tasks) are the accuracies of tasks learned alone."""
    found: dict[str, list[float]] = {"acc": [float(np.mean(record["final"])) for record in records]}
    for number, record in enumerate(records):
        last = record["named"][-1] if "named" in record else record.get("final_named")
        if last is not None:
            found.setdefault("acc_named", []).append(float(np.mean(last)))
        if "routed" in record:
            routed, named = (AccuracyMatrix(tasks[number], _nan(record[kind])) for kind in ("routed", "named"))
            each = {
                "bwt": routed.backward_transfer, "bwt_named": named.backward_transfer, "forgetting": routed.forgetting,
                "average": routed.average_incremental_accuracy, "gap": -routing_gap(routed, named),
            }  # fmt: skip
            if cold is not None:
                each["fwt"] = named.forward_transfer(cold[number])
            for name, value in each.items():
                found.setdefault(name, []).append(value)
        found.setdefault("seconds", []).append(float(np.sum(record["seconds"])) / len(tasks[number]))
        found.setdefault("megabytes", []).append(float(np.sum(record["bytes"])) / len(tasks[number]) / 1e6)
    return found


def _nan(values: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[np.nan if value is None else value for value in row] for row in values]


def table_of(title: str, figures: Mapping[str, Mapping[str, list[float]]]) -> Table:
    table = Table(title=title)
    columns = {"acc": "ACC", "acc_named": "named", "bwt": "BWT", "bwt_named": "BWT named", "forgetting": "forgetting"}
    columns |= {"average": "mean of stages", "fwt": "FWT"}
    for name in ("", *columns.values(), "s a task", "MB a task", "runs"):
        table.add_column(name, justify="left" if not name else "right")
    for method in TITLES:
        if method in figures:
            own = figures[method]
            shares = [_percent(own.get(name)) for name in columns]
            table.add_row(TITLES[method], *shares, _plain(own.get("seconds")), _plain(own.get("megabytes")), str(len(own["acc"])))
    return table


def _percent(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def _plain(values: Sequence[float] | None) -> str:
    return f"{np.mean(values):.2f}" if values else ""


def draw(name: str, path: Path, records: Mapping[str, Sequence[Record]], tasks: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """The curves of all methods, and the matrices of those that learn task after task."""
    found = {
        TITLES[method]: [AccuracyMatrix(tasks[method][number], _nan(record["routed"])) for number, record in enumerate(own)]
        for method, own in records.items()
        if "routed" in own[0]
    }
    whole = {method: own for method, own in records.items() if "routed" not in own[0]}
    bounds = {TITLES[method]: float(np.mean([np.mean(record["final"]) for record in own])) for method, own in whole.items()}
    if found:
        title = f"{name}: {len(next(iter(found.values()))[0].tasks)} tasks, no task id"
        plots.curves(path.with_name(path.name + "_curves.png"), title, found, bounds, TITLES[HUB])
        plots.matrices(path.with_name(path.name + "_matrices.png"), title, found)


def missed(name: str, figures: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """The bars that this hub does not reach."""
    ours, joint = figures.get(HUB, {}), figures.get(JOINT, {})
    means = {figure: float(np.mean(values)) for figure, values in ours.items()}
    if joint and ours:
        means["minus_joint"] = means["acc"] - float(np.mean(joint["acc"]))
    return [f"{name}: {figure} {means[figure]:.4f} < {least}" for figure, least in BARS.get(name, ()) if figure in means and means[figure] < least]


# ---- main ---------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of public data")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where registries and records are kept; a run goes on from there")
    parser.add_argument("--budget", choices=tuple(CONFIGS), default="small", help="20 examples a class, or all (default: small)")
    parser.add_argument("--only", default="clinc_domains,banking", metavar="NAMES", help=f"of {', '.join(SEQUENCES)}")
    parser.add_argument("--methods", metavar="NAMES", help=f"of {', '.join(TITLES)} (default: all; with --budget full {', '.join(HEADLINE)})")
    parser.add_argument("--seeds", metavar="NUMBERS", help="default: 0,1,2; with --budget full 0")
    parser.add_argument("--orders", type=int, metavar="N", help=f"how many of the {ORDERS} orders (default: 1; with --budget full {ORDERS})")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where figures and pictures go")
    arguments = parser.parse_args()
    small = arguments.budget == "small"
    methods = _named(parser, arguments.methods, tuple(TITLES) if small else HEADLINE, TITLES)
    names = _named(parser, arguments.only, (), SEQUENCES)
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else list(SEEDS[arguments.budget])
    orders = arguments.orders or (1 if small else ORDERS)
    arguments.work.mkdir(parents=True, exist_ok=True)

    console, base, vectors = Console(width=150), FrozenBase.load(DEFAULT_MODEL), Vectors(load_encoder(DEFAULT_MODEL))
    results: dict[str, Any] = {}
    for name in names:
        figures = measured(name, arguments, methods, seeds, orders, base, vectors, console)
        console.print(table_of(f"{name}, {arguments.budget}", figures))
        results[name] = {"figures": figures, "missed": [] if small else missed(name, figures)}
    report = {
        "benchmark": "continual", "budget": arguments.budget, "seeds": seeds, "orders": orders,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", "sequences": results,
    }  # fmt: skip
    path = arguments.out / f"continual_{arguments.budget}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "continual", "bars_missed": [line for found in results.values() for line in found["missed"]]}))
    return 1 if any(found["missed"] for found in results.values()) else 0


def measured(
    name: str, arguments: Any, methods: Sequence[str], seeds: Sequence[int], orders: int, base: FrozenBase, vectors: Vectors, console: Console
) -> dict[str, dict[str, list[float]]]:
    """The figures of each method, run by run."""
    records: dict[str, list[Record]] = {}
    tasks: dict[str, list[list[str]]] = {}
    cold: dict[tuple[int, int], list[float]] = {}
    small = arguments.budget == "small"
    for method in methods:
        if method in (ALONE, RANDOM):
            continue
        for seed in seeds:
            sequence = load(name, arguments.data, small, seed)
            labels = sorted({label for task in sequence.tasks for label in task.labels})
            ordered = method in (HUB, "sequential", "replay", "ewc", "olora")
            for order in range(orders if ordered else 1):
                run = Run(sequence, arguments.budget, seed, order, method, arguments.work)
                say = lambda line, run=run: console.print(f"[dim]{run.path.stem} {line}[/dim]", highlight=False)  # noqa: E731
                record = _recorded(run, lambda run=run, labels=labels, say=say: (  # type: ignore[misc]
                    run_hub(run, say) if run.method == HUB else run_scores(run, methods_of(run, base, vectors, labels), labels, say)
                ))
                records.setdefault(method, []).append(record)
                tasks.setdefault(method, []).append([task.name for task in run.tasks])
                if method == HUB:
                    cold[seed, order] = record["named"][-1]
    draw(name, arguments.out / f"continual_{name}_{arguments.budget}", records, tasks)
    found = {}
    for method, own in records.items():
        colds = [cold[key] for key in sorted(cold)] if method != HUB and len(cold) == len(own) else None
        found[method] = figures_of(own, tasks[method], colds)
    if ALONE in methods and HUB in records:
        found[ALONE] = figures_of([record | {"routed": record["alone"], "final": record["alone"][-1]} for record in records[HUB]], tasks[HUB], None)
    if RANDOM in methods and HUB in records:
        found[RANDOM] = {"acc": [float(np.mean(record["random"])) for record in records[HUB]]}
    return found


def _recorded(run: Run, measure: Callable[[], Record]) -> Record:
    if run.path.exists():
        found: Record = json.loads(run.path.read_text())
        return found
    found = measure()
    part = run.path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(run.path)
    return found


def _named(parser: argparse.ArgumentParser, given: str | None, default: Sequence[str], known: Mapping[str, object]) -> list[str]:
    names = given.split(",") if given else list(default)
    for one in names:
        if one not in known:
            parser.error(f"{one!r} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
