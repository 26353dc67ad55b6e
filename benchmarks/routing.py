"""The router beside other heads on the same frozen features: CLINC150, BANKING77 and prompt tasks, whole and in ten shots.

    python benchmarks/routing.py --data DIR [--only clinc10,bank77,growth] [--quick] [--semantic .semantic/bin/python]

DIR holds the folders clinc150, banking77, few_shot and prompt_tasks. Hyperparameters, thresholds and probabilities
come from validation rows, or from the exemplars where there are none; LOG.md names two choices of the router that followed a look at test
figures. The last line is JSON.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from routing_baselines import CENTROID, JOINT, LEXICAL, RANKED, Joint, Linear, adds, class_centroids, discriminant, heads, one_centroid
from routing_data import I64, SHOTS, TASKS, Corpus, Encoded, Task
from routing_metrics import (
    Answers,
    Probability,
    auroc,
    calibration_error,
    curve,
    fpr95,
    macro_recall,
    paired_difference,
    risks,
    spread,
    top,
)

from adapter_hub.base_model import DEFAULT_MODEL
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.encoder import Encoder, load_encoder
from adapter_hub.routing.features import Features, extract
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import RoutingState, state_of

RESULTS = Path(__file__).parent / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter_hub-benchmarks"
OURS = "ours"
RATES = (0.02, 0.05, 0.1)
RATE_TOLERANCE = 0.015
TIMED_SINGLE, TIMED_BATCH, TIMED_ADDS = 100, 512, 20
ENCODED_SINGLE, ENCODED_BATCH = 20, 256
GROWTH = {"clinc10": (2, 1), "bank77": (7, 7)}    # adapters at first, and how many more a step
ORDERS = 3
FEW = f"{SHOTS}shot"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """What the project promises of ours on a task. `aim`: hoped for beyond the promise."""

    task: str
    figure: str
    says: str
    least: float | None = None
    most: float | None = None
    aim: bool = False

    def met(self, value: float) -> bool:
        return bool((self.least is None or value >= self.least) and (self.most is None or value <= self.most))

    def limit(self) -> str:
        sides = ([f"≥ {self.least:g}"] if self.least is not None else []) + ([f"≤ {self.most:g}"] if self.most is not None else [])
        return " ".join(sides)


NOT_BELOW = "top-1 minus joint logistic: the paired 95 % interval reaches 0"
ABOVE = "top-1 minus joint logistic: above 0"
BARS = (
    Bar("clinc10", "minus_joint_high", NOT_BELOW, least=0.0),
    Bar("clinc10", "top1", "top-1", least=0.986, aim=True),
    Bar("clinc10", "auroc", "out-of-scope AUROC", least=0.98),
    Bar("clinc10", "fpr95", "out-of-scope FPR95", most=0.095),
    Bar("clinc10", "shift", "shift: BANKING77 to `banking` or `credit_cards`", least=0.85),
    Bar("clinc150", "minus_joint_high", NOT_BELOW, least=0.0),
    Bar("clinc150", "top1", "top-1", least=0.964, aim=True),
    *(Bar(task, "minus_joint", ABOVE, least=1e-9) for task in ("bank77", "bank77_all")),
    *(Bar(task, "top1", "top-1", least=0.945, aim=True) for task in ("bank77", "bank77_all")),
    Bar("clinc150_10shot", "top1", "top-1", least=0.94),
    Bar("bank77_10shot", "top1", "top-1", least=0.87),
    Bar("prompt34", "minus_centroid", "top-1 minus one centroid per adapter", least=0.1),
    *(
        Bar(task, f"false_reject_{100 * rate:g}", f"observed at a stated {100 * rate:g} %", least=rate - RATE_TOLERANCE, most=rate + RATE_TOLERANCE)
        for task in ("clinc10", "clinc150", "bank77", "bank77_all")
        for rate in RATES
    ),
)
TITLES = {
    "clinc10": "CLINC150, 10 adapters of 15 intents",
    "clinc150": "CLINC150, 150 adapters",
    "clinc10_10shot": "CLINC150, 10 adapters, 10 examples an intent",
    "clinc150_10shot": "CLINC150, 150 adapters of 10 examples",
    "bank77": "BANKING77, 77 adapters, a tenth of the training rows held out for evaluation",
    "bank77_all": "BANKING77, 77 adapters, every training row an exemplar",
    "bank77_10shot": "BANKING77, 77 adapters of 10 examples",
    "prompt34": "prompts of 34 data sets, unlabelled",
}
COLUMNS = {    # figure: (heading, factor, decimals)
    "top1": ("top-1", 100, 2), "top3": ("top-3", 100, 1), "top5": ("top-5", 100, 1), "macro_recall": ("macro recall", 100, 1),
    "top1_mean": ("top-1 of draws", 100, 1), "shift": ("shift", 100, 1),
    "auroc": ("AUROC", 100, 1), "fpr95": ("FPR95", 100, 1), "oos_recall_5": ("OOS kept out", 100, 1),
    "false_reject_2": ("rejected at 2", 100, 1), "false_reject_5": ("at 5", 100, 1), "false_reject_10": ("at 10 %", 100, 1),
    "aurc": ("AURC ×1000", 1000, 2), "ece": ("ECE", 100, 2),
    "query_ms": ("ms a query", 1, 2), "batched_ms": ("batched", 1, 3), "add_ms": ("ms to add", 1, 1), "bytes_a_task": ("kB a task", 1e-3, 1),
}


# ---- ours ------------------------------------------------------------------------------------------------------------------


class Ours:
    """The router over a task's adapters, each with its exemplars' state."""

    def __init__(self, encoder: Encoder, task: Task) -> None:
        self.refs = [AdapterRef(name, 1) for name in task.adapters]
        self.place = {ref: i for i, ref in enumerate(self.refs)}
        self.states = {ref: adapter_state(encoder, task, i) for i, ref in enumerate(self.refs)}
        self.router = Router.build(self.states)

    def route(self, features: Features) -> Sequence[Any]:
        return self.router.route_features(features, k=RANKED, max_false_reject=0.0)

    def answers(self, features: Features) -> Answers:
        decisions = self.route(features)
        ranked = np.full((len(decisions), RANKED), -1)
        for row, decision in zip(ranked, decisions, strict=True):
            found = [self.place[ref] for ref, _ in decision.candidates]
            row[: len(found)] = found
        accepted = {}
        for rate in RATES:
            accepted[rate] = np.array([d.adapter is not None for d in self.router.route_features(features, max_false_reject=rate)])
        return Answers(ranked, np.array([decision.score for decision in decisions], float), accepted)

    def threshold(self, features: Features, rate: float) -> float:
        return float(self.router.route_features(features[[0]], max_false_reject=rate)[0].threshold)

    def add_ms(self) -> float:
        """Until a newcomer answers; through the solved head it does once that is solved again."""
        found = []
        for ref in self.refs[:: max(1, len(self.refs) // TIMED_ADDS)][:TIMED_ADDS]:
            without = self.router.without(ref)
            started = time.perf_counter()
            without.with_added({ref: self.states[ref]})
            found.append(time.perf_counter() - started)
        return 1e3 * float(np.median(found))

    @property
    def bytes_stored(self) -> int:
        return sum(len(state.to_bytes()) for state in self.states.values())


def adapter_state(encoder: Encoder, task: Task, adapter: int) -> RoutingState:
    rows = np.flatnonzero(task.train.adapters == adapter)
    held_out = task.evaluation.features[np.flatnonzero(task.evaluation.adapters == adapter)] if task.evaluation else None
    return state_of(encoder, task.train.features[rows], [task.class_names[c] for c in task.train.classes[rows]], held_out)


# ---- figures ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Routed:
    """A head's answers to the inputs of a task."""

    test: Answers
    outside: Answers | None = None
    evaluation: Answers | None = None
    shifted: Answers | None = None

    @classmethod
    def by(cls, answers: Callable[[Features], Answers], task: Task) -> Routed:
        def given(features: Features | None) -> Answers | None:
            return None if features is None else answers(features)

        evaluation = task.evaluation.features if task.evaluation else None
        return cls(answers(task.test.features), given(task.outside), given(evaluation), given(task.shifted))

    def thresholded(self) -> Routed:
        """With thresholds from the evaluation rows, for heads that set none of their own."""
        if self.evaluation is None or self.test.accepted:
            return self
        thresholds = {rate: float(np.quantile(self.evaluation.acceptance, rate)) for rate in RATES}

        def judged(answers: Answers | None) -> Answers | None:
            return answers and replace(answers, accepted={rate: answers.acceptance >= at for rate, at in thresholds.items()})

        return replace(self, test=judged(self.test), outside=judged(self.outside))


