"""What a newcomer would take, and what a recalibration would move, on inputs whose home is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import EVALUATION_MIN, fit
from adapter_hub.routing.effect import INPUTS_MAX, Effect, effect, inputs_of, moves
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import RoutingState, state_of
from tests.routing.conftest import ENCODER, World

WORLD = World(4, 2, noise=0.8, seed=31)
COPIED, LABELS = WORLD.sample(2, 8)
STATES = {**WORLD.states(8, evaluation=20), WORLD.refs[2]: state_of(ENCODER, COPIED, LABELS)}
BEFORE = Router.build(STATES)
NEWCOMER = AdapterRef("newcomer", 1)


def unrelated() -> RoutingState:
    """Of classes at right angles to all others, in words of its own."""
    world = World(60, 2, noise=0.5, seed=99)
    directions, _ = np.linalg.qr(np.vstack([*WORLD.centres, world.centres[-1]]).T)
    world.centres[-1] = directions[:, -2:].T
    return world.state(59, 8)


def effect_of(state: RoutingState) -> Effect:
    states = STATES | {NEWCOMER: state}
    after = Router.build(states, BEFORE.calibration, fit(states).head)
    return effect(BEFORE, after, NEWCOMER, states)


def test_a_newcomer_that_copies_another_shows_it_as_taken() -> None:
    victim = WORLD.refs[2]
    found = effect_of(state_of(ENCODER, COPIED, LABELS))
    assert found.others[0].adapter == victim and found.others[0].contradictions == 16 and found.others[0].inputs == 16
    assert {other.adapter for other in found.others} == set(STATES) and all(other.contradictions == 0 for other in found.others[1:])
    # Twins score alike but for the last bits, so that about half of the inputs go either way.
    assert found.others[0].taken == found.most_taken > 0.2 and found.others[0].after < found.others[0].before == 1.0
    assert found.others[0].before - found.others[0].after == pytest.approx(found.others[0].taken)


def test_a_newcomer_with_more_of_anothers_inputs_takes_some() -> None:
    """As evaluation inputs show: exemplars are known to their own adapter by heart."""
    more, labels = WORLD.sample(1, 40)
    found = effect_of(state_of(ENCODER, more, labels))
    assert found.others[0].adapter == WORLD.refs[1] and found.others[0].taken > 0.2 and found.others[0].contradictions == 0
    assert all(other.taken < 0.1 for other in found.others[1:])


def test_an_unrelated_newcomer_takes_nothing() -> None:
    found = effect_of(unrelated())
    assert found.most_taken == 0 and all(other.before == other.after and other.contradictions == 0 for other in found.others)
    assert [other.adapter for other in found.others] == sorted(STATES)


def test_an_effect_is_plain_json() -> None:
    found = effect_of(unrelated())
    shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert shown["newcomer"] == "newcomer@1" and shown["most_taken"] == 0
    assert shown["others"][0] == {"adapter": "task-00@1", "inputs": 40, "taken": 0, "before": 1, "after": 1, "contradictions": 0}


def test_the_first_version_takes_from_nobody() -> None:
    state = WORLD.state(0, 3)
    assert effect(Router.build({}), Router.build({NEWCOMER: state}), NEWCOMER, {NEWCOMER: state}) == Effect(NEWCOMER, ())


def test_inputs_are_evaluation_inputs_where_there_are_enough() -> None:
    enough, few = WORLD.state(0, 3, evaluation=EVALUATION_MIN), WORLD.state(0, 3, evaluation=1)
    assert (inputs_of(enough).dense == enough.evaluation.features.dense).all()
    assert (inputs_of(few).dense == few.exemplars.features.dense).all()
    many = WORLD.state(0, INPUTS_MAX)
    spread = np.linspace(0, 2 * INPUTS_MAX - 1, INPUTS_MAX).astype(int)
    assert (inputs_of(many).dense == many.exemplars.features.dense[spread]).all()


def test_the_same_calibration_moves_nothing() -> None:
    assert moves(BEFORE, Router.build(STATES), STATES) == {"moved": 0, "let_in": 0, "turned_away": 0}


def test_moves_are_counted_input_by_input() -> None:
    other = {ref: WORLD.state(i, 2) for i, ref in enumerate(WORLD.refs)}
    fitted = fit(other)
    after = Router.build(STATES, fitted.calibration, fitted.head)
    total = {"moved": 0, "let_in": 0, "turned_away": 0}
    inputs = [row for state in STATES.values() for row in (inputs_of(state)[i] for i in range(len(inputs_of(state))))]
    for row in inputs:
        was, will = BEFORE.route_features(row, max_false_reject=0.3)[0], after.route_features(row, max_false_reject=0.3)[0]
        total["moved"] += was.candidates[0][0] != will.candidates[0][0]
        total["let_in"] += was.adapter is None and will.adapter is not None
        total["turned_away"] += was.adapter is not None and will.adapter is None
    found = moves(BEFORE, after, STATES, max_false_reject=0.3)
    assert found == pytest.approx({name: count / len(inputs) for name, count in total.items()}, abs=1e-6)
    assert sum(total.values()) > 0
