"""One forward, many adapters: each row of a batch gets its own low-rank update in every linear layer.

    y = x W + s_a · B_a A_a x                      LoRA, for a row of adapter a
    y = x W + Σ_a w_a s_a · B_a A_a x              LoRA, for a row of several adapters with weights w
    y = y₀ + (g_a − 1)(y₀ − b) + g_a s_a B_a A_a x  DoRA, with g_a = m_a / ‖W + s_a B_a A_a‖ and bias b

The base's modules carry a hook that does nothing unless this thread has a batch open: weights and modules stay the base's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapter_hub.adapters.checks import dora_gain
from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import FrozenBase

# n rows, t tokens, s adapters of the batch (0 is the base), k adapters of a row, at most
# i inputs of a module, o outputs, r rank (padded with zeros)


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """One adapter's update of one module, on the base's device and in its type."""

    a: Tensor              # (r, i)
    b: Tensor              # (o, r), the scaling multiplied in
    gain: Tensor | None    # (o,), DoRA only


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The updates of one module by every adapter of a batch."""

    a: Tensor              # (s, i, r)
    b: Tensor              # (s, r, o)
    gain: Tensor | None    # (s, 1, o), where any adapter is a DoRA; 1 for the others


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    slots: Tensor                        # (n,), the place of each row's adapter in the stacks; (n, k) with weights
    weights: Tensor | None               # (n, k) float32, where any row has several adapters; places that a row does not need are 0 of weight 0
    stacks: Mapping[nn.Module, Stack]


class MixedLayers:
    """The hooks on one base. `open` a batch, run the base, and each row is adapted."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        self._hooked: set[nn.Module] = set()
        self._lock = threading.Lock()
        self._thread = threading.local()

    def bind(self, adapter: Adapter) -> dict[nn.Module, Bound]:
        """The adapter's updates by module of the base, ready to be stacked."""
        bound = {}
        for name, delta in adapter.deltas.items():
            module = self._base.modules[self._base.canonical(name)]
            a_exact, b_exact = (part.to(self._base.device, torch.float32) for part in (delta.a, delta.b))
            a, b = a_exact.to(self._base.dtype), b_exact.to(self._base.dtype)
            gain = None
            if delta.magnitude is not None:
                # In float32 whatever the file holds: PEFT multiplies B and A so, and the norm decides each output's size.
                exact = replace(delta, a=a_exact, b=b_exact, magnitude=delta.magnitude.to(self._base.device, torch.float32))
                gain = dora_gain(_weight(module).float(), exact).to(self._base.dtype)
            bound[module] = Bound(a, delta.scaling * b, gain)
            self._hook(module)
        return bound

    def _hook(self, module: nn.Module) -> None:
        with self._lock:
            if module not in self._hooked:
                module.register_forward_hook(self._adapt)
                self._hooked.add(module)

    @contextmanager
    def open(self, slots: Tensor, weights: Tensor | None, stacks: Mapping[nn.Module, Stack]) -> Iterator[None]:
        """While open, this thread's forwards adapt row i by place `slots[i]` of the stacks; 0 leaves it to the base.

        With weights, both (n, k), by the sum of `weights[i, j]` times the update at place `slots[i, j]`.
        """
        self._thread.open = _Open(slots, weights, stacks)
        try:
            yield
        finally:
            self._thread.open = None

    def _adapt(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        batch: _Open | None = getattr(self._thread, "open", None)
        if batch is None or (stack := batch.stacks.get(module)) is None:
            return None
        x = inputs[0]
        # Beams repeat each row in place, and some models flatten rows and tokens: either way a row's parts stay together.
        copies = x.shape[0] // len(batch.slots)
        slots = batch.slots.repeat_interleave(copies, dim=0)
        x = x.reshape(len(slots), -1, x.shape[-1])
        if batch.weights is None:
            update = torch.bmm(torch.bmm(x, stack.a[slots]), stack.b[slots])
        else:
            update = _weighted(x, slots, batch.weights.repeat_interleave(copies, dim=0), stack)
            slots = slots[:, 0]    # of the gain: a row with several adapters has no DoRA among them
        y = output.reshape(len(slots), -1, output.shape[-1])
        if stack.gain is None:
            return (y + update).reshape(output.shape)
        gain = stack.gain[slots]
        plain = y if module.bias is None else y - module.bias  # type: ignore[operator]
        return (y + (gain - 1) * plain + gain * update).reshape(output.shape)


def _weighted(x: Tensor, slots: Tensor, weights: Tensor, stack: Stack) -> Tensor:
    """(n, t, o) of inputs (n, t, i): one adapter of rank k · r for each row, its parts weighed where they are narrowest."""
    narrow = [torch.bmm(x, stack.a[place]) * weight[:, None, None] for place, weight in zip(slots.T, weights.T, strict=True)]
    return torch.bmm(torch.cat(narrow, dim=-1).to(x.dtype), stack.b[slots].flatten(1, 2))


def stack_bound(adapters: Sequence[Mapping[nn.Module, Bound]]) -> dict[nn.Module, Stack]:
    """The stacks of these adapters by module; place 0 is the base (zeros), then the adapters in this order."""
    modules = dict.fromkeys(module for adapter in adapters for module in adapter)
    return {module: _stack([adapter.get(module) for adapter in adapters]) for module in modules}


def _stack(bound: Sequence[Bound | None]) -> Stack:
    some = next(part for part in bound if part is not None)
    r = max(part.a.shape[0] for part in bound if part is not None)
    a = some.a.new_zeros(len(bound) + 1, some.a.shape[1], r)
    b = some.b.new_zeros(len(bound) + 1, r, some.b.shape[0])
    gains = [part.gain for part in bound if part is not None and part.gain is not None]
    gain = some.b.new_ones(len(bound) + 1, 1, some.b.shape[0]) if gains else None
    for place, part in enumerate(bound, 1):
        if part is None:
            continue
        a[place, :, : part.a.shape[0]] = part.a.T
        b[place, : part.b.shape[1]] = part.b.T
        if gain is not None and part.gain is not None:
            gain[place, 0] = part.gain
    return Stack(a, b, gain)


def _weight(module: nn.Module) -> Tensor:
    """(o, i)"""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight
