"""Continual learning, no task id at test: this hub beside one LoRA throughout, joint training, and heads on the frozen encoder.

    python benchmarks/continual.py --data DIR [--budget small|full] [--only clinc_domains,banking] [--methods hub,joint] [--seeds 0]
                                   [--jobs 2] [--device cuda]

DIR holds the folders clinc150, banking77, standard_cl and cl_benchmark. `--work` keeps registries and one record a run: what is
there is not computed again, so that a run that was cut off goes on. `--jobs` runs so many methods and seeds beside each other.
Every method gets the same rows, and every LoRA as many passes over them and a head that starts from a linear probe. A part of the
rows is carved off where something is to be chosen. The hub's LoRAs and the joint one choose their epoch on it, and are not trained
on it; the router is taught it then, and the heads on the frozen encoder, which choose a penalty on it, learn it. The other LoRAs
take the last epoch, and are trained on everything. The joint LoRA, of all tasks at once, has twice the rank and adapts every layer.
Accuracy is of the label, among those of all tasks learned so far (where tasks share labels, whoever gives the right one is right);
"named" tells the method which task it is. The test split chooses nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from continual_data import ORDERS, SEQUENCES, Task, TaskSequence, load
from continual_hub import ASKED, HubRun, golden_same
from continual_methods import (
    SETTINGS,
    Alone,
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
from adapter_hub.examples import Example, digest_of
from adapter_hub.routing.encoder import load_encoder
from adapter_hub.training.config import TrainConfig

RESULTS = Path(__file__).parent / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter_hub-benchmarks" / "continual"
HUB, ALONE, RANDOM, JOINT = "hub", "alone", "random", "joint"    # the second and the third are told by the hub's runs
COLD = "cold"    # each task by a LoRA of its own, for the forward transfer of SEQUENTIAL
SEQUENTIAL = ("sequential", "replay", "ewc", "olora")
ONE_BY_ONE = (*SEQUENTIAL, "ridge", "means", "base")    # see a task at a time, as the hub does
ORDERED = (HUB, ALONE, RANDOM, *SEQUENTIAL)    # run in each order; the others come to the same in all, and their stages are of the first
RECIPES = dict.fromkeys(SEQUENTIAL, 3)    # to be raised where the same settings would give another record
RECIPE = 2    # of the others
TITLES = {
    HUB: "adapter_hub, near candidates asked",
    ALONE: "adapter_hub, routed alone",
    JOINT: "one joint LoRA",
    COLD: "a LoRA a task, by the loop of those below",
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
    "full": TrainConfig(epochs=6, steps_min=0),
}
BARS = {    # of `full`: what the project promises. (figure, least)
    "clinc_domains": (("acc", 0.965), ("minus_joint", -0.003), ("minus_named", -0.015)),
    "clinc_groups": (("minus_joint", -0.015),),
    "banking": (("acc", 0.945), ("minus_joint", -0.01)),
    "standard_cl": (("minus_joint", -0.01), ("minus_others", 0.0)),
}
WANTED = {"standard_cl": ((0, 1, 2), (1, 2, 3))}    # seeds and orders that a bar is of, where it is not the first of both
ALWAYS = (("bwt_named", 0.0), ("golden_same", 1.0), ("singles_same", 1.0))
Record = dict[str, Any]
Figures = Mapping[str, Sequence[Mapping[str, Any]]]    # by method, those of each run: its seed and order, and how it was run


@dataclass(frozen=True)
class Run:
    """One method on one sequence."""

    sequence: TaskSequence
    budget: str
    seed: int
    order: int
    method: str
    work: Path
    device: str = "cpu"

    @cached_property
    def identity(self) -> str:
        """Of all that a record depends on but the code: another is another run."""
        rows = [digest_of([*task.train, *task.validation, *task.test]) for task in self.sequence.tasks]
        return hashlib.sha256(repr([rows, self.config, self.recipe, SETTINGS, ASKED, DEFAULT_MODEL, self.device]).encode()).hexdigest()[:8]

    @property
    def recipe(self) -> int:
        return RECIPES.get(self.method, RECIPE)

    @property
    def path(self) -> Path:
        return self.work / f"{self.sequence.name}-{self.budget}-{self.seed}-{self.order}-{self.method}-{self.identity}.json"

    def registry(self, order: int) -> Path:
        return self.work / f"{self.sequence.name}-{self.budget}-{self.seed}-{order}-registry-{self.identity}"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.sequence.ordered(self.order)

    @property
    def config(self) -> TrainConfig:
        return replace(CONFIGS[self.budget], seed=self.seed)

    @cached_property
    def labels(self) -> list[str]:
        return sorted({label for task in self.sequence.tasks for label in task.labels})

    def mixture(self, tasks: Sequence[Task]) -> tuple[list[Example], list[int]]:
        """The test rows of these tasks, shuffled, and which task each is of."""
        rows = [(row, place) for place, task in enumerate(tasks) for row in task.test]
        random.Random(self.seed).shuffle(rows)
        return [row for row, _ in rows], [place for _, place in rows]


# ---- run ----------------------------------------------------------------------------------------------------------------


def run_hub(run: Run, say: Callable[[str], None]) -> Record:
    """Routed and named accuracies after each stage; adapters of the first order serve the others too, for order cannot change them."""
    hub, stages = HubRun(run.registry(run.order), run.config, run.device), []
    learned = run.registry(0) if run.order and replace(run, order=0).path.exists() else None
    measured: dict[str, list[list[float | None]]] = {"routed": [], "alone": [], "named": []}
    for number, task in enumerate(run.tasks):
        tasks = run.tasks[: number + 1]
        rows, homes = run.mixture(tasks)
        stages.append(hub.stage(number, tasks, (rows, [tasks[home].name for home in homes]), learned))
        for kind, own in measured.items():
            own.append(_by_task(rows, homes, stages[-1][kind], len(run.tasks)))
        shown = ", ".join(f"{kind} {_mean(own[-1]):.4f}" for kind, own in measured.items())
        say(f"{task.name}: {stages[-1]['seconds']:.0f} s, {shown}")
    rows, homes = run.mixture(run.tasks)
    return measured | {
        "final": measured["routed"][-1], "routing": float(np.mean(stages[-1]["right_adapter"])),
        "random": _by_task(rows, homes, hub.at_random(rows, run.seed), len(run.tasks)),
        "seconds": [one["seconds"] for one in stages], "learning": [one.get("learning") for one in stages],
        "bytes": [one["bytes"] for one in stages], "verdicts": [one["verdict"] for one in stages],
        "golden_same": golden_same(stages), "singles_same": hub.singles_same(rows),
    }  # fmt: skip


def run_scores(run: Run, method: Scores, say: Callable[[str], None]) -> Record:
    """The same of one model of all labels. Named: only the labels of its task compete."""
    labels = run.labels
    place = {label: number for number, label in enumerate(labels)}
    if run.method == COLD:
        return run_cold(run, method)
    stages = [run.tasks] if method.joint else [run.tasks[: stage + 1] for stage in range(len(run.tasks))]
    routed, named, seconds = [], [], []
    for tasks in stages:
        started = time.perf_counter()
        method.learn(tasks if method.joint else tasks[-1:])
        seconds.append(getattr(method, "trained_s", time.perf_counter() - started))    # what was trained before is but read again
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


def run_cold(run: Run, method: Scores) -> Record:
    """Each task's own LoRA, asked for its own test rows alone."""
    named, seconds = [], []
    for task in run.tasks:
        started = time.perf_counter()
        method.learn([task])
        seconds.append(time.perf_counter() - started)
        best = method.scores([row.text for row in task.test]).argmax(axis=1)
        named.append(float(np.mean([run.labels[place] == row.label for place, row in zip(best, task.test, strict=True)])))
    return {"final_named": named, "seconds": seconds, "bytes": [method.bytes_stored * len(run.tasks)]}


