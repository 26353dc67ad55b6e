"""Routing without examples: by the LoRA weights alone, by the adapters' own heads, and by words, beside routing by examples.

    python benchmarks/routing_weights.py --data DIR [--registry registry] [--rows 100]

The ten adapters of the registry and CLINC150's test split (DIR holds the folder clinc150). Nothing is tuned on the test split: how token
scores become one score of an input is chosen on the validation split. By weights, the frozen base runs once and hooks read what enters
each adapted module; Arrow (Ostapenko et al. 2024, arXiv 2405.11157) and SpectR (Fleshman and Van Durme 2025, arXiv 2504.03454) choose
per token and layer, here their scores choose for the whole input. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from routing_data import Corpus, Encoded, Rows
from routing_metrics import F64, I64, auroc
from torch import Tensor, nn
from transformers import BatchEncoding

from adapter_hub import Hub
from adapter_hub.adapters.weights import Adapter, LoraDelta, read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.heads import Heads
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import fit
from adapter_hub.routing.features import Features, extract
from adapter_hub.routing.live import ROUTING_FILE
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import RoutingState, build_state, state_of

# n inputs, t tokens, a adapters, c labels, i inputs of a module, r rank
RESULTS = Path(__file__).parent / "results" / "routing_weights.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapter_hub-benchmarks"
BATCH = 128
TEMPERATURES = (0.1, 0.3, 1.0, 3.0)
SPLITS = {"val": ("val", ("oos_train", "oos_val")), "test": ("test", ("oos_test",))}    # in scope, out of scope
RATE = 0.05
Figures = dict[str, float]
Scored = dict[str, NDArray[np.floating[Any]]]    # (n, a) by method

ARROW, SPECTR, DIRECTIONS = "Arrow: |v₁ᵀx|", "SpectR: ‖ΔW x‖ = ‖Σ Vᵀx‖", "its directions: ‖Vᵀx‖"
SCALED, RELATIVE = "‖ΔW x‖ / ‖ΔW‖", "‖ΔW x‖ / ‖W x‖"
KINDS = (ARROW, SPECTR, DIRECTIONS, SCALED, RELATIVE)
MEAN = "mean"
STANDARD = ", standardised on unlabelled inputs"


# ---- by the weights alone --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spectra:
    """One module's updates by all adapters: ΔW = U Σ Vᵀ, of which the part that meets the input is kept."""

    directions: Tensor    # (a, r, i), V transposed
    values: Tensor        # (a, r), the diagonal of Σ

    @classmethod
    def of(cls, deltas: Sequence[LoraDelta]) -> Spectra:
        found = [torch.linalg.svd((d.scaling * d.b.double() @ d.a.double()), full_matrices=False) for d in deltas]
        rank = max(len(d.a) for d in deltas)
        return cls(torch.stack([vt[:rank] for _, _, vt in found]).float(), torch.stack([s[:rank] for _, s, _ in found]).float())

    def scores(self, x: Tensor, wx: Tensor) -> dict[str, Tensor]:
        """(n, t, a) by kind, of inputs (n, t, i) and what the base makes of them (n, t, o)."""
        seen = torch.einsum("nti,ari->ntar", x, self.directions)
        update = (seen * self.values).norm(dim=-1)
        return {
            ARROW: seen[..., 0].abs(),
            SPECTR: update,
            DIRECTIONS: seen.norm(dim=-1),
            SCALED: update / self.values.norm(dim=-1),
            RELATIVE: update / wx.norm(dim=-1, keepdim=True),
        }


def ways(scores: Tensor, x: Tensor) -> dict[str, Tensor]:
    """(n, t, a) each: what is averaged over tokens and layers."""
    alike = (scores - scores.mean(dim=-1, keepdim=True)) / (scores.std(dim=-1, keepdim=True) + 1e-9)
    softened = {f"softmax at {t:g}": torch.softmax(alike / t, dim=-1) for t in TEMPERATURES}
    return {MEAN: scores, "inputs at unit length": scores / x.norm(dim=-1, keepdim=True), "every token and layer alike": alike} | softened


