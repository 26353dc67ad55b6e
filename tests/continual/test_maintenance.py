"""Looking after a registry: what a pass decides, and passes over a real log with real updates. Real tiny models."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from adapter_hub import lifelong
from adapter_hub.cli import app
from adapter_hub.continual.maintenance import (
    NEVER,
    TESTS,
    Decision,
    Health,
    MaintenancePolicy,
    Memory,
    Proof,
    Step,
    alike,
    decide,
    is_fewer,
    judged,
    no_worse,
    proof_of,
)
from adapter_hub.errors import InvalidInput, RegistryError
from adapter_hub.examples import Example
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.events import EventKind
from adapter_hub.registry.notes import Notes
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import TrainConfig

POLICY = MaintenancePolicy()
NOW = datetime(2026, 6, 1, tzinfo=UTC)
REF = AdapterRef("banking", 2)
ALARM = {"reason": "it fell"}
soak = [pytest.mark.soak, pytest.mark.skipif("ADAPTER_HUB_SOAK" not in os.environ, reason="only under `make soak`")]
CONFIG = TrainConfig(r=4, epochs=8, steps_min=0, learning_rate=5e-3)


def found(right: int, answers: int, rows: int = 100, at: str = "1", **more: Any) -> Health:
    """Everything that was said is new."""
    return Health(REF, 2, 1, (at, "x"), right, answers, rows=rows, until=(at, "x"), **({"agreeing": rows} | more))


def decided(health: Health, memory: Memory | None = None, now: datetime = NOW) -> Decision:
    return decide(health, memory or Memory(2), POLICY, now)


# ---- the decision ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_which_nobody_spoke_is_left_alone_and_no_look_is_spent() -> None:
    decision = decided(Health(REF, 2))
    assert decision.step is Step.NONE and not decision.memory.looks


def test_below_the_floor_it_is_updated_and_chance_is_not() -> None:
    assert decided(found(40, 100)).step is Step.UPDATE
    assert decided(found(66, 100)).step is Step.NONE    # 0.7 is the floor: that is chance
    assert decided(found(0, 1)).step is Step.NONE       # one wrong answer proves nothing


def test_each_look_at_something_new_has_less_of_the_level_and_all_of_them_have_no_more_than_it() -> None:
    assert TESTS * sum(map(POLICY.level_of, range(1, 100_000))) <= POLICY.level
    memory, steps = Memory(2), []
    for look in range(1, 30):
        decision = decided(found(53, 100, at=f"{look:02}"), memory)    # significant at first, not at the level of later looks
        steps.append(decision.step)
        memory = replace(decision.memory, harm="", pending=None, looks={"2": look})
    assert steps[0] is Step.UPDATE and steps[-1] is Step.NONE
    again = decided(found(40, 100, at="29"), memory)
    assert again.memory == memory and again.step is Step.NONE    # nothing new was said


@pytest.mark.parametrize("n", [5, 20, 60])
def test_the_test_of_two_versions_is_exact_at_any_level(n: int) -> None:
    for level in (0.02, 1e-3, 1e-5):
        size = sum(binom.pmf(mine, n, 0.5) for mine in range(n + 1) if is_fewer(mine, n - mine, level))
        assert size <= level


def test_harm_that_was_found_waits_for_rows_and_for_the_cool_down_and_is_not_tested_again() -> None:
    first = decided(found(40, 100, rows=49))
    assert first.step is Step.WAIT and "49 of 50 rows" in first.reason
    recent = replace(first.memory, updated_at=(NOW - timedelta(hours=23)).isoformat())
    second = decided(found(40, 100), recent)
    assert second.step is Step.WAIT and "not before 2026-06-01T01:00" in second.reason and second.memory.looks == {"2": 1}
    third = decided(found(40, 100), recent, NOW + timedelta(hours=1))
    assert third.step is Step.UPDATE and third.memory.pending and third.memory.updates == {"2": 1}    # the candidate's own test


def test_after_an_alarm_it_is_held_to_what_it_was_as_well_and_an_alarm_that_is_not_confirmed_is_closed() -> None:
    worse = found(80, 100, right_since=80, answers_since=100, expected=0.97)
    assert decided(worse).step is Step.NONE
    assert decided(worse, Memory(2, alarm=ALARM)).step is Step.UPDATE
    closed = decided(found(196, 200, right_since=96, answers_since=100, expected=0.97), Memory(2, alarm=ALARM))
    assert closed.step is Step.NONE and closed.memory.alarm is None and "do not confirm it" in closed.reason
    assert decided(found(9, 10, right_since=9, answers_since=10, expected=0.97), Memory(2, alarm=ALARM)).memory.alarm == ALARM    # too few
    assert decided(found(40, 100, expected=0.97), Memory(2, alarm=ALARM, alarmed_at=("9", ""))).step is Step.UPDATE    # the floor holds all the same


def test_it_goes_back_where_the_version_before_is_better_by_both_measures() -> None:
    before = AdapterRef("banking", 1)
    decision = decided(found(60, 100, previous=before, compared=(2, 30)))
    assert decision.step is Step.ROLL_BACK and "banking@1" in decision.reason and decision.memory.pending
    assert decided(found(90, 100, previous=before, compared=(4, 5))).step is Step.NONE
    # People spoke of wrong answers alone: on the older version's own set the newer one is better.
    assert decided(found(80, 100, previous=before, compared=(0, 22), measured=(30, 10))).step is Step.NONE


@pytest.mark.parametrize("health", [found(40, 100), found(60, 100, previous=AdapterRef("banking", 1), compared=(2, 30))])
def test_a_step_that_was_cut_off_is_ended_by_the_next_pass(health: Health) -> None:
    begun = decided(health).memory
    assert decided(Health(REF, 3), begun).step is Step.RESUME and decided(Health(REF, 3), begun).memory == begun
    assert begun.of(3).pending == begun.pending    # also where the new version was promoted already
    assert Memory.from_json(json.loads(json.dumps(begun.to_json()))) == begun


def test_a_new_version_is_looked_at_with_fresh_eyes_and_what_was_set_aside_stays_so() -> None:
    memory = Memory(2, ("1", "x"), ALARM, ("0", "x"), "harm", {"2": 9}, {"2": 1}, NOW.isoformat(), 100, ("a", "b"))
    assert memory.of(2) == memory
    assert memory.of(3) == Memory(3, looks={"2": 9}, updates={"2": 1}, updated_at=NOW.isoformat(), set_aside=("a", "b"))
    assert memory.of(3).of(2).looks == {"2": 9}    # looks at a version that comes back are not forgotten


def test_where_nothing_is_wrong_much_that_was_said_is_learned_all_the_same_and_takes_no_chance_from_a_needed_update() -> None:
    assert decided(found(95, 100, rows=199)).step is Step.NONE
    begun = decided(found(95, 100, rows=200))
    assert begun.step is Step.UPDATE and begun.memory.pending and begun.memory.pending.routine and not begun.memory.updates
    unproved = judged(begun.memory, Proof.MISSING)
    later = NOW + timedelta(days=2)
    assert decided(found(95, 100, rows=299, at="2"), unproved, later).step is Step.NONE    # half as many again
    assert decided(found(90, 99, rows=200)).step is Step.NONE    # of this version too few have been spoken of
    needed = decided(found(40, 100, rows=210, at="2"), unproved, later)
    assert needed.step is Step.UPDATE and needed.memory.pending and not needed.memory.pending.routine
    assert needed.memory.pending.level == POLICY.level_of(1) and needed.memory.updates == {"2": 1}
    assert decided(found(95, 100, rows=300, at="2"), unproved).step is Step.NONE           # within the cool-down
    assert decided(found(95, 100, rows=300, at="2"), unproved, later).step is Step.UPDATE
    assert decided(found(95, 100, rows=200), Memory(2, alarm=ALARM)).step is Step.NONE     # an alarm is open: what came may be what is wrong
    never = replace(POLICY, refresh_rows=0)
    assert decide(found(95, 100, rows=10_000), Memory(2), never, NOW).step is Step.NONE


def test_blocks_of_which_fewer_are_right_than_of_all_others_are_not_learned_as_a_matter_of_routine() -> None:
    good, bad = [True] * 9 + [False], [False] * 9 + [True]
    assert alike(good * 20, 0.05) == [True] * 200 and alike([], 0.05) == [] and alike([True, False], 0.05) == [True, True]
    assert alike(good * 10 + bad * 5 + good * 5, 0.05) == [True] * 100 + [False] * 50 + [True] * 50     # wherever it stands
    assert alike(good * 20 + bad * 25, 0.05)[:200] == [True] * 200 and not any(alike(good * 20 + bad * 25, 0.05)[200:])    # and if it is most
    assert len(alike(good * 12, 0.05)) == 120    # the last block has what is left
    many = decided(found(180, 200, rows=1_500, agreeing=1_200)).memory.pending
    assert many and many.rows == 1_200
    few = decided(found(180, 200, rows=300, agreeing=199))
    assert few.step is Step.NONE
    begun = decided(found(180, 200, rows=300, agreeing=250))
    assert begun.step is Step.UPDATE and begun.reason.endswith("250 rows are there to learn from, 50 are left out")


def test_a_routine_update_goes_live_where_no_fewer_are_right_of_its_own_of_the_others_and_of_each_label_that_it_knew() -> None:
    kept = {"a": (1, 2), "b": (0, 0)}
    assert no_worse("promote", 40, 40, 3, 3, (0, 0), kept, 0.05)[0] is no_worse("promote", 40, 40, 3, 1, (1, 3), kept, 0.05)[0] is Proof.BETTER
    assert no_worse("promote", 40, 40, 30, 0, (0, 30), kept, 0.05)[0] is Proof.MISSING    # what it gains is not taken from others
    assert no_worse("promote", 40, 40, 1, 0, (0, 2), kept, 0.05)[0] is Proof.MISSING      # and is more than they lose
    assert no_worse("promote", 40, 40, 3, 4, (9, 0), kept, 0.05)[0] is Proof.MISSING
    assert no_worse("promote", 40, 39, 3, 0, (0, 0), kept, 0.05)[0] is no_worse("promote", 40, 40, 3, 0, (0, 0), {}, 0.05)[0] is Proof.MISSING
    assert no_worse("hold", 40, 40, 9, 0, (9, 0), kept, 0.05)[0] is Proof.AGAINST
    lost = no_worse("promote", 40, 40, 28, 0, (0, 0), kept | {"plum": (0, 6)}, 0.05)
    assert lost[0] is Proof.AGAINST and "of the kept rows of 'plum' 6" in lost[1]


def test_while_rows_are_awaited_a_version_may_go_back_and_harm_that_is_over_is_forgotten() -> None:
    waiting = decided(found(40, 100, rows=10)).memory
    assert waiting.harm
    back = decided(found(60, 100, rows=10, at="2", previous=AdapterRef("banking", 1), compared=(2, 60)), waiting)
    assert back.step is Step.ROLL_BACK
    still = decided(found(68, 100, rows=10, at="2"), waiting)    # no test says so now, and it lies below
    assert still.step is Step.WAIT and still.memory.harm == waiting.harm
    over = decided(found(75, 100, rows=10, at="2"), waiting)
    assert over.step is Step.NONE and not over.memory.harm


def test_a_candidate_goes_live_on_proof_alone() -> None:
    assert proof_of("promote", 40, 12, 1, 0.01)[0] is Proof.BETTER
    assert proof_of("hold", 40, 12, 1, 0.01)[0] is proof_of("reject", 40, 12, 1, 0.01)[0] is Proof.AGAINST
    assert proof_of("promote", 40, 12, 11, 0.01)[0] is proof_of("promote", 0, 0, 0, 0.01)[0] is Proof.MISSING


def test_rows_are_set_aside_where_they_were_learned_or_did_harm_and_without_proof_more_are_awaited() -> None:
    begun = decided(found(40, 100)).memory
    for proof in (Proof.BETTER, Proof.AGAINST):
        after = judged(begun, proof)
        assert after.set_aside == ("1", "x") and not after.harm and after.pending is None
    after = judged(begun, Proof.MISSING)
    assert after.set_aside == ("", "") and "100 of 150 rows" in decided(found(40, 100), after, NOW + timedelta(days=2)).reason


# ---- passes over a real log -----------------------------------------------------------------------------------------

WORDS = {"fruit": ("apple", "pear", "plum"), "beast": ("zebra", "tiger", "camel")}
NEW_WORDS = {"fruit": ("malum", "pirum"), "beast": ("equus", "felis")}    # what people call them now
OTHER = {"fruit": "beast", "beast": "fruit"}
FRAMES = ("{} number {}", "see {} {}")


def rows(words: dict[str, tuple[str, ...]], count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"text": FRAMES[i % len(FRAMES)].format(word, i), "label": label}
        for i in range(start, start + count) for label, own in words.items() for word in own
    ]    # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maintained")
    with Hub.create(root / "registry", base_model=tiny_model(root / "bert", "bert"), encoder="hash") as hub:
        pass
    settings = root / "registry" / "hub.toml"
    text = settings.read_text().replace('keep = "vectors"', 'keep = "text"').replace('observe = "off"', 'observe = "text"')
    settings.write_text(text.replace("cooldown_days = 1.0", "cooldown_days = 7"))
    with Hub.open(root / "registry") as hub:
        report = hub.learn("kinds", rows(WORDS, 12), config=CONFIG, promote="always")
        assert report.metrics["accuracy"] > 0.9
        greetings = [{"text": f"good {time} friend {i}", "label": time} for time in ("morning", "evening") for i in range(15)]
        hub.learn("greetings", greetings, config=CONFIG, promote="always")
    return root / "registry"


@pytest.fixture
def hub(template: Path, tmp_path: Path) -> Iterator[Hub]:
    shutil.copytree(template, tmp_path / "registry")
    with Hub.open(tmp_path / "registry") as hub:
        yield hub


def ask(hub: Hub, asked: list[dict[str, str]], truth: Callable[[dict[str, str]], str] = lambda row: row["label"]) -> float:
    """Each row by name, and what it should have been; the share that was right."""
    answers = hub.predict([row["text"] for row in asked], adapters="kinds")
    for row, answer in zip(asked, answers, strict=True):
        hub.feedback(answer.id, correct_label=truth(row))
    return sum(answer.label == row["label"] for row, answer in zip(asked, answers, strict=True)) / len(asked)


def accuracy(hub: Hub, asked: list[dict[str, str]]) -> float:
    figures = hub.evaluate([row | {"adapter": "kinds"} for row in asked])    # past the log
    return float(figures["accuracy_named"])


def test_a_pass_over_a_quiet_registry_measures_once_and_changes_nothing(hub: Hub) -> None:
    report = hub.maintain(now=NOW)
    assert [(str(one.ref), one.step) for one in report.done] == [("greetings@1", Step.NONE), ("kinds@1", Step.NONE)]
    assert all(one.evaluation and one.evaluation["oracle"]["accuracy"] > 0.8 for one in report.done)
    events = hub.registry.events()
    assert [one.evaluation for one in hub.maintain(now=NOW).done] == [None, None]
    assert hub.registry.events() == events and hub.verify().ok
    remarks = [event for event in events if event.kind is EventKind.MAINTAINED]
    assert {event.name for event in remarks} == {"greetings", "kinds"} and all(event.detail["step"] == "evaluate" for event in remarks)


def test_an_adapter_that_the_world_has_left_behind_learns_from_what_people_corrected(hub: Hub) -> None:
    old = accuracy(hub, rows(WORDS, 5, 30))
    assert ask(hub, rows(NEW_WORDS, 30)) < 0.7
    planned = hub.maintain(dry_run=True, now=NOW)
    assert {one.ref.name: one.step for one in planned.done} == {"greetings": Step.NONE, "kinds": Step.UPDATE}
    assert str(hub.registry.resolve("kinds")) == "kinds@1" and not hub.registry.notes.read("maintenance")
    done = {one.ref.name: one for one in hub.maintain(config=CONFIG, now=NOW).done}
    assert done["kinds"].step is Step.UPDATE and done["kinds"].promoted and str(done["kinds"].result) == "kinds@2"
    assert accuracy(hub, rows(NEW_WORDS, 5, 100)) > 0.9 and accuracy(hub, rows(WORDS, 5, 30)) >= old - 0.1    # two of 30 rows with unseen numbers
    assert any(event.kind is EventKind.MAINTAINED and event.detail["step"] == "update" for event in hub.history("kinds"))
    again = hub.maintain(config=CONFIG, now=NOW + timedelta(days=30))
    assert {one.step for one in again.done} == {Step.NONE} and str(hub.registry.resolve("kinds")) == "kinds@2" and hub.verify().ok


def test_a_dry_run_writes_nothing_not_even_what_is_derived(template: Path, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    shutil.copytree(template, root)

    def stored() -> dict[Path, bytes]:
        paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock" and not path.name.startswith("catalog.sqlite")]
        return {path: path.read_bytes() for path in paths}

    with Hub.open(root) as hub:
        ask(hub, rows(NEW_WORDS, 30))
    shutil.rmtree(root / "index" / "router")
    with Hub.open(root) as hub:
        before, events, notes = stored(), hub.registry.events(), {kind: hub.registry.notes.read(kind) for kind in ("drift", "maintenance", "alarm")}
        assert {one.step for one in hub.maintain(dry_run=True, now=NOW).done} == {Step.NONE, Step.UPDATE}
        assert stored() == before and hub.registry.events() == events
        assert {kind: hub.registry.notes.read(kind) for kind in ("drift", "maintenance", "alarm")} == notes
        hub.maintain(["greetings"], now=NOW)
        assert (root / "index" / "router").exists()


def test_a_poisoned_batch_of_feedback_is_learned_from_in_vain_and_set_aside(hub: Hub) -> None:
    before = accuracy(hub, rows(WORDS, 5, 100))
    ask(hub, rows(WORDS, 20, 50), truth=lambda row: OTHER[row["label"]])
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.step is Step.UPDATE and not done.promoted and "held" in done.reason
    assert str(hub.registry.resolve("kinds")) == "kinds@1" and accuracy(hub, rows(WORDS, 5, 100)) == before
    [later] = hub.maintain(["kinds"], config=CONFIG, now=NOW + timedelta(days=30)).done
    assert later.step is Step.NONE    # those rows are no evidence any more


def test_production_goes_back_where_the_version_before_answers_better(hub: Hub) -> None:
    swapped = [row | {"label": OTHER[row["label"]]} for row in rows(WORDS, 12)]
    hub.learn("kinds", swapped, config=CONFIG, start="cold", promote="always")
    assert ask(hub, rows(WORDS, 10, 60)) < 0.5
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.step is Step.ROLL_BACK and str(done.result) == "kinds@1" and str(hub.registry.resolve("kinds")) == "kinds@1"
    assert hub.history("kinds")[-1].detail["step"] == "roll back"


ACTS = itertools.product(["worse", "left behind", "poisoned"], ["rollback", "promote", "learn", "retire", "remark", "_remember"])


@pytest.mark.parametrize(("case", "broken"), [*ACTS, ("agrees", "learn"), ("agrees", "promote"), ("agrees", "_remember")])
def test_a_pass_that_dies_at_any_of_its_acts_is_ended_by_the_next_one(hub: Hub, monkeypatch: pytest.MonkeyPatch, case: str, broken: str) -> None:
    """The act is done, and the process is gone before the next one."""
    if case == "worse":
        swapped = [row | {"label": OTHER[row["label"]]} for row in rows(WORDS, 12)]
        hub.learn("kinds", swapped, config=CONFIG, start="cold", promote="always")
        ask(hub, rows(WORDS, 10, 60))
    else:
        words, truth = (NEW_WORDS if case == "left behind" else WORDS), (OTHER if case == "poisoned" else dict(zip(OTHER, OTHER, strict=True)))
        ask(hub, rows(words, 40, 50) if case == "agrees" else rows(words, 30), truth=lambda row: truth[row["label"]])
    hub.maintain(["greetings"], now=NOW)
    owner: Any = lifelong if broken == "_remember" else hub.registry if broken == "remark" else hub
    act = getattr(owner, broken)

    def dies(*args: Any, **more: Any) -> Any:
        act(*args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, dies)
        with suppress(KeyboardInterrupt):
            hub.maintain(["kinds"], config=CONFIG, now=NOW)
    hub.maintain(["kinds"], config=CONFIG, now=NOW)
    assert str(hub.registry.resolve("kinds")) == {"worse": "kinds@1", "left behind": "kinds@2", "poisoned": "kinds@1", "agrees": "kinds@2"}[case]
    assert max(row.ref.version or 0 for row in hub.registry.versions("kinds")) == 2, "nothing is learned twice"
    memory = hub.registry.notes.read("maintenance")["kinds"]
    assert memory["pending"] is None and hub.verify().ok
    steps = [event.detail["step"] for event in hub.history("kinds") if event.kind is EventKind.MAINTAINED and event.detail["step"] != "evaluate"]
    assert set(steps) == {"roll back" if case == "worse" else "update"}
    [after] = hub.maintain(["kinds"], config=CONFIG, now=NOW + timedelta(days=30)).done
    assert after.step is Step.NONE


def cut_off_before_it_learns(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub, "learn", dies)
        hub.maintain(["kinds"], config=CONFIG, now=NOW)


def test_what_a_person_learned_meanwhile_is_not_taken_for_the_candidate_and_later_feedback_stays(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(hub, rows(NEW_WORDS, 30))
    cut_off_before_it_learns(hub, monkeypatch)
    theirs = hub.learn("kinds", rows(WORDS, 6, 40), config=CONFIG, promote="never").ref
    ask(hub, rows(NEW_WORDS, 10, 70))
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.result and done.result != theirs and done.promoted
    assert hub.registry.notes.read("maintenance")["kinds"]["set_aside"] < max([one.feedback.at, one.id] for one in hub.observations() if one.feedback)


def test_one_adapter_that_cannot_be_maintained_does_not_stop_the_others_and_waits_for_its_cool_down(hub: Hub) -> None:
    asked = [{"text": f"good morning friend {i}", "label": f"new {i}"} for i in range(60)]
    for row, answer in zip(asked, hub.predict([row["text"] for row in asked], adapters="greetings"), strict=True):
        hub.feedback(answer.id, row["label"], new_label=True)
    ask(hub, rows(NEW_WORDS, 30))
    done = {one.ref.name: one for one in hub.maintain(config=CONFIG, now=NOW).done}
    assert done["greetings"].step is Step.WAIT and "0 of 50 rows" in done["greetings"].reason    # of new labels nothing is learned here
    assert done["kinds"].promoted


def test_much_that_agrees_is_learned_where_nothing_is_wrong(hub: Hub) -> None:
    asked = rows(WORDS, 40, 50)
    assert len(asked) >= POLICY.refresh_rows and ask(hub, asked) > 0.9
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.step is Step.UPDATE and done.promoted and "rows are there to learn from" in done.reason
    assert str(hub.registry.resolve("kinds")) == "kinds@2" and hub.registry.notes.read("maintenance")["kinds"]["set_aside"] != list(NEVER)
    [after] = hub.maintain(["kinds"], config=CONFIG, now=NOW + timedelta(days=30)).done
    assert after.step is Step.NONE


def test_a_label_that_is_poisoned_among_what_agrees_is_not_forgotten(hub: Hub) -> None:
    """One label's rows are said to be another's, every other time: blocks do not show it, and the kept rows do."""
    label, known = next(iter(WORDS)), rows(WORDS, 5, 100)
    own = [row for row in known if row["label"] == label]
    before, turn = accuracy(hub, own), itertools.count()
    ask(hub, rows(WORDS, 40, 50), truth=lambda row: OTHER[label] if row["label"] == label and next(turn) % 2 else row["label"])
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.step in (Step.UPDATE, Step.NONE) and accuracy(hub, own) >= before - 0.1, done.reason


@pytest.mark.parametrize("case", ["left behind", "worse"])
def test_what_a_person_put_into_production_meanwhile_stays_there(hub: Hub, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    if case == "worse":
        hub.learn("kinds", [row | {"label": OTHER[row["label"]]} for row in rows(WORDS, 12)], config=CONFIG, start="cold", promote="always")
        ask(hub, rows(WORDS, 10, 60))
    else:
        ask(hub, rows(NEW_WORDS, 30))
    theirs = hub.learn("kinds", rows(WORDS, 6, 40), config=CONFIG, promote="never").ref
    act: Any = hub.rollback if case == "worse" else hub.promote

    def beaten(*given: Any, **more: Any) -> Any:
        hub.registry.promote(theirs)
        return act(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "rollback" if case == "worse" else "promote", beaten)
        [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert "somebody moved it meanwhile" in done.reason and not done.promoted and hub.registry.resolve("kinds") == theirs
    memory = hub.registry.notes.read("maintenance")["kinds"]
    assert memory["pending"] is None and memory["rows_next"] == 0
    assert hub.maintain(["kinds"], config=CONFIG, now=NOW).done[0].step is Step.NONE


def test_a_person_who_goes_back_behind_a_pass_that_was_killed_is_not_overruled(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(hub, rows(NEW_WORDS, 30))
    act = hub.promote

    def dies(*given: Any, **more: Any) -> Any:
        act(*given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub, "promote", dies)
        hub.maintain(["kinds"], config=CONFIG, now=NOW)
    hub.rollback("kinds")
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert str(hub.registry.resolve("kinds")) == "kinds@1" and not done.promoted and "has come meanwhile" in done.reason


def test_a_rollback_that_fails_is_tried_by_the_next_pass(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.learn("kinds", [row | {"label": OTHER[row["label"]]} for row in rows(WORDS, 12)], config=CONFIG, start="cold", promote="always")
    ask(hub, rows(WORDS, 10, 60))

    def busy(*_: Any, **__: Any) -> Any:
        raise RegistryError("the database is busy.")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "rollback", busy)
        assert hub.maintain(["kinds"], config=CONFIG, now=NOW).done[0].step is Step.FAILED
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.step is Step.RESUME and str(hub.registry.resolve("kinds")) == "kinds@1"


def test_whatever_error_one_adapter_raises_the_others_are_attended_to(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(hub, rows(NEW_WORDS, 30))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "learn", broken)
        done = {one.ref.name: one for one in hub.maintain(config=CONFIG, now=NOW).done}
    assert done["kinds"].step is Step.FAILED and "out of memory" in done["kinds"].reason and done["greetings"].step is Step.NONE
    assert hub.registry.notes.read("maintenance")["kinds"]["pending"] is None


def test_a_damaged_neighbour_is_left_out_where_routers_are_compared(hub: Hub) -> None:
    [greetings, kinds] = hub.registry.production()
    path = hub.registry.folder(greetings) / "routing.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    asked = [Example(row["text"], row["label"]) for row in rows(WORDS, 2, 100)]
    assert sum(hub.answered(asked, [kinds] * len(asked), [greetings, kinds])) > 0


def test_an_alarm_over_all_inputs_waits_for_the_next_pass_over_all(hub: Hub) -> None:
    hub.maintain(now=NOW)
    hub.registry.notes.write("drift", {"unseen": {"reason": "inputs are unlike the earlier ones"}})    # as a watch leaves it
    assert not any(one.evaluation for one in hub.maintain(dry_run=True, names=[], now=NOW).done)
    assert all(one.evaluation for one in hub.maintain(now=NOW).done)
    assert not any(one.evaluation for one in hub.maintain(now=NOW).done)


def test_rows_that_left_the_log_are_told_and_no_pass_dies_of_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(hub, rows(NEW_WORDS, 30))
    cut_off_before_it_learns(hub, monkeypatch)
    hub.forget_observations()
    [done] = hub.maintain(["kinds"], config=CONFIG, now=NOW).done
    assert done.step is Step.FAILED and "are gone" in done.reason
    assert hub.registry.notes.read("maintenance")["kinds"]["pending"] is None


def test_another_encoder_begins_the_comparison_of_vectors_anew(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.lifelong.SETTLED_S", -1.0)
    hub.predict([row["text"] for row in rows(WORDS, 5)])
    hub.watch()
    hub.reembed("hash:32")
    hub.predict([row["text"] for row in rows(WORDS, 5)])
    assert not hub.watch() and not hub.maintain(now=NOW).failed


def test_an_alarm_is_noted_told_and_open_until_answers_say_what_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.lifelong.SETTLED_S", -1.0)
    told = []
    ask(hub, rows(WORDS, 30, 50))
    assert not [alarm for alarm in hub.watch([told.append]) if alarm.kind == "alarm"]
    ask(hub, rows(NEW_WORDS, 60, 90))
    alarms = [alarm for alarm in hub.watch([told.append]) if alarm.kind == "alarm"]
    assert {alarm.adapter for alarm in alarms} >= {"kinds"} and told
    assert not hub.watch(), "what was seen is not seen twice"
    opened = hub.registry.notes.read("maintenance")["kinds"]["alarm"]
    assert opened["adapter"] == "kinds" and opened["evaluated"] is False and hub.registry.notes.read("alarm")


def test_a_watch_that_is_killed_goes_on_from_there_and_ends_as_one_that_was_not(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously it began again, with all that was logged since the last one that ended."""
    for constant, value in (("SETTLED_S", -1.0), ("SAVED_S", 0.0), ("BLOCK_ROWS", 40)):
        monkeypatch.setattr(lifelong, constant, value)
    for words, start in ((WORDS, 50), (NEW_WORDS, 90)):
        hub.predict([row["text"] for row in rows(words, 60, start)])
        ask(hub, rows(words, 40, start))
    root = hub.registry.layout.root
    hub.close()
    shutil.copytree(root, tmp_path / "whole")
    with Hub.open(tmp_path / "whole") as whole:
        expected = whole.watch()
        kept = {kind: whole.registry.notes.read(kind) for kind in ("drift", "maintenance", "alarm")}
    assert {alarm.signal for alarm in expected} >= {"error", "score"} and kept["maintenance"]
    write, told, writes = Notes.write, [], 0

    def dies(self: Notes, kind: str, bodies: Mapping[str, Any]) -> None:
        nonlocal writes
        write(self, kind, bodies)
        writes += 1
        if writes % 3 == 0 and not (kind == "drift" and bodies["state"]["alarms"] == []):
            raise KeyboardInterrupt

    kills = 0
    while True:
        with monkeypatch.context() as patch, Hub.open(root) as again:
            patch.setattr(Notes, "write", dies)
            try:
                found = again.watch([told.append])
                break
            except KeyboardInterrupt:
                kills += 1
    assert kills >= 3 and found == expected, "those that a killed one had found are given by the one that ends"
    assert {one.alarm.reason for one in told} >= {one.reason for one in expected if one.kind == "alarm"}
    with Hub.open(root) as after:
        notes = after.registry.notes
        alike = {kind: notes.read(kind) for kind in ("drift", "maintenance")}
        assert {one["reason"] for one in notes.read("alarm").values()} == {one.reason for one in expected}
        state, other = alike["drift"].pop("state"), kept["drift"]["state"]
        assert alike["maintenance"] == kept["maintenance"] and {**state, "alerts": ""} == {**other, "alerts": ""}
        assert not after.watch()


