"""Compute once what training cannot change: the hidden states that reach the first adapted layer.

Layers below it hold no trainable weight. Their outputs, without dropout, are kept for each row, and while training those layers pass
on what they are given. The model keeps its modules and their names, so what is saved is an adapter of the whole base.
"""

# n rows, t tokens, d hidden width

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_hub.training.config import TrainConfig

HIDDEN = "frozen_hidden"     # the collated field, (n, t, d)
BYTES_MAX = 2**30            # more is computed anew in each epoch


def layers_of(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]] | None:
    """Name and layers of the transformer's one stack; None where it has several, or shares layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return (found[0][0], list(found[0][1])) if count and len(found) == 1 else None


def below(model: PreTrainedModel, config: TrainConfig) -> str | None:
    """PEFT's `exclude_modules`, a regular expression: the layers below the uppermost `layers_share`, and what stands before them.

    None where all are adapted.
    """
    stack = layers_of(model)
    if stack is None:
        return None
    name, layers = stack
    first = len(layers) - max(1, round(config.layers_share * len(layers)))
    if first == 0:
        return None
    before = []
    for module_name, module in model.named_modules():
        if module_name == name:
            break
        if isinstance(module, nn.Linear | Conv1D):
            before.append(re.escape(module_name))
    lower = rf"{re.escape(name)}\.({'|'.join(map(str, range(first)))})\..*"
    return "|".join([*before, lower])


@contextmanager
def computed_once(model: nn.Module, base: PreTrainedModel, rows: Iterable[Mapping[str, Tensor]]) -> Iterator[list[Tensor] | None]:
    """The hidden states (t, d) of each row of the padded batches; while open, `model` takes them as `HIDDEN`, (n, t, d).

    `base` is the transformer within `model`, which has its adapter already. None, and the model as it was, where no layer is frozen, the
    stack is of another form, or they would take more than BYTES_MAX.
    """
    first = _first_trainable(base)
    hidden = _hidden(base, first, rows) if first else None
    if hidden is None or first is None:
        yield None
        return
    _, layers = layers_of(base) or ("", [])
    current: list[Tensor] = []

    def take(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current[:] = [kwargs.pop(HIDDEN)]
        return args, kwargs

    def give(*_: Any, **__: Any) -> Tensor:
        return current[0]

    handle = model.register_forward_pre_hook(take, with_kwargs=True)
    for layer in layers[:first]:
        layer.forward = give    # of this one instance
    try:
        yield hidden
    finally:
        handle.remove()
        for layer in layers[:first]:
            del layer.forward


def _first_trainable(base: PreTrainedModel) -> int | None:
    """The number of the first layer with a trainable weight; None where there is none, or one stands outside the stack and its like."""
    stack = layers_of(base)
    if stack is None or torch.cuda.device_count() > 1:    # on several devices rows are dealt out after they are taken
        return None
    return next((i for i, layer in enumerate(stack[1]) if any(p.requires_grad for p in layer.parameters())), None)


class _Reached(Exception):
    """The first adapted layer was called: the rest of the forward is not needed."""


def _hidden(base: PreTrainedModel, first: int, rows: Iterable[Mapping[str, Tensor]]) -> list[Tensor] | None:
    _, layers = layers_of(base) or ("", [])
    seen: list[Any] = []
    early: list[nn.Module] = []    # with a trainable weight, and called before
    more: list[bool] = []          # whether a layer hands on more than hidden states, which none could in its place

    def reach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs.get("hidden_states"))
        raise _Reached

    def left(_: nn.Module, __: Any, output: Any) -> None:
        more.append(not isinstance(output, Tensor))

    handles: list[Any] = [layers[first].register_forward_pre_hook(reach, with_kwargs=True), layers[0].register_forward_hook(left)]
    for module in base.modules():
        around = any(part is layers[first] for part in module.modules())
        if not around and any(parameter.requires_grad for parameter in module.parameters()):
            handles.append(module.register_forward_pre_hook(lambda module, _: early.append(module)))
    was_training, found, size = base.training, [], 0
    base.train(False)
    try:
        with torch.no_grad():
            for batch in rows:
                try:
                    base(**{key: tensor.to(base.device) for key, tensor in batch.items()})
                except _Reached:
                    pass
                hidden = seen.pop() if seen else None
                mask = batch["attention_mask"]
                if early or any(more) or not isinstance(hidden, Tensor) or hidden.shape[:2] != mask.shape:
                    return None
                size += hidden.nbytes
                if size > BYTES_MAX:
                    return None
                # Padding is on the right.
                found += [row[: int(count)].clone() for row, count in zip(hidden, mask.sum(dim=1), strict=True)]
    finally:
        for handle in handles:
            handle.remove()
        base.train(was_training)
    return found
