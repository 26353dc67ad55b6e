"""The live router: it follows every event of another handle, never forgets what was settled, and one bad file stops nobody."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_hub.errors import InvalidInput, ModelChanged
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.layout import Layout
from adapter_hub.registry.registry import Registry
from adapter_hub.routing.calibration import Calibration, Fitted, fit, solved_centres
from adapter_hub.routing.decision import Method, Reason
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.features import Features
from adapter_hub.routing.head import Solver, digest_of
from adapter_hub.routing.live import ROUTING_FILE, LiveRouter
from adapter_hub.routing.prototypes import Prototypes
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import Exemplars, RoutingState, build_state
from tests.routing.conftest import ENCODER, World
from tests.routing.registries import CONFIG, FACTS, add
from tests.routing.test_router import assert_agree, large_segments
from tests.soak import router_threads

WORLD = World(5, 2, noise=0.9, seed=21)
STATES = [WORLD.state(i, 5) for i in range(5)]
QUERIES = Features.concatenate([*(WORLD.sample(i, 2)[0] for i in range(5)), WORLD.strangers(5)])
ALPHA, BETA, GAMMA = (AdapterRef(name, 1) for name in ("alpha", "beta", "gamma"))
DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    lambda path: path.write_bytes(b""),
    lambda path: path.unlink(),
]


@dataclass
class Place:
    """A registry folder with `alpha` and `beta`, written by one handle and followed by others."""

    folder: Path
    writer: Registry
    opened: list[Registry] = field(default_factory=list)
    read: list[str] = field(default_factory=list)    # digests of the states that live routers have read

    def live(self, check: Callable[[RoutingState], None] | None = None) -> LiveRouter:
        self.opened.append(Registry.open(self.folder))
        return LiveRouter(self.opened[-1], check or (lambda state: self.read.append(state.digest)))

    @property
    def saved(self) -> Path:
        return self.folder / "index" / "router"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Registry.create(tmp_path / "registry", config=CONFIG) as writer:
        place = Place(tmp_path / "registry", writer)
        add(writer, "alpha", STATES[0])
        add(writer, "beta", STATES[1])
        yield place
        for registry in place.opened:
            registry.close()


def reference(router: Router, states: dict[AdapterRef, RoutingState]) -> Router:
    """Built at once from these states under the router's calibration, with the head solved for them."""
    assert router.calibration is not None
    exemplars = {ref: Exemplars.of(state) for ref, state in states.items()}
    solver = Solver(exemplars, STATES[0].dim)
    head = solver.head(digest_of({ref: state.digest for ref, state in states.items()}))
    return Router.build(states, router.calibration).with_head(head, solved_centres(router.calibration, states, exemplars, solver, head))


def assert_serves(live: LiveRouter, states: dict[AdapterRef, RoutingState]) -> None:
    """At once by prototypes, and settled as if it had never served anything else."""
    assert live.snapshot().refs == tuple(sorted(states))
    settled = live.snapshot(settled=True)
    expected = reference(settled, states)
    assert settled.digest == expected.digest
    assert_agree(settled.route_features(QUERIES, k=9), expected.route_features(QUERIES, k=9))
    assert live.snapshot().digest == settled.digest


# ---- follow -------------------------------------------------------------------------------------------------------------


def test_it_follows_every_event_of_another_handle(place: Place) -> None:
    live = place.live()
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})
    add(place.writer, "gamma", STATES[2])
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    second = add(place.writer, "alpha", STATES[3], promote=False)
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    place.writer.promote(second)
    assert_serves(live, {second: STATES[3], BETA: STATES[1], GAMMA: STATES[2]})
    place.writer.rollback("alpha")
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    place.writer.retire(BETA)
    assert_serves(live, {ALPHA: STATES[0], GAMMA: STATES[2]})
    place.writer.purge(GAMMA)
    place.writer.promote(second)
    add(place.writer, "beta", STATES[4])
    assert_serves(live, {second: STATES[3], AdapterRef("beta", 2): STATES[4]})


def test_a_newcomer_answers_by_its_prototypes_at_once_and_by_the_head_when_settled(place: Place) -> None:
    live = place.live()
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    own = STATES[2].exemplars.features
    at_once = live.snapshot().route_features(own, max_false_reject=0)
    assert {(decision.adapter, decision.method) for decision in at_once} == {(GAMMA, Method.PROTOTYPES)}
    settled = live.snapshot(settled=True).route_features(own, max_false_reject=0)
    assert {(decision.adapter, decision.method) for decision in settled} == {(GAMMA, Method.KERNEL_RIDGE)}


