"""Classification heads: the architecture's own code, run on hidden states that the batch already has.

The task's model is built without weights; a `Replay` that returns the given body output stands where its transformer would be,
and only the adapter's head tensors are loaded. So BERT's pooler, RoBERTa's two layers and GPT-2's last token all run as upstream.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel
from transformers.utils.generic import ModelOutput

from adapter_hub.adapters.checks import lacks_pooler, skeletons
from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.adapters.weights import Adapter, outputs_of
from adapter_hub.base_model import FrozenBase

# n rows, t tokens, c labels


class Replay(nn.Module):
    """Answers a call with the output it was given, pooled where the base has no pooler and the head brings one."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self.output: ModelOutput | None = None

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        assert self.output is not None
        if self.pooler is None:
            return self.output
        return type(self.output)(**{**self.output, "pooler_output": self.pooler(self.output["last_hidden_state"])})


class Heads:
    """Makes the heads of one base's adapters. A task's model is built once, and copied for each further adapter. Safe between threads."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._models: dict[tuple[TaskType | None, int], PreTrainedModel] = {}    # without transformer and weights

    def of(self, adapter: Adapter) -> Head:
        form = adapter.task_type, outputs_of(adapter.head)
        with self._lock:
            if form not in self._models:
                model = next(iter(skeletons(self._base, *form)))
                pooler = model.base_model.pooler if lacks_pooler(model, self._base) else None
                setattr(model, model.base_model_prefix, Replay(cast(nn.Module | None, pooler)))
                self._models[form] = model.train(False).requires_grad_(False)
            model = copy.deepcopy(self._models[form])
        model.load_state_dict({name: tensor.to(self._base.device, self._base.dtype) for name, tensor in adapter.head.items()}, assign=True)
        return Head(model.requires_grad_(False))


class Head:
    """The head of one adapter. Safe between threads: one call at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._replay: Replay = getattr(model, model.base_model_prefix)
        self._lock = threading.Lock()

    def logits(self, body: ModelOutput, inputs: BatchEncoding, rows: slice) -> Tensor:
        """(n, c), or (n, t, c) for token classification, of these rows of the batch."""
        chosen = {key: value[rows] for key, value in body.items() if isinstance(value, Tensor)}
        with self._lock:
            self._replay.output = type(body)(**chosen)
            logits: Tensor = self._model(input_ids=inputs["input_ids"][rows], attention_mask=inputs["attention_mask"][rows]).logits
            self._replay.output = None
        return logits


def summed(logits: Sequence[Tensor], weights: Sequence[Sequence[float]]) -> Tensor:
    """The logits of k heads, each (n, …), weighed row by row by `weights` (n, k) and summed, in float32. One head's are its own."""
    if len(logits) == 1:
        return logits[0]
    shares = torch.tensor(weights, device=logits[0].device, dtype=torch.float32)
    return torch.einsum("kn...,nk->n...", torch.stack(list(logits)).float(), shares)


def probabilities(logits: Tensor, problem_type: ProblemType | None = None) -> Tensor:
    """Over the labels, in float32: of several labels each by itself (sigmoid), else of one among them (softmax). Regression: the numbers."""
    if problem_type is ProblemType.REGRESSION:
        return logits.float()
    return torch.sigmoid(logits.float()) if problem_type is ProblemType.MULTI else torch.softmax(logits.float(), dim=-1)
