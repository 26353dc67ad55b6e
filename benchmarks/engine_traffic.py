"""Many requests: threads that each ask for one row, and files answered from end to end."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_rounds import RANK, ROWS, Act, Figures, Settings, Shelf, against_base, minilm
from peft import PeftModel
from sentence_transformers import SentenceTransformer

from adapter_hub import Hub
from adapter_hub.base_model import DEFAULT_MODEL, FrozenBase
from adapter_hub.engine.queue import RequestQueue
from adapter_hub.testing import make_adapter, task_model

THREADS = (1, 2, 4, 8, 16)
ADAPTERS = 16


def threads(settings: Settings, root: Path) -> Figures:
    """Rows a second of threads that ask one row after another, over those of 64-row requests of the same rows by one thread."""
    base = minilm(settings, root)
    shelf = Shelf(base, root, ADAPTERS, task_type="FEATURE_EXTRACTION")
    rng, engine = np.random.default_rng(0), shelf.engine
    asked = shelf.asked(rng.integers(0, ADAPTERS, ROWS if settings.quick else 4 * ROWS).tolist(), rng)

    def together() -> None:
        for at in range(0, len(asked), ROWS):
            engine.predict(asked[at : at + ROWS])

    def by_threads(count: int, ask: Act) -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(ask, asked))

    with RequestQueue(engine) as queue:
        ways = {"predict": lambda one: engine.predict([one]), "submit": lambda one: queue.submit(one).result()}
        acts = {f"{count} × {way}": partial(by_threads, count, ask) for count in THREADS for way, ask in ways.items()}
        found = against_base(together, acts, settings.rounds)
    return {f"threads, {name}, rows a second over 64-row requests": [1 / ratio for ratio in reversed(found[name])] for name in acts}


def jobs(settings: Settings, root: Path) -> Figures:
    """CLINC150's test inputs, shuffled, from a file into a file: `Hub.run`, a plain script, and one bare forward of the base.

    The plain script is what one writes with the libraries: 64 rows at a time, sentence-transformers for the vectors, the closest
    centroid for the adapter, then PEFT with one adapter after another. Adapters are random, with a head of 15 labels: speed alone.
    """
    if settings.data is None:
        print("jobs: left out, --data names no folder with clinc150/data_full.json")
        return {}
    quick, device = settings.quick, settings.device
    upstream = json.loads((settings.data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    intents = sorted({intent for _, intent in upstream["train"]})
    rng = np.random.default_rng(0)
    texts = [text for text, _ in upstream["test"]]
    texts = [texts[i] for i in rng.permutation(len(texts))[: 128 if quick else 1024]]
    source = root / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    base = FrozenBase.load(DEFAULT_MODEL, device=device)
    encoder = SentenceTransformer(str(base.path), device=device)
    figures: Figures = {}
    for count in (10,) if quick else (10, 64):
        home = {intent: i * count // len(intents) for i, intent in enumerate(intents)}
        train = [(text, home[intent]) for text, intent in upstream["train"][:: 30 if quick else 5]]
        folders = [make_adapter(base, root / f"{count}-{i}", seed=i, r=RANK, task_type="SEQ_CLS", outputs=15) for i in range(count)]
        hub = Hub.create(root / f"registry-{count}", device=device)
        for i, folder in enumerate(folders):
            hub.register(f"task-{i:02d}", folder, examples=[text for text, at in train if at == i], labels=[f"label {c}" for c in range(15)])
        hub.settle()
        centroids = np.stack([encoder.encode([text for text, at in train if at == i]).mean(axis=0) for i in range(count)])
        peft = PeftModel.from_pretrained(task_model(base, "SEQ_CLS", 15), str(folders[0]), adapter_name="0").eval()
        for i, folder in enumerate(folders[1:], 1):
            peft.load_adapter(str(folder), adapter_name=str(i))
        peft.to(device)

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
        found = against_base(bare, acts, max(2, settings.rounds // 3))
        figures |= {
            f"jobs, {count} adapters, rows a second of `run` over the bare forward's": 1 / found["run"][1],
            f"jobs, {count} adapters, rows a second of `run` over the plain script's": found["script"][1] / found["run"][1],
            f"jobs, {count} adapters, rows a second of `run`": 1e3 * len(texts) / (found["base alone, ms"][1] * found["run"][1]),
        }
    return figures