def test_a_snapshot_is_the_same_object_while_nothing_happens(place: Place) -> None:
    live = place.live()
    first = live.snapshot()
    reads = len(place.read)
    assert live.snapshot() is first and live.snapshot(settled=True) is first and len(place.read) == reads


def test_thresholds_do_not_move_when_a_task_is_added(place: Place) -> None:
    live = place.live()
    before = live.snapshot()
    expected = before.route_features(QUERIES, k=2)
    add(place.writer, "gamma", STATES[2])
    after = live.snapshot(settled=True)
    assert before.calibration is not None and after.calibration is not None
    assert after.calibration.digest == before.calibration.digest and after.calibration.id == before.calibration.id == 1
    assert {decision.threshold for decision in after.route_features(QUERIES)} == {expected[0].threshold}
    assert before.route_features(QUERIES, k=2) == expected
    assert place.writer.latest_calibration() == 1


def test_an_empty_registry_has_no_candidates_until_the_first_version(tmp_path: Path) -> None:
    with Registry.create(tmp_path / "registry", config=CONFIG) as registry:
        live = LiveRouter(registry, lambda state: None)
        assert {decision.reason for decision in live.snapshot().route_features(QUERIES)} == {Reason.NO_CANDIDATES}
        add(registry, "named", build_state(ENCODER, []))
        assert live.snapshot().versions == (AdapterRef("named", 1),) and registry.latest_calibration() is None
        add(registry, "alpha", STATES[0])
        found = live.snapshot()
        assert found.refs == (ALPHA,) and found.versions == (ALPHA, AdapterRef("named", 1)) and registry.latest_calibration() == 1
        registry.retire(ALPHA)
        assert live.snapshot().refs == ()


def test_many_versions_are_taken_up_at_once(place: Place) -> None:
    live = place.live()
    live.snapshot()
    states = {add(place.writer, f"more{i}", STATES[i]): STATES[i] for i in range(4)}
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], **states})
    for ref in states:
        place.writer.retire(ref)
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})


def test_a_router_that_grows_one_by_one_is_indexed_in_the_background(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    large_segments(monkeypatch, 4)
    live, states = place.live(), {ALPHA: STATES[0], BETA: STATES[1]}
    for i in range(20):
        state = STATES[i % 5]
        states[add(place.writer, f"more{i:02d}", state)] = state
        live.snapshot()
    assert_serves(live, states)
    while live._solving is not None and live._solving.is_alive():
        live._solving.join()
    assert not live.snapshot().scattered
    assert_serves(live, states)
    place.read.clear()
    assert_serves(place.live(), states)
    assert place.read == []    # what is saved is the compacted router


def test_a_version_purged_while_it_is_about_to_be_read_is_passed_over(place: Place) -> None:
    """Reading `beta` is what lets another handle purge `gamma` here, after the standing was taken and before it is read."""
    add(place.writer, "gamma", STATES[2])

    def purge(state: RoutingState) -> None:
        if state.digest == STATES[1].digest and GAMMA in place.writer.production():
            place.writer.purge(GAMMA)

    live = place.live(purge)
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})


def test_a_version_purged_while_the_head_is_solved_is_passed_over(place: Place) -> None:
    gate = Gate(STATES[2])    # so that this thread solves
    armed, main = threading.Event(), threading.current_thread()

    def purge(state: RoutingState) -> None:
        if armed.is_set() and threading.current_thread() is main and state.digest == STATES[1].digest and GAMMA in place.writer.production():
            place.writer.purge(GAMMA)
        gate(state)

    live = place.live(purge)
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    live.snapshot()    # its prototypes are taken up
    assert gate.reached.wait(60)
    armed.set()
    assert live.snapshot(settled=True).refs == (ALPHA, BETA)
    gate.join()
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})


