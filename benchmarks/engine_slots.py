"""Loading adapters, what they take, and what a working set larger than the slots costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from engine_rounds import ROWS, WORDS, Act, Figures, Settings, Shelf, against_base, minilm, mixed, seconds, spread, traffic

from adapter_hub.engine.engine import Engine, Request
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import task_model

FILES = 16      # adapters on disk, each loaded under many names
LOADS = 1000
NEAR = 16       # loads before and after the nth that its time is the median of
WORKING_SETS = (0.5, 0.75, 1, 1.5, 2, 3, 4)    # over the slots
SLOTS = 8
ADAPTERS = 64


def loading(settings: Settings, root: Path) -> Figures:
    """1,000 cold loads: into 64 places, each evicting another in the end; and into 1,000 places, where all stay."""
    base = minilm(settings, root)
    shelf = Shelf(base, root, FILES, task_type="FEATURE_EXTRACTION")
    loads = 100 if settings.quick else LOADS
    process = psutil.Process()
    resident: list[int] = []
    taken = _loads(shelf, shelf.engine, loads, lambda: resident.append(process.memory_info().rss))
    before, after = resident[ADAPTERS], resident[-1]    # from there on each load evicts
    first, last = taken[1 : 1 + 32], taken[-32:]        # the first of all builds what the others share
    figures: Figures = {
        "cold load, ms": spread([1e3 * s for s in taken]),
        "the 1,000th load over the 1st": statistics.median(last) / statistics.median(first),
        "bytes after 1,000 loads and evictions over before": after / before,
        "adapter, MB": shelf.engine.slots.facts(shelf.refs[0]).bytes / 1e6,
    }
    for places, times in ((ADAPTERS, taken), (loads, _loads(shelf, shelf.engine_of(loads), loads))):
        figures[f"cold load, the 1st into {places} places, ms"] = 1e3 * times[0]
        for nth in (n for n in (10, 100, 1000) if n <= loads):
            near = times[max(1, nth - NEAR) : nth + NEAR]
            figures[f"cold load, the {nth:,}th into {places} places, ms"] = spread([1e3 * s for s in near])
        figures[f"cold load, the slowest but the 1st into {places} places, ms"] = 1e3 * max(times[1:])
    return figures


def _loads(shelf: Shelf, engine: Engine, loads: int, then: Act = lambda: None) -> list[float]:
    """Seconds of each."""
    taken = []
    for turn in range(loads):
        ref = AdapterRef(f"copy-{turn}", 1)
        shelf.folders[ref] = shelf.folders[shelf.refs[turn % FILES]]
        taken.append(seconds(partial(engine.slots.facts, ref)))
        then()
    return taken


def slots(settings: Settings, root: Path) -> Figures:
    """8 slots: seconds over the same with all resident, of one request of 512 rows (a job's) and of 64 rows at a time; Zipf's law."""
    base = minilm(settings, root)
    shelf = Shelf(base, root, int(SLOTS * max(WORKING_SETS)), task_type="FEATURE_EXTRACTION")
    rng = np.random.default_rng(0)
    figures: Figures = {}
    for over in WORKING_SETS[::3] if settings.quick else WORKING_SETS:
        count = int(SLOTS * over)
        chosen = traffic("skewed", count, 128 if settings.quick else 512, rng)
        rng.shuffle(chosen)
        asked = shelf.asked(chosen, rng)
        few, many = shelf.engine_of(SLOTS), shelf.engine_of(count)

        def by_64(engine: Engine, asked: Sequence[Request] = asked) -> None:
            for at in range(0, len(asked), ROWS):
                engine.predict(asked[at : at + ROWS])

        for name, ask in (("", lambda engine, asked=asked: engine.predict(asked)), (", 64 rows at a time", by_64)):
            found = against_base(partial(ask, many), {"few": partial(ask, few)}, max(2, settings.rounds // 3))
            figures[f"seconds{name} at a working set of {over:g} × the slots, over all resident"] = found["few"]
    return figures


def memory(settings: Settings, root: Path) -> Figures:
    """What resident adapters take, over their files and the base; on CUDA also the most that one mixed forward takes over the base's."""
    base = minilm(settings, root)
    count = 8 if settings.quick else ADAPTERS
    shelf = Shelf(base, root, count, task_type="FEATURE_EXTRACTION")
    weights = _bytes(base.model.parameters())
    files = sum((folder / "adapter_model.safetensors").stat().st_size for folder in shelf.folders.values())
    peft = shelf.peft(task_model(base, "FEATURE_EXTRACTION"))
    inputs = base.tokenize([" ".join(WORDS * 4)] * ROWS)
    with shelf.engine.slots.hold(shelf.refs) as held:
        own = {id(tensor) for tensor in base.model.parameters()}
        copied = [tensor for tensor in shelf.engine.slots.merged(shelf.refs[0], held[0]).parameters() if id(tensor) not in own]
        figures: Figures = {
            f"memory, {count} adapters resident over their files": shelf.engine.slots.bytes / files,
            f"memory, {count} adapters in PEFT over their files": _bytes(p for name, p in peft.named_parameters() if "lora_" in name) / files,
            f"memory, {count} adapters resident over the base": shelf.engine.slots.bytes / weights,
            "memory, one merged copy over the base": _bytes(copied) / weights,
        }
        if settings.device != "cpu":
            refs = sorted(shelf.refs[i % count] for i in range(ROWS))
            alone, adapted = (_peak(partial(mixed, shelf, partial(base.model, **inputs), rows)) for rows in ([None] * ROWS, refs))
            figures["memory, a mixed forward's peak over the base's"] = adapted / alone
    return figures


def _peak(act: Act) -> int:
    """Bytes beyond what is there before."""
    act()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    act()
    return torch.cuda.max_memory_allocated() - before


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