def test_an_alarm_that_a_watch_found_leads_to_one_evaluation_in_the_next_pass(hub: Hub) -> None:
    """Previously only alarms of the pass itself did."""
    hub.maintain(now=NOW)    # measures what is new
    hub.registry.notes.write("maintenance", {"kinds": Memory(1, alarm=ALARM | {"evaluated": False}).to_json()})
    assert [[one.evaluation is not None for one in hub.maintain(["kinds"], now=NOW).done] for _ in range(2)] == [[True], [False]]


def test_what_is_forgotten_in_the_log_is_forgotten_by_the_detectors(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.lifelong.SETTLED_S", -1.0)
    hub.predict([row["text"] for row in rows(WORDS, 5)])
    hub.watch()
    before = hub.registry.notes.read("drift")["state"]
    assert json.loads(before["monitor"])["embeddings"]["count"] == 30
    assert hub.forget_observations() == 30
    after = hub.registry.notes.read("drift")["state"]
    assert json.loads(after["monitor"])["embeddings"]["count"] == 0 and after["seen"] == before["seen"]


def test_two_passes_do_not_run_at_once(hub: Hub) -> None:
    program = f"from adapter_hub import Hub\nHub.open({str(hub.registry.layout.root)!r}).maintain()"
    with hub.registry.maintaining():
        with pytest.raises(RegistryError, match="another process maintains this registry"):
            hub.maintain()
        beside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert beside.returncode == 1 and "another process maintains this registry" in beside.stderr
    assert not hub.maintain().failed


def test_a_time_without_a_zone_is_refused(hub: Hub) -> None:
    with pytest.raises(InvalidInput, match="no time zone"):
        hub.maintain(now=datetime(2026, 1, 1))


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=soak)])
def test_a_pass_that_is_killed_leaves_a_sound_registry_and_the_next_one_ends_what_was_begun(kills: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak.maintenance_kill", "--kills", str(kills)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["faults"] == [] and result["kills"] >= kills


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_verbs_say_what_was_done_and_what_would_be(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_hub.lifelong.SETTLED_S", -1.0)
    ask(hub, rows(NEW_WORDS, 30))
    place = ["--registry", str(hub.registry.layout.root)]
    planned = CliRunner().invoke(app, ["maintain", "--dry-run", *place])
    assert planned.exit_code == 0 and "rows are there to learn from" in planned.output and "a dry run: nothing was done" in planned.output
    done = CliRunner().invoke(app, ["maintain", "greetings", "--json", *place])
    assert done.exit_code == 0 and [(one["adapter"], one["step"]) for one in json.loads(done.stdout)["done"]] == [("greetings@1", "none")]
    watched = CliRunner().invoke(app, ["watch", *place])
    assert watched.exit_code == 0 and "nothing has changed for the worse" in watched.output
    unknown = CliRunner().invoke(app, ["maintain", "nobody", *place])
    assert unknown.exit_code == 2 and "nobody" in unknown.output
