"""Are tasks that nobody taught found among what the router turns away: how many, how pure, after how many inputs?

    python benchmarks/discovery.py --data DIR [--split test|tune] [--seeds 5]

DIR holds clinc150/. Each of its ten domains is hidden in turn: the router knows the other nine, and gets the inputs of all ten in equal shares
mixed with the real out-of-scope ones. What it turns away is looked through after every 50 inputs. The settings were chosen with --split tune:
training rows that are left out of the exemplars, the out-of-scope rows of the training and validation splits, and a few inputs of each intent of
eight domains that no router knows as further odd ones. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from routing_data import Corpus, Encoded, drawn

from adapter_hub import Hub
from adapter_hub.base_model import DEFAULT_MODEL
from adapter_hub.continual.discovery import DiscoveryConfig, discover
from adapter_hub.continual.proposals import Chosen, advice
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.observations import Observation
from adapter_hub.routing.encoder import Encoder, load_encoder
from adapter_hub.routing.features import F32, Features
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import RoutingState, state_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "discovery.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter_hub-benchmarks"
RATE = 0.05            # max_false_reject
EVERY = 50             # inputs between two looks
INPUTS_MOST = 300      # of the hidden domain: the bar
DOMAINS_LEAST = 8      # found of ten: the bar
PURITY = 0.85          # share of a proposal's inputs that are of the hidden domain: the bar
RECALL = 0.5           # share of its turned away inputs so far that the proposal must hold to be the domain, not a corner of it
THIN = 4               # inputs of each intent of a domain that stands for odd inputs: --split tune has too few that are out of scope
FEWER = 5              # one in so many inputs out of scope comes where it is asked who knows inputs already
LEFT_OUT = 30          # training rows an intent that are the stream of --split tune
OUTSIDE = "out of scope"
NEW, KNOWN, WRONG = "a new skill", "teach it", "teach another"
I64, Bools = NDArray[np.int64], NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Inputs:
    """n inputs, and whether the router without what is hidden turns each away."""

    texts: tuple[str, ...]
    vectors: F32
    domains: NDArray[np.str_]
    intents: NDArray[np.str_]
    rejected: Mapping[tuple[str, ...], Bools]                  # by what was hidden: domains, or intents
    nearest: Mapping[tuple[str, ...], NDArray[np.str_]]        # the best candidate of each

    @property
    def own(self) -> Bools:
        """Of each input, whether the router without its domain turns it away."""
        alone = np.ones(len(self.domains), bool)
        for hidden, rejected in self.rejected.items():
            if len(hidden) == 1:
                alone = np.where(self.domains == hidden[0], rejected, alone)
        return alone

    def also(self, other: Inputs) -> Inputs:
        """With what other routers made of the same inputs."""
        return replace(self, rejected={**self.rejected, **other.rejected}, nearest={**self.nearest, **other.nearest})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with clinc150")
    parser.add_argument("--registry", type=Path, default=ROOT / "registry", metavar="DIR", help="whose heads are asked: the one that ships")
    parser.add_argument("--split", choices=("test", "tune"), default="test", help="tune: what the settings were chosen on")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="orders of each stream")
    parser.add_argument("--every", type=int, default=EVERY, metavar="N", help="inputs between two looks")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="other than DiscoveryConfig's")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where encoded texts and decisions are kept")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the figures go as JSON; results/discovery.json for the test split")
    arguments = parser.parse_args()
    config, started, console = DiscoveryConfig(**arguments.settings), time.perf_counter(), Console(width=None if sys.stdout.isatty() else 160)
    encoder = load_encoder(DEFAULT_MODEL)
    corpus = Corpus(arguments.data, Encoded(encoder, arguments.cache, console.print))
    names = sorted(set(corpus.domains.values()))
    pairs = [*zip(names[::2], names[1::2], strict=True)]
    corners = {name: corner(corpus, name) for name in names}
    inputs = routed(corpus, encoder, arguments.split, [(), *((name,) for name in names)], arguments.cache)
    seeds = range(arguments.seeds)
    thin = len(names) - 2 if arguments.split == "tune" else 0
    hidden = {name: [followed(inputs, (name,), seed, arguments.every, config, thin) for seed in seeds] for name in names}
    quiet = [followed(inputs, (), seed, arguments.every * 5, config, thin) for seed in seeds]
    table(console, hidden)
    inputs = inputs.also(routed(corpus, encoder, arguments.split, pairs, arguments.cache))
    two = {" + ".join(pair): [followed(inputs, pair, seed, arguments.every, config) for seed in seeds[:2]] for pair in pairs}
    found = [sum(one[seed]["found"] is not None for one in hidden.values()) for seed in seeds]
    at = [one["found"]["inputs"] for runs in hidden.values() for one in runs if one["found"]]
    streamed = sum(one["streamed"] for runs in hidden.values() for one in runs)
    summary = {
        "domains_found": spread(found),
        "inputs_until_found": spread(at),
        "purity": spread([one["found"]["purity"] for runs in hidden.values() for one in runs if one["found"]]),
        "recall": spread([one["found"]["recall"] for runs in hidden.values() for one in runs if one["found"]]),
        "false_per_10k": round(sum(one["false"] for runs in hidden.values() for one in runs) / streamed * 10_000, 2),
        "nothing_hidden_per_10k": round(sum(one["proposed"] for one in quiet) / sum(one["streamed"] for one in quiet) * 10_000, 2),
        "two_hidden_found": round(float(np.mean([found is not None for runs in two.values() for one in runs for found in one["each"].values()])), 3),
        "look_s_longest": max(one["look_s"] for runs in hidden.values() for one in runs),
    }
    console.print_json(data=summary)
    advisings = {}
    if arguments.split == "test":
        inputs = inputs.also(routed(corpus, encoder, arguments.split, [*corners.values()], arguments.cache))
        advisings = advised(inputs, arguments.registry, corners, config)
    summary |= {"advice": {kind: advisings[kind] for kind in ("missing", "hidden")} if advisings else {}}
    missed = [] if min(found) >= DOMAINS_LEAST else [f"{min(found)} of {len(names)} domains"]
    report = {"benchmark": "discovery", "split": arguments.split, "seeds": arguments.seeds, "settings": arguments.settings, **summary}
    report |= {"hidden": hidden, "nothing_hidden": quiet, "two_hidden": two, "advice": advisings, "bars_missed": missed}
    report["wall_s"] = round(time.perf_counter() - started)
    report["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if out := arguments.out or (RESULTS if arguments.split == "test" and not arguments.settings else None):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "discovery", "split": arguments.split, **summary, "bars_missed": missed}))
    return 1 if missed else 0


# ---- what the routers turn away ---------------------------------------------------------------------------------


def routed(corpus: Corpus, encoder: Encoder, split: str, hidings: Sequence[tuple[str, ...]], cache: Path) -> Inputs:
    """The stream's inputs, each decided by a router for each hiding. Decisions are kept: routers are solved for minutes."""
    train, held_out = corpus.clinc("train"), corpus.clinc("val")
    chosen = drawn(train.labels, LEFT_OUT, seed=7) if split == "tune" else np.empty(0, np.int64)
    examples, stream = np.setdiff1d(np.arange(len(train)), chosen), train.take(chosen) if split == "tune" else corpus.clinc("test")
    outside = [corpus.clinc(part) for part in (("oos_train", "oos_val") if split == "tune" else ("oos_test",))]
    features = Features.concatenate([corpus.encoded(rows.texts) for rows in (stream, *outside)])
    texts = tuple(text for rows in (stream, *outside) for text in rows.texts)
    intents = np.array([*stream.labels, *(OUTSIDE for rows in outside for _ in rows.texts)])
    domains = np.array([corpus.domains.get(intent, OUTSIDE) for intent in intents])
    learned, evaluation = corpus.encoded(train.texts)[examples], corpus.encoded(held_out.texts)
    kept, owners = train.take(examples).labels, np.array([corpus.domains[label] for label in held_out.labels])
    homes = np.array([corpus.domains[label] for label in kept])
    key = hashlib.sha256(f"{encoder.fingerprint} {split}".encode() + learned.dense.tobytes() + features.dense.tobytes()).hexdigest()[:32]
    rejected, nearest = {}, {}
    for hidden in hidings:
        path = cache / f"discovery-{key}-{hashlib.sha256('+'.join(hidden).encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            states: dict[AdapterRef, RoutingState] = {}
            for name in sorted({*homes.tolist()} - {*hidden}):
                own, held = (np.flatnonzero((at == name) & ~np.isin(of, hidden)) for at, of in ((homes, kept), (owners, held_out.labels)))
                states[AdapterRef(name, 1)] = state_of(encoder, learned[own], [kept[row] for row in own], evaluation[held])
            decisions = Router.build(states).route_features(features, max_false_reject=RATE)
            best = [one.candidates[0][0].name for one in decisions]
            np.savez(path, rejected=[one.adapter is None for one in decisions], nearest=best)
        with np.load(path) as decided:
            rejected[hidden], nearest[hidden] = decided["rejected"], decided["nearest"]
    return Inputs(texts, features.dense, domains, intents, rejected, nearest)