def figures_of(routed: Routed, task: Task) -> Figures:
    test, right = routed.test, task.test.adapters
    hits = test.ranked[:, 0] == right
    risk = risks(test.acceptance, ~hits)
    figures: Figures = {f"top{k}": top(test, right, k) for k in (1, 3, 5)}
    figures |= {"macro_recall": macro_recall(test, right), "aurc": float(risk.mean()), "risk_curve": curve(risk)}
    figures |= {f"false_reject_{100 * rate:g}": float(1 - accepted.mean()) for rate, accepted in test.accepted.items()}
    if routed.outside is not None:
        figures |= {name: measure(test.acceptance, routed.outside.acceptance) for name, measure in (("auroc", auroc), ("fpr95", fpr95))}
        # An accepted out-of-scope input is a wrong answer too.
        both = np.concatenate([test.acceptance, routed.outside.acceptance])
        open_risk = risks(both, np.concatenate([~hits, np.ones(len(routed.outside), bool)]))
        figures |= {"aurc_open": float(open_risk.mean()), "risk_curve_open": curve(open_risk)}
        if 0.05 in routed.outside.accepted:
            figures["oos_recall_5"] = float(1 - routed.outside.accepted[0.05].mean())
    if routed.evaluation is not None and task.evaluation is not None:
        held_out = routed.evaluation.ranked[:, 0] == task.evaluation.adapters
        figures["ece"] = calibration_error(Probability.of(routed.evaluation.acceptance, held_out)(test.acceptance), hits)
    if routed.shifted is not None:
        figures["shift"] = float(np.isin(routed.shifted.ranked[:, 0], task.homes).mean())
    return figures


