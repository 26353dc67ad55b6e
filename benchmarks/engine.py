"""The engine beside the base alone and beside PEFT: one forward for many adapters, generation, loading, and more adapters than slots.

    python benchmarks/engine.py [--data DIR] [--only forward,generation,loading,slots,jobs] [--rounds 15] [--quick] [--device cuda]

Every ratio is to the base's own forward of the same batch in the same round; rounds are interleaved, and medians with quartiles are
shown, because absolute times on a shared machine are noise. The last line is JSON; exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import psutil
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from adapter_hub import Hub
from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import DEFAULT_MODEL, FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.engine.plan import Batch, Segment
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, task_model, tiny_model

RESULTS = Path(__file__).parent / "results" / "engine.json"
RANK = 8
ADAPTERS = 64
ROWS, TOKENS = 64, 32
DISTINCT = (1, 2, 4, 8, 16, 32, 64)
LLAMA_ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 16
LLAMA_DISTINCT = (1, 4, 16)
LOADS = 1000
WORKING_SETS = (0.5, 1, 2, 4)    # over the slots
SLOTS, SKEW = 8, 1.1             # slots of that run, exponent of Zipf's law
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
Figures = dict[str, Any]


class Shelf:
    """Adapters on disk for one base, and the engine that runs them."""

    def __init__(self, base: FrozenBase, root: Path, count: int, **settings: Any) -> None:
        self.base = base
        self.folders = {
            AdapterRef(f"task-{i:04d}", 1): make_adapter(base, root / f"{i}", seed=i, r=RANK, target_modules="all-linear", **settings)
            for i in range(count)
        }
        self.refs = list(self.folders)
        self.engine = Engine(base, self.load)

    def load(self, ref: AdapterRef) -> Adapter:
        return read_adapter(self.folders[ref])

    def peft(self, model: Any, count: int) -> PeftModel:
        first, *others = [(str(i), folder) for i, folder in enumerate(self.folders.values())][:count]
        made = PeftModel.from_pretrained(model, str(first[1]), adapter_name=first[0])
        for name, folder in others:
            made.load_adapter(str(folder), adapter_name=name)
        return made.eval()


def spread(values: Sequence[float]) -> list[float]:
    """[lower quartile, median, upper quartile]"""
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4)
    return [low, middle, high]


def against_base(base: Callable[[], Any], others: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The quartiles of each one's seconds over the base's, round by round; and the base's own milliseconds."""
    for act in (base, *others.values()):
        act()
    taken: dict[str, list[float]] = {name: [] for name in others}
    alone: list[float] = []
    for turn in range(rounds):
        # In another order each round: what ran before leaves the caches and the clock rate of the processor.
        acts = list(others.items())
        acts = acts[turn % len(acts) :] + acts[: turn % len(acts)]
        alone.append(seconds(base))
        for name, act in acts:
            taken[name].append(seconds(act) / alone[-1])
    return {"base alone, ms": spread([1e3 * s for s in alone])} | {name: spread(ratios) for name, ratios in taken.items()}


def seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def traffic(shape: str, adapters: int, rows: int, rng: np.random.Generator) -> list[int]:
    """The adapter of each row."""
    if shape == "identical":
        return [0] * rows
    if shape == "skewed":
        weights = 1 / np.arange(1, adapters + 1) ** SKEW
        return sorted(rng.choice(adapters, rows, p=weights / weights.sum()).tolist())
    return sorted(i % adapters for i in range(rows))    # uniform; distinct where there are as many adapters as rows


def batch_of(refs: Sequence[AdapterRef | None]) -> Batch:
    """Rows in this order, which is by adapter."""
    sets = list(dict.fromkeys((ref,) if ref else () for ref in refs))
    return Batch("hidden", tuple(Segment(one, tuple(i for i, ref in enumerate(refs) if ((ref,) if ref else ()) == one)) for one in sets))


def forward(rounds: int, quick: bool, device: str, root: Path) -> Figures:
    """MiniLM, one forward of hidden states."""
    base = FrozenBase.load(DEFAULT_MODEL, device=device)
    shelf = Shelf(base, root, ADAPTERS, task_type="FEATURE_EXTRACTION")
    rng = np.random.default_rng(0)
    peft = shelf.peft(AutoModel.from_pretrained(base.path).to(device), ADAPTERS)
    figures: Figures = {}
    for rows in (64,) if quick else (1, 8, 64):
        ids = torch.tensor(rng.integers(1000, 20000, (rows, TOKENS)), device=device)
        mixed, by_groups = partial(mixed_forward, shelf, inputs_of(ids)), partial(grouped, peft, ids)
        acts: dict[str, Callable[[], Any]] = {}
        with shelf.engine.slots.hold(shelf.refs) as held:
            if not figures:
                figures["making a merged copy, ms"] = 1e3 * seconds(partial(shelf.engine.slots.merged, shelf.refs[0], held[0]))
            acts["1 adapter, merged for a job"] = partial(plain, base.body_of(shelf.engine.slots.merged(shelf.refs[0], held[0])), ids)
            for distinct in [n for n in DISTINCT if n <= rows]:
                chosen = traffic("uniform", distinct, rows, rng)
                acts[_counted(distinct)] = partial(mixed, [shelf.refs[i] for i in chosen])
                acts[f"PEFT adapter_names, {_counted(distinct)}"] = partial(plain, peft, ids, adapter_names=[str(i) for i in chosen])
                if distinct in (1, 8, 64):
                    acts[f"PEFT set_adapter group by group, {_counted(distinct)}"] = partial(by_groups, [str(i) for i in chosen])
            acts["skewed over 64 adapters"] = partial(mixed, [shelf.refs[i] for i in traffic("skewed", ADAPTERS, rows, rng)])
            acts["half base rows, 32 adapters"] = partial(mixed, [None] * (rows // 2) + shelf.refs[: rows - rows // 2])
            acts["base rows beside 64 resident"] = partial(mixed, [None] * rows)
            found = against_base(partial(plain, base.body, ids), acts, rounds)
        figures |= {f"forward, {rows} rows, {name}": value for name, value in found.items()}
    return figures


def inputs_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plain(model: Any, ids: torch.Tensor, **more: Any) -> None:
    with torch.inference_mode():
        model(**inputs_of(ids), **more)


def grouped(peft: PeftModel, ids: torch.Tensor, names: Sequence[str]) -> None:
    for name in dict.fromkeys(names):
        peft.set_adapter(name)
        plain(peft, ids[[i for i, other in enumerate(names) if other == name]])


def mixed_forward(shelf: Shelf, inputs: dict[str, torch.Tensor], refs: Sequence[AdapterRef | None]) -> None:
    """What `Engine.predict` does for one batch, without texts and heads."""
    batch = batch_of(refs)
    shares = [((ref, 1.0),) if ref else () for ref in refs]
    with shelf.engine.slots.hold(batch.adapters) as held, torch.inference_mode(), shelf.engine._open(batch, held, shares):
        shelf.base.body(**inputs)


def generated(model: Any, ids: torch.Tensor, **more: Any) -> None:
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(**inputs_of(ids), **settings, **more)


def mixed_generation(shelf: Shelf, ids: torch.Tensor, refs: Sequence[AdapterRef | None]) -> None:
    batch = batch_of(refs)
    shares = [((ref, 1.0),) if ref else () for ref in refs]
    with shelf.engine.slots.hold(batch.adapters) as held, torch.inference_mode(), shelf.engine._open(batch, held, shares, steps=True):
        generated(shelf.base.model, ids)


def _counted(count: int) -> str:
    return f"{count} adapter" + ("s" if count > 1 else "")


def generation(rounds: int, quick: bool, device: str, root: Path) -> Figures:
    """A causal model of 135M parameters, shaped like Llama: prompts of 32 tokens, 16 more written."""
    small = {"hidden_size": 72, "num_hidden_layers": 4} if quick else {}
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, **small}
    folder = tiny_model(root / "llama", "llama")    # for its tokenizer
    tokens = {"vocab_size": 49152, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**tokens, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    base = FrozenBase.load(folder, device=device)
    shelf = Shelf(base, root / "adapters", max(LLAMA_DISTINCT), task_type="CAUSAL_LM")
    peft = shelf.peft(LlamaForCausalLM.from_pretrained(folder).to(device), max(LLAMA_DISTINCT))
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(3, 300, (LLAMA_ROWS, PROMPT_TOKENS)), device=device)
    acts: dict[str, Callable[[], Any]] = {}
    with shelf.engine.slots.hold(shelf.refs):
        for distinct in LLAMA_DISTINCT:
            chosen = traffic("uniform", distinct, LLAMA_ROWS, rng)
            acts[_counted(distinct)] = partial(mixed_generation, shelf, ids, [shelf.refs[i] for i in chosen])
            acts[f"PEFT adapter_names, {_counted(distinct)}"] = partial(generated, peft, ids, adapter_names=[str(i) for i in chosen])
        acts["base rows beside 16 resident"] = partial(mixed_generation, shelf, ids, [None] * LLAMA_ROWS)
        found = against_base(partial(generated, base.model, ids), acts, rounds)
    return {f"generation, {name}": value for name, value in found.items()}


def loading(_: int, quick: bool, device: str, root: Path) -> Figures:
    """Loads of cold adapters into one slot after another, each evicting another: 16 adapters' files, 64 of them resident at most."""
    base = FrozenBase.load(DEFAULT_MODEL, device=device)
    shelf = Shelf(base, root, 16, task_type="FEATURE_EXTRACTION")
    loads = 100 if quick else LOADS
    slots = shelf.engine.slots
    process, taken, before = psutil.Process(), [], None
    for turn in range(loads):
        ref = AdapterRef(f"copy-{turn}", 1)
        shelf.folders[ref] = shelf.folders[shelf.refs[turn % 16]]
        start = time.perf_counter()
        with slots.hold([ref]):
            taken.append(time.perf_counter() - start)
        if turn == slots.slots_max:    # all places are taken: from here on each load evicts
            before = process.memory_info().rss
    assert before is not None
    first, last = taken[1 : 1 + 32], taken[-32:]    # the first of all builds what the others share
    return {
        "cold load, ms": spread([1e3 * s for s in taken]),
        "the 1,000th load over the 1st": statistics.median(last) / statistics.median(first),
        "bytes after 1,000 loads and evictions over before": process.memory_info().rss / before,
        "adapter, MB": shelf.engine.slots.facts(shelf.refs[0]).bytes / 1e6,
    }


def slots(rounds: int, quick: bool, device: str, root: Path) -> Figures:
    """A job's seconds with fewer slots than adapters, over the same with all resident; traffic by Zipf's law."""
    base = FrozenBase.load(DEFAULT_MODEL, device=device)
    shelf = Shelf(base, root, int(SLOTS * max(WORKING_SETS)), task_type="FEATURE_EXTRACTION")
    rng = np.random.default_rng(0)
    words = ["balance", "card", "transfer", "flight", "recipe", "weather", "meeting", "song"]
    figures: Figures = {}
    for over in WORKING_SETS:
        count = int(SLOTS * over)
        chosen = traffic("skewed", count, 128 if quick else 512, rng)
        rng.shuffle(chosen)
        asked = [Request(" ".join(rng.choice(words, 12)), shelf.refs[i]) for i in chosen]
        few, many = Engine(base, shelf.load, slots_max=SLOTS), Engine(base, shelf.load, slots_max=count)
        found = against_base(partial(many.predict, asked), {"few": partial(few.predict, asked)}, max(3, rounds // 3))
        figures[f"seconds at a working set of {over:g} × the slots, over all resident"] = found["few"]
    return figures


def jobs(rounds: int, quick: bool, device: str, root: Path, data: Path | None = None) -> Figures:
    """CLINC150's test inputs, shuffled, from a file into a file: `Hub.run`, a plain script, and one bare forward of the base.

    The plain script is what one writes with the libraries: 64 rows at a time, sentence-transformers for the vectors, the closest
    centroid for the adapter, then PEFT with one adapter after another. Adapters are random, with a head of 15 labels: speed alone.
    """
    if data is None:
        print("jobs: left out, --data names no folder with clinc150/data_full.json")
        return {}
    upstream = json.loads((data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    intents = sorted({intent for _, intent in upstream["train"]})
    rng = np.random.default_rng(0)
    texts = [text for text, _ in upstream["test"]]
    texts = [texts[i] for i in rng.permutation(len(texts))[: 128 if quick else 1024]]
    source = root / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    base = FrozenBase.load(DEFAULT_MODEL, device=device)
    encoder = SentenceTransformer(str(base.path), device=device)
    figures: Figures = {}
    for count in (10, 64):
        home = {intent: i * count // len(intents) for i, intent in enumerate(intents)}
        train = [(text, home[intent]) for text, intent in upstream["train"][:: 30 if quick else 5]]
        folders = [make_adapter(base, root / f"{count}-{i}", seed=i, r=RANK, task_type="SEQ_CLS", outputs=15) for i in range(count)]
        hub = Hub.create(root / f"registry-{count}")
        for i, folder in enumerate(folders):
            hub.register(f"task-{i:02d}", folder, examples=[text for text, at in train if at == i], labels=[f"label {c}" for c in range(15)])
        hub.settle()
        centroids = np.stack([encoder.encode([text for text, at in train if at == i]).mean(axis=0) for i in range(count)])
        peft = PeftModel.from_pretrained(task_model(base, "SEQ_CLS", 15), str(folders[0]), adapter_name="0").eval()
        for i, folder in enumerate(folders[1:], 1):
            peft.load_adapter(str(folder), adapter_name=str(i))

        def script(peft: PeftModel = peft, centroids: Any = centroids) -> None:
            with (root / "script.jsonl").open("w", encoding="utf-8") as out, torch.inference_mode():
                for start in range(0, len(texts), 64):
                    rows = texts[start : start + 64]
                    chosen = (encoder.encode(rows) @ centroids.T).argmax(axis=1)
                    answers = {}
                    for i in np.unique(chosen):
                        peft.set_adapter(str(i))
                        places = np.flatnonzero(chosen == i)
                        inputs = encoder.tokenizer([rows[p] for p in places], padding=True, truncation=True, return_tensors="pt").to(device)
                        answers |= dict(zip(places.tolist(), peft(**inputs).logits.argmax(dim=1).tolist(), strict=True))
                    out.writelines(json.dumps({"text": row, "adapter": int(chosen[p]), "label": answers[p]}) + "\n" for p, row in enumerate(rows))

        def bare() -> None:
            order = sorted(texts, key=len)
            with torch.inference_mode():
                for start in range(0, len(order), 64):
                    base.body(**base.tokenize(order[start : start + 64]))

        acts = {"run": partial(hub.run, source, root / "out.jsonl", overwrite=True, max_false_reject=0), "script": script}
        found = against_base(bare, acts, max(3, rounds // 3))
        figures |= {
            f"jobs, {count} adapters, rows a second of `run` over the bare forward's": 1 / found["run"][1],
            f"jobs, {count} adapters, rows a second of `run` over the plain script's": found["script"][1] / found["run"][1],
            f"jobs, {count} adapters, rows a second of `run`": 1e3 * len(texts) / (found["base alone, ms"][1] * found["run"][1]),
        }
    return figures


SECTIONS: dict[str, Callable[..., Figures]] = {"forward": forward, "generation": generation, "loading": loading, "slots": slots, "jobs": jobs}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: does it run?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with clinc150, for the jobs")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="where the figures go; results/engine.json for a whole run")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    figures: Figures = {}
    load = os.getloadavg()[0]
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            more = {"data": arguments.data} if name == "jobs" else {}
            figures |= SECTIONS[name](2 if arguments.quick else arguments.rounds, arguments.quick, arguments.device, Path(scratch), **more)
    show(figures)
    below = [name for name, value in figures.items() if missed(name, value)]
    report = {
        "benchmark": "engine",
        **{name: [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4) for name, value in figures.items()},
        "bars_missed": below,
        "threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, {arguments.device}",
    }
    whole = len(names) == len(SECTIONS) and not arguments.quick
    if out := arguments.out or (RESULTS if whole else None):
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 1 if below and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