def corner(corpus: Corpus, domain: str) -> tuple[str, ...]:
    """A third of a domain's intents."""
    intents = sorted(intent for intent, home in corpus.domains.items() if home == domain)
    return tuple(sorted(np.random.default_rng(0).permutation(intents)[: len(intents) // 3].tolist()))


# ---- streams ----------------------------------------------------------------------------------------------------


def followed(inputs: Inputs, hidden: tuple[str, ...], seed: int, every: int, config: DiscoveryConfig, thin: int = 0) -> dict[str, Any]:
    """One order of the inputs, until the hidden domain has had its 300 (nothing hidden: all), looked through at each step.

    `found` is the first look with a proposal that is the domain (of two, of the first); `false` counts proposals of which less than half
    is hidden, each once, as long as it keeps half of its inputs from look to look. So many other domains are `thin`: a few inputs of each of
    their intents come, and their routers' rejections count, which makes them odd inputs.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(inputs.domains))
    rejected = inputs.rejected[hidden]
    if thin:
        odd = rng.permutation(sorted({*inputs.domains.tolist()} - {*hidden, OUTSIDE}))[:thin].tolist()
        rejected = np.where(np.isin(inputs.domains, odd), inputs.own, rejected)
        drawn_rows = rng.permutation(len(order))    # not the first of the stream: they come all along it
        left = drawn_rows[[count >= THIN for count in counts_before(inputs.intents[drawn_rows])]]
        order = order[~np.isin(order, left[np.isin(inputs.domains[left], odd)])]
    own = np.cumsum(inputs.domains[order] == hidden[0]) if hidden else np.zeros(len(order), int)
    end = int(np.searchsorted(own, INPUTS_MOST)) + 1 if hidden and own[-1] >= INPUTS_MOST else len(order)
    each: dict[str, dict[str, Any] | None] = dict.fromkeys(hidden)
    wrong: list[set[int]] = []
    seen: list[set[int]] = []
    last: dict[str, Any] = {}
    slowest = 0.0
    for stop in [*range(every, end, every), end]:
        rows = order[:stop]
        away = rows[rejected[rows]][-config.rows_max :]
        started = time.perf_counter()
        clusters = discover(inputs.vectors[away], stop, RATE, config)
        slowest = max(slowest, time.perf_counter() - started)
        members = [away[list(cluster.rows)] for cluster in clusters]
        for rows_of in members:
            counted(seen, rows_of)
            if np.isin(inputs.domains[rows_of], hidden).mean() < 0.5:
                counted(wrong, rows_of)
        for name in hidden:
            best = closest(inputs, members, away, name)
            last[name] = best | {"stability": round(min((cluster.stability for cluster in clusters), default=0), 3)}
            if each[name] is None and best["purity"] >= PURITY and best["recall"] >= RECALL:
                each[name] = {"inputs": int((inputs.domains[rows] == name).sum()), "of": stop, **best}
    facts = {"streamed": end, "turned_away": int(rejected[order[:end]].sum()), "proposed": len(seen), "false": len(wrong)}
    facts |= {"each": each, "look_s": round(slowest, 2)}
    return facts | ({"found": each[hidden[0]], "at_the_end": last[hidden[0]]} if hidden else {})


def counts_before(names: NDArray[np.str_]) -> Iterator[int]:
    """How often each name came before."""
    seen = Counter[str]()
    for name in names.tolist():
        yield seen[name]
        seen[name] += 1


def closest(inputs: Inputs, proposals: Sequence[I64], away: I64, name: str) -> dict[str, Any]:
    """Of the proposals that are pure the one that holds most of the domain, else the purest; and what all pure ones hold together."""
    all_own = int((inputs.domains[away] == name).sum())
    told = []
    for rows in proposals:
        own = int((inputs.domains[rows] == name).sum())
        told.append({"purity": round(own / len(rows), 3), "recall": round(own / max(all_own, 1), 3), "size": len(rows)})
    pure = [one for one in told if one["purity"] >= PURITY]
    none = {"purity": 0.0, "recall": 0.0, "size": 0}
    best = max(pure, key=lambda one: one["recall"]) if pure else max(told, key=lambda one: one["purity"], default=none)
    return {**best, "turned_away": all_own, "pieces": len(pure), "recall_of_all": round(sum(one["recall"] for one in pure), 3)}


def counted(known: list[set[int]], rows: I64) -> None:
    """One proposal more, unless it is one that was seen, with other inputs."""
    now = set(rows.tolist())
    for place, before in enumerate(known):
        if len(before & now) * 2 >= min(len(before), len(now)):
            known[place] = now
            return
    known.append(now)


# ---- who knows them already -------------------------------------------------------------------------------------


def advised(inputs: Inputs, registry: Path, corners: Mapping[str, tuple[str, ...]], config: DiscoveryConfig) -> dict[str, Any]:
    """Whether `advice` tells inputs that a registered adapter answers from those of a new task, by the heads of the registry that ships.

    The router of an adapter has no exemplar of a third of its intents, which its head knows ("missing"); or there is no such adapter
    ("hidden"). Counted are proposals of which PURITY and more is that. All inputs at once, of those out of scope a fifth: beside all of them a
    third of a domain is too little to be proposed.
    """
    found = {"missing": Counter[str](), "hidden": Counter[str]()}
    reasons, few = [], (inputs.domains != OUTSIDE) | (np.arange(len(inputs.domains)) % FEWER == 0)
    with Hub.open(registry) as hub:
        for domain, intents in corners.items():
            for kind, hidden, own in (("missing", intents, np.isin(inputs.intents, intents)), ("hidden", (domain,), inputs.domains == domain)):
                away = np.flatnonzero(inputs.rejected[hidden] & few)[: config.rows_max]
                clusters = discover(inputs.vectors[away], len(inputs.domains), RATE, config)
                clustered = {int(away[row]) for cluster in clusters for row in cluster.rows}
                others = [inputs.texts[row] for row in away if int(row) not in clustered]
                for cluster in clusters:
                    rows = away[list(cluster.rows)]
                    if own[rows].mean() < PURITY:
                        found[kind]["other proposals"] += 1
                        continue
                    names = Counter(inputs.nearest[hidden][rows].tolist())
                    shares = tuple((name, count / len(rows)) for name, count in names.most_common(5))
                    groups = tuple(tuple(observation(inputs, int(away[row])) for row in group) for group in cluster.groups)
                    teach, why = advice(Chosen(groups, shares, cluster), others, partial(sureness, hub))
                    found[kind][NEW if teach is None else KNOWN if teach == domain and kind == "missing" else WRONG] += 1
                    reasons.append({"domain": domain, "kind": kind, "size": len(rows), "teach": teach, "why": why})
    return {kind: dict(counts) for kind, counts in found.items()} | {"proposals": reasons}


def observation(inputs: Inputs, row: int) -> Observation:
    return Observation(str(row), None, None, None, "below_threshold", None, None, inputs.texts[row])


def sureness(hub: Hub, name: str, texts: Sequence[str]) -> list[float]:
    return [max(one.scores.values()) for one in hub.predict(texts, adapters=name)] if texts else []


# ---- report -----------------------------------------------------------------------------------------------------


def spread(values: Collection[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": round(float(np.median(list(values))), 3), "least": min(values), "most": max(values)}


def table(console: Console, hidden: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    drawn_table = Table(title=f"Found: a proposal of purity {PURITY} and more that holds {RECALL:.0%} of the domain's turned away inputs; medians")
    for column in ("hidden", "found", "inputs", "turned away", "purity", "recall", "after 300: purity", "recall", "pieces", "false"):
        drawn_table.add_column(column)
    for name, runs in hidden.items():
        drawn_table.add_row(name, f"{sum(one['found'] is not None for one in runs)}/{len(runs)}", *cells(runs))
    console.print(drawn_table)


def cells(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [one["found"] for one in runs if one["found"]]
    for key in ("inputs", "turned_away", "purity", "recall"):
        values = [one[key] for one in found]
        yield f"{np.median(values):g} ({min(values):g}–{max(values):g})" if values else "-"
    for key in ("purity", "recall", "pieces"):
        yield f"{np.median([one['at_the_end'][key] for one in runs]):g}"
    yield str(sum(one["false"] for one in runs))


if __name__ == "__main__":
    raise SystemExit(main())
