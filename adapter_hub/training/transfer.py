"""Start a new name's adapter from those nearest to it, where a short trial says that this helps.

Which adapters are nearest is the router's to say. Each of them is a start, and so are all together; each start and the cold one are
trained for equally many steps on the same rows, and asked the same rows that none was trained on. The best of several looks better than it
is on the rows that chose it, so each half of those rows chooses for the other: what the chosen gained there is the advantage, and the best
start of all rows is taken where that exceeds its standard error. Ranks need not agree: of a higher one the best approximation is taken, to a
lower one directions are added that do nothing yet.
"""

# i inputs of a module, o its outputs, r rank, k adapters, n rows

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.adapters.source import ADAPTER_WEIGHTS
from adapter_hub.adapters.weights import KEY_PREFIX, Adapter, LoraDelta
from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput, counted
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.training.config import ALL_LINEAR, TrainConfig
from adapter_hub.training.data import check_task, hold_out, split, task_seed
from adapter_hub.training.frozen import below
from adapter_hub.training.trials import losses_after
from adapter_hub.training.warm import Start

NEIGHBOURS_MAX = 2
STEPS = 30             # of each trial: what 60 tell, 20 told already (benchmarks/LOG.md)
ASKED_SHARE = 0.2      # of the training rows, in each of the two halves that are asked
DECIMALS = 6           # of stored figures
NOTHING = 1e-7         # of the largest singular value: below it there is no direction, but float32's rounding

Losses = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An adapter that a newcomer may start from."""

    ref: AdapterRef
    closeness: float    # higher is closer; the share of it in a combination follows from it
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Trial:
    """What one start gained over the cold one on all rows that were asked. Nats a row, positive where it is better."""

    origins: tuple[AdapterRef, ...]
    advantage: float    # mean
    error: float        # its standard error

    def to_json(self) -> dict[str, Any]:
        return {"origins": [str(ref) for ref in self.origins], **_rounded(self)}


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the trials found: the start to take, if any. Stored in gate.json."""

    trials: tuple[Trial, ...] = ()              # in the order of the starts
    advantage: float = 0.0                      # of the start that one half of the rows chose, on the other half: mean, nats a row
    error: float = math.inf                     # its standard error
    rows: int = 0                               # that were asked
    unfit: Mapping[AdapterRef, str] = field(default_factory=dict)    # nearer than those tried, and why they were not
    few: int | None = None                      # training rows, where they were too few to hold any out that could be asked

    @property
    def best(self) -> Trial | None:
        """On all rows: flattered, if it was chosen among several."""
        return max(self.trials, key=lambda trial: trial.advantage, default=None)

    @property
    def chosen(self) -> Trial | None:
        """The best, where it is to be taken."""
        return self.best if self.best and self.best.advantage > 0 and self.advantage > self.error else None

    @property
    def origins(self) -> tuple[AdapterRef, ...]:
        """Whose weights the new adapter begins with; none where it starts cold."""
        return self.chosen.origins if self.chosen else ()

    @property
    def note(self) -> str:
        """In words."""
        if self.best is None:
            why = "no adapter fits to start from" if self.few is None else f"{counted(self.few, 'row is', 'rows are')} too few to hold some out"
            return f"it starts cold: {why}"
        begins = f"from {' and '.join(map(str, self.origins))}" if self.origins else "cold"
        gains = f"{self.best.advantage:+.3f} ± {self.best.error:.3f} nats a row on {counted(self.rows, 'row')}"
        if len(self.trials) > 1:    # the best of several on the rows that chose it: what decides is another figure
            gains += f", and what one half of them chose {self.advantage:+.3f} ± {self.error:.3f} on the other half"
        return f"it starts {begins}: the best start gains {gains}"

    def to_json(self) -> dict[str, Any]:
        trials = [trial.to_json() | {"chosen": trial is self.chosen} for trial in self.trials]
        figures = _rounded(self) | {"rows": self.rows} if trials else {}
        return {"trials": trials, **figures, "unfit": {str(ref): why for ref, why in self.unfit.items()}}


def _rounded(found: Trial | Transfer) -> dict[str, float]:
    return {"advantage": round(found.advantage, DECIMALS), "error": round(found.error, DECIMALS)}


# ---- which fit ------------------------------------------------------------------------------------------------------


def fault_of(adapter: Adapter, base: FrozenBase, config: TrainConfig) -> str:
    """Why an adapter's weights are no start for a classifier of this config, to be read after a colon; empty where they are."""
    settings = adapter.settings
    if adapter.task_type is not TaskType.SEQ_CLS or adapter.problem_type is not ProblemType.SINGLE:
        return "it is no classifier of one label among several"
    if adapter.prompt_template is not None:
        return "it has a prompt template, and a new one is trained on the text alone"
    if settings.use_dora:
        return "it is a DoRA, whose pairs are nothing without its magnitudes, and a start is pairs alone"
    if config.use_dora:
        return "the config asks for a DoRA, whose magnitudes would not be those of another adapter's pairs"
    return "" if placed(adapter, base, config) else "it adapts none of the modules that the config names"


def placed(adapter: Adapter, base: FrozenBase, config: TrainConfig) -> dict[str, LoraDelta]:
    """Those of its pairs whose modules the config adapts too: with a smaller `layers_share` that is a part of them."""
    targets = config.target_modules
    lower = below(base.body, config) if targets == ALL_LINEAR else None    # type: ignore[arg-type]
    found = {}
    for module, delta in adapter.deltas.items():
        if isinstance(targets, str):
            named = re.fullmatch(targets, module) if targets != ALL_LINEAR else not (lower and re.fullmatch(lower, base.canonical(module)))
        else:
            named = any(module == ending or module.endswith(f".{ending}") for ending in targets)
        if named and not delta.embedding:
            found[module] = delta
    return found


