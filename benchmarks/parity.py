"""The engine against PEFT: the largest difference for every base, task type and adapter form, and whether generations are equal.

    python benchmarks/parity.py [--lm FOLDER]

One mixed batch of all adapters and the base, against PEFT with one adapter and one text at a time. Differences are relative to
max(1, |x|), with |x| the largest value that PEFT gives for the text. The last line is JSON; exit code 1 above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from rich.console import Console
from rich.table import Table

from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import SHAPES, make_adapter, tiny_model
from tests.engine.reference import FORMS, distance, references
from tests.engine.test_parity import LABELS, NEW_TOKENS, OWN_TASK, TASKS, TEXTS

RESULTS = Path(__file__).parent / "results" / "parity.json"
DIFFERENCE_MAX = 1e-5
HEADED = ("SEQ_CLS", "TOKEN_CLS")


def measure(base: FrozenBase, root: Path) -> dict[str, dict[str, float]]:
    """task -> form -> largest difference; infinity where a generated text differs."""
    folders: dict[AdapterRef, tuple[Path | None, str | None, str]] = {}
    for task in TASKS[base.kind]:
        for seed, (form, settings) in enumerate(FORMS.items()):
            folder = make_adapter(base, root / f"{task}-{form}", task_type=task, outputs=3, seed=seed, **settings)
            folders[AdapterRef(f"{task}-{form}".lower(), 1)] = (folder, task, form)

    def load(ref: AdapterRef) -> Adapter:
        folder, task, _ = folders[ref]
        assert folder is not None
        return read_adapter(folder, labels=LABELS if task in HEADED else None)

    versions: dict[AdapterRef | None, tuple[Path | None, str | None, str]] = {None: (None, OWN_TASK[base.kind], "base"), **folders}
    asked = [Request(text, ref) for ref in versions for text in TEXTS]
    outputs = iter(Engine(base, load).predict(asked, generation={"max_new_tokens": NEW_TOKENS}))
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for folder, task, form in versions.values():
        expected = references(base, folder, task, TEXTS, max_new_tokens=NEW_TOKENS, do_sample=False)
        found[str(task)][form] = max(difference(base, task)(next(outputs), one, text) for one, text in zip(expected, TEXTS, strict=True))
    return found


def difference(base: FrozenBase, task: str | None) -> Callable[[Output, Any, str], float]:
    def measured(output: Output, expected: Any, text: str) -> float:
        if task == "SEQ_CLS":
            return distance(list(output.scores.values()), expected)
        if task == "TOKEN_CLS":
            places = [t for t, (start, end) in enumerate(base.encode([text])[0].offsets) if end > start]
            return distance([token.score for token in output.tokens or ()], expected[places].max(axis=1))
        if isinstance(expected, str):
            return distance(output.text, expected)
        return distance(output.vector, expected) / max(1.0, float(np.abs(expected).max()))

    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lm", default=os.environ.get("ADAPTER_HUB_TEST_LM"), metavar="FOLDER", help="a small causal language model")
    lm = parser.parse_args().lm
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bases = {shape: (lambda shape=shape: FrozenBase.load(tiny_model(root / shape, shape))) for shape in SHAPES}
        bases |= {"all-MiniLM-L6-v2": FrozenBase.load} | ({Path(lm).name: lambda: FrozenBase.load(lm)} if lm else {})
        for name, make in bases.items():
            figures[name] = measure(make(), root / f"adapters-{name}")
    table = Table("base", "task", "base rows", *FORMS, box=None)
    for name, tasks in figures.items():
        for task, forms in tasks.items():
            table.add_row(name, task, *(f"{forms[form]:.1e}" if form in forms else "" for form in ("base", *FORMS)))
    Console(width=120).print(table)
    worst = max(value for tasks in figures.values() for forms in tasks.values() for value in forms.values())
    result = {"largest_difference": worst, "texts_equal": worst < float("inf"), "bases": list(figures), "forms": list(FORMS), "figures": figures}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("largest_difference", "texts_equal", "bases", "forms")}))
    return 0 if worst <= DIFFERENCE_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