def timings(route: Callable[[Features], object], features: Features) -> Figures:
    """Milliseconds a query, encoding excluded: alone, and in a batch."""
    alone = [features[[i]] for i in range(min(TIMED_SINGLE, len(features)))]
    batch = features[np.arange(min(TIMED_BATCH, len(features)))]
    route(batch)
    single = [timed(lambda one=one: route(one)) for one in alone]
    batched = [timed(lambda: route(batch)) for _ in range(5)]
    return {"query_ms": 1e3 * float(np.median(single)), "batched_ms": 1e3 * float(np.median(batched)) / len(batch)}


def encoding(encoder: Encoder, texts: Sequence[str]) -> Figures:
    """Milliseconds a text, for the features: alone, and in a batch. Every head pays this too."""
    extract(encoder, texts[:ENCODED_SINGLE])
    single = [timed(lambda text=text: extract(encoder, [text])) for text in texts[:ENCODED_SINGLE]]
    batch = texts[:ENCODED_BATCH]
    return {"encode_ms": 1e3 * float(np.median(single)), "encode_batched_ms": 1e3 * timed(lambda: extract(encoder, batch)) / len(batch)}


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


# ---- one task ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """One task: figures by head, and what the pictures need."""

    task: Task
    heads: Mapping[str, Figures]
    routed: Mapping[str, Routed]
    facts: Figures
    thresholds: Mapping[float, float]