# ---- starts ---------------------------------------------------------------------------------------------------------


def combined(parts: Sequence[tuple[LoraDelta, float]], r: int, scaling: float, fresh: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A (r, i), B (o, r)) whose `scaling · B A` is the best approximation of rank r to the weighted sum of the parts' own.

    Best in every unitarily invariant norm (Eckart and Young 1936, Mirsky 1960). Sums of A and B would be another thing: the product of sums
    has cross terms. The sum of k parts is [w₁s₁B₁ … wₖsₖBₖ] · [A₁; …; Aₖ] = (Q₁R₁)(Q₂R₂)ᵀ, so an SVD of R₁R₂ᵀ, as wide as the sum of their
    ranks, is all that is needed: the (o, i) matrix is never made. Each factor gets the root of the singular values. Where the sum has a lower
    rank than r, the rest begins as a fresh LoRA does, drawn from `fresh`: A as PEFT draws it (Kaiming, a = √5), B as nothing.
    """
    left = torch.cat([weight * delta.scaling * delta.b.double() for delta, weight in parts], dim=1)    # (o, kr)
    right = torch.cat([delta.a.double() for delta, _ in parts])                                         # (kr, i)
    (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    rank = int((s[:r] > NOTHING * s[0]).sum())
    root = (s[:rank] / scaling).sqrt()
    a, b = root[:, None] * (q2 @ vt[:rank].T).T, (q1 @ u[:, :rank]) * root
    # Zeros in both would stay zeros: neither has a gradient without the other.
    width = a.shape[1]
    noise = (2 * torch.rand(r - rank, width, generator=fresh, dtype=a.dtype) - 1) / math.sqrt(width)
    return torch.cat([a, noise]).float().contiguous(), torch.nn.functional.pad(b, (0, r - rank)).float().contiguous()


def start_of(neighbours: Sequence[Neighbour], base: FrozenBase, config: TrainConfig, task: str, folder: Path) -> Start:
    """A start with the LoRA pairs of these adapters together, weighted by their closeness, and no head. Written to `folder`."""
    total = sum(max(one.closeness, 0.0) for one in neighbours)
    shares = [max(one.closeness, 0.0) / total if total else 1 / len(neighbours) for one in neighbours]
    parts: dict[str, list[tuple[LoraDelta, float]]] = {}
    for one, share in zip(neighbours, shares, strict=True):
        for module, delta in placed(one.adapter, base, config).items():
            parts.setdefault(module, []).append((delta, share))
    scaling = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    tensors: dict[str, Tensor] = {}
    fresh = torch.Generator().manual_seed(task_seed(config.seed, task, ()))
    for module, pairs in sorted(parts.items()):
        a, b = combined(pairs, config.r, scaling, fresh)
        tensors |= {f"{KEY_PREFIX}{module}.lora_A.weight": a, f"{KEY_PREFIX}{module}.lora_B.weight": b}
    folder.mkdir(parents=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return Start(folder, ())


# ---- trials ---------------------------------------------------------------------------------------------------------


def judged(cold: Losses, warm: Mapping[tuple[AdapterRef, ...], Losses], half: int) -> Transfer:
    """What the starts gained. Losses (n,) are of the same rows in the same order; the first `half` and the others choose for each other."""
    gains = np.array([cold - losses for losses in warm.values()])    # (starts, n)
    first, second = gains[:, :half], gains[:, half:]
    unseen = np.concatenate([first[second.mean(axis=1).argmax()], second[first.mean(axis=1).argmax()]])
    trials = tuple(Trial(origins, *_mean(own)) for origins, own in zip(warm, gains, strict=True))
    return Transfer(trials, *_mean(unseen), len(cold))


def _mean(gains: Losses) -> tuple[float, float]:
    """(mean, its standard error)"""
    return float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(len(gains)))


def transfer(
    base: FrozenBase,
    rows: Sequence[Example],
    neighbours: Sequence[Neighbour],
    *,
    task: str,
    config: TrainConfig,
    folder: Path,
    unfit: Mapping[AdapterRef, str] | None = None,
    steps: int = STEPS,
    validated: bool = False,
) -> tuple[Start | None, Transfer]:
    """(what to start from, what the trials found). The neighbours fit (`fault_of`); starts are written below `folder`.

    Rows that `train_adapter` will hold out to measure what it makes of these choose nothing, unless it is given validation rows
    (`validated`). Too few rows to hold any out decide for a cold start. Raises InvalidInput as `train_adapter`.
    """
    seed = task_seed(config.seed, task, check_task(rows, None))
    groups = [(one,) for one in neighbours] + ([tuple(neighbours)] if len(neighbours) > 1 else [])
    try:
        rest = rows if validated else hold_out(rows, config.validation_share, seed)[0]
        train, first, second = split(rest, None, ASKED_SHARE, seed)
    except InvalidInput:
        groups = []
    if not groups or first is train:
        return None, Transfer(unfit=dict(unfit or {}), few=len(rows) if neighbours else None)
    starts = {tuple(one.ref for one in group): start_of(group, base, config, task, folder / str(i)) for i, group in enumerate(groups)}
    asked, brief = [*first, *second], dataclasses.replace(config, progress=False, align_steps=0)    # as many steps for each
    cold, *warm = (losses_after(base, train, asked, steps=steps, task=task, config=brief, start=start) for start in (None, *starts.values()))
    found = dataclasses.replace(judged(cold, dict(zip(starts, warm, strict=True)), len(first)), unfit=dict(unfit or {}))
    return starts.get(found.origins), found
