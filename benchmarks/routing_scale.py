"""How fast, how large and how right the router's first stage is with 100,000 adapters of 8 prototypes.

    python benchmarks/routing_scale.py [--adapters 100000] [--prototypes 8] [--data DIR]

Prototypes are class means plus noise of the classes' own shape, at unit length, float16: CLINC150's classes by the default encoder
where DIR/clinc150/data_full.json is named, else made ones. Queries are held-out draws of the same kind and, with DIR, validation texts.
The 128 rows that the index finds are scored again exactly; recall counts queries whose best adapter is that of an exact search.
Building and serving each run in a process of their own. Other work on the machine moves times, so the processor time of a query is
shown beside them. The last line is JSON.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from adapter_hub.base_model import DEFAULT_MODEL
from adapter_hub.routing.encoder import load_encoder
from adapter_hub.routing.index import FaissIndex

RESULTS = Path(__file__).parent / "results" / "routing_scale.json"
FOUND = 128               # rows of the first stage that are scored again
PER_CLASS = 40            # train texts behind a class mean
NOISE = 0.5               # of a prototype, over the noise of a single text
QUERIES = 1000            # of each kind
SINGLES = 300             # queries sent one at a time
REPEATS = 5
BLOCK = 50_000
# What the issue asks for: (least, most).
BARS: dict[str, tuple[float | None, float | None]] = {
    "recall_at_1": (0.99, None), "one_query_ms": (None, 2.0), "batched_ms": (None, 0.3), "open_s": (None, 5.0), "memory_mib": (None, 1.5e9 / 2**20),
}
Floats = NDArray[np.float32]
Figures = dict[str, Any]


class Source:
    """Draws unit vectors around class means; n draws, d width."""

    def __init__(self, means: Floats, residuals: Floats) -> None:
        self.means = means                                                          # (classes, d), shorter than 1
        covariance = np.cov(residuals, rowvar=False) + 1e-8 * np.eye(means.shape[1])
        self._shape = np.linalg.cholesky(covariance).T.astype(np.float32)           # (d, d)

    def draw(self, count: int, rng: np.random.Generator, noise: float) -> Floats:
        vectors = self.means[rng.integers(len(self.means), size=count)]
        return unit(vectors + noise * rng.standard_normal(vectors.shape, dtype=np.float32) @ self._shape)

    @classmethod
    def made(cls) -> Source:
        """150 classes as far apart and as wide as CLINC150's."""
        rng = np.random.default_rng(0)
        return cls(0.71 * unit(rng.standard_normal((150, 384), np.float32)), 0.68 / np.sqrt(384) * rng.standard_normal((6000, 384), np.float32))


def from_texts(file: Path) -> tuple[Source, Floats]:
    """CLINC150's classes, and its validation texts as vectors."""
    data, encoder = json.loads(file.read_text(encoding="utf-8")), load_encoder(DEFAULT_MODEL)
    by_label: dict[str, list[str]] = {}
    for text, label in data["train"]:
        by_label.setdefault(label, []).append(text)
    vectors = encoder.encode([text for texts in by_label.values() for text in texts[:PER_CLASS]]).reshape(len(by_label), PER_CLASS, -1)
    means = vectors.mean(axis=1)
    chosen = np.random.default_rng(3).choice(len(data["val"]), QUERIES, replace=False)
    return Source(means, (vectors - means[:, None]).reshape(-1, means.shape[1])), encoder.encode([data["val"][i][0] for i in chosen])


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def prepare(folder: Path, data: Path | None, count: int) -> list[str]:
    """Write rows, queries and each query's true best row; return the names of the kinds of query, QUERIES of each."""
    source, texts = from_texts(data / "clinc150" / "data_full.json") if data else (Source.made(), None)
    rng = np.random.default_rng(1)
    rows = np.empty((count, source.means.shape[1]), np.float16)
    for start in range(0, count, BLOCK):
        rows[start : start + BLOCK] = source.draw(len(rows[start : start + BLOCK]), rng, NOISE)
    kinds = {"held-out prototypes": source.draw(QUERIES, rng, NOISE), "held-out inputs": source.draw(QUERIES, rng, 1.0)}
    if texts is not None:
        kinds["validation texts"] = texts
    queries = np.concatenate(list(kinds.values()))
    best, top = np.zeros(len(queries), np.int64), np.full(len(queries), -np.inf, np.float32)
    for start in range(0, count, BLOCK):
        scores = queries @ rows[start : start + BLOCK].astype(np.float32).T
        place = scores.argmax(axis=1)
        score = scores[np.arange(len(queries)), place]
        best, top = np.where(score > top, place + start, best), np.maximum(score, top)
    for name, array in (("rows", rows), ("queries", queries), ("best", best)):
        np.save(folder / f"{name}.npy", array)
    return list(kinds)


