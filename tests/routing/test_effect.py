"""What a newcomer would take, and what a recalibration would move, on inputs whose home is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import EVALUATION_MIN, Calibration, fit
from adapter_hub.routing.effect import CHANGED_MAX, INPUTS_MAX, Effect, confusion, effect, moves
from adapter_hub.routing.features import Features
from adapter_hub.routing.head import Head
from adapter_hub.routing.router import Router
from adapter_hub.routing.scoring import Scoring
from adapter_hub.routing.statistics import RoutingState, state_of
from tests.routing.conftest import ENCODER, World

WORLD = World(4, 2, noise=0.8, seed=31)
COPIED, LABELS = WORLD.sample(2, 8)
STATES = {**WORLD.states(8, evaluation=20), WORLD.refs[2]: state_of(ENCODER, COPIED, LABELS)}
FITTED = fit(STATES)
SCORING = FITTED.calibration.scoring
NEWCOMER = AdapterRef("newcomer", 1)


def unrelated() -> RoutingState:
    """Of classes at right angles to all others, in words of its own."""
    world = World(60, 2, noise=0.5, seed=99)
    directions, _ = np.linalg.qr(np.vstack([*WORLD.centres, world.centres[-1]]).T)
    world.centres[-1] = directions[:, -2:].T
    return world.state(59, 8)


def effect_of(state: RoutingState) -> Effect:
    return effect(STATES, NEWCOMER, state, SCORING)


def share_taken(world: World, states: Mapping[AdapterRef, RoutingState], state: RoutingState, adapter: int) -> float:
    """Of inputs that nobody has seen, by routers: went to the adapter, and go to the newcomer."""
    fitted, both = fit(states), {**states, NEWCOMER: state}
    fresh, victim = world.sample(adapter, 300)[0], world.refs[adapter]
    was, will = (
        [decision.candidates[0][0] for decision in router.route_features(fresh, max_false_reject=0)]
        for router in (Router.build(states, fitted.calibration, fitted.head), Router.build(both, fitted.calibration, fit(both).head))
    )
    return sum(a == victim and b == NEWCOMER for a, b in zip(was, will, strict=True)) / len(fresh)


def test_confusion_is_where_routers_that_were_never_given_an_input_send_it() -> None:
    """Each exemplar taken out of its own adapter, and everything solved anew; evaluation inputs by the router as it is."""
    world = World(3, 2, noise=0.9, seed=5)
    states = {**world.states(6), world.refs[2]: world.state(2, 6, evaluation=20)}
    fitted = fit(states)
    found = confusion(states, set(states), fitted.calibration.scoring)
    for ref, state in states.items():
        chosen = []
        for row in range(state.count) if not len(state.evaluation) else ():
            rest = np.delete(np.arange(state.count), row)
            less = {**states, ref: state_of(ENCODER, state.exemplars.features[rest], [state.class_names[c] for c in state.classes[rest]])}
            router = Router.build(less, fitted.calibration, fit(less).head)
            chosen.append(router.route_features(state.exemplars.features[[row]], max_false_reject=0)[0].candidates[0][0])
        if len(state.evaluation):
            router = Router.build(states, fitted.calibration, fitted.head)
            chosen = [decision.candidates[0][0] for decision in router.route_features(state.evaluation.features, max_false_reject=0)]
        inputs, shares = found[ref]
        assert inputs == len(chosen)
        for other in states:
            expected = chosen.count(other) / len(chosen) if other != ref else 0.0
            assert shares.get(other, 0.0) == pytest.approx(expected, abs=1.5 / len(chosen))
    assert confusion(states, {world.refs[0]}, fitted.calibration.scoring) == {world.refs[0]: found[world.refs[0]]}


@pytest.mark.parametrize("evaluation", [0, 60])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_newcomer_of_the_other_half_takes_what_fresh_inputs_show(evaluation: int, labelled: bool) -> None:
    """Previously exemplars were scored by heads that know them by heart, and nothing was ever taken."""
    world = World(6, 3, noise=0.8, seed=7)
    states, newcomer = world.states(30, labelled=labelled, evaluation=evaluation), world.state(2, 30, labelled=labelled)
    fresh = share_taken(world, states, newcomer, 2)
    found = effect(states, NEWCOMER, newcomer, fit(states).calibration.scoring)
    assert fresh > 0.3 and found.others[0].adapter == world.refs[2] and found.others[0].contradictions == 0
    assert found.most_taken == pytest.approx(fresh, abs=0.15)
    assert all(other.taken < 0.1 for other in found.others[1:])


def test_prototypes_alone_show_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more classes than a head can hold."""
    world = World(6, 3, noise=0.8, seed=7)
    monkeypatch.setattr("adapter_hub.routing.head.CLASSES_MAX", 4)
    states, newcomer = world.states(30), world.state(2, 30)
    fitted = fit(states)
    assert fitted.head is None
    found = effect(states, NEWCOMER, newcomer, fitted.calibration.scoring)
    assert found.others[0].adapter == world.refs[2]
    assert found.most_taken == pytest.approx(share_taken(world, states, newcomer, 2), abs=0.15)


