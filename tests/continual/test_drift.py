"""The drift monitor: quiet where nothing changes, tells what got worse, and goes on from its state as if it had never stopped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_hub.continual.drift import OVERALL, Alarm, DriftConfig, DriftMonitor, Kind, Signal, compare
from adapter_hub.errors import InvalidInput

SMALL = DriftConfig(history=400, reference=100, window=60, every=20, block=5, embedding_alarms_per_10k=1.0)
Observation = dict[str, Any]


def traffic(rng: np.random.Generator, count: int, wrong: float = 0.05, *, adapters: tuple[str, ...] = ("banking", "travel")) -> list[Observation]:
    """Inputs of which `wrong` are answered wrongly, half of those turned away, at scores that follow."""
    rows: list[Observation] = []
    for _ in range(count):
        error = bool(rng.random() < wrong)
        abstained = error and bool(rng.random() < 0.5)
        score = float(rng.normal(-0.7 if abstained else 0.0, 0.25))
        rows.append({"adapter": str(rng.choice(adapters)), "score": score, "abstained": abstained, "error": error})
    return rows


def alarms(monitor: DriftMonitor, rows: list[Observation], kind: Kind | None = Kind.ALARM) -> list[Alarm]:
    return [alarm for row in rows for alarm in monitor.observe(**row) if kind is None or alarm.kind is kind]


# ---- score, abstention, error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_where_nothing_changes_there_is_no_alarm(seed: int) -> None:
    assert alarms(DriftMonitor(), traffic(np.random.default_rng(seed), 5_000)) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_sudden_drop_alarms_on_every_signal_it_moves_within_400_inputs(seed: int) -> None:
    rng, monitor = np.random.default_rng(seed), DriftMonitor()
    assert alarms(monitor, traffic(rng, 1_000)) == []
    found = alarms(monitor, traffic(rng, 400, wrong=0.45))
    assert {alarm.signal for alarm in found if alarm.adapter == OVERALL} == {Signal.SCORE, Signal.ABSTAINED, Signal.ERROR}
    error = next(alarm for alarm in found if alarm.signal is Signal.ERROR and alarm.adapter == OVERALL)
    assert error.detector == "ADWIN" and 1_000 < error.at <= 1_400
    assert error.before < 0.15 and error.after > 0.25


def test_a_warning_comes_before_the_alarm() -> None:
    rng, monitor = np.random.default_rng(0), DriftMonitor()
    alarms(monitor, traffic(rng, 1_000))
    found = [alarm for alarm in alarms(monitor, traffic(rng, 400, wrong=0.3), None) if (alarm.adapter, alarm.signal) == (OVERALL, Signal.ERROR)]
    assert [alarm.kind for alarm in found][:2] == [Kind.WARNING, Kind.ALARM]
    assert found[0].detector == "Page-Hinkley" and found[0].after > found[0].before


def test_what_gets_better_is_no_alarm() -> None:
    rng, monitor = np.random.default_rng(0), DriftMonitor()
    assert alarms(monitor, traffic(rng, 1_000, wrong=0.5) + traffic(rng, 2_000, wrong=0.05)) == []


def test_one_change_alarms_once_and_the_next_one_again() -> None:
    rng, monitor = np.random.default_rng(1), DriftMonitor()
    rows = traffic(rng, 1_000) + traffic(rng, 3_000, wrong=0.5) + traffic(rng, 2_000, wrong=0.05) + traffic(rng, 1_000, wrong=0.5)
    found = [alarm.at for alarm in alarms(monitor, rows) if (alarm.adapter, alarm.signal) == (OVERALL, Signal.ERROR)]
    first, second = found
    assert 1_000 < first < 1_400 and 6_000 < second < 6_400


def test_a_score_is_told_as_it_was_given_and_an_alarm_says_it_in_words() -> None:
    monitor, rng = DriftMonitor(), np.random.default_rng(0)
    found = alarms(monitor, [{"adapter": "banking", "score": float(score)} for score in [*rng.normal(0.2, 0.2, 500), *rng.normal(-0.8, 0.2, 200)]])
    own = found[0]
    assert (own.adapter, own.signal) == ("banking", Signal.SCORE) and own.before > 0 > own.after
    assert own.reason == f"the mean acceptance score of inputs of 'banking' is {own.after:.2f}, {own.before:.2f} before"
    assert json.loads(json.dumps(own.to_json()))["kind"] == "alarm"


def test_an_adapter_that_did_not_change_does_not_alarm() -> None:
    rng, monitor = np.random.default_rng(0), DriftMonitor()
    alarms(monitor, traffic(rng, 2_000))
    rows = [row for pair in zip(traffic(rng, 600, 0.5, adapters=("banking",)), traffic(rng, 600, adapters=("travel",)), strict=True) for row in pair]
    assert {alarm.adapter for alarm in alarms(monitor, rows)} == {"banking", OVERALL}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_in_which_order_adapters_take_turns_does_not_matter_to_each(seed: int, order: Any) -> None:
    rng = np.random.default_rng(seed)
    of = {name: traffic(rng, 150, adapters=(name,)) + traffic(rng, 150, wrong=0.6, adapters=(name,)) for name in ("a", "b", "c")}
    turns = [name for name, rows in of.items() for _ in rows]
    order.shuffle(turns)
    left = {name: iter(rows) for name, rows in of.items()}
    mixed = alarms(DriftMonitor(SMALL), [next(left[name]) for name in turns], None)
    for name, rows in of.items():
        assert [alarm for alarm in mixed if alarm.adapter == name] == [a for a in alarms(DriftMonitor(SMALL), rows, None) if a.adapter == name]


def test_feedback_that_comes_late_counts_as_error_alone() -> None:
    together, apart = DriftMonitor(), DriftMonitor()
    rows = traffic(np.random.default_rng(3), 300) + traffic(np.random.default_rng(4), 300, wrong=0.5)
    expected = alarms(together, rows, None)
    found = alarms(apart, [{**row, "error": None} for row in rows], None)
    found += alarms(apart, [{"adapter": row["adapter"], "error": row["error"]} for row in rows], None)
    assert expected and sorted(map(repr, found)) == sorted(map(repr, expected))


def test_a_reset_forgets_one_adapter_and_no_other() -> None:
    monitor = DriftMonitor()
    alarms(monitor, traffic(np.random.default_rng(0), 200))
    before = json.loads(monitor.to_json())["tracks"]
    monitor.reset("banking")
    after = json.loads(monitor.to_json())["tracks"]
    assert monitor.adapters == ("travel",)
    assert after == {name: track for name, track in before.items() if name != "banking"}
    with pytest.raises(InvalidInput, match=r"nothing was seen of 'banking'. Seen: travel"):
        monitor.reset("banking")
    monitor.reset()
    assert monitor.to_json() == DriftMonitor().to_json()


# ---- embeddings -----------------------------------------------------------------------------------------------------


def vectors(rng: np.random.Generator, count: int, centre: int) -> Any:
    """Unit vectors around one axis."""
    rows = rng.normal(0, 0.3, (count, 16))
    rows[:, centre] += 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_inputs_about_something_else_alarm_without_any_label_and_once() -> None:
    rng, monitor = np.random.default_rng(0), DriftMonitor(SMALL)
    assert alarms(monitor, [{"adapter": None, "embedding": vector} for vector in vectors(rng, 1_000, 0)]) == []
    (alarm,) = alarms(monitor, [{"adapter": None, "embedding": vector} for vector in vectors(rng, 1_000, 1)])
    assert (alarm.adapter, alarm.signal, alarm.detector) == (OVERALL, Signal.EMBEDDING, "MMD")
    assert 1_000 < alarm.at <= 1_060 and alarm.after < alarm.before <= 1


def test_false_alarms_of_the_comparison_are_as_rare_as_its_level() -> None:
    rng = np.random.default_rng(0)
    found = sum(compare(rows[:60], rows[60:], 5, 0.05, (trial,)) is not None for trial in range(400) for rows in [as_float32(vectors(rng, 100, 0))])
    assert found <= 32    # 20 are expected; more than 32 come once in 200 times


def test_equal_vectors_never_differ_and_other_ones_always_do() -> None:
    same, other = as_float32(np.tile(np.eye(4)[0], (60, 1))), as_float32(np.tile(np.eye(4)[1], (40, 1)))
    assert compare(same, same[:40], 5, 0.01, (0,)) is None
    assert compare(same, other, 5, 0.01, (0,)) is not None


def as_float32(rows: Any) -> Any:
    return np.asarray(rows, np.float32)


# ---- state ----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 1_199), max_size=3))
def test_a_monitor_that_is_stopped_and_read_back_goes_on_identically(seed: int, stops: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rows = traffic(rng, 700) + traffic(rng, 500, wrong=0.5)    # more than `history`, so that the older half was left, and a change
    for row, vector in zip(rows, np.concatenate([vectors(rng, 700, 0), vectors(rng, 500, 1)]), strict=True):
        row["embedding"] = vector
    whole, stopped = DriftMonitor(SMALL), DriftMonitor(SMALL)
    for number, row in enumerate(rows):
        if number in stops:
            stopped = DriftMonitor.from_json(stopped.to_json())
        assert stopped.observe(**row) == whole.observe(**row)
    assert stopped.to_json() == whole.to_json()


def test_the_state_of_a_track_is_bounded() -> None:
    monitor = DriftMonitor(SMALL)
    alarms(monitor, traffic(np.random.default_rng(0), 3_000))
    kept = [len(track["values"]) for of in json.loads(monitor.to_json())["tracks"].values() for track in of.values()]
    assert max(kept) < SMALL.history


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "config": {"speed": 1}}', '{"format": 1, "config": {}, "tracks": {"a": {"mood": {}}}}'],
)
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="no state of a drift monitor"):
        DriftMonitor.from_json(text)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation", "fact"),
    [
        ({"adapter": "*", "score": 1.0}, "is no adapter's name"),
        ({"adapter": "", "score": 1.0}, "is no adapter's name"),
        ({"adapter": "banking", "score": float("nan")}, "a score of nan"),
        ({"adapter": "banking", "score": True}, "a score of True"),
        ({"adapter": "banking", "score": 1.0, "abstained": 1}, "abstained=1 is neither"),
        ({"adapter": "banking", "score": 1.0, "error": "no"}, "error='no' is neither"),
        ({"adapter": "banking", "score": 1.0, "embedding": [[1.0]]}, "an embedding of shape"),
        ({"adapter": "banking", "score": 1.0, "embedding": [float("inf")]}, "not finite"),
        ({"adapter": "banking", "score": 1.0, "embedding": "text"}, "no vector of numbers"),
        ({"adapter": "banking", "score": 1.0, "embedding": [1.0, 0.0]}, "has 2 numbers, those before it 3"),
    ],
)
def test_a_refused_observation_was_never_seen(observation: Observation, fact: str) -> None:
    monitor = DriftMonitor()
    monitor.observe("banking", score=0.5, embedding=[1.0, 0.0, 0.0])
    before = monitor.to_json()
    with pytest.raises(InvalidInput, match=fact):
        monitor.observe(**observation)
    assert monitor.to_json() == before


@pytest.mark.parametrize(
    ("settings_", "fact"),
    [
        ({"adwin_delta": 0.0}, "adwin_delta=0.0"),
        ({"adwin_delta": 1.0}, "adwin_delta=1.0"),
        ({"history": 10}, "history=10"),
        ({"every": True}, "every=True"),
        ({"block": 300}, "no whole number of them"),
        ({"reference": 100, "window": 50}, "too few blocks of 50"),
        ({"embedding_alarms_per_10k": 1e3}, "ask for a level of 10"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings_: dict[str, Any], fact: str) -> None:
    with pytest.raises(InvalidInput, match=fact):
        DriftConfig(**settings_)
