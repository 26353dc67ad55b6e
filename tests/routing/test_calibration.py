"""The calibration: one record for one set of versions, rates that are met, and a clear word where examples are few."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_hub.errors import CorruptVersion, InvalidInput, ModelChanged
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import CENTRE_WEIGHT, EVALUATION_MIN, Calibration, calibrate, check_rate, fit, good_enough, solved_centres
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.features import Features
from adapter_hub.routing.head import SCHEMA, Solver
from adapter_hub.routing.router import Router
from adapter_hub.routing.scoring import CLOSENESS
from adapter_hub.routing.statistics import Encodings, Exemplars, build_state, state_of
from tests.routing.conftest import ENCODER, World

FEW = World(4, 2, seed=3).states(4)
MANY = World(4, 3, noise=0.9, seed=5)
MANY_STATES = MANY.states(30)


@pytest.fixture(scope="module")
def many() -> Calibration:
    return calibrate(MANY_STATES)


def test_a_record_survives_its_bytes_exactly(many: Calibration) -> None:
    again = Calibration.from_bytes(many.to_bytes(), id=7)
    assert again.to_bytes() == many.to_bytes() and again.digest == many.digest and again.id == 7
    assert again.members == many.members == tuple(sorted(MANY_STATES)) and again.scoring == many.scoring
    for rate in (0.0, 0.001, 0.05, 0.5, 1.0):
        assert again.threshold(rate) == many.threshold(rate)


@settings(max_examples=20)
@given(st.permutations(sorted(FEW)))
def test_the_same_bytes_in_whatever_order_the_versions_come(order: list[AdapterRef]) -> None:
    expected, found = fit(FEW), fit({ref: FEW[ref] for ref in order})
    assert found.calibration.to_bytes() == expected.calibration.to_bytes()
    assert found.head is not None and expected.head is not None and found.head.to_bytes() == expected.head.to_bytes()


@settings(max_examples=10)
@given(st.lists(st.sampled_from(sorted(FEW)), min_size=1, max_size=3, unique=True))
def test_what_came_and_went_leaves_no_trace(guests: list[AdapterRef]) -> None:
    never = {ref: state for ref, state in FEW.items() if ref not in guests}
    router = Router.build(never)
    for ref in guests:
        router = router.with_added({ref: FEW[ref]})
    for ref in guests:
        router = router.without(ref)
    again = fit({ref: FEW[ref] for ref in router.refs})
    assert again.calibration.to_bytes() == fit(never).calibration.to_bytes()
    assert router.digest == Router.build(never).digest


def observed(calibration: Calibration, world: World, rate: float, each: int = 60) -> tuple[float, int]:
    """(share of fresh draws that are turned away, how many there were)."""
    fitted = fit(STATES_OF[world])
    router = Router.build(STATES_OF[world], calibration, fitted.head)
    fresh = Features.concatenate([world.sample(i, each)[0] for i in range(len(world.refs))])
    decisions = router.route_features(fresh, max_false_reject=rate)
    return sum(decision.adapter is None for decision in decisions) / len(fresh), len(fresh)


EVALUATED = World(4, 3, noise=0.9, seed=6)
STATES_OF = {MANY: MANY_STATES, EVALUATED: EVALUATED.states(6, evaluation=40)}


@pytest.mark.parametrize("world", [MANY, EVALUATED], ids=["left-out exemplars", "evaluation inputs"])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25])
def test_a_stated_rate_is_met_on_fresh_inputs(world: World, rate: float) -> None:
    """Within three standard errors of the fresh draws and of the scores that the threshold was taken from."""
    calibration = calibrate(STATES_OF[world])
    share, fresh = observed(calibration, world, rate)
    error = math.sqrt(rate * (1 - rate) * (1 / fresh + 1 / calibration.count))
    assert abs(share - rate) < 3 * error


def test_scores_are_of_evaluation_inputs_where_there_are_enough(many: Calibration) -> None:
    assert many.facts["left_out"] == 360 and many.facts["evaluation"] == 0
    assert calibrate(STATES_OF[EVALUATED]).facts["evaluation"] == 480
    too_few = World(2, 1, seed=1).states(8, evaluation=EVALUATION_MIN - 1)
    assert calibrate(too_few).facts["evaluation"] == 0 and calibrate(too_few).facts["left_out"] == 16


def test_scores_left_out_are_like_scores_of_fresh_inputs(many: Calibration) -> None:
    """Otherwise the exemplars would vouch for themselves, and the threshold would be too high."""
    router = Router.build(MANY_STATES)
    fresh = Features.concatenate([MANY.sample(i, 60)[0] for i in range(4)])
    scores = np.array([decision.score for decision in router.route_features(fresh)])
    for share in (0.1, 0.5, 0.9):
        assert abs(np.quantile(scores, share) - np.interp(share, np.linspace(0, 1, len(many.quantiles)), many.quantiles)) < 0.1
    known = [decision.score for decision in router.route_features(Features.concatenate([s.exemplars.features for s in MANY_STATES.values()]))]
    assert np.median(known) > np.median(scores) + 0.05


def test_a_newcomer_is_measured_by_its_own_exemplars_left_out(many: Calibration) -> None:
    newcomer, ref = World(1, 3, noise=1.6, seed=9), AdapterRef("newcomer", 1)
    (features, labels), alone = newcomer.sample(0, 6), []
    for i in range(len(labels)):
        rest = [row for row in range(len(labels)) if row != i]
        without = Router.build({ref: state_of(ENCODER, features[np.array(rest)], [labels[row] for row in rest])}, many)
        alone += [decision.candidates[0][1] for decision in without.route_features(features[i])]
    expected = (sum(alone) + CENTRE_WEIGHT * many.centre) / (len(alone) + CENTRE_WEIGHT)
    router = Router.build({**MANY_STATES, ref: state_of(ENCODER, features, labels)}, many)
    found = router.route_features(newcomer.sample(0, 100)[0], max_false_reject=0)
    own = [decision for decision in found if decision.candidates[0][0] == ref]
    assert own[0].candidates[0][1] - own[0].score == pytest.approx(expected, abs=2e-3)    # exemplars are stored in bytes
    assert expected < many.centre - 0.05


def test_a_newcomer_is_measured_by_its_evaluation_inputs_where_it_has_them(many: Calibration) -> None:
    """Else most inputs of one that lies wider than the others would be turned away; how they spread is still taken from all."""
    newcomer, ref = World(1, 3, noise=1.6, seed=9), AdapterRef("newcomer", 1)
    router = Router.build({**MANY_STATES, ref: newcomer.state(0, 6, evaluation=100)}, many)
    decisions = router.route_features(newcomer.sample(0, 200)[0], max_false_reject=0.1)
    turned_away = np.mean([decision.adapter is None for decision in decisions])
    by_the_common_centre = np.mean([decision.candidates[0][1] - many.centre < many.threshold(0.1) for decision in decisions])
    assert turned_away < 0.4 and turned_away < by_the_common_centre - 0.1


def test_the_same_states_as_later_versions_accept_and_turn_away_as_the_calibrated_ones_do(many: Calibration) -> None:
    """Previously their centre came from prototypes and their scores from the head: what `teach` made let strangers in."""
    later = {AdapterRef(ref.name, 2): state for ref, state in MANY_STATES.items()}
    exemplars = {ref: Exemplars.of(state) for ref, state in later.items()}
    solver = Solver(exemplars, ENCODER.dim)
    head = solver.head("later")
    centres = solved_centres(many, later, exemplars, solver, head)
    for ref, centre in centres.items():
        assert centre == pytest.approx(many.centres[AdapterRef(ref.name, 1)], abs=0.02)
    router, again = Router.build(MANY_STATES), Router.build(later, many).with_head(head, centres)
    for inputs in (MANY.strangers(300), Features.concatenate([MANY.sample(i, 100)[0] for i in range(4)])):
        accepted = [np.mean([decision.adapter is not None for decision in one.route_features(inputs)]) for one in (router, again)]
        assert accepted[1] == pytest.approx(accepted[0], abs=0.02)


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_descriptions_with_evaluation_inputs_are_measured_by_those(rate: float) -> None:
    """Previously they were measured from one centre and routed from another: a stated 10 % turned away 3 %."""
    world = World(6, 1, noise=0.9, seed=21)
    states = {}
    for i, ref in enumerate(world.refs):
        state = build_state(ENCODER, [], f"description {i}")
        held_out = Encodings.of(world.sample(i, 60)[0])
        states[ref] = replace(state, exemplars=Encodings.of(world.sample(i, 1)[0]), evaluation=held_out)
    router = Router.build(states)
    inputs = Features.concatenate([state.evaluation.features for state in states.values()])
    assert np.mean([decision.adapter is None for decision in router.route_features(inputs, max_false_reject=rate)]) == pytest.approx(rate, abs=0.015)


def test_strangers_are_turned_away_more_than_those_who_belong(many: Calibration) -> None:
    decisions = Router.build(MANY_STATES).route_features(MANY.strangers(300), max_false_reject=0.05)
    assert np.mean([decision.adapter is None for decision in decisions]) > 0.8


@pytest.mark.parametrize("states", [MANY_STATES, FEW, World(1, 1).states(1), World(3, 1).states(2)], ids=["many", "few", "one", "pairs"])
def test_a_greater_rate_never_turns_away_fewer(states: Any) -> None:
    calibration = calibrate(states)
    thresholds = [calibration.threshold(rate) for rate in [*np.linspace(0, 1, 401), *np.geomspace(1e-9, 1, 50)]]
    ordered = [calibration.threshold(rate) for rate in sorted([*np.linspace(0, 1, 401), *np.geomspace(1e-9, 1, 50)])]
    assert ordered == sorted(thresholds) and not np.isnan(thresholds).any()
    assert calibration.threshold(0) == -math.inf and calibration.threshold(1) == math.inf
    assert np.isfinite(ordered[1:-2]).all()


def test_a_rate_of_0_never_abstains_and_of_1_always(many: Calibration) -> None:
    router, strangers = Router.build(MANY_STATES), MANY.strangers(50)
    assert all(decision.adapter for decision in router.route_features(strangers, max_false_reject=0))
    known = MANY.sample(0, 20)[0]
    assert not any(decision.adapter for decision in router.route_features(known, max_false_reject=1))


@pytest.mark.parametrize("rate", [-0.01, 1.01, math.nan, math.inf, "0.05", None, True])
def test_what_is_no_share_is_refused(many: Calibration, rate: Any) -> None:
    for act in (check_rate, many.threshold, many.false_reject_range):
        with pytest.raises(InvalidInput, match=r"^max_false_reject=.* is not a share\. Give a number from 0 \(never abstain\) to 1: 5 % is 0\.05\.$"):
            act(rate)


def test_few_examples_promise_little_and_keep_it() -> None:
    """Over twelve registries of a few examples: the stated range is wide, and holds what is seen about nine times in ten."""
    rate, inside, widths = 0.1, 0, []
    for seed in range(12):
        world = World(4, 3, noise=0.9, seed=100 + seed)
        states = world.states(3)
        fitted = fit(states)
        router = Router.build(states, fitted.calibration, fitted.head)
        fresh = Features.concatenate([world.sample(i, 40)[0] for i in range(4)])
        share = np.mean([decision.adapter is None for decision in router.route_features(fresh, max_false_reject=rate)])
        low, high = fitted.calibration.false_reject_range(rate)
        slack = 2 * math.sqrt(rate * (1 - rate) / len(fresh))
        inside += low - slack <= share <= high + slack
        widths.append(high - low)
    assert inside >= 9 and min(widths) > 0.1


def test_more_examples_promise_more(many: Calibration) -> None:
    few, low_high = calibrate(FEW), many.false_reject_range(0.05)
    assert low_high[1] - low_high[0] < 0.6 * np.ptp(few.false_reject_range(0.05)) and low_high[0] < 0.05 < low_high[1]
    assert many.false_reject_range(0) == (0, 0) and many.false_reject_range(1) == (1, 1)


def test_descriptions_alone_calibrate_by_what_is_usually_so() -> None:
    texts = {"cards": "questions about bank cards", "travel": "flights and hotels", "food": "recipes and restaurants"}
    states = {AdapterRef(name, 1): build_state(ENCODER, [], text) for name, text in texts.items()}
    fitted = fit(states)
    assert fitted.head is None and fitted.calibration.count == 0 and not len(fitted.calibration.quantiles)
    assert fitted.calibration.scoring.closeness == CLOSENESS and fitted.calibration.members == tuple(sorted(states))
    again = Calibration.from_bytes(fitted.calibration.to_bytes())
    assert math.isfinite(again.threshold(0.05)) and again.threshold(0.05) == fitted.calibration.threshold(0.05)
    assert again.false_reject_range(0.05)[1] > 0.5
    router = Router.build(states)
    assert router.route(ENCODER, ["bank cards"], max_false_reject=0)[0].adapter == AdapterRef("cards", 1)


@pytest.mark.parametrize("label", [None, "freeze"])
def test_one_exemplar_is_enough_to_calibrate(label: str | None) -> None:
    states = {AdapterRef("cards", 1): build_state(ENCODER, [Example("freeze my card", label)])}
    calibration = calibrate(states)
    assert Calibration.from_bytes(calibration.to_bytes()).to_bytes() == calibration.to_bytes() and calibration.count == 0
    found = Router.build(states).route(ENCODER, ["freeze my card"], max_false_reject=0.05)[0]
    assert found.adapter == AdapterRef("cards", 1) and found.margin is None


def test_one_exemplar_beside_many_is_found() -> None:
    world = World(3, 2, seed=8)
    states = dict(world.states(10)) | {AdapterRef("lonely", 1): build_state(ENCODER, [Example("zebra crossing", "z")])}
    found = Router.build(states).route(ENCODER, ["zebra crossing"], max_false_reject=0)[0]
    assert found.adapter == AdapterRef("lonely", 1)


def test_a_repeated_exemplar_changes_nothing() -> None:
    world = World(3, 2, seed=9)
    once, twice = {}, {}
    for place, ref in enumerate(world.refs):
        features, labels = world.sample(place, 5)
        rows = [*range(len(labels)), 0, 0, 3]
        once[ref] = state_of(ENCODER, features, labels)
        twice[ref] = state_of(ENCODER, features[rows], [labels[row] for row in rows])
    a, b = fit(once), fit(twice)
    assert a.calibration.to_bytes() == b.calibration.to_bytes()
    assert a.head is not None and b.head is not None and (a.head.weights == b.head.weights).all()


def test_one_text_under_two_adapters_calibrates_and_is_counted() -> None:
    shared = [Example("is it open today", "hours"), Example("call me back", "call"), Example("where are you", "place")]
    states = {AdapterRef(name, 1): build_state(ENCODER, shared) for name in ("shop", "bank")}
    fitted = fit(states)
    assert fitted.head is not None and np.isfinite(fitted.head.weights).all()
    assert fitted.calibration.facts["contradictions"] == 3
    assert Calibration.from_bytes(fitted.calibration.to_bytes()).digest == fitted.calibration.digest
    decision = Router.build(states).route(ENCODER, ["call me back"], k=2, max_false_reject=0)[0]
    assert {ref for ref, _ in decision.candidates} == set(states) and decision.margin == pytest.approx(0, abs=1e-3)


def test_all_exemplars_alike_calibrate() -> None:
    """No score differs from another: there is no spread to divide by."""
    rows = [Example("the same words", f"label {i}") for i in range(3)]
    states = {AdapterRef(f"task{i}", 1): build_state(ENCODER, [*rows, Example(f"another {i}")]) for i in range(3)}
    calibration = calibrate(states)
    assert Calibration.from_bytes(calibration.to_bytes()).to_bytes() == calibration.to_bytes()
    assert not math.isnan(calibration.threshold(0.05))


def test_two_encoders_cannot_meet() -> None:
    other = HashEncoder(64)
    states = dict(FEW) | {AdapterRef("zzz", 1): build_state(other, [Example("a text")])}
    with pytest.raises(ModelChanged, match=r"^'zzz@1' was encoded by 'hash:64' .*the router's exemplars by 'hash:32'"):
        fit(states)
    with pytest.raises(ModelChanged, match="Register it again from its texts with the registry's encoder"):
        Router.build(FEW).with_added({AdapterRef("zzz", 1): states[AdapterRef("zzz", 1)]})


@pytest.mark.parametrize("states", [{}, {AdapterRef("named", 1): build_state(ENCODER, [])}], ids=["nothing", "no exemplars"])
def test_nothing_to_calibrate_on_is_refused(states: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^there is nothing to calibrate on: no version has an exemplar\. Register one"):
        calibrate(states)


def test_the_facts_say_what_each_rate_means(many: Calibration) -> None:
    shown = json.loads(json.dumps(replace(many, id=3).to_json(), allow_nan=False))
    assert shown["calibration"] == 3 and shown["adapters"] == 4 and shown["exemplars"] == 360 and shown["head"] == SCHEMA
    assert shown["max_false_reject"]["5 %"]["threshold"] == round(many.threshold(0.05), 4)
    assert shown["left_out_accuracy"] > 0.8 and shown["measured_on"].startswith("examples left out")
    assert calibrate(STATES_OF[EVALUATED]).to_json()["measured_on"] == "evaluation inputs"
    assert calibrate({AdapterRef("a", 1): build_state(ENCODER, [], "a description")}).to_json()["measured_on"].startswith("nothing")


def tampered(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
    data = calibrate(FEW).to_bytes()
    facts = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["calibration"])
    tensors = {k: v.copy() for k, v in safetensors.numpy.load(data).items()}
    change(tensors, facts)
    return safetensors.numpy.save(tensors, {"calibration": json.dumps(facts)})


@pytest.mark.parametrize(
    "change",
    [
        lambda t, f: t["quantiles"].__setitem__(0, np.nan),
        lambda t, f: t["quantiles"].__setitem__(0, 99.0),
        lambda t, f: t.update(quantiles=t["quantiles"][:9]),
        lambda t, f: t.update(quantiles=t["quantiles"].astype(np.float32)),
        lambda t, f: t.pop("quantiles"),
        lambda t, f: f.pop("centres"),
        lambda t, f: f["centres"].__setitem__(0, ["../up@1", 1.0]),
        lambda t, f: f["centres"].__setitem__(0, ["task-00@1", math.nan]),
        lambda t, f: f["scoring"].__setitem__(0, -1.0),
        lambda t, f: f.update(scoring=[1.0]),
        lambda t, f: f.update(deviation=0.0),
        lambda t, f: f.update(count=-3.0),
        lambda t, f: f.update(count=0.0),
        lambda t, f: f.update(mean="none"),
        lambda t, f: f.update(facts=[1]),
        lambda t, f: f.update(schema=1),
    ],
)
def test_a_damaged_record_is_refused(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    with pytest.raises(CorruptVersion, match="somewhere/1"):
        Calibration.from_bytes(tampered(change), source="somewhere/1.safetensors")


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_a_record_cut_short_is_refused(many: Calibration, cut: int) -> None:
    with pytest.raises(CorruptVersion):
        Calibration.from_bytes(many.to_bytes()[:cut])


def test_a_record_tells_whether_it_was_measured_under_an_earlier_head() -> None:
    record = fit(MANY.states(20)).calibration
    assert record.facts["head"] == SCHEMA and not record.of_earlier_head
    assert replace(record, facts={**record.facts, "head": 1.0}).of_earlier_head
    assert not replace(record, facts={**record.facts, "head": 0.0}).of_earlier_head    # nothing was solved


@pytest.mark.parametrize(
    ("curve", "of_several", "of_one"),
    [
        ([0.990, 0.991, 0.990, 0.9895, 0.980], 3, 1),
        ([0.9909, 0.991, 0.991, 0.980, 0.970], 2, 0),
        ([0.991, 0.991, 0.991], 2, 0),
        ([0.5, 0.6, 0.7], 2, 2),
    ],
)
def test_closeness_counts_as_much_as_costs_little_and_of_one_class_each_as_little_as_is_best(
    curve: list[float], of_several: int, of_one: int
) -> None:
    assert good_enough(np.array(curve), True) == of_several
    assert good_enough(np.array(curve), False) == of_one