def _by_task(rows: Sequence[Example], homes: Sequence[int], answers: Sequence[str | None], count: int) -> list[float | None]:
    """Accuracy of each task; None where no row is of it."""
    right = np.array([answer == row.label for answer, row in zip(answers, rows, strict=True)])
    where = np.array(homes)
    return [float(right[where == task].mean()) if (where == task).any() else None for task in range(count)]


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


@cache
def models(device: str) -> tuple[FrozenBase, Vectors]:
    """Loaded once a process."""
    return FrozenBase.load(DEFAULT_MODEL, device=device), Vectors(load_encoder(DEFAULT_MODEL, device))


def method_of(run: Run) -> Scores:
    base, vectors = models(run.device)
    labels = run.labels
    lora = (base, labels, run.config, run.seed)
    ways: Mapping[str, Callable[[], Scores]] = {
        COLD: lambda: Alone(*lora),
        "sequential": lambda: SequentialLora(*lora),
        "replay": lambda: Replay(*lora),
        "ewc": lambda: Elastic(*lora),
        "olora": lambda: OrthogonalLora(*lora),
        JOINT: lambda: JointLora(base, labels, replace(run.config, r=16, alpha=32, layers_share=1.0), run.work, str(run.recipe)),
        "probe": lambda: JointProbe(vectors, labels),
        "ridge": lambda: RandomRidge(vectors, labels, run.seed),
        "means": lambda: ClassMean(vectors, labels),
        "base": lambda: LabelNames(vectors, labels),
    }
    return ways[run.method]()


