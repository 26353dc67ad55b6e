"""Where each row of one generation ends: rows of a batch have their own limits and stop strings, whoever stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from adapter_hub.base_model import FrozenBase

# n rows, t tokens so far, prompt included
Step = Callable[[Tensor], bool]    # sees the tokens that the first row has written; True ends the generation


class Limits(StoppingCriteria):
    """Ends row by row, for greedy search and sampling. transformers ends rows by their end tokens itself, and pads what is done."""

    def __init__(self, base: FrozenBase, settings: Sequence[Mapping[str, Any]], step: Step | None = None) -> None:
        self._most = torch.tensor([row["max_new_tokens"] for row in settings], device=base.device)
        self._lengths = torch.zeros_like(self._most)    # in new tokens; 0: the row has not met its limit or stop string
        self._start: int | None = None                  # the prompt's tokens, or what a seq2seq model's decoder begins with
        self._step = step
        stops: dict[Any, list[int]] = {}
        for i, row in enumerate(settings):
            if row.get("stop_strings"):
                stops.setdefault(row["stop_strings"], []).append(i)
        self._stops = [(torch.tensor(rows, device=base.device), base.stopping(stop)) for stop, rows in stops.items()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        """Whether each row is done, (n,), after a token was added to all of `input_ids` (n, t)."""
        if self._start is None:
            self._start = input_ids.shape[1] - 1
        new = input_ids.shape[1] - self._start
        done = self._most <= new
        for rows, criterion in self._stops:
            done[rows] |= criterion(input_ids[rows], scores)
        running = self._lengths == 0
        self._lengths = torch.where(running & done, new, self._lengths)
        if self._step is not None and running[0] and self._step(input_ids[0, self._start :]):
            self._lengths.clamp_(min=1)
        return self._lengths > 0

    def cut(self, written: Tensor) -> list[Tensor]:
        """The new tokens of each row of `written` (n, t), up to where it ended; those that ended by an end token are padded still."""
        assert self._start is not None
        found = zip(written[:, self._start :], self._lengths.tolist(), strict=True)
        return [row[: length or len(row)] for row, length in found]