def test_who_would_be_chosen_is_what_routers_without_the_exemplar_choose() -> None:
    """Each exemplar taken out of its own adapter, and everything solved anew."""
    world = World(3, 2, noise=0.9, seed=5)
    states, newcomer = world.states(6), world.state(1, 6)
    scoring, calibration = fit(states).calibration.scoring, fit(states).calibration
    found = {other.adapter: other for other in effect(states, NEWCOMER, newcomer, scoring).others}
    for ref, state in states.items():
        taken = before = after = 0
        for row in range(state.count):
            rest = np.delete(np.arange(state.count), row)
            labels = [state.class_names[c] for c in state.classes[rest]]
            less = {**states, ref: state_of(ENCODER, state.exemplars.features[rest], labels)}
            more = {**less, NEWCOMER: newcomer}
            was, will = (
                Router.build(one, calibration, fit(one).head).route_features(state.exemplars.features[[row]], max_false_reject=0)[0].candidates[0][0]
                for one in (less, more)
            )
            taken, before, after = taken + (was == ref and will == NEWCOMER), before + (was == ref), after + (will == ref)
        shares = (found[ref].taken, found[ref].before, found[ref].after)
        assert shares == pytest.approx((taken / state.count, before / state.count, after / state.count), abs=1.5 / state.count)


def test_a_newcomer_that_copies_another_shows_it_as_taken() -> None:
    found = effect_of(state_of(ENCODER, COPIED, LABELS))
    assert found.others[0].adapter == WORLD.refs[2] and found.others[0].contradictions == 16 and found.others[0].inputs == 16
    assert {other.adapter for other in found.others} == set(STATES) and all(other.contradictions == 0 for other in found.others[1:])
    assert found.others[0].taken == found.most_taken > 0.8 and found.others[0].after < 0.1 < 0.8 < found.others[0].before


def test_a_newcomer_with_more_of_anothers_inputs_takes_some() -> None:
    more, labels = WORLD.sample(1, 40)
    found = effect_of(state_of(ENCODER, more, labels))
    assert found.others[0].adapter == WORLD.refs[1] and found.others[0].taken > 0.2 and found.others[0].contradictions == 0
    assert all(other.taken < 0.1 for other in found.others if other.adapter not in (WORLD.refs[1], WORLD.refs[2]))


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
    assert effect({}, NEWCOMER, WORLD.state(0, 3), Scoring()) == Effect(NEWCOMER, ())


def test_a_version_of_the_same_name_gives_way_and_loses_nothing() -> None:
    """What it had, its successor does not take from the others a second time."""
    old, new = AdapterRef("newcomer", 1), AdapterRef("newcomer", 2)
    production = {**STATES, old: WORLD.state(1, 40)}
    found = effect(production, new, production[old], SCORING)
    assert {other.adapter for other in found.others} == set(STATES) and found.most_taken == 0 and found.instead_of == old
    assert effect(STATES, new, production[old], SCORING).most_taken > 0.2    # what the old one took, it would take