# ---- say ----------------------------------------------------------------------------------------------------------------


def figures_of(record: Record, tasks: Sequence[str], cold: Sequence[float] | None) -> dict[str, float]:
    """Of one run. `cold` are the accuracies of each task learned alone by the same trainer, in the order of `tasks`."""
    found = {"megabytes": float(np.sum(record["bytes"])) / len(tasks) / 1e6}
    if None not in record.get("learning", ()):    # versions that were taken from another order's run took no time to speak of
        found["seconds"] = float(np.sum(record["seconds"])) / len(tasks)
    if "final" in record:
        found["acc"] = float(np.mean(record["final"]))
    last = record["named"][-1] if "named" in record else record.get("final_named")
    if last is not None:
        found["acc_named"] = float(np.mean(last))
    if "routed" in record:
        routed, named = (AccuracyMatrix(tasks, _nan(record[kind])) for kind in ("routed", "named"))
        found |= {
            "bwt": routed.backward_transfer, "bwt_named": named.backward_transfer, "forgetting": routed.forgetting,
            "average": routed.average_incremental_accuracy, "minus_named": -routing_gap(routed, named),
        }  # fmt: skip
        if cold is not None:
            found["fwt"] = named.forward_transfer(cold)
    return found | {name: float(record[name]) for name in ("routing", "golden_same", "singles_same") if name in record}


def _nan(values: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[np.nan if value is None else value for value in row] for row in values]


def table_of(title: str, figures: Figures) -> Table:
    table = Table(title=title)
    columns = {"acc": "ACC", "acc_named": "named", "routing": "right adapter", "bwt": "BWT", "bwt_named": "BWT named", "forgetting": "forgetting"}
    columns |= {"average": "of all stages", "fwt": "FWT"}
    for name in ("", *columns.values(), "s a task", "MB a task", "runs"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for method in TITLES:
        if method in figures:
            shares = [_percent(_each(figures, method, name)) for name in columns]
            plain = [_plain(_each(figures, method, name)) for name in ("seconds", "megabytes")]
            table.add_row(TITLES[method], *shares, *plain, str(len(figures[method])))
    return table


def _each(figures: Figures, method: str, name: str) -> list[float]:
    """Of each seed that has it, the mean over its orders."""
    by_seed: dict[int, list[float]] = {}
    for run in figures.get(method, ()):
        if name in run:
            by_seed.setdefault(run["seed"], []).append(run[name])
    return [float(np.mean(values)) for values in by_seed.values()]


def _gap(figures: Figures, other: str) -> float | None:
    """How far the hub's ACC is above another method's in the runs that both have: of the same seed and, where that sees one, order."""
    own: dict[tuple[int, ...], list[float]] = {}
    for run in figures.get(HUB, ()):
        own.setdefault(_place(run, other), []).append(run["acc"])
    gaps = [np.mean(own[place]) - run["acc"] for run in figures.get(other, ()) if (place := _place(run, other)) in own]
    return float(np.mean(gaps)) if gaps else None


def _place(run: Mapping[str, Any], method: str) -> tuple[int, ...]:
    return (run["seed"], run["order"]) if method in ORDERED else (run["seed"],)


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


def _plain(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if values else ""


def draw(name: str, path: Path, runs: Sequence[Run], figures: Figures) -> None:
    """The curves of those that learn task after task, of the seeds and orders that all of them have, their matrices, and what the others reach."""
    import continual_plots as plots  # matplotlib, which only pictures need

    staged: dict[str, dict[tuple[int, int], AccuracyMatrix]] = {}
    for run in runs:
        if routed := json.loads(run.path.read_text()).get("routed"):
            staged.setdefault(run.method, {})[run.order + 1, run.seed] = AccuracyMatrix([task.name for task in run.tasks], _nan(routed))
    if not staged or not (common := sorted(set.intersection(*map(set, staged.values())))):
        return
    found = {TITLES[method]: [own[place] for place in common] for method, own in staged.items()}
    others = (method for method in TITLES if method in figures and method not in (*staged, ALONE, RANDOM, COLD))
    bounds = {TITLES[method]: float(np.mean(_each(figures, method, "acc"))) for method in others}
    orders = ", ".join(map(str, sorted({order for order, _ in common})))
    title = f"{name}: {len(next(iter(found.values()))[0].tasks)} tasks, no task id, order {orders}"
    plots.curves(path.with_name(path.name + "_curves.png"), title, found, bounds, TITLES[HUB])
    plots.matrices(path.with_name(path.name + "_matrices.png"), title, found)


def missed(name: str, figures: Figures) -> list[str]:
    """The bars that this hub does not reach, or that were not measured."""
    bars = (*BARS.get(name, ()), *ALWAYS)
    figures = {method: [run for run in runs if run["recipe"] == RECIPES.get(method, RECIPE)] for method, runs in figures.items()}
    means = {figure: float(np.mean(values)) for figure, _ in bars if (values := _each(figures, HUB, figure))}
    gaps = {method: gap for method in (JOINT, *ONE_BY_ONE) if (gap := _gap(figures, method)) is not None}
    if JOINT in gaps:
        means["minus_joint"] = gaps[JOINT]
    if gaps.keys() >= set(ONE_BY_ONE):
        means["minus_others"] = min(gaps[method] for method in ONE_BY_ONE)
    compared = {"minus_joint": (JOINT,), "minus_others": ONE_BY_ONE}
    found = []
    for method in dict.fromkeys([HUB, *(method for figure, _ in bars for method in compared.get(figure, ()))]):
        seeds, orders = WANTED.get(name, ((0,), (1,)))
        wanted = {(seed, order) for seed in seeds for order in (orders if method in ORDERED else (1,))}
        if lacking := wanted - {(run["seed"], run["order"]) for run in figures.get(method, ())}:
            found.append(f"{name}: {method} was not measured at {len(lacking)} of {len(wanted)} seeds and orders")
    for figure, least in bars:
        if figure not in means:
            found.append(f"{name}: {figure} was not measured")
        elif means[figure] < least:
            found.append(f"{name}: {figure} {means[figure]:.4f} < {least:g}")
    return found


# ---- main ---------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of public data")
    parser.add_argument("--work", type=Path, default=CACHE, metavar="DIR", help=f"keeps registries and records (default: {CACHE})")
    parser.add_argument("--budget", choices=tuple(CONFIGS), default="small", help="20 examples a class, or all (default: small)")
    parser.add_argument("--only", default="clinc_domains,banking", metavar="NAMES", help=f"of {', '.join(SEQUENCES)}")
    parser.add_argument("--methods", metavar="NAMES", help=f"of {', '.join(TITLES)} (default: all; with --budget full {', '.join(HEADLINE)})")
    parser.add_argument("--seeds", type=_numbers, metavar="NUMBERS", help="default: 0,1,2; with --budget full 0")
    parser.add_argument("--orders", type=_numbers, metavar="NUMBERS", help=f"of 1 to {ORDERS} (default: 1; with --budget full all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="NUMBER", help="methods and seeds beside each other (default: 1)")
    parser.add_argument("--device", default="cpu", help="of torch (default: cpu)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where figures and pictures go")
    arguments = parser.parse_args()
    small = arguments.budget == "small"
    methods = _named(parser, arguments.methods, tuple(TITLES) if small else HEADLINE, TITLES)
    names = _named(parser, arguments.only, (), SEQUENCES)
    if not arguments.data.is_dir():
        parser.error(f"there is no folder {str(arguments.data)!r}")
    seeds = arguments.seeds or list(SEEDS[arguments.budget])
    orders = arguments.orders or ([1] if small else list(range(1, ORDERS + 1)))
    if other := [order for order in orders if not 1 <= order <= ORDERS]:
        parser.error(f"order {other[0]} is none of 1 to {ORDERS}")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least 1")
    arguments.work.mkdir(parents=True, exist_ok=True)

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))    # of the processes that `--jobs` starts

    console, started = Console(width=180), time.perf_counter()
    path = arguments.out / f"continual_{arguments.budget}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sequences": {}}
    runs = {name: [*runs_of(name, arguments, methods, seeds, orders)] for name in names}
    new = compute([run for own in runs.values() for run in own], arguments.jobs)
    results: dict[str, Any] = {}
    for name, own in runs.items():
        figures = joined(before["sequences"].get(name, {}).get("figures", {}), measured(own, methods))
        draw(name, arguments.out / f"continual_{name}_{arguments.budget}", own, figures)
        console.print(table_of(f"{name}, {arguments.budget}", figures))
        results[name] = {"figures": figures, "missed": [] if small else missed(name, figures)}
    last = {"runs": len(new), "of": sum(map(len, runs.values())), "jobs": arguments.jobs, "seconds": round(time.perf_counter() - started)}
    report = {"benchmark": "continual", "budget": arguments.budget, "last": last, "sequences": before["sequences"] | results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "continual", "bars_missed": [line for found in results.values() for line in found["missed"]]} | last))
    return 1 if any(found["missed"] for found in results.values()) else 0


