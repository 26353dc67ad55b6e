"""Start a head from a linear probe instead of from noise: logistic regression on what the frozen base feeds its last layer.

Probe first, then fine-tune (Kumar et al. 2022, "Fine-tuning can distort pretrained features"): the adapter starts from a head that
already separates what the base can separate, and spends its steps on the rest.
"""

# n rows, t tokens, h width of the head's input, c classes

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_hub.base_model import unsaid

PENALTY_INVERSE = 0.1    # sklearn's C, on standardised features
ITERATIONS_MAX = 300
CELLS_MAX = 20_000_000    # rows x classes: a minute and more
DEVIATION_FLOOR = 1e-6


def start_from_probe(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], targets: NDArray[np.int64], outer: nn.Module | None = None
) -> bool:
    """Set the model's output layer to a probe fitted on the batches, in the order of `targets` (n,). It is `outer` that is called, if given.

    False, and the layer as it was, where the head has no single linear output layer.
    """
    layer = output_layer(model)
    if layer is None:
        return False
    weight, bias = probe(inputs_of(layer, outer or model, batches), targets)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    return True


def probe(features: NDArray[np.float64], targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(weight (c, h), bias (c,)) of a logistic regression on the inputs (n, h) of a head; beyond CELLS_MAX of nearest class means.

    Each of the classes 0 to c - 1 has a row.
    """
    centre, spread = features.mean(axis=0), features.std(axis=0) + DEVIATION_FLOOR
    # A dimension that is constant on the training rows says nothing; dividing by its spread would make it shout elsewhere.
    spread[spread < 1e-3 * np.median(spread)] = np.inf
    if len(targets) * (int(targets.max()) + 1) > CELLS_MAX:
        scaled = (features - centre) / spread
        means = np.array([scaled[targets == number].mean(axis=0) for number in range(int(targets.max()) + 1)])
        return means / spread, -(means**2).sum(axis=1) / 2 - (means / spread) @ centre
    found = logistic_regression((features - centre) / spread, targets, PENALTY_INVERSE)
    weight, bias = _one_row_a_class(found.coef_, found.intercept_)
    return weight / spread, bias - (weight / spread) @ centre


def logistic_regression(features: NDArray[np.floating[Any]], targets: NDArray[np.int64], penalty_inverse: float) -> LogisticRegression:
    """Fitted in ITERATIONS_MAX at most, which are enough for what begins with it or is compared with it; labels may be as many as rows."""
    with unsaid("lbfgs failed to converge", "The number of unique classes is greater than 50%"):
        return LogisticRegression(C=penalty_inverse, max_iter=ITERATIONS_MAX).fit(features, targets)


def output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The one trainable linear layer outside the transformer with an output for each label; None if there is not exactly one."""
    body = set(model.base_model.modules())
    found = [
        m for m in model.modules()
        if isinstance(m, nn.Linear) and m not in body and m.out_features == model.config.num_labels and m.weight.requires_grad
    ]    # fmt: skip
    return found[0] if len(found) == 1 else None


def output_name(model: PreTrainedModel) -> str | None:
    """Of the output layer, among the model's modules."""
    layer = output_layer(model)
    return next((name for name, module in model.named_modules() if layer is not None and module is layer), None)


def inputs_of(layer: nn.Module, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> NDArray[np.float64]:
    """What reaches `layer` for each row, (n, h)."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    was_training, device = model.training, next(model.parameters()).device
    model.train(False)
    try:
        rows = []
        with torch.inference_mode():
            for batch in batches:
                model(**{key: tensor.to(device) for key, tensor in batch.items()})
                rows.append(one_a_row(seen.pop(), batch["attention_mask"].to(device)).double().cpu().numpy())
    finally:
        hook.remove()
        model.train(was_training)
    return np.concatenate(rows)


def one_a_row(features: Tensor, mask: Tensor) -> Tensor:
    """(n, h) as it is; of (n, t, h), which causal models score at every token, the last token that is not padding."""
    if features.ndim == 2:
        return features
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1)
    return features[torch.arange(len(features), device=features.device), last]


def _one_row_a_class(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sklearn keeps one row for two classes, the second's; a head has one for each."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