def build(folder: Path) -> Figures:
    rows = np.load(folder / "rows.npy")
    index, build_s, build_cpu_s = timed(lambda: FaissIndex.build(rows))
    _, save_s, _ = timed(lambda: index.save(folder / "rows.index"))
    return {"build_s": build_s, "build_cpu_s": build_cpu_s, "save_s": save_s, "index_bytes": (folder / "rows.index").stat().st_size}


def serve(folder: Path, prototypes: int, kinds: list[str]) -> Figures:
    queries, best = np.load(folder / "queries.npy"), np.load(folder / "best.npy")
    before = memory_mib()

    def opened() -> tuple[NDArray[np.float16], FaissIndex]:
        return np.load(folder / "rows.npy"), FaissIndex.open(folder / "rows.index")

    (rows, index), first_s, _ = timed(opened)

    def both(asked: Floats) -> NDArray[np.int64]:
        return rescored(rows, asked, index.search(asked, FOUND)[1])

    found = both(queries)
    memory = memory_mib() - before
    opens = [first_s, *(timed(opened)[1] for _ in range(REPEATS - 1))]
    right = (found // prototypes == best // prototypes).reshape(len(kinds), QUERIES).mean(axis=1)
    single = np.random.default_rng(4).choice(len(queries), SINGLES, replace=False)
    figures: Figures = {"recall_at_1": float(right.mean())} | {f"recall_at_1, {k}": float(r) for k, r in zip(kinds, right, strict=True)}
    figures |= {"open_s": statistics.median(opens), "open_s_spread": [min(opens), max(opens)], "memory_mib": memory, "rows_bytes": rows.nbytes}
    for name, act in (("", lambda asked: index.search(asked, FOUND)), ("_rescored", both)):
        ones = [timed(lambda i=i, act=act: act(queries[i : i + 1])) for i in single]
        batches = [timed(lambda act=act: act(queries)) for _ in range(REPEATS)]
        wall, batch = [1e3 * s for _, s, _ in ones], [1e3 * s / len(queries) for _, s, _ in batches]
        figures |= {
            f"one_query{name}_ms": statistics.median(wall),
            f"one_query{name}_ms_p95": float(np.percentile(wall, 95)),
            f"one_query{name}_cpu_ms": statistics.median(1e3 * c for _, _, c in ones),
            f"batched{name}_ms": statistics.median(batch),
            f"batched{name}_ms_spread": [min(batch), max(batch)],
            f"batched{name}_cpu_ms": statistics.median(1e3 * c / len(queries) for _, _, c in batches),
        }
    return figures


def rescored(rows: NDArray[np.float16], queries: Floats, found: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the greatest exact product among those found, for each query."""
    best = np.empty(len(queries), np.int64)
    for i, (query, places) in enumerate(zip(queries, found, strict=True)):
        best[i] = places[(rows[places].astype(np.float32) @ query).argmax()]
    return best


def timed(act: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what it gave, seconds by the clock, seconds of processor)."""
    start, cpu = time.perf_counter(), time.process_time()
    result = act()
    return result, time.perf_counter() - start, time.process_time() - cpu


def memory_mib() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


def alone(act: Callable[..., Figures], *arguments: Any) -> Figures:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(act, *arguments).result()


def within(name: str, value: float) -> bool:
    least, most = BARS[name]
    return (least is None or value >= least) and (most is None or value <= most)


def show(figures: Figures, title: str) -> None:
    table = Table(title=title)
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    for name, value in figures.items():
        least, most = BARS.get(name, (None, None))
        bar = f"≥ {least:g}" if least is not None else f"≤ {most:.4g}" if most is not None else ""
        shown = " – ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
        table.add_row(name, shown, bar, "" if name not in BARS else "met" if within(name, value) else "MISSED")
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--prototypes", type=int, default=8, help="of each adapter")
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="folder with clinc150/data_full.json")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="where the figures go as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        kinds = prepare(folder, arguments.data, arguments.adapters * arguments.prototypes)
        load = os.getloadavg()[0]
        figures = alone(build, folder) | alone(serve, folder, arguments.prototypes, kinds)
    show(figures, f"{arguments.adapters:,} adapters × {arguments.prototypes} prototypes, {'CLINC150' if arguments.data else 'made'} classes")
    missed = [name for name in BARS if not within(name, figures[name])]
    report = {
        "benchmark": "routing_scale",
        "adapters": arguments.adapters,
        "prototypes": arguments.prototypes,
        "vectors": "clinc150" if arguments.data else "made",
        **{name: [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4) for name, value in figures.items()},
        "bars_missed": missed,
        "load_before": round(load, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, FAISS {faiss.__version__}",
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