def by_weights(base: FrozenBase, adapters: Sequence[Adapter], texts: Sequence[str]) -> Scored:
    """Scores under "kind, way": one forward of the base, every adapter's directions held against what passes."""
    spectra = {name: Spectra.of([adapter.deltas[name] for adapter in adapters]) for name in adapters[0].deltas}
    passed: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        passed[name] = x, y - module.bias

    found: Scored = {}
    with hooked(base, list(spectra), keep):
        for rows, inputs in batches(base, texts):
            base.body(**inputs)
            for name, (x, wx) in passed.items():
                if x.ndim == 2:    # BERT's pooler reads one token
                    x, wx, shares = x[:, None], wx[:, None], torch.ones(len(x), 1)
                else:
                    shares = inputs["attention_mask"] / inputs["attention_mask"].sum(dim=1, keepdim=True)
                for kind, scores in spectra[name].scores(x, wx).items():
                    for way, values in ways(scores, x).items():
                        kept = found.setdefault(f"{kind}, {way}", np.zeros((len(texts), len(adapters))))
                        kept[rows] += torch.einsum("nta,nt->na", values, shares).numpy() / len(spectra)
    return found


@contextmanager
def hooked(base: FrozenBase, names: Sequence[str], act: Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, each named module shows `act` its input and output; what that returns takes the output's place."""
    modules = {name: base.modules[base.canonical(name)] for name in names}
    handles = [m.register_forward_hook(lambda m, inputs, y, name=name: act(name, m, inputs[0], y)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- by running every adapter ------------------------------------------------------------------------------------------------


def by_heads(base: FrozenBase, adapters: Sequence[Adapter], texts: Sequence[str]) -> Scored:
    """How sure each adapter's own head is, and how far the adapter moves the base's vector: as many forwards as adapters."""
    made = Heads(base)
    heads = [made.of(adapter) for adapter in adapters]
    found: Scored = {}
    for rows, inputs in batches(base, texts):
        plain = base.pool(base.body(**inputs).last_hidden_state, inputs["attention_mask"])
        for place, (adapter, head) in enumerate(zip(adapters, heads, strict=True)):

            def adapt(name: str, _: nn.Module, x: Tensor, y: Tensor, deltas: Mapping[str, LoraDelta] = adapter.deltas) -> Tensor:
                return y + deltas[name].scaling * (x @ deltas[name].a.T @ deltas[name].b.T)

            with hooked(base, list(adapter.deltas), adapt):
                body = base.body(**inputs)
            logits = head.logits(body, inputs, slice(len(rows)))
            logs = torch.log_softmax(logits, dim=1)
            first, second = logits.topk(2, dim=1).values.T
            pooled = base.pool(body.last_hidden_state, inputs["attention_mask"])
            for name, values in {
                "greatest probability": logs.amax(dim=1),
                "least entropy": (logs.exp() * logs).sum(dim=1),
                "energy": logits.logsumexp(dim=1),
                "margin of logits": first - second,
                "shift of the base's vector": (pooled - plain).norm(dim=1),
            }.items():
                found.setdefault(name, np.zeros((len(texts), len(adapters))))[rows, place] = values.numpy()
    return found


def batches(base: FrozenBase, texts: Sequence[str]) -> Iterator[tuple[list[int], BatchEncoding]]:
    """(places of the texts, inputs), those of one length together."""
    encoded = base.encode(texts)
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            yield rows, base.pad([encoded[i] for i in rows])


# ---- by words and by examples: the router ------------------------------------------------------------------------------------


def by_router(states: Mapping[AdapterRef, RoutingState]) -> Callable[[Features], tuple[I64, F64]]:
    """(n,) place of the adapter, (n,) acceptance score."""
    router, place = Router.build(states), {ref: i for i, ref in enumerate(states)}

    def routed(features: Features) -> tuple[I64, F64]:
        decisions = router.route_features(features, max_false_reject=0)
        return np.array([place[d.candidates[0][0]] for d in decisions]), np.array([d.score for d in decisions], float)

    return routed


def by_centroid(states: Mapping[AdapterRef, RoutingState]) -> Callable[[Features], tuple[I64, F64]]:
    means = np.stack([state.exemplars.vectors.mean(axis=0) for state in states.values()])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return lambda features: best_of(features.dense @ means.T)


def best_of(scores: NDArray[np.floating[Any]]) -> tuple[I64, F64]:
    return scores.argmax(axis=1), scores.max(axis=1).astype(float)


def words_of(hub: Hub, refs: Sequence[AdapterRef]) -> dict[str, dict[AdapterRef, RoutingState]]:
    """States without examples, by what they are made of."""
    found: dict[str, dict[AdapterRef, RoutingState]] = {}
    for ref in refs:
        manifest = hub.registry.manifest(ref)
        labels = manifest.labels or ()
        named, told = [label.replace("_", " ") for label in labels], manifest.description

        def of(texts: Sequence[str], labels: Sequence[str | None]) -> RoutingState:
            return state_of(hub.encoder, extract(hub.encoder, texts), labels, from_description=True)

        for name, state in {
            "name": of([ref.name.replace("_", " ")], [None]),
            "description": build_state(hub.encoder, [], told),
            "description and labels in one text": of([f"{told} {', '.join(named)}"], [None]),
            "each label after the description": of([f"{told} {one}" for one in named], labels),
            "labels": of(named, labels),
            WORDS: build_state(hub.encoder, [], told, label_names=labels),
        }.items():
            found.setdefault(name, {})[ref] = state
    return found


WORDS = "description and labels: what `register` does"


def beside(
    known: Mapping[AdapterRef, RoutingState], by_word: Mapping[str, Mapping[AdapterRef, RoutingState]], inputs: Mapping[str, Inputs], count: int
) -> dict[str, Figures]:
    """One adapter by words beside all others by examples, for `count` adapters in turn, by what it is known by: means over them."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in by_word}
    refs = list(known)
    for place, ref in list(enumerate(refs))[:count]:
        others = {other: state for other, state in known.items() if other != ref}
        fitted = fit(others)
        nine = Router.build(others, fitted.calibration, fitted.head)
        for name, states in by_word.items():
            router = nine.with_added({ref: states[ref]})
            for split, part in inputs.items():
                decisions = router.route_features(part.features, max_false_reject=RATE)
                chosen = np.array([refs.index(d.candidates[0][0]) for d in decisions])
                own, hits = part.right == place, chosen == place
                for figure, value in {
                    "recall": hits[own].mean(),
                    "taken": hits[~own].mean(),
                    "turned_away": np.mean([d.adapter is None for d, mine in zip(decisions, own, strict=True) if mine]),
                    "top1": (chosen == part.right).mean(),
                }.items():
                    found[name].setdefault(f"{split}_{figure}", []).append(float(value))
    return {name: {figure: float(np.mean(values)) for figure, values in figures.items()} for name, figures in found.items()}


# ---- figures -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """Of one split: those in scope, then those out of scope."""

    texts: tuple[str, ...]
    right: I64              # (n,), the adapter of those in scope
    encoded: Features       # of all

    @property
    def features(self) -> Features:
        return self.encoded[np.arange(len(self.right))]

    def figures(self, chosen: I64, scores: F64) -> Figures:
        n = len(self.right)
        hits = chosen[:n] == self.right
        recalls = [hits[self.right == adapter].mean() for adapter in np.unique(self.right)]
        return {"top1": float(hits.mean()), "macro_recall": float(np.mean(recalls)), "auroc": auroc(scores[:n], scores[n:])}


def measure(hub: Hub, corpus: Corpus, count: int | None) -> dict[str, Any]:
    refs = [hub.registry.resolve(name) for name in sorted(hub.names())]
    adapters = [read_adapter(hub.registry.open_version(ref), labels=hub.registry.manifest(ref).labels) for ref in refs]
    inputs = {name: inputs_of(corpus, [ref.name for ref in refs], *parts, count) for name, parts in SPLITS.items()}
    texts = [text for part in inputs.values() for text in part.texts]
    methods: dict[str, dict[str, Figures]] = {}
    ms = {}

    def timed(group: str, act: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        done = act()
        ms[group] = 1e3 * (time.perf_counter() - started) / len(texts)
        return done

    timed("forward", lambda: [hub.base.body(**batch) for _, batch in batches(hub.base, texts)])
    for group, scored in (
        ("weights", timed("weights", lambda: by_weights(hub.base, adapters, texts))),
        ("heads", timed("heads", lambda: by_heads(hub.base, adapters, texts))),
    ):
        edge = len(inputs["val"].texts)
        for name, scores in scored.items():
            unlabelled = scores[: len(inputs["val"].right)]
            standard = (scores - unlabelled.mean(axis=0)) / (unlabelled.std(axis=0) + 1e-12)
            for suffix, values in (("", scores), (STANDARD, standard)):
                parts = {"val": values[:edge], "test": values[edge:]}
                methods[f"{group}: {name}{suffix}"] = {split: inputs[split].figures(*best_of(part)) for split, part in parts.items()}
    known = {ref: RoutingState.from_bytes(hub.registry.read(ref, ROUTING_FILE)) for ref in refs}
    by_word = words_of(hub, refs)
    routers = {f"words: {name}": by_router(states) for name, states in by_word.items()}
    routers |= {"examples: one centroid": by_centroid(known), "examples: the router": by_router(known)}
    for name, routed in routers.items():
        methods[name] = {split: part.figures(*routed(part.encoded)) for split, part in inputs.items()}
    compared = {name: by_word[name] for name in ("description", "labels", WORDS)}
    return {
        "methods": methods,
        "beside": beside(known, compared, inputs, len(refs) if count is None else 1),
        "ms_per_input": {name: round(value, 3) for name, value in ms.items()},
        "adapters": len(refs),
    }


def inputs_of(corpus: Corpus, names: Sequence[str], inside: str, outside: Sequence[str], count: int | None) -> Inputs:
    """All inputs of a split, or `count` of each part."""
    rows, others = drawn(corpus.clinc(inside), count), [drawn(corpus.clinc(split), count) for split in outside]
    texts = (*rows.texts, *(text for other in others for text in other.texts))
    return Inputs(texts, np.array([names.index(corpus.domains[label]) for label in rows.labels]), corpus.encoded(texts))


def drawn(rows: Rows, count: int | None) -> Rows:
    return rows if count is None else rows.take(np.sort(np.random.default_rng(0).permutation(len(rows))[:count]))


def shown(methods: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """What the table shows: of each kind of weights the mean and the way that is best on validation; all else."""
    names = []
    for kind in KINDS:
        for suffix in ("", STANDARD):
            tried = [name for name in methods if name.startswith(f"weights: {kind},") and name.endswith(STANDARD) == bool(suffix)]
            chosen = max(tried, key=lambda name: methods[name]["val"]["top1"])
            names += dict.fromkeys([f"weights: {kind}, {MEAN}{suffix}", chosen])
    return names + [name for name in methods if not name.startswith("weights") and not name.endswith(STANDARD)]


def show(report: Mapping[str, Any]) -> None:
    table = Table(title=f"{report['adapters']} adapters of CLINC150, never abstaining")
    for column in ("by", "val top-1", "test top-1", "macro recall", "AUROC", "forwards"):
        table.add_column(column, justify="left" if column == "by" else "right")
    for name in report["shown"]:
        val, test = (report["methods"][name][split] for split in SPLITS)
        numbers = (val["top1"], test["top1"], test["macro_recall"], test["auroc"])
        forwards = report["adapters"] + name.count("shift") if name.startswith("heads") else 1
        table.add_row(name, *(f"{100 * number:.1f}" for number in numbers), str(forwards))
    Console(width=150).print(table)
    table = Table(title="one adapter by words beside the others by examples, test")
    for column in ("by", "recall", "taken of the others'", f"turned away at {100 * RATE:g} %", "top-1 of all"):
        table.add_column(column, justify="left" if column == "by" else "right")
    for name, figures in report["beside"].items():
        table.add_row(name, *(f"{100 * figures[f'test_{figure}']:.1f}" for figure in ("recall", "taken", "turned_away", "top1")))
    Console(width=150).print(table)
    Console().print(f"milliseconds an input: {report['ms_per_input']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with clinc150/")
    parser.add_argument("--registry", type=Path, default=Path(__file__).parent.parent / "registry", metavar="DIR")
    parser.add_argument("--rows", type=int, metavar="N", help="this many inputs of each part, and one adapter beside the others: a quick run")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with Hub.open(arguments.registry) as hub:
        report = measure(hub, Corpus(arguments.data, Encoded(hub.encoder, CACHE, console.print)), arguments.rows)
    report["shown"] = shown(report["methods"])
    show(report)
    report = {
        "benchmark": "routing_weights",
        **rounded(report),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(report, ensure_ascii=False))
    return 0


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
