"""Sampling that no other row and no other thread has a part in: each row of a batch draws from a generator of its own.

transformers samples by torch.multinomial from the one random state of the process, all rows at once. While a `Draws` is open, this
thread's calls are answered row by row instead, and the process's state is neither read nor moved.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# n rows, v tokens to choose from
SEED_BITS = 63


class Draws(TorchFunctionMode):
    """A row's seed makes its draws the same each time; without one they come from the system's randomness."""

    def __init__(self, seeds: Sequence[int | None], device: torch.device) -> None:
        super().__init__()
        self._generators = [torch.Generator(device).manual_seed(secrets.randbits(SEED_BITS) if seed is None else seed) for seed in seeds]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.multinomial:
            return self._multinomial(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _multinomial(self, input: torch.Tensor, num_samples: int, replacement: bool = False) -> torch.Tensor:
        """(n, num_samples) of weights (n, v). One draw a row is torch's own: the largest weight over an exponential number."""
        rows = list(zip(input, self._generators, strict=True))
        if num_samples > 1:
            return torch.stack([torch.multinomial(row, num_samples, replacement, generator=generator) for row, generator in rows])
        numbers = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
        # Asked once for all rows: on a CUDA device each answer waits until all that was begun is done.
        if not bool(((input >= 0) & (input < torch.inf)).all() & (input.sum(dim=1) > 0).all()):
            raise RuntimeError("a probability is negative or not finite, or those of a row are all zero")
        return input.div(numbers).argmax(dim=-1, keepdim=True)
