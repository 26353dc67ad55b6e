"""One forward, many adapters: each row of a batch gets its own low-rank update in every linear layer and embedding.

    y = x W + s_a · B_a A_a x                      LoRA, for a row of adapter a
    y = x W + Σ_a w_a s_a · B_a A_a x              LoRA, for a row of several adapters with weights w
    y = g_a (y₀ + s_a B_a A_a x) + (1 − g_a) b     DoRA, with y₀ = x W + b and g_a = m_a / ‖W + s_a B_a A_a‖

The base's modules carry a hook that does nothing unless this thread has a batch open: weights and modules stay the base's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adapter_hub.adapters.checks import dora_gain, embedding_scale
from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.table import Stack, Update
from adapter_hub.precision import float_weight

# n rows of the batch, m of them in a part, t tokens, c places of a table
# i inputs of a module, o outputs, r rank


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of a batch whose adapters are in one table: one product for all of them."""

    rows: slice | Tensor                    # of the batch; (m,)
    places: Tensor                          # (m,), of each row's adapter in the stacks
    stacks: Mapping[nn.Module, Stack]
    weights: Tensor | None = None           # (m,) float32, of adapters that share a row with others
    lone: int | None = None                 # the place, where it is the same for all rows
    taken: dict[nn.Module, tuple[Tensor, Tensor]] | None = None    # A and B of each row, kept from one step of a generation to the next

    def add(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Add these rows' updates to the module's output y (n, t, o) for its input x: (n, t, i), or an embedding's tokens (n, t)."""
        stack = self.stacks.get(module)
        if stack is None:
            return
        x, rows = x[self.rows], y[self.rows]    # a slice is a view, indices make a copy
        if isinstance(module, nn.Embedding):
            narrow = stack.a[self.places[:, None], :, x]    # A's columns of these tokens
            rows.baddbmm_(self._weighed(narrow), stack.b.index_select(0, self.places))
        elif self.lone is not None and self.weights is None:
            narrow = nn.functional.linear(x.reshape(-1, x.shape[-1]), stack.a[self.lone])
            rows.view(-1, rows.shape[-1]).addmm_(narrow, stack.b[self.lone])
        else:
            a, b = self._taken(module, stack)
            narrow = torch.bmm(x, a.transpose(1, 2))
            rows.baddbmm_(self._weighed(narrow), b)
        if stack.gain is not None and stack.shift is not None:
            rows.mul_(stack.gain[self.places]).add_(stack.shift[self.places])
        if not isinstance(self.rows, slice):
            y[self.rows] = rows

    def _weighed(self, narrow: Tensor) -> Tensor:
        """(m, t, r)"""
        return narrow if self.weights is None else (narrow * self.weights[:, None, None]).to(narrow.dtype)

    def _taken(self, module: nn.Module, stack: Stack) -> tuple[Tensor, Tensor]:
        """((m, r, i), (m, r, o))"""
        if self.taken is not None and module in self.taken:
            return self.taken[module]
        found = stack.a.index_select(0, self.places), stack.b.index_select(0, self.places)
        if self.taken is not None:
            self.taken[module] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    rows: int
    parts: Sequence[Part]


class MixedLayers:
    """The hooks on one base. `open` a batch, run the base, and each row is adapted."""

    def __init__(self, base: FrozenBase) -> None:
        self._base = base
        self._hooked: set[nn.Module] = set()
        self._lock = threading.Lock()
        self._thread = threading.local()

    @torch.inference_mode()
    def bind(self, adapter: Adapter) -> dict[nn.Module, Update]:
        """The adapter's updates by module of the base, ready for a table."""
        updates = {}
        for name, delta in adapter.deltas.items():
            module = self._base.modules[self._base.canonical(name)]
            weight: Tensor = module.weight  # type: ignore[assignment]
            # An update is in the type of what it is added to: where weights are packed into bits, that is the base's.
            device, dtype = weight.device, weight.dtype if weight.is_floating_point() else self._base.dtype
            a, b = (part.to(device, torch.float32) for part in (delta.a, delta.b))
            gain = shift = None
            if delta.magnitude is not None:
                # In float32 whatever the file holds: PEFT multiplies B and A so, and the norm decides each output's size.
                exact = replace(delta, a=a, b=b, magnitude=delta.magnitude.to(device, torch.float32))
                gain = dora_gain(float_weight(module).float(), exact)
                bias = module.bias.float() if isinstance(module.bias, Tensor) else torch.zeros_like(gain)
                gain, shift = gain.to(dtype), ((1 - gain) * bias).to(dtype)
            scaling = delta.scaling * embedding_scale(module) if isinstance(module, nn.Embedding) else delta.scaling
            updates[module] = Update(a.to(dtype), (scaling * b.T).to(dtype), gain, shift)
            self._hook(module)
        return updates

    def _hook(self, module: nn.Module) -> None:
        with self._lock:
            if module not in self._hooked:
                module.register_forward_hook(self._adapt)
                self._hooked.add(module)

    @contextmanager
    def open(self, rows: int, parts: Sequence[Part]) -> Iterator[None]:
        """While open, this thread's forwards of `rows` rows are adapted, part by part; a row in no part is the base's."""
        self._thread.open = _Open(rows, parts)
        try:
            yield
        finally:
            self._thread.open = None

    def _adapt(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        batch: _Open | None = getattr(self._thread, "open", None)
        if batch is None or not batch.parts:
            return None
        # Beams repeat each row in place, and some models flatten rows and tokens: either way a row's parts stay together.
        x = inputs[0].reshape(batch.rows, -1) if isinstance(module, nn.Embedding) else inputs[0].reshape(batch.rows, -1, inputs[0].shape[-1])
        y = output.reshape(batch.rows, -1, output.shape[-1])    # the module made it for this call alone, so it is written in place
        for part in batch.parts:
            part.add(module, x, y)
        return y.view(output.shape)