def measure(task: Task, encoder: Encoder, baselines: Mapping[str, Any], semantic: Sequence[str], say: Callable[[str], None]) -> Measured:
    figures: dict[str, Figures] = {}
    routed: dict[str, Routed] = {}
    for name, make in baselines.items():
        say(f"{task.name}: {name}")
        fit_s, head = _made(lambda make=make: make(task))
        if isinstance(make, Joint):
            fit_s = make.fit_s[task.corpus]
        routed[name] = Routed.by(head.answers, task).thresholded()
        figures[name] = figures_of(routed[name], task) | timings(head.answers, task.test.features)
        figures[name] |= {"fit_s": fit_s, "add_ms": 1e3 * fit_s / (len(task.adapters) if adds(name) else 1)}
        figures[name] |= {"bytes_a_task": head.bytes_stored / len(task.adapters)}
        figures[name] |= {"C": make.penalty(task)} if isinstance(make, Joint) else {}
    for python in semantic:
        say(f"{task.name}: semantic-router in {python}")
        name, routed_there, own = by_semantic_router(python, task)
        routed[name] = routed_there.thresholded()
        figures[name] = figures_of(routed[name], task) | own
    say(f"{task.name}: {OURS}")
    fit_s, ours = _made(lambda: Ours(encoder, task))
    routed[OURS] = Routed.by(ours.answers, task)
    figures[OURS] = figures_of(routed[OURS], task) | timings(ours.route, task.test.features)
    figures[OURS] |= {"fit_s": fit_s, "add_ms": ours.add_ms(), "bytes_a_task": ours.bytes_stored / len(task.adapters)}
    figures[OURS] |= _compared(routed, task.test.adapters)
    facts = {"adapters": len(task.adapters), "classes": len(task.owner), "exemplars": len(task.train), "test": len(task.test)}
    facts |= {"evaluation": len(task.evaluation) if task.evaluation else 0, **encoding(encoder, task.texts)}
    return Measured(task, figures, routed, facts, {rate: ours.threshold(task.test.features, rate) for rate in RATES})


