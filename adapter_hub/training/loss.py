"""The loss of a classifier of one label among several, beyond what transformers' models compute themselves."""

# n rows, c classes

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from adapter_hub.training.config import TrainConfig

Loss = Callable[..., Tensor]


def classifier_loss(config: TrainConfig, weights: Tensor | None) -> Loss:
    """Cross-entropy, smoothed, weighed by class (c,); with R-Drop also what two passes with other dropout disagree in (Liang et al. 2021).

    Called as transformers' Trainer calls a loss. Twice as many logits as labels are two passes of the same rows, one after the other.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits: Tensor = outputs.logits.float()
        passes = len(logits) // len(labels)
        labels = labels.repeat(passes)
        own = None if weights is None else weights.to(logits.device)
        rows = cross_entropy(logits, labels, weight=own, label_smoothing=config.label_smoothing, reduction="none")
        if passes == 2:
            first, second = log_softmax(logits, dim=1).chunk(2)
            apart = sum(kl_div(a, b, reduction="none", log_target=True).sum(dim=1) for a, b in ((first, second), (second, first)))
            rows = rows + config.r_drop / 2 * torch.cat([apart, apart]) / 2  # type: ignore[list-item]
        # Of gradient accumulation the Trainer knows how many rows the whole step has.
        count = len(labels) if num_items_in_batch is None else num_items_in_batch * passes
        return rows.sum() / count

    return loss


def class_weights(targets: Sequence[int] | NDArray[np.int64], classes: int) -> Tensor:
    """Rows over (classes × rows of the class), (c,): all classes then weigh the same, and the mean row 1. As scikit-learn's "balanced"."""
    counts = np.bincount(np.asarray(targets), minlength=classes)
    return torch.tensor(len(targets) / (classes * np.maximum(counts, 1)), dtype=torch.float32)


def varied(inputs: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """A batch as training sees it: with R-Drop twice, and with a share of the tokens hidden from the others, never a row's first or last."""
    if config.r_drop:
        # Among them may be a count of rows, which is one number.
        inputs = {key: torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value for key, value in inputs.items()}
    mask = inputs["attention_mask"]
    if config.token_dropout:
        inner = mask.clone()
        inner[:, 0] = 0
        inner.scatter_(1, (mask.sum(dim=1, keepdim=True) - 1), 0)    # padding is on the right
        hidden = (torch.rand(mask.shape, device="cpu").to(mask.device) < config.token_dropout) & inner.bool()
        inputs = inputs | {"attention_mask": mask.masked_fill(hidden, 0)}
    return inputs