def machine_of(device: str) -> str:
    shown = f", {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{shown}, Python {platform.python_version()}"


def joined(before: Figures, now: Figures) -> dict[str, list[Mapping[str, Any]]]:
    """What was measured before stays but for the same figures of the same runs, and for a method that was run by another recipe then."""
    found = {method: list(runs) for method, runs in before.items()}
    for method, runs in now.items():
        places = {(run["seed"], run["order"]): run for run in found.get(method, ()) if run["recipe"] == RECIPES.get(method, RECIPE)}
        for run in runs:
            place = run["seed"], run["order"]
            same = places.get(place, {}).get("machine") == run.get("machine")    # then what was not measured now stays
            places[place] = {**places.get(place, {}), **run} if same else run
        found[method] = [places[place] for place in sorted(places)]
    return found


def runs_of(name: str, arguments: Any, methods: Sequence[str], seeds: Sequence[int], orders: Sequence[int]) -> Iterator[Run]:
    """Those that are asked for; also others, where their records lie there."""
    asked = {HUB if method in (ALONE, RANDOM) else method for method in methods}
    sequences = {seed: load(name, arguments.data, arguments.budget == "small", seed) for seed in seeds}
    for method in (method for method in TITLES if method not in (ALONE, RANDOM)):
        for seed, sequence in sequences.items():
            for order in orders if method in ORDERED else (1,):
                run = Run(sequence, arguments.budget, seed, order - 1, method, arguments.work, arguments.device)
                if method in asked or run.path.exists():
                    yield run


def compute(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Those without a record get one: of one method and seed in their order, of several beside each other."""
    new = sorted((run for run in runs if not run.path.exists()), key=_unit)
    units = [[*own] for _, own in itertools.groupby(new, key=_unit)]
    if jobs == 1:
        for unit in units:
            record(unit)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            started = [pool.submit(record, unit) for unit in units]
        for one in started:    # all are run, then what failed is told
            one.result()
    return new


def _unit(run: Run) -> tuple[int, str, int]:
    """Of one method and seed on one sequence; longer methods first."""
    return [*TITLES].index(run.method), run.sequence.name, run.seed


def record(runs: Sequence[Run]) -> None:
    """Compute what these runs measure, and keep it."""
    console = Console(width=150)
    for run in runs:

        def say(line: str, of: str = run.path.stem) -> None:
            console.print(f"[dim]{of} {line}[/dim]", highlight=False)

        found = run_hub(run, say) if run.method == HUB else run_scores(run, method_of(run), say)
        found["machine"] = machine_of(run.device)
        part = run.path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(run.path)


def measured(runs: Sequence[Run], methods: Sequence[str]) -> Figures:
    """The figures of each method, run by run."""
    records: dict[str, list[tuple[Run, Record]]] = {}
    for run in runs:
        records.setdefault(run.method, []).append((run, json.loads(run.path.read_text())))
    cold = {run.seed: dict(zip((task.name for task in run.tasks), found["final_named"], strict=True)) for run, found in records.get(COLD, ())}
    figures: dict[str, list[Mapping[str, Any]]] = {}
    for method, own in records.items():
        for run, found in own:
            how = {"seed": run.seed, "order": run.order + 1, "machine": found["machine"], "recipe": run.recipe}
            known = cold.get(run.seed) if method in SEQUENTIAL else None
            tasks = [task.name for task in run.tasks]
            figures.setdefault(method, []).append(how | figures_of(found, tasks, [known[task] for task in tasks] if known else None))
            if method == HUB and ALONE in methods:
                less = {key: value for key, value in found.items() if key not in ("routing", "golden_same", "singles_same")}
                alone = figures_of(less | {"routed": found["alone"], "final": found["alone"][-1]}, tasks, None)
                figures.setdefault(ALONE, []).append(how | alone)
            if method == HUB and RANDOM in methods:
                figures.setdefault(RANDOM, []).append(how | {"acc": float(np.mean(found["random"])), "seconds": 0.0})
    return figures


def _numbers(given: str) -> list[int]:
    return [int(number) for number in given.split(",")]


def _named(parser: argparse.ArgumentParser, given: str | None, default: Sequence[str], known: Mapping[str, object]) -> list[str]:
    names = given.split(",") if given else list(default)
    for one in names:
        if one not in known:
            parser.error(f"{one!r} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