def test_a_description_more_leaves_the_head_to_those_with_examples(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head never sees a description: none of them counts against what it can hold."""
    monkeypatch.setattr("adapter_hub.routing.head.CLASSES_MAX", 4)
    for i in range(5):
        add(place.writer, f"described{i}", build_state(ENCODER, [], f"questions about matter {i}"))
    live = place.live()
    assert live.snapshot().head is not None
    add(place.writer, "described5", build_state(ENCODER, [], "questions about something else"))
    settled = live.snapshot(settled=True)
    assert settled.head is not None and set(settled.head.columns) == {ALPHA, BETA}
    assert live.of(settled.versions, 1).digest == settled.digest == place.live().snapshot().digest
    add(place.writer, "gamma", STATES[2])
    settled = live.snapshot(settled=True)    # now there are two classes too many
    assert settled.head is None and live.of(settled.versions, 1).digest == settled.digest


# ---- saved --------------------------------------------------------------------------------------------------------------


def test_a_saved_router_is_opened_without_reading_a_state(place: Place) -> None:
    first = place.live().snapshot()
    place.read.clear()
    again = place.live().snapshot()
    assert again.digest == first.digest and place.read == [] and again.calibration is not None and again.calibration.id == 1
    assert again.route_features(QUERIES, k=5) == first.route_features(QUERIES, k=5)


def test_a_saved_router_that_needs_no_head_is_opened_without_reading_a_state(tmp_path: Path) -> None:
    place = Place(tmp_path / "registry", Registry.create(tmp_path / "registry", config=CONFIG))
    with place.writer:
        add(place.writer, "described", build_state(ENCODER, [], "questions about cards"))
        first = place.live().snapshot()
        place.read.clear()
        assert first.head is None and place.live().snapshot().digest == first.digest and place.read == []
        for registry in place.opened:
            registry.close()


def test_a_saved_router_is_brought_up_to_date_by_reading_what_is_new(place: Place) -> None:
    place.live().snapshot()
    add(place.writer, "gamma", STATES[2])
    place.writer.retire(ALPHA)
    place.read.clear()
    live = place.live()
    live.snapshot()
    assert place.read[0] == STATES[2].digest
    assert_serves(live, {BETA: STATES[1], GAMMA: STATES[2]})


def test_the_first_snapshot_is_settled_also_where_the_saved_router_is_behind(place: Place) -> None:
    place.live().snapshot()
    add(place.writer, "gamma", STATES[2])
    first = place.live().snapshot()
    own = first.route_features(STATES[2].exemplars.features, max_false_reject=0)
    assert {(decision.adapter, decision.method) for decision in own} == {(GAMMA, Method.KERNEL_RIDGE)}
    assert first.digest == place.live().snapshot(settled=True).digest
    place.read.clear()
    assert place.live().snapshot().digest == first.digest and place.read == []    # it was saved for the next process


def test_threads_that_need_the_same_head_solve_it_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.live().snapshot()
    shutil.rmtree(place.saved)
    together, solved = threading.Barrier(4), []

    class Counted(Solver):
        def __init__(self, *given: Any, **named: Any) -> None:
            solved.append(threading.current_thread())
            super().__init__(*given, **named)

    def wait(state: RoutingState) -> None:
        if threading.current_thread().name.startswith("asks") and state.digest == STATES[1].digest and begun.is_set():
            together.wait(60)    # all have read what they need

    monkeypatch.setattr("adapter_hub.routing.live.Solver", Counted)
    begun, live, found = threading.Event(), place.live(wait), list[Router]()
    threads = [threading.Thread(target=lambda: found.append(live.snapshot()), name=f"asks {i}") for i in range(4)]
    with live._lock:    # the router begins, and each of them waits with what it has read before it solves
        live._follow()
        begun.set()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(solved) == 1 and len({router.digest for router in found}) == 1 and len(found) == 4
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})


def test_each_saved_file_is_made_again_when_it_is_damaged(place: Place) -> None:
    expected = place.live().snapshot().digest
    names = sorted(path.name for path in place.saved.iterdir())
    assert [name for name in names if len(name) < 40] == ["SHA256SUMS", "head.safetensors", "router.json"] and len(names) == 4
    for name in names:
        for damage in DAMAGES:
            damage(place.saved / name)
            place.read.clear()
            assert place.live().snapshot().digest == expected and place.read != []
            place.read.clear()
            assert place.live().snapshot().digest == expected and place.read == []


def test_the_saved_router_of_an_older_calibration_is_not_used(place: Place) -> None:
    live = place.live()
    live.snapshot()
    keep = {path.name: path.read_bytes() for path in place.saved.iterdir()}
    add(place.writer, "gamma", STATES[2])
    live.calibrate("more tasks")
    for name, data in keep.items():
        (place.saved / name).write_bytes(data)
    assert_serves(place.live(), {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})


def test_an_index_folder_that_cannot_be_written_stops_nobody(place: Place) -> None:
    (place.folder / "index").write_text("a file where the folder belongs")
    assert_serves(place.live(), {ALPHA: STATES[0], BETA: STATES[1]})


def test_what_is_forgotten_is_made_again_from_what_is_left(place: Place) -> None:
    live = place.live()
    add(place.writer, "gamma", STATES[2])
    live.snapshot()
    place.writer.purge(GAMMA)
    live.forget()
    assert not place.saved.exists()
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})


class Gate:
    """A check that holds the thread which solves in the background, once it has read the last state that it needs."""

    def __init__(self, last: RoutingState) -> None:
        self.last, self.reached, self.go = last.digest, threading.Event(), threading.Event()

    def __call__(self, state: RoutingState) -> None:
        if threading.current_thread().name == "adapter_hub head" and state.digest == self.last:
            self.reached.set()
            assert self.go.wait(60)

    def join(self) -> None:
        self.go.set()
        self.join_solving()

    @staticmethod
    def join_solving() -> None:
        for thread in threading.enumerate():
            if thread.name == "adapter_hub head":
                thread.join(60)


def test_what_was_purged_while_the_head_was_solved_is_not_saved(place: Place) -> None:
    gate = Gate(STATES[2])
    live = place.live(gate)
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    live.snapshot()
    assert gate.reached.wait(60)
    place.writer.purge(ALPHA)
    live.forget()
    gate.join()
    assert not place.saved.exists()
    assert_serves(live, {BETA: STATES[1], GAMMA: STATES[2]})


def test_who_did_not_hear_of_a_purge_yet_saves_nothing_of_what_was_purged(place: Place) -> None:
    gate = Gate(STATES[2])
    live = place.live(gate)
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    live.snapshot()
    assert gate.reached.wait(60) and held(place.folder / "index", STATES[0])
    place.writer.purge(ALPHA)
    assert not (place.folder / "index").exists()
    gate.join()
    assert not held(place.folder / "index", STATES[0])
    assert_serves(live, {BETA: STATES[1], GAMMA: STATES[2]})
    assert held(place.folder / "index", STATES[1]) and not held(place.folder / "index", STATES[0])


def test_what_is_only_masked_in_a_large_segment_is_saved_no_more_once_it_is_purged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    large_segments(monkeypatch, 2)
    add(place.writer, "gamma", STATES[2])
    live, index = place.live(), place.folder / "index"
    live.snapshot()
    place.writer.retire(BETA)
    place.writer.retire(GAMMA)
    assert_serves(live, {ALPHA: STATES[0]})
    Gate.join_solving()    # while a thread saves, there is a moment without the folder
    assert held(index, STATES[0]) and held(index, STATES[1]) and list(place.saved.glob("*.faiss"))
    place.writer.purge(BETA)
    place.read.clear()
    add(place.writer, "delta", STATES[3])
    assert_serves(live, {ALPHA: STATES[0], AdapterRef("delta", 1): STATES[3]})
    Gate.join_solving()
    assert held(index, STATES[0]) and held(index, STATES[2]) and not held(index, STATES[1])
    assert_serves(place.live(), {ALPHA: STATES[0], AdapterRef("delta", 1): STATES[3]})


def held(folder: Path, state: RoutingState) -> bool:
    """Whether a file has a vector of these exemplars: of the head's, or a prototype as a segment or a flat index stores it."""
    means = Prototypes.of(Exemplars.of(state), False).means
    while True:
        try:
            stored = b"\0".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
            break
        except FileNotFoundError:    # a thread is just saving
            continue
    return any(row.tobytes() in stored for row in (*means, *means.astype(np.float32), *state.exemplars.features.dense))


def test_a_head_that_comes_late_does_not_take_the_place_of_a_newer_one(place: Place) -> None:
    gate = Gate(STATES[2])
    live = place.live(gate)
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    live.snapshot()
    assert gate.reached.wait(60)
    delta = add(place.writer, "zeta", STATES[3])
    settled = live.snapshot(settled=True)
    gate.join()
    assert settled.head is not None and delta in settled.head.columns
    assert live.snapshot().digest == settled.digest
    assert place.live().snapshot().digest == settled.digest


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), np.linalg.LinAlgError("not positive definite")])
def test_a_head_that_cannot_be_solved_is_tried_once_until_the_versions_change(
    error: Exception, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    broken = threading.Event()

    def check(state: RoutingState) -> None:
        if broken.is_set() and threading.current_thread().name == "adapter_hub head":
            raise error

    live = place.live(check)
    live.snapshot()
    broken.set()
    for name, i in (("gamma", 2), ("zeta", 3)):
        add(place.writer, name, STATES[i])
        caplog.clear()
        for _ in range(5):
            assert live.snapshot().refs[-1] == AdapterRef(name, 1)
            Gate.join_solving()
        assert caplog.text.count("the head could not be made") == 1
    broken.clear()
    place.writer.retire(AdapterRef("zeta", 1))
    live.snapshot()
    Gate.join_solving()
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})


