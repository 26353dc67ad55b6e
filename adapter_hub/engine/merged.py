"""One adapter merged into a copy of the base, for so many rows of it that the copy pays. The base itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.table import Stack


def mergeable(base: FrozenBase, modules: Iterable[nn.Module], bytes_max: int) -> bool:
    """In float32 alone, where merging changes answers by rounding (1e-5) and no more; and where the copied weights fit."""
    weights: list[Any] = [module.weight for module in modules]
    return all(weight.dtype == torch.float32 for weight in weights) and sum(4 * weight.numel() for weight in weights) <= bytes_max


@torch.no_grad()
def merged(base: FrozenBase, stacks: Iterable[tuple[nn.Module, Stack]], place: int) -> PreTrainedModel:
    """The base with W + s B A (DoRA: m (W + s B A) / ‖·‖) in the modules of this place; all other tensors are the base's own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(base.model.parameters(), base.model.buffers())}
    # Hooks belong to an engine, which is no part of a model; in the copy no batch is ever open for them.
    owners = [getattr(hook, "__self__", None) for module in base.model.modules() for hook in module._forward_hooks.values()]
    copied = copy.deepcopy(base.model, shared | {id(owner): owner for owner in owners})
    names = {module: name for name, module in base.model.named_modules()}
    for module, stack in stacks:
        delta = stack.b[place].T @ stack.a[place]    # (o, i)
        weight: Any = module.weight
        turned = isinstance(module, nn.Embedding | Conv1D)    # kept as (i, o)
        made = (weight.T if turned else weight) + delta
        if stack.gain is not None:
            made *= stack.gain[place].T
        copied.get_submodule(names[module]).weight = nn.Parameter((made.T if turned else made).clone(), requires_grad=False)
    return copied