def _made(make: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = make()
    return time.perf_counter() - started, made


def _compared(routed: Mapping[str, Routed], right: I64) -> Figures:
    hits = {name: routed[name].test.ranked[:, 0] == right for name in (OURS, JOINT, CENTROID)}
    joint, centroid = paired_difference(hits[OURS], hits[JOINT]), paired_difference(hits[OURS], hits[CENTROID])
    return dict(zip(("minus_joint", "minus_joint_low", "minus_joint_high"), joint, strict=True)) | {"minus_centroid": centroid[0]}


def over_seeds(measured: Measured, corpus: Corpus, baselines: Mapping[str, Any], encoder: Encoder, seeds: int) -> None:
    """Add the mean and deviation of top-1 over draws of the shots; seed 0 is the usual split."""
    found = {name: [figures["top1"]] for name, figures in measured.heads.items() if name in baselines or name == OURS}
    for seed in range(1, seeds):
        task = replace(corpus.task(measured.task.name, seed), outside=None, shifted=None)
        for name in found:
            head = Ours(encoder, task) if name == OURS else baselines[name](task)
            found[name].append(top(head.answers(task.test.features), task.test.adapters, 1))
    for name, values in found.items():
        mean, deviation = spread(values)
        measured.heads[name].update({"top1_seeds": values, "top1_mean": mean, "top1_deviation": deviation})


# ---- the semantic-router package, in an environment of its own ----------------------------------------------------------------


def by_semantic_router(python: str, task: Task) -> tuple[str, Routed, Figures]:
    """(name, answers, what it said of itself). The package sees dense vectors only: it has no place for a sketch without a vocabulary."""
    names = np.array(task.adapters)
    parts = {"test": task.test.features, "outside": task.outside, "shifted": task.shifted}
    parts["evaluation"] = task.evaluation.features if task.evaluation else None
    parts = {part: features for part, features in parts.items() if features is not None}
    held_out = task.evaluation or task.train
    fit_vectors, fit_routes = [held_out.features.dense], [names[held_out.adapters]]
    if task.negatives is not None:    # its thresholds move only where some input has no route
        fit_vectors, fit_routes = [*fit_vectors, task.negatives.dense], [*fit_routes, np.array([""] * len(task.negatives))]
    with tempfile.TemporaryDirectory() as scratch:
        given, answered = Path(scratch) / "task.npz", Path(scratch) / "answers.npz"
        np.savez(
            given,
            parts=np.array(list(parts)),
            train_vectors=task.train.features.dense,
            train_routes=names[task.train.adapters],
            fit_vectors=np.concatenate(fit_vectors),
            fit_routes=np.concatenate(fit_routes),
            **{f"{part}_vectors": features.dense for part, features in parts.items()},
        )
        script = Path(__file__).with_name("semantic_router_baseline.py")
        subprocess.run([python, str(script), str(given), str(answered)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with np.load(answered) as data:
            found = {name: data[name] for name in data.files}
    facts = json.loads(str(found["facts"]))
    place = np.array([task.adapters.index(str(name)) for name in found["names"]] + [-1])
    routed = Routed(**{part: Answers(place[found[f"{part}_ranked"]], found[f"{part}_acceptance"]) for part in parts})
    chosen = {part: place[found[f"{part}_chosen"]] for part in parts}
    own = {"query_ms": facts["query_ms"], "add_ms": facts["add_ms"], "fit_s": facts["fit_s"], "thresholds": facts["thresholds"]}
    own |= {"bytes_a_task": facts["bytes_stored"] / len(task.adapters), "fit_rows": facts["fit_rows"]}
    own |= {"own_accuracy": float((chosen["test"] == task.test.adapters).mean()), "own_false_reject": float((chosen["test"] < 0).mean())}
    own |= {"own_oos_recall": float((chosen["outside"] < 0).mean())} if "outside" in chosen else {}
    return f"semantic-router {facts['version']}", routed, own


# ---- growth ------------------------------------------------------------------------------------------------------------------


def growth(task: Task, encoder: Encoder, first: int, step: int, orders: int, joint: Joint | None) -> Figures:
    """Top-1 of the first adapters' test inputs as others come, for several orders; the joint head, fitted at each step, for one."""
    curves: dict[str, list[list[float]]] = {}
    counts = list(range(first, len(task.adapters) + 1, step))
    penalty = joint.penalty(task) if joint else 0.0
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(len(task.adapters))
        found: dict[str, list[float]] = {}
        growing = Ours(encoder, only(task, order[:first])).router
        for count in counts:
            part = only(task, order[:count])
            firsts = np.flatnonzero(np.isin(part.test.adapters, [part.adapters.index(task.adapters[i]) for i in order[:first]]))
            asked, right = part.test.features[firsts], part.test.adapters[firsts]
            made: dict[str, Any] = {CENTROID: one_centroid(part), "class centroids": class_centroids(part), "LDA": discriminant(part)}
            if joint and seed == 0:
                made[JOINT] = Linear.logistic(part.train, part.owner, LEXICAL, penalty)
            made["ours, solved at each step"] = Ours(encoder, part)
            for name, head in made.items():
                found.setdefault(name, []).append(float((head.answers(asked).ranked[:, 0] == right).mean()))
            for adapter in order[count - step : count] if count > first else ():
                growing = growing.with_added({AdapterRef(task.adapters[adapter], 1): adapter_state(encoder, task, adapter)})
            names = [part.adapters[i] for i in right]
            decisions = growing.route_features(asked, max_false_reject=0.0)
            found.setdefault("ours, added at once", []).append(float(np.mean([d.adapter.name == n for d, n in zip(decisions, names, strict=True)])))
        for name, values in found.items():
            curves.setdefault(name, []).append(values)
    return {"adapters": counts, "first": first, "curves": curves}


def only(task: Task, adapters: I64) -> Task:
    """The task with these adapters only, in the order of their names."""
    kept = np.sort(adapters)
    classes = np.flatnonzero(np.isin(task.owner, kept))

    def chosen(part: Any) -> Any:
        rows = np.flatnonzero(np.isin(part.adapters, kept))
        return replace(
            part,
            features=part.features[rows],
            adapters=np.searchsorted(kept, part.adapters[rows]),
            classes=np.searchsorted(classes, part.classes[rows]),
        )

    return replace(
        task,
        corpus=f"{task.corpus} {kept.tolist()}",
        adapters=tuple(task.adapters[i] for i in kept),
        owner=np.searchsorted(kept, task.owner[classes]),
        class_names=tuple(task.class_names[i] for i in classes),
        train=chosen(task.train),
        test=chosen(task.test),
        evaluation=chosen(task.evaluation) if task.evaluation else None,
        outside=None,
        shifted=None,
    )


# ---- the whole ---------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with clinc150, banking77, few_shot and prompt_tasks")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"some of {','.join((*TASKS, 'growth'))}")
    parser.add_argument("--quick", action="store_true", help="few rows, one draw, no growth under the joint head: does it run?")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help=f"draws of the {SHOTS}-shot splits, and orders of growth")
    parser.add_argument("--encoder", default=DEFAULT_MODEL, metavar="ID", help="any encoder that the router takes")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where encoded texts are kept")
    parser.add_argument("--semantic", action="append", default=[], metavar="PYTHON", help="interpreter with semantic-router; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where figures and pictures go; results/routing.json for a whole run")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name] or [*TASKS, "growth"]
    if unknown := [name for name in chosen if name not in (*TASKS, "growth")]:
        parser.error(f"no task {', '.join(unknown)}: choose from {', '.join((*TASKS, 'growth'))}")
    out = arguments.out or (None if arguments.only or arguments.quick else RESULTS / "routing.json")
    seeds = 1 if arguments.quick else arguments.seeds

    console, notes = Console(width=None if sys.stdout.isatty() else 220), Console(stderr=True)
    encoder = load_encoder(arguments.encoder)
    corpus = Corpus(arguments.data, Encoded(encoder, arguments.cache, notes.print), arguments.quick)
    baselines = heads(arguments.quick)
    if not arguments.semantic:
        notes.print("semantic-router is left out: no --semantic PYTHON names an environment that has it")
    measured: dict[str, Measured] = {}
    for name in TASKS:
        if name not in chosen:
            continue
        measured[name] = measure(corpus.task(name), encoder, baselines, arguments.semantic, notes.print)
        if name.endswith(FEW) and seeds > 1:
            over_seeds(measured[name], corpus, baselines, encoder, seeds)
        console.print(task_table(measured[name]))
    grown = {}
    for name, (first, step) in GROWTH.items() if "growth" in chosen else ():
        notes.print(f"growth: {name}")
        joint = None if arguments.quick else baselines[JOINT]
        grown[name] = growth(corpus.task(name), encoder, first, step, min(ORDERS, seeds), joint)
        console.print(growth_table(name, grown[name]))

    judged = [(bar, measured[bar.task].heads[OURS][bar.figure]) for bar in BARS if bar.task in measured]
    console.print(bar_table(judged, measured, arguments.quick))
    report = {
        "benchmark": "routing",
        "quick": arguments.quick,
        "encoder": arguments.encoder,
        "tasks": {name: one.facts | {"heads": one.heads} for name, one in measured.items()},
        "growth": grown,
        "bars": [
            {"task": bar.task, "figure": bar.figure, "bar": bar.limit(), "value": value, "aim": bar.aim, "met": bar.met(value)}
            for bar, value in judged
        ],
        "bars_missed": [f"{bar.task} {bar.figure}" for bar, value in judged if not bar.met(value) and not bar.aim],
        "semantic_router": "measured" if arguments.semantic else "left out: no interpreter was named",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    report = rounded(report)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw(out.with_suffix(""), measured, grown)
    print(json.dumps(report))
    return 1 if report["bars_missed"] and not arguments.quick else 0


def draw(stem: Path, measured: Mapping[str, Measured], grown: Mapping[str, Figures]) -> None:
    """Pictures beside the report: routing_growth.png and so on. Raises ImportError without matplotlib."""
    import routing_plots

    def path(kind: str) -> Path:
        return stem.with_name(f"{stem.name}_{kind}.png")

    if grown:
        routing_plots.growth(path("growth"), {TITLES[name].split(",")[0]: (one["adapters"], one["curves"]) for name, one in grown.items()})
    shown = (OURS, JOINT, "LDA", f"{CENTROID}")
    if curves := {TITLES[n].partition(", a tenth")[0]: measured[n] for n in ("clinc10", "clinc150", "bank77") if n in measured}:
        routing_plots.coverage_risk(path("coverage_risk"), {t: {h: one.heads[h]["risk_curve"] for h in shown} for t, one in curves.items()})
    if "clinc10" in measured:
        one = measured["clinc10"]
        panels = {h: (one.routed[h].test.acceptance, one.routed[h].outside.acceptance, None) for h in (OURS, JOINT, CENTROID)}
        panels[OURS] = (*panels[OURS][:2], one.thresholds[0.05])
        routing_plots.scores(path("scores"), panels)
    stated: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {}
    for name, one in measured.items():
        panel = "test inputs unlike the examples" if name == "prompt34" else f"{SHOTS} examples a class" if FEW in name else "enough examples"
        stated.setdefault(panel, {})[name] = (RATES, [one.heads[OURS][f"false_reject_{100 * rate:g}"] for rate in RATES])
    if stated:
        routing_plots.calibration(path("calibration"), stated, RATE_TOLERANCE)


# ---- tables ------------------------------------------------------------------------------------------------------------------


def task_table(one: Measured) -> Table:
    facts = one.facts
    title = f"{TITLES[one.task.name]}: {facts['exemplars']:,} exemplars, {facts['evaluation']:,} evaluation rows, {facts['test']:,} test inputs"
    paid = f"every head pays for encoding too: {facts['encode_ms']:.1f} ms a text alone, {facts['encode_batched_ms']:.2f} ms in a batch"
    table = Table(title=title, caption=paid)
    columns = {figure: how for figure, how in COLUMNS.items() if any(figure in figures for figures in one.heads.values())}
    table.add_column("head")
    for heading, _, _ in columns.values():
        table.add_column(heading, justify="right")
    for name, figures in one.heads.items():
        cells = [f"{factor * figures[figure]:.{decimals}f}" if figure in figures else "" for figure, (_, factor, decimals) in columns.items()]
        table.add_row(name, *cells, style="bold" if name == OURS else None)
    return table


def growth_table(name: str, one: Figures) -> Table:
    table = Table(title=f"{TITLES[name].split(',')[0]}: top-1 of the first {one['first']} adapters' test inputs, mean of the orders, %")
    table.add_column("head")
    for count in one["adapters"]:
        table.add_column(str(count), justify="right")
    for head, orders in one["curves"].items():
        table.add_row(f"{head} ({len(orders)})", *(f"{100 * value:.1f}" for value in np.mean(orders, axis=0)))
    return table


def bar_table(judged: Sequence[tuple[Bar, float]], measured: Mapping[str, Measured], quick: bool) -> Table:
    table = Table(title="What ours promises", caption="of a quick run they say nothing" if quick else None)
    for column in ("task", "figure", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    for bar, value in judged:
        shown = f"{value:.4f}"
        if bar.figure.startswith("minus_joint"):
            mean, low, high = (measured[bar.task].heads[OURS][f"minus_joint{end}"] for end in ("", "_low", "_high"))
            shown = f"{mean:+.4f}  [{low:+.4f}, {high:+.4f}]"
        verdict = "met" if bar.met(value) else "MISSED"
        table.add_row(bar.task, bar.says + (" (aim)" if bar.aim else ""), shown, bar.limit(), verdict)
    return table


def rounded(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


if __name__ == "__main__":
    raise SystemExit(main())