# ---- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_left_out_and_said_once(damage: Callable[[Path], object], place: Place, caplog: pytest.LogCaptureFixture) -> None:
    add(place.writer, "gamma", STATES[2])
    damage(Layout(place.folder).version("beta", 1) / ROUTING_FILE)
    live = place.live()
    with caplog.at_level(logging.ERROR, logger="adapter_hub"):
        assert_serves(live, {ALPHA: STATES[0], GAMMA: STATES[2]})
        add(place.writer, "delta", STATES[3])
        assert_serves(live, {ALPHA: STATES[0], GAMMA: STATES[2], AdapterRef("delta", 1): STATES[3]})
    assert [record.message for record in caplog.records if record.message.startswith("beta@1 is left out of routing")] == [caplog.messages[0]]
    assert live.calibrate("without it").members == (ALPHA, AdapterRef("delta", 1), GAMMA)


@pytest.mark.parametrize("hears", ["an event", "forget"])
@pytest.mark.parametrize("when", ["before it is known", "when the head is solved"])
def test_a_damaged_version_that_was_restored_is_routed_again(when: str, hears: str, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    states = {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]}
    add(place.writer, "gamma", STATES[2])
    live, path = place.live(), Layout(place.folder).version("beta", 1) / ROUTING_FILE
    gate = Gate(STATES[0])
    if when == "when the head is solved":
        live = place.live(gate)
        live.snapshot()
        states[add(place.writer, "zeta", STATES[4])] = STATES[4]
        live.snapshot()
        assert gate.reached.wait(60)
    data = path.read_bytes()
    DAMAGES[1](path)
    gate.join()
    lacking = live.snapshot(settled=True)
    assert lacking.head is not None and BETA not in lacking.head.columns and lacking.head.digest != reference(lacking, states).head_digest
    for i in (1, 2):
        if when == "before it is known":
            delta = AdapterRef("delta", i)
            states = {ref: state for ref, state in states.items() if ref.name != "delta"} | {delta: STATES[3]}
            assert add(place.writer, "delta", STATES[3]) == delta
            assert_serves(live, {ref: state for ref, state in states.items() if ref != BETA})
    path.write_bytes(data)
    if hears == "forget":
        live.forget()
    else:
        states[add(place.writer, "eta", STATES[3])] = STATES[3]
    assert_serves(live, states)
    assert_serves(place.live(), states)
    assert caplog.text.count("beta@1 is left out of routing") == 1


