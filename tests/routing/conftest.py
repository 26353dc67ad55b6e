"""Clusters on the unit sphere, with words to match: adapters whose classes are known, and inputs that belong to none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.features import Features, sketch
from adapter_hub.routing.statistics import RoutingState, state_of

DIM = 32
ENCODER = HashEncoder(DIM)    # whose vectors these claim to be
COMMON = [f"common{i}" for i in range(40)]


class World:
    """`adapters` × `classes` cluster centres; every sample is a centre plus noise at unit length, and a few words of its class."""

    def __init__(self, adapters: int, classes: int = 2, *, noise: float = 0.6, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.centres = unit(self.rng.normal(size=(adapters, classes, DIM)))
        self.noise = noise
        self.refs = [AdapterRef(f"task-{i:02d}", 1) for i in range(adapters)]

    def sample(self, adapter: int, each: int) -> tuple[Features, list[str | None]]:
        """`each` draws of every class, independent of all others."""
        classes = len(self.centres[adapter])
        noise = self.rng.normal(size=(classes * each, DIM)) * self.noise / np.sqrt(DIM)
        vectors = unit(np.repeat(self.centres[adapter], each, axis=0) + noise).astype(np.float32)
        texts = [self._words([f"word{adapter}x{c}x{i}" for i in range(12)]) for c in range(classes) for _ in range(each)]
        return Features(vectors, sketch(texts)), [f"class {c}" for c in range(classes) for _ in range(each)]

    def strangers(self, count: int) -> Features:
        vectors = unit(self.rng.normal(size=(count, DIM))).astype(np.float32)
        return Features(vectors, sketch([self._words([f"strange{i}" for i in range(200)]) for _ in range(count)]))

    def _words(self, own: list[str]) -> str:
        return " ".join([*self.rng.choice(own, 3), *self.rng.choice(COMMON, 3)])

    def state(self, adapter: int, each: int, *, labelled: bool = True, evaluation: int = 0) -> RoutingState:
        features, labels = self.sample(adapter, each)
        held_out = self.sample(adapter, evaluation)[0] if evaluation else None
        return state_of(ENCODER, features, labels if labelled else [None] * len(labels), held_out)

    def states(self, each: int, *, labelled: bool = True, evaluation: int = 0) -> Mapping[AdapterRef, RoutingState]:
        """`evaluation` held-out draws of every class beside `each` exemplars."""
        return {ref: self.state(i, each, labelled=labelled, evaluation=evaluation) for i, ref in enumerate(self.refs)}


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def make_world() -> Callable[..., World]:
    return World


@pytest.fixture(scope="session")
def encoder() -> HashEncoder:
    return ENCODER
