"""What fewer bits cost: CLINC150's test inputs, each with its adapter named, on the base in float32, bfloat16 and int8.

    python benchmarks/precision.py --data DIR [--rows N] [--rounds 15] [--registry registry] [--lm FOLDER]

Accuracy, labels and probabilities are compared input by input with float32's; seconds of one mixed batch with float32's in the same
round. `--rows` takes every k-th input. With `--lm` a causal model's greedy tokens are compared too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from clinc150 import test_rows
from rich.console import Console
from rich.table import Table

from adapter_hub import Hub
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.prediction import Prediction
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter

RESULTS = Path(__file__).parent / "results" / "precision.json"
PRECISIONS = ("float32", "bfloat16", "int8")
CHUNK_ROWS, BATCH_ROWS = 512, 64
NEW_TOKENS, LM_ADAPTERS = 64, 3
PROMPTS = ("Once upon a time", "The little dog", "Lily went to the park and", "One day, a big")
PROMPTS += ("Tom said", "The sun was", "She had a red", "In the forest")
Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with data_full.json and domains.json")
    parser.add_argument("--registry", type=Path, default=Path(__file__).parent.parent / "registry", metavar="DIR")
    parser.add_argument("--rows", type=int, default=0, help="about so many of the 4,500 in-scope inputs; by default all")
    parser.add_argument("--rounds", type=int, default=15, help="of the timed batch")
    parser.add_argument("--lm", default=os.environ.get("ADAPTER_HUB_TEST_LM"), metavar="FOLDER", help="a small causal language model")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    rows = [row for row in test_rows(arguments.data) if row["domain"] is not None]
    rows = rows[:: max(1, len(rows) // arguments.rows)] if arguments.rows else rows
    hubs = {precision: Hub.open(arguments.registry, precision=precision) for precision in PRECISIONS}
    figures = classified(hubs, rows)
    for precision, ratio in timed(hubs, rows, arguments.rounds).items():
        figures[precision] |= ratio
    if arguments.lm:
        for precision, written in generated(arguments.lm).items():
            figures[precision] |= written
    show(figures, len(rows))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    report = {"benchmark": "precision", "rows": len(rows), "rounds": arguments.rounds, "machine": machine, "precisions": figures}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


def classified(hubs: dict[str, Hub], rows: Sequence[dict[str, Any]]) -> dict[str, Figures]:
    """Of each precision: accuracy, what differs from the first one's answers, and what the base takes."""
    intents, figures, exact = [row["intent"] for row in rows], {}, None
    for precision, hub in hubs.items():
        found = named(hub, rows)
        exact = found if exact is None else exact
        pairs = list(zip(found, exact, strict=True))
        worst = max(abs(score - theirs.scores[label]) for mine, theirs in pairs for label, score in mine.scores.items())
        figures[precision] = {
            "intent_accuracy_named": share(mine.label == intent for mine, intent in zip(found, intents, strict=True)),
            "labels_equal": share(mine.label == theirs.label for mine, theirs in pairs),
            "probability_difference_max": round(worst, 5),
            "base_mib": round(hub.base.model.get_memory_footprint() / 2**20, 1),
        }
    return figures


def named(hub: Hub, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
    found: list[Prediction] = []
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        found += hub.predict([row["text"] for row in chunk], adapters=[row["domain"] for row in chunk])
    return found


def timed(hubs: dict[str, Hub], rows: Sequence[dict[str, Any]], rounds: int) -> dict[str, Figures]:
    """Seconds of one batch of all adapters over float32's in the same round: quartiles."""
    batch = rows[:: max(1, len(rows) // BATCH_ROWS)][:BATCH_ROWS]
    taken: dict[str, list[float]] = {precision: [] for precision in hubs}
    for turn in range(rounds + 1):
        for precision, hub in hubs.items():
            started = time.perf_counter()
            named(hub, batch)
            if turn:    # the first one loads
                taken[precision].append(time.perf_counter() - started)
    base = taken[PRECISIONS[0]]
    return {
        precision: {
            "batch_ms": round(1e3 * statistics.median(seconds), 1),
            "over_float32": [round(q, 3) for q in statistics.quantiles((mine / theirs for mine, theirs in zip(seconds, base, strict=True)), n=4)],
        }
        for precision, seconds in taken.items()
    }


def generated(lm: str) -> dict[str, Figures]:
    """Share of greedy tokens before the first that is not float32's, of the model alone and with adapters; and what it chooses next after
    each of float32's own tokens."""
    exact, figures = FrozenBase.load(lm), {}
    with tempfile.TemporaryDirectory() as root:
        folders = {AdapterRef(f"a{i}", 1): make_adapter(exact, Path(root) / str(i), seed=i, size=0.02) for i in range(LM_ADAPTERS)}
        asked = [Request(prompt, ref) for ref in (None, *folders) for prompt in PROMPTS]
        expected: list[list[int]] = []
        for precision in PRECISIONS:
            base = FrozenBase.load(lm, precision=precision)
            engine = Engine(base, lambda ref: read_adapter(folders[ref]))
            texts = [output.text or "" for output in engine.predict(asked, generation={"max_new_tokens": NEW_TOKENS})]
            tokens = base.tokenizer(texts, add_special_tokens=False)["input_ids"]
            expected = expected or tokens
            same = sum(common(mine, theirs) for mine, theirs in zip(tokens, expected, strict=True))
            figures[precision] = {
                "greedy_tokens_equal": round(same / sum(map(len, expected)), 4),
                "next_token_equal": round(float((chosen(base, asked, expected) == chosen(exact, asked, expected)).mean()), 4),
            }
    return figures


def chosen(base: FrozenBase, asked: Sequence[Request], written: Sequence[Sequence[int]]) -> np.ndarray:
    """The base's own next token after every token of what was written without an adapter."""
    found = []
    for request, tokens in zip(asked, written, strict=True):
        if request.adapter is None:
            prompt = list(base.encode([request.text])[0].ids["input_ids"])
            with torch.inference_mode():
                found.append(base.model(torch.tensor([prompt + list(tokens)])).logits[0, len(prompt) - 1 :].argmax(dim=-1).numpy())
    return np.concatenate(found)


def common(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))


def share(hits: Any) -> float:
    return round(float(np.mean(list(hits))), 5)


def show(figures: dict[str, Figures], rows: int) -> None:
    table = Table(title=f"CLINC150, {rows} in-scope test inputs with their adapters named")
    table.add_column("")
    for precision in figures:
        table.add_column(precision, justify="right")
    for figure in figures[PRECISIONS[-1]]:
        table.add_row(figure, *(str(found.get(figure, "")) for found in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
