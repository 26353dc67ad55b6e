"""What the engine's benchmarks share: rounds of one act beside others, adapters on disk, and which row asks for which."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import BertConfig, BertModel

from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import DEFAULT_MODEL, FrozenBase
from adapter_hub.engine.engine import HIDDEN, Engine, Request
from adapter_hub.engine.plan import Batch, Segment
from adapter_hub.errors import ModelNotFound
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model

RANK = 8
ROWS = 64
SKEW = 1.1    # exponent of Zipf's law
WORDS = ("balance", "card", "transfer", "flight", "recipe", "weather", "meeting", "song")
SHAPE_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522}
Figures = dict[str, Any]    # a number, or [lower quartile, median, upper quartile]
Act = Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    rounds: int
    rows: tuple[int, ...]    # of the batches
    quick: bool
    device: str
    seven_b: bool
    data: Path | None
    peft: bool = True        # measure PEFT beside the engine


def minilm(settings: Settings, root: Path) -> FrozenBase:
    """MiniLM; where its package is not installed a model of its shape with random weights, which takes as long."""
    try:
        return FrozenBase.load(DEFAULT_MODEL, device=settings.device, local=True)
    except ModelNotFound:
        folder = tiny_model(root / "minilm")    # for its tokenizer
        BertModel(BertConfig(**SHAPE_MINILM, pad_token_id=0)).save_pretrained(folder)
        return FrozenBase.load(folder, device=settings.device)


class Shelf:
    """Adapters on disk for one base, and the engine that runs them."""

    def __init__(self, base: FrozenBase, root: Path, count: int, write: Callable[..., Path] = make_adapter, **settings: Any) -> None:
        self.base = base
        self.folders = {
            AdapterRef(f"task-{i:04d}", 1): write(base, root / f"{i}", seed=i, r=RANK, target_modules="all-linear", **settings)
            for i in range(count)
        }
        self.refs = list(self.folders)
        self._labels = tuple(f"label {c}" for c in range(settings["outputs"])) if "outputs" in settings else None
        self.engine = self.engine_of()

    def engine_of(self, slots_max: int = 64) -> Engine:
        """As many as there are places, whatever they take: an adapter of 7B parameters takes 40 MB and more."""
        return Engine(self.base, self.load, slots_max=slots_max, bytes_max=2**34)

    def load(self, ref: AdapterRef) -> Adapter:
        return read_adapter(self.folders[ref], labels=self._labels)

    def peft(self, model: Any) -> PeftModel:
        """All of them on this model, by name "0", "1", …; in the model's own type, as here."""
        first, *others = [(str(i), str(folder)) for i, folder in enumerate(self.folders.values())]
        how: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        made = PeftModel.from_pretrained(model, first[1], adapter_name=first[0], **how)
        for name, folder in others:
            made.load_adapter(folder, adapter_name=name, **how)
        return made.to(self.base.device).eval()

    def asked(self, chosen: Sequence[int], rng: np.random.Generator) -> list[Request]:
        """A text of twelve words for each."""
        return [Request(" ".join(rng.choice(WORDS, 12)), self.refs[i]) for i in chosen]


def spread(values: Sequence[float]) -> list[float]:
    """[lower quartile, median, upper quartile]"""
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def seconds(act: Act) -> float:
    """From an idle device to an idle device."""
    _wait()
    start = time.perf_counter()
    act()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def against_base(base: Act, others: Mapping[str, Act], rounds: int) -> dict[str, list[float]]:
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


def traffic(shape: str, adapters: int, rows: int, rng: np.random.Generator) -> list[int]:
    """The adapter of each row, in order. S-LoRA's and Punica's names: uniform is Identical for one adapter, Distinct for one a row."""
    if shape == "skewed":
        weights = 1 / np.arange(1, adapters + 1) ** SKEW
        return sorted(rng.choice(adapters, rows, p=weights / weights.sum()).tolist())
    return sorted(i % adapters for i in range(rows))


def counted(count: int) -> str:
    return f"{count} adapter" + ("s" if count > 1 else "")


def batch_of(refs: Sequence[AdapterRef | None], *, merged: bool = False) -> tuple[Batch, list[Any]]:
    """Rows in this order, which is by adapter; and each row's shares."""
    asked = [(ref,) if ref else () for ref in refs]
    segments = (Segment(one, tuple(i for i, other in enumerate(asked) if other == one)) for one in dict.fromkeys(asked))
    return Batch(HIDDEN, tuple(segments), merged), [tuple((ref, 1.0) for ref in one) for one in asked]


def mixed(shelf: Shelf, act: Act, refs: Sequence[AdapterRef | None], *, steps: bool = False) -> None:
    """What `Engine.predict` does for one batch, without texts and heads. `act` runs the base's model."""
    batch, shares = batch_of(refs)
    engine = shelf.engine
    with engine.slots.hold(batch.adapters) as held, torch.inference_mode(), engine._open(batch, held, shares, steps=steps):
        act()