def test_a_newcomer_that_is_damaged_does_not_stop_the_others(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    live = place.live()
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    DAMAGES[0](Layout(place.folder).version("gamma", 1) / ROUTING_FILE)
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})
    assert "gamma@1 is left out of routing" in caplog.text


def test_a_damaged_calibration_is_fitted_again_on_the_versions_it_knew_and_gets_the_next_number(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    first = place.live().snapshot().calibration
    add(place.writer, "gamma", STATES[2])
    DAMAGES[0](Layout(place.folder).calibration(1))
    live = place.live()
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    again = live.snapshot().calibration
    assert first is not None and again is not None and (again.id, again.digest) == (2, first.digest)
    assert place.writer.events()[-1].reason == "calibration 1 is damaged" and caplog.text.count("Fitted again on the versions it knew") == 1
    assert place.live().snapshot().calibration is not None and place.writer.latest_calibration() == 2


def test_who_may_only_read_fits_a_damaged_calibration_once_for_all_events(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    first = place.live().snapshot().calibration
    DAMAGES[0](Layout(place.folder).calibration(1))
    with Registry._open_read_only(Layout(place.folder), CONFIG) as registry, caplog.at_level(logging.WARNING):
        early, late = LiveRouter(registry, lambda state: None), LiveRouter(registry, lambda state: None)
        found = [early.snapshot().calibration]
        states = {ALPHA: STATES[0], BETA: STATES[1]}
        for i in (2, 3):
            states[add(place.writer, f"more{i}", STATES[i])] = STATES[i]
            assert_serves(early, states)
            found.append(early.snapshot().calibration)
        assert found[0] is found[1] is found[2] and caplog.text.count("Fitted again") == 1
        found.append(late.snapshot().calibration)    # though more versions are there than when the other one was fitted
        assert first is not None and {made.digest for made in found if made} == {first.digest} and {made.id for made in found if made} == {None}


def test_of_a_damaged_calibration_the_versions_that_are_left_count(place: Place) -> None:
    place.live().snapshot()
    DAMAGES[0](Layout(place.folder).calibration(1))
    place.writer.purge(ALPHA)
    live = place.live()
    made = live.snapshot().calibration
    assert made is not None and made.digest == fit({BETA: STATES[1]}).calibration.digest
    add(place.writer, "gamma", STATES[2])
    DAMAGES[0](Layout(place.folder).calibration(2))
    place.writer.purge(BETA)    # nothing that it knew is left
    made = place.live().snapshot().calibration
    assert made is not None and made.digest == fit({GAMMA: STATES[2]}).calibration.digest


def test_a_version_without_a_routing_file_is_reached_by_name_and_stops_nobody(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    bare = place.writer.add("bare", FACTS, {"adapter_model.safetensors": b"weights alone"})
    live = place.live()
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})
    place.writer.add("bare", FACTS, {"adapter_model.safetensors": b"other weights"})
    add(place.writer, "gamma", STATES[2])
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    assert caplog.messages.count("bare@1 has no routing.safetensors: only its name reaches it.") == 1 and place.writer.resolve(bare) == bare


def test_a_state_of_another_encoder_is_refused(place: Place) -> None:
    def check(state: RoutingState) -> None:
        if state.encoder_fingerprint != ENCODER.fingerprint:
            raise ModelChanged("another encoder")

    live = place.live(check)
    live.snapshot()
    add(place.writer, "other", build_state(HashEncoder(64), [], "a description"))
    with pytest.raises(ModelChanged):
        live.snapshot()


def test_a_rehearsal_stores_nothing_and_what_follows_is_as_if_it_had_not_been(place: Place) -> None:
    live = place.live()
    with live.rehearsing():
        first = live.snapshot(settled=True)
        assert first.calibration is not None and first.calibration.id is None
        add(place.writer, "gamma", STATES[2])
        assert live.snapshot(settled=True).refs == (ALPHA, BETA, GAMMA)
    assert not place.saved.exists() and place.writer.latest_calibration() is None
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    assert place.saved.exists() and place.writer.latest_calibration() == 1
    saved = {path: path.read_bytes() for path in place.saved.rglob("*") if path.is_file()}
    delta = add(place.writer, "delta", STATES[3])
    with live.rehearsing():
        now = live.snapshot(settled=True)
        assert now.calibration is not None and now.calibration.id == 1 and delta in now.refs
    assert {path: path.read_bytes() for path in place.saved.rglob("*") if path.is_file()} == saved
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2], delta: STATES[3]})


