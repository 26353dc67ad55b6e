"""Clusters on the unit sphere: adapters whose classes are known, and inputs that belong to none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.statistics import RoutingState, state_of

DIM = 32
ENCODER = HashEncoder(DIM)    # whose vectors these claim to be


class World:
    """`adapters` × `classes` cluster centres; every sample is a centre plus noise, at unit length."""

    def __init__(self, adapters: int, classes: int = 2, *, noise: float = 0.6, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.centres = unit(self.rng.normal(size=(adapters, classes, DIM)))
        self.noise = noise
        self.refs = [AdapterRef(f"task-{i:02d}", 1) for i in range(adapters)]

    def sample(self, adapter: int, each: int) -> tuple[NDArray[np.float32], list[str]]:
        classes = len(self.centres[adapter])
        noise = self.rng.normal(size=(classes * each, DIM)) * self.noise / np.sqrt(DIM)
        vectors = unit(np.repeat(self.centres[adapter], each, axis=0) + noise).astype(np.float32)
        return vectors, [f"class {c}" for c in range(classes) for _ in range(each)]

    def strangers(self, count: int) -> NDArray[np.float32]:
        return unit(self.rng.normal(size=(count, DIM))).astype(np.float32)

    def states(self, each: int, *, labelled: bool = True) -> Mapping[AdapterRef, RoutingState]:
        made = {}
        for place, ref in enumerate(self.refs):
            vectors, labels = self.sample(place, each)
            made[ref] = state_of(ENCODER, vectors, labels if labelled else [None] * len(labels))
        return made


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def make_world() -> Callable[..., World]:
    return World


@pytest.fixture(scope="session")
def encoder() -> HashEncoder:
    return ENCODER