@pytest.mark.parametrize("evaluation", [0, 30])
def test_in_the_place_of_a_version_only_what_that_one_left_is_taken(evaluation: int) -> None:
    """Counted input by input, as routers with the old version and with the new one in its place choose."""
    world = World(4, 3, noise=0.8, seed=3)
    states = world.states(20, evaluation=evaluation)
    old, new = AdapterRef("newcomer", 1), AdapterRef("newcomer", 2)
    first, more = world.state(1, 20), world.state(2, 20)
    both = state_of(
        ENCODER,
        Features.concatenate([first.exemplars.features, more.exemplars.features]),
        [f"{state is more} {state.class_names[c]}" for state in (first, more) for c in state.classes],
    )
    scoring = fit({**states, old: first}).calibration.scoring
    found = {other.adapter: other for other in effect({**states, old: first}, new, both, scoring).others}
    assert set(found) == set(states)
    assert found[world.refs[1]].taken < 0.1 < 0.15 < found[world.refs[2]].taken
    assert effect(states, new, both, scoring).others[0].taken > 0.2 and {old, new}.isdisjoint(found)
    if evaluation:
        calibration = fit({**states, old: first}).calibration
        was, will = (Router.build(one, calibration, fit(one).head) for one in ({**states, old: first}, {**states, new: both}))
        for ref, state in states.items():
            before, after = (
                [one.candidates[0][0] for one in router.route_features(state.evaluation.features, max_false_reject=0)] for router in (was, will)
            )
            taken = sum(a == ref and b == new for a, b in zip(before, after, strict=True)) / len(before)
            assert found[ref].taken == pytest.approx(taken) and found[ref].after == pytest.approx(after.count(ref) / len(after))


def test_where_nothing_can_be_left_out_no_input_is_looked_at() -> None:
    """One example, or one of each label: without it there is nothing to know the adapter by."""
    one, each = AdapterRef("one", 1), AdapterRef("each", 1)
    features, _ = WORLD.sample(0, 1)
    states = {**STATES, one: state_of(ENCODER, features[[0]], [None]), each: WORLD.state(3, 1)}
    found = {other.adapter: other for other in effect(states, NEWCOMER, WORLD.state(3, 8), SCORING).others}
    assert all((found[ref].inputs, found[ref].taken, found[ref].before, found[ref].after) == (0, 0, 0, 0) for ref in (one, each))
    alone = effect({one: states[one]}, NEWCOMER, states[one], Scoring())    # no head on either side
    assert alone.others[0].inputs == 0 and alone.others[0].contradictions == 1 and alone.most_taken == 0


def test_inputs_are_evaluation_inputs_where_there_are_enough() -> None:
    sizes = {"enough": (3, EVALUATION_MIN // 2), "few": (3, 1), "many": (INPUTS_MAX, 0)}
    states = {AdapterRef(name, 1): WORLD.state(0, each, evaluation=evaluation) for name, (each, evaluation) in sizes.items()}
    found = effect(states, NEWCOMER, WORLD.state(1, 3), SCORING)
    assert {other.adapter.name: other.inputs for other in found.others} == {"enough": EVALUATION_MIN, "few": 6, "many": INPUTS_MAX}


# ---- a recalibration ------------------------------------------------------------------------------------------------


def test_the_same_calibration_moves_nothing() -> None:
    calibration = FITTED.calibration
    before = {f"threshold_before {rate:g}": calibration.threshold(rate) for rate in (0.02, 0.05, 0.1)}
    assert moves(FITTED.bench, calibration, calibration) == {"moved": 0, "let_in": 0, "turned_away": 0, **before}


def test_where_nothing_can_be_scored_nothing_moves() -> None:
    alone = fit({NEWCOMER: WORLD.state(0, 1)})
    found = moves(alone.bench, alone.calibration, alone.calibration)
    assert {name: fact for name, fact in found.items() if " " not in name} == {"moved": 0, "let_in": 0, "turned_away": 0}
    assert all(name.startswith("threshold_before ") for name in found if " " in name)


def test_moves_are_counted_input_by_input() -> None:
    """Of evaluation inputs, as routers under one head decide."""
    states = WORLD.states(8, evaluation=20)
    fitted, other = fit(states), fit({ref: WORLD.state(i, 2) for i, ref in enumerate(WORLD.refs)}).calibration
    inputs = Features.concatenate([state.evaluation.features for state in states.values()])
    was, will = (decided(states, calibration, fitted.head, inputs) for calibration in (fitted.calibration, other))
    total = {
        "moved": sum(a != b for (a, _), (b, _) in zip(was, will, strict=True)),
        "let_in": sum(b and not a for (_, a), (_, b) in zip(was, will, strict=True)),
        "turned_away": sum(a and not b for (_, a), (_, b) in zip(was, will, strict=True)),
    }
    found = moves(fitted.bench, fitted.calibration, other, max_false_reject=0.3)
    assert {name: found[name] for name in total} == pytest.approx({name: count / len(inputs) for name, count in total.items()}, abs=1e-6)
    assert sum(total.values()) > 0
    homes = [ref for ref, state in states.items() for _ in range(len(state.evaluation))]
    for ref in states:
        before, after = (np.mean([accepted for home, (_, accepted) in zip(homes, side, strict=True) if home == ref]) for side in (was, will))
        assert found.get(f"accepted_before {ref}", before) == pytest.approx(before, abs=1e-6)
        assert found.get(f"accepted {ref}", before) == pytest.approx(after, abs=1e-6)    # where nothing is said, nothing changed


def test_the_adapters_whose_inputs_are_let_in_more_or_less_are_named_most_first_and_in_the_record() -> None:
    world = World(8, 2, noise=0.8, seed=17)
    states = world.states(8, evaluation=20)
    fitted = fit(states)
    centres = {ref: centre + 0.1 * place for place, (ref, centre) in enumerate(fitted.calibration.centres.items())}
    stricter = replace(fitted.calibration, centres=centres)
    record = replace(stricter, facts={**stricter.facts, **moves(fitted.bench, fitted.calibration, stricter)}, id=2)
    found = Calibration.from_bytes(record.to_bytes(), id=2).to_json()
    rows = found["changed"]
    assert len(rows) == CHANGED_MAX and {row["adapter"] for row in rows} <= {str(ref) for ref in world.refs}
    drops = [row["accepted_before"] - row["accepted"] for row in rows]
    assert drops == sorted(drops, reverse=True) and drops[0] > 0.2 and "task-00@1" not in {row["adapter"] for row in rows}
    for rate in (0.02, 0.05, 0.1):
        assert found["max_false_reject"][f"{100 * rate:g} %"]["before"] == round(fitted.calibration.threshold(rate), 4)
    assert not any(" " in name for name in found) and "changed" not in fitted.calibration.to_json()
    assert "before" not in fitted.calibration.to_json()["max_false_reject"]["5 %"]    # a record that compares nothing, as all did before


def decided(
    states: Mapping[AdapterRef, RoutingState], calibration: Calibration, head: Head | None, inputs: Features
) -> list[tuple[AdapterRef, bool]]:
    found = Router.build(states, calibration, head).route_features(inputs, max_false_reject=0.3)
    return [(decision.candidates[0][0], decision.adapter is not None) for decision in found]


def test_exemplars_are_left_out_where_a_calibration_is_compared() -> None:
    """By heart all of them are let in, under whatever calibration; as inputs, the share that the rate turns away is not."""
    states = WORLD.states(20)
    fitted = fit(states)
    lenient = replace(fitted.calibration, quantiles=fitted.calibration.quantiles - 10)
    found = moves(fitted.bench, fitted.calibration, lenient, max_false_reject=0.2)
    assert found["moved"] == found["turned_away"] == 0 and found["let_in"] == pytest.approx(0.2, abs=0.03)
