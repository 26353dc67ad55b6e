"""What a training holds while it runs: its own randomness, one thread at a time, and silence."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from adapter_hub.base_model import BUILDING, RANDOMNESS


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
def building() -> Iterator[None]:
    """One thread at a time: a model is built by patching torch, and Python's warning filters, too, are the process's."""
    with BUILDING, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)    # PEFT asks transformers by an old name
        yield


@contextmanager
def quiet(quiet: bool) -> Iterator[None]:
    """No report of the fresh head's missing weights, no bars: the library does not print."""
    if not quiet:
        yield
        return
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