# ---- calibrate ----------------------------------------------------------------------------------------------------------


def test_a_recalibration_gets_the_next_number_and_says_what_moved(place: Place) -> None:
    live, other = place.live(), place.live()
    first = live.snapshot().calibration
    other.snapshot()
    add(place.writer, "gamma", STATES[2])
    second = live.calibrate("one task more")
    assert first is not None and (first.id, second.id) == (1, 2) and "moved" not in first.facts
    assert {"moved", "let_in", "turned_away"} <= set(second.facts) and all(0 <= second.facts[key] <= 1 for key in ("moved", "let_in", "turned_away"))
    assert second.facts["threshold_before 0.05"] == first.threshold(0.05)
    assert second.members == (ALPHA, BETA, GAMMA) and first.members == (ALPHA, BETA)
    assert place.writer.history("alpha") and [event.reason for event in place.writer.events() if event.kind == "calibrated"][-1] == "one task more"
    assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
    assert other.snapshot(settled=True).digest == live.snapshot(settled=True).digest


class SlowFit:
    """`fit`, which waits in the thread that calibrates."""

    def __init__(self, live: LiveRouter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go, self.made = threading.Event(), threading.Event(), list[Calibration]()
        self._thread = threading.Thread(target=lambda: self.made.append(live.calibrate("slowly")))
        monkeypatch.setattr("adapter_hub.routing.live.fit", self._fit)

    def _fit(self, states: Mapping[AdapterRef, RoutingState]) -> Fitted:
        if threading.current_thread() is self._thread:
            self.reached.set()
            assert self.go.wait(60)
        return fit(states)

    def start(self) -> None:
        self._thread.start()
        assert self.reached.wait(60)

    def join(self) -> Calibration:
        self.go.set()
        self._thread.join(60)
        (made,) = self.made
        return made


def test_inputs_are_routed_and_events_followed_while_a_calibration_is_fitted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    live = place.live()
    before = live.snapshot()
    slow = SlowFit(live, monkeypatch)
    slow.start()
    assert live.snapshot() is before
    add(place.writer, "gamma", STATES[2])
    place.writer.retire(BETA)
    assert_serves(live, {ALPHA: STATES[0], GAMMA: STATES[2]})
    assert live.of(before.versions, 1).digest == before.digest
    made = slow.join()
    assert (made.id, made.members) == (2, (ALPHA, BETA))
    assert_serves(live, {ALPHA: STATES[0], GAMMA: STATES[2]})
    assert live.snapshot().calibration is made
    again = reference(live.snapshot(), {ALPHA: STATES[0], GAMMA: STATES[2]})
    assert again.route_features(QUERIES, k=5) == live.snapshot().route_features(QUERIES, k=5)
    assert_serves(place.live(), {ALPHA: STATES[0], GAMMA: STATES[2]})


def test_a_newer_calibration_of_another_handle_outlives_a_slow_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    live, other = place.live(), place.live()
    live.snapshot()
    slow = SlowFit(live, monkeypatch)
    slow.start()
    assert other.calibrate("quickly").id == 2
    found = live.snapshot().calibration
    assert found is not None and found.id == 2
    assert slow.join().id == 3
    for each in (live, other):
        found = each.snapshot().calibration
        assert found is not None and found.id == 3
        assert_serves(each, {ALPHA: STATES[0], BETA: STATES[1]})


def test_what_is_purged_while_a_calibration_is_fitted_is_not_saved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    live = place.live()
    live.snapshot()
    slow = SlowFit(live, monkeypatch)
    slow.start()
    place.writer.purge(BETA)
    live.forget()
    assert slow.join().id is None
    assert not held(place.folder, STATES[1])
    assert_serves(live, {ALPHA: STATES[0]})
    found = live.snapshot().calibration
    assert found is not None and found.id == 1


def test_what_came_and_went_leaves_no_trace_in_the_next_record(place: Place) -> None:
    live = place.live()
    before = live.snapshot().calibration
    add(place.writer, "gamma", STATES[2])
    live.snapshot(settled=True)
    place.writer.purge(GAMMA)
    live.forget()
    after = live.calibrate("without gamma")
    assert before is not None and after.id == 2
    compared = {"moved", "let_in", "turned_away", *(f"threshold_before {rate:g}" for rate in (0.02, 0.05, 0.1))}
    assert {key: value for key, value in after.facts.items() if key not in compared} == before.facts
    assert (after.quantiles == before.quantiles).all() and after.centres == before.centres and after.scoring == before.scoring
    assert (after.facts["moved"], after.facts["let_in"], after.facts["turned_away"]) == (0, 0, 0)


def test_a_new_calibration_is_taken_up_also_where_a_version_is_purged_meanwhile(place: Place) -> None:
    armed = threading.Event()

    def purge(state: RoutingState) -> None:
        if armed.is_set() and state.digest == STATES[0].digest and BETA in place.writer.production():
            place.writer.purge(BETA)

    live = place.live(purge)
    live.snapshot()
    add(place.writer, "gamma", STATES[2])
    assert place.live().calibrate("one task more").id == 2
    armed.set()
    found = live.snapshot()
    assert found.refs == (ALPHA, GAMMA) and found.calibration is not None and found.calibration.id == 2


def test_there_is_nothing_to_calibrate_on_without_examples(tmp_path: Path) -> None:
    with Registry.create(tmp_path / "registry", config=CONFIG) as registry:
        add(registry, "named", build_state(ENCODER, []))
        with pytest.raises(InvalidInput) as caught:
            LiveRouter(registry, lambda state: None).calibrate("now")
        assert caught.value.fact == "no version in production has examples to calibrate on."


def test_a_router_of_the_past_is_built_again(place: Place) -> None:
    live = place.live()
    past = live.snapshot()
    add(place.writer, "gamma", STATES[2])
    place.writer.retire(ALPHA)
    live.calibrate("anew")
    again = live.of(past.versions, 1)
    assert again.digest == past.digest
    assert_agree(again.route_features(QUERIES, k=5), past.route_features(QUERIES, k=5))


def test_a_calibration_that_knows_few_of_the_adapters_is_said_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    live = place.live()
    live.snapshot()
    for i in range(4):
        add(place.writer, f"more{i}", STATES[i])
        live.snapshot()
    assert caplog.text.count("calibration 1 knows 2 of the 5 adapters in production") == 1 and caplog.text.count(" knows ") == 1


def test_who_uses_no_threshold_is_not_told_of_them_and_the_first_who_does_is(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Previously whoever learned on a small registry was told "calibration 1 knows 0 of the 2 adapters in production"."""
    live = place.live()
    live.snapshot()
    for name in ("alpha", "beta"):
        add(place.writer, name, STATES[2])
        live.snapshot(thresholds=False)
    assert caplog.text == ""
    live.snapshot()
    assert caplog.messages == ["calibration 1 knows no version in production, thresholds are estimates: see `adapter-hub calibrate`."]


def test_who_calibrates_is_not_told_to(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Previously `calibrate` warned of the record that it was about to replace."""
    live = place.live()
    live.snapshot()
    for i in range(4):
        add(place.writer, f"more{i}", STATES[i])
    live.calibrate("anew")
    assert " knows " not in caplog.text


# ---- read-only ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_registry_that_may_only_be_read_is_routed(calibrated: bool, place: Place) -> None:
    if calibrated:
        place.live().snapshot()
    before = sorted(path for path in place.folder.rglob("*") if "catalog" not in path.name)
    with Registry._open_read_only(Layout(place.folder), CONFIG) as registry:
        live = LiveRouter(registry, lambda state: None)
        assert not registry.writable
        assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1]})
        made = live.snapshot().calibration
        assert made is not None and made.id == (1 if calibrated else None)
        assert before == sorted(path for path in place.folder.rglob("*") if "catalog" not in path.name)
        add(place.writer, "gamma", STATES[2])
        assert_serves(live, {ALPHA: STATES[0], BETA: STATES[1], GAMMA: STATES[2]})
        later = live.snapshot().calibration
        assert later is not None and later.digest == made.digest


def test_who_may_only_read_keeps_a_calibration_of_his_own_until_another_is_stored(place: Place) -> None:
    place.live().snapshot()
    with Registry._open_read_only(Layout(place.folder), CONFIG) as registry:
        live = LiveRouter(registry, lambda state: None)
        add(place.writer, "gamma", STATES[2])
        made = live.calibrate("mine")
        assert made.id is None and made.members == (ALPHA, BETA, GAMMA)
        place.writer.retire(BETA)
        assert live.snapshot(settled=True).calibration is made
        assert_serves(live, {ALPHA: STATES[0], GAMMA: STATES[2]})
        stored = place.live().calibrate("for all")
        found = live.snapshot().calibration
        assert found is not None and found.id == stored.id == 2


# ---- threads ------------------------------------------------------------------------------------------------------------


def test_sixteen_threads_get_only_answers_of_consistent_snapshots(tmp_path: Path) -> None:
    changes = 1000 if os.environ.get("ADAPTER_HUB_SOAK") else 100
    found = router_threads.run(16, changes, tmp_path / "registry")
    assert found["faults"] == []
