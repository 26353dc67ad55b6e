"""What a training holds while it runs: its own randomness, one thread at a time, and silence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from adapter_hub.base_model import RANDOMNESS, without_bars


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Run with every generator seeded, one thread at a time; the caller's are as before afterwards."""
    with RANDOMNESS, torch.random.fork_rng():
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """Nothing said of what is meant so (a fresh head, a loss by its own name, where checkpoints lie), and no bars unless they are wanted."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with nullcontext() if bars else without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
