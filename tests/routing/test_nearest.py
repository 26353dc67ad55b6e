"""Closeness to other adapters, against a slow reference."""

from __future__ import annotations

import numpy as np
import pytest

from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.nearest import nearest, neighbours
from adapter_hub.routing.statistics import RoutingState, build_state
from tests.routing.conftest import ENCODER


def state(*texts: str, label: bool = True) -> RoutingState:
    return build_state(ENCODER, [Example(text, text.split()[0] if label else None) for text in texts])


CARS = state("fuel for the car", "fuel my car needs", "tire of the car", "tire that is flat")
TRAVEL = state("fuel for a trip", "hotel in rome", "hotel by the sea")
MUSIC = state("song of summer", "song by a choir", "volume up", label=False)
OTHERS = {AdapterRef("travel", 1): TRAVEL, AdapterRef("music", 3): MUSIC}


def test_closeness_is_the_mean_best_cosine_of_class_means() -> None:
    def means(one: RoutingState) -> list[np.ndarray]:
        return [one.exemplars.vectors[one.classes == c].mean(axis=0) for c in range(len(one.class_names))]

    for ref, found in nearest(CARS, OTHERS.items()):
        best = [max(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in means(OTHERS[ref])) for a in means(CARS)]
        assert found == pytest.approx(np.mean(best), abs=1e-9)


def test_the_closest_comes_first_and_an_adapter_is_closest_to_itself() -> None:
    itself = AdapterRef("cars", 1)
    ranked = nearest(CARS, (OTHERS | {itself: CARS}).items())
    assert ranked[0] == (itself, pytest.approx(1.0)) and [ref.name for ref, _ in ranked] == ["cars", "travel", "music"]


def test_of_a_stream_of_many_the_closest_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.routing.nearest.RANKED_MAX", 2)
    others = ((AdapterRef("music" if version < 4 else "travel", version), MUSIC if version < 4 else TRAVEL) for version in range(9, 0, -1))
    assert [str(ref) for ref, _ in nearest(CARS, others)] == ["travel@4", "travel@5"]


def test_what_has_no_exemplars_is_near_to_nothing() -> None:
    empty = build_state(ENCODER, [])
    assert nearest(CARS, [(AdapterRef("empty", 1), empty)]) == [] and nearest(empty, OTHERS.items()) == []


def test_neighbours_are_as_close_as_the_farther_of_both_ways_says_in_whatever_order_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [*OTHERS.items(), (AdapterRef("cars", 2), CARS), (AdapterRef("empty", 1), build_state(ENCODER, []))]
    found = neighbours(states)
    assert [(str(one), str(other)) for one, other, _ in found] == [("cars@2", "music@3"), ("cars@2", "travel@1"), ("music@3", "travel@1")]
    known = dict(states)
    for one, other, closeness in found:
        [(_, there)], [(_, back)] = nearest(known[one], [(other, known[other])]), nearest(known[other], [(one, known[one])])
        assert closeness == pytest.approx(min(there, back), abs=1e-6)
    assert neighbours(reversed(states)) == found and neighbours(states[:1]) == []
    monkeypatch.setattr("adapter_hub.routing.nearest.RANKED_MAX", 1)    # of many each has its closest
    assert ("cars@2", "travel@1") in [(str(one), str(other)) for one, other, _ in neighbours(states)] and len(neighbours(states)) < 3
