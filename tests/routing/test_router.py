"""The router: the same whatever came and went, honest about bad input, and either whole or refused when it is read back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_hub.errors import CorruptIndex, InvalidInput, ModelChanged
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing import head as head_module
from adapter_hub.routing import router as router_module
from adapter_hub.routing import segment as segment_module
from adapter_hub.routing.calibration import Fitted, fit
from adapter_hub.routing.decision import Decision, Method, Reason
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.features import Features
from adapter_hub.routing.head import can_solve
from adapter_hub.routing.router import SCORE_DECIMALS, Router
from adapter_hub.routing.statistics import Exemplars, RoutingState, build_state
from tests.routing.conftest import DIM, ENCODER, World

STEP = 1.01 * 10**-SCORE_DECIMALS    # sums in another order may round to the neighbour
WORLD = World(6, 2, noise=0.9, seed=11)
STATES: Mapping[AdapterRef, RoutingState] = {
    **WORLD.states(5),
    AdapterRef("described", 1): build_state(ENCODER, [], "questions about bank cards"),
    AdapterRef("loose", 2): World(1, 9, seed=12).state(0, 6, labelled=False),
    AdapterRef("named-only", 1): build_state(ENCODER, []),
    AdapterRef("wary", 1): build_state(
        ENCODER,
        [Example(text, "pay") for text in ("pay my bill", "pay the rent", "pay what I owe")],
        negatives=[Example("pay attention to me"), Example("does it pay to wait")],
    ),
}
FITTED: Fitted = fit(STATES)
QUERIES = Features.concatenate([*(WORLD.sample(i, 3)[0] for i in range(6)), WORLD.strangers(10)])
CARDS, FOOD = AdapterRef("cards", 1), AdapterRef("food", 1)


@pytest.fixture(params=["one segment", "large segments"])
def sizes(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `large segments` five prototypes are too many to merge, and the index has a file."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "large segments":
            large_segments(patch, 5)
        yield


def large_segments(patch: pytest.MonkeyPatch, dense_max: int) -> None:
    patch.setattr(router_module, "DENSE_MAX", dense_max)
    patch.setattr(segment_module, "DENSE_MAX", dense_max)


def build(refs: Sequence[AdapterRef]) -> Router:
    """At once, under the calibration and head of all."""
    return Router.build({ref: STATES[ref] for ref in refs}, FITTED.calibration, FITTED.head)


@pytest.mark.usefixtures("sizes")
def test_it_has_a_head_where_its_exemplars_can_be_solved(tmp_path: Path) -> None:
    """At every limit, without those that left, and once it was saved: `can_solve` counts exemplars, a router prototypes."""
    router, here = build(()), dict[AdapterRef, RoutingState]()
    lonely = {AdapterRef("lonely", 1): build_state(ENCODER, [Example("one text")])}
    for ref, state in {**STATES, **lonely}.items():
        router, here = router.with_added({ref: state}), here | {ref: state}
    for ref in (*STATES, None):
        exemplars = {other: Exemplars.of(state) for other, state in here.items() if state.count}
        classes = sum(one.target_count for one in exemplars.values() if not one.single)
        rows = sum(len(one) for one in exemplars.values() if not one.single)
        router.save(tmp_path / "router")
        for name, exact in (("CLASSES_MAX", classes), ("EXEMPLARS_MAX", rows)):
            for limit in (exact - 1, exact):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(head_module, name, limit)
                    found = [one._replaced().has_head for one in (router, Router.open(tmp_path / "router", router.calibration))]
                    assert found == [can_solve(exemplars)] * 2
        if ref:
            router, here = router.without(ref), {other: state for other, state in here.items() if other != ref}
    assert router.refs == tuple(lonely) and not router.has_head


def assert_same(found: Router, expected: Router, features: Features = QUERIES) -> None:
    assert found.digest == expected.digest and found.refs == expected.refs and found.versions == expected.versions
    assert found.digests == expected.digests
    assert_agree(found.route_features(features, k=20), expected.route_features(features, k=20))


def assert_agree(found: Sequence[Decision], expected: Sequence[Decision]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.adapter, a.reason, a.threshold, a.method, a.calibration) == (b.adapter, b.reason, b.threshold, b.method, b.calibration)
        assert dict(a.candidates) == pytest.approx(dict(b.candidates), abs=STEP)
        assert [score for _, score in a.candidates] == sorted((score for _, score in a.candidates), reverse=True)
        assert a.candidates[:1] == () or a.candidates[0][0] == b.candidates[0][0]
        assert (a.score, a.margin) == pytest.approx((b.score, b.margin), abs=2 * STEP)


# ---- what came and went -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(order=st.permutations(sorted(STATES)), first=st.integers(0, len(STATES)), dense_max=st.sampled_from([1, 5, 4096]))
def test_any_order_of_additions_gives_the_router_that_is_built_at_once(order: list[AdapterRef], first: int, dense_max: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        large_segments(patch, dense_max)
        router = build(order[:first])
        for ref in order[first:]:
            router = router.with_added({ref: STATES[ref]})
        assert_same(router, build(sorted(STATES)))


@settings(max_examples=30)
@given(
    steps=st.lists(st.sampled_from([*sorted(STATES), None]), max_size=25),
    start=st.sets(st.sampled_from(sorted(STATES))),
    dense_max=st.sampled_from([1, 5, 4096]),
)
def test_any_coming_and_going_gives_the_router_that_saw_only_the_last_state(
    steps: list[AdapterRef | None], start: set[AdapterRef], dense_max: int
) -> None:
    """Each step adds what is absent or removes what is there; None begins to compact the segments, which takes until the next one."""
    with pytest.MonkeyPatch.context() as patch:
        large_segments(patch, dense_max)
        router, present, merged = build(sorted(start)), set(start), None
        for ref in steps:
            if ref is None:
                router = router if merged is None else router.compacted(merged)
                merged = router.compaction()
                router = router.erased(sorted(STATES)[: len(present)])
                continue
            router = router.without(ref) if ref in present else router.with_added({ref: STATES[ref]})
            present ^= {ref}
        assert_same(router, build(sorted(present)))


def test_what_is_removed_from_a_large_segment_can_come_back(sizes: None) -> None:
    """As a version does after promote and rollback."""
    router, ref = build(sorted(STATES)), WORLD.refs[2]
    there_and_back = router.without(ref).with_added({ref: STATES[ref]})
    assert ref in there_and_back.refs and ref in there_and_back.digests
    assert_same(there_and_back, router)
    assert_same(there_and_back.without(ref), router.without(ref))


def test_a_router_that_grows_one_by_one_is_compacted_into_few_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 adapters with one prototype each, no segment is scored in full beside more than twice what one may hold."""
    large_segments(monkeypatch, 4)
    states = {AdapterRef(f"one{i:03d}", 1): build_state(ENCODER, [], f"text number {i} of many") for i in range(100)}
    router = Router.build(dict(list(states.items())[:1]))
    for ref, state in states.items():
        router = router.with_added({ref: state})
        if merged := router.compaction():
            router = router.compacted(merged)
        assert not router.scattered and len(router._segments) <= 10
    decision = router.route(ENCODER, ["text number 50 of many"], max_false_reject=0)[0]
    assert decision.adapter == AdapterRef("one050", 1) and decision.searched


def test_what_was_removed_stays_away_whatever_is_compacted_and_erased_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many more adapters than a segment scores in full, so that large ones are merged and cut, too."""
    states = {
        AdapterRef(f"one{i:02d}", 1): build_state(
            ENCODER, [Example(f"text number {i} of many {j}", f"label{j}") for j in range(1 + i % 3)], negatives=[Example("no thing")] * (i % 5 == 0)
        )
        for i in range(24)
    }
    fitted = fit(dict(list(states.items())[:6]))
    asked = [f"text number {i} of many" for i in range(24)]
    for seed in range(40):
        random = np.random.default_rng(seed)
        large_segments(monkeypatch, int(random.choice([2, 4, 6])))
        here = {ref for ref in states if random.random() < 0.3}
        router, merged = Router.build({ref: states[ref] for ref in here}, fitted.calibration, fitted.head), None
        for _ in range(60):
            act = random.random()
            if act < 0.2:
                merged = merged or router.compaction()
            elif act < 0.35:
                router, merged = (router.compacted(merged) if merged else router), None
            elif act < 0.4:
                router = router.erased({ref for ref in states if ref not in here and random.random() < 0.5})
            else:
                ref = sorted(states)[int(random.integers(len(states)))]
                router = router.without(ref) if ref in here else router.with_added({ref: states[ref]})
                here ^= {ref}
            assert router.versions == tuple(sorted(here))
        expected = Router.build({ref: states[ref] for ref in here}, fitted.calibration, fitted.head)
        assert_agree(router.route(ENCODER, asked, max_false_reject=0), expected.route(ENCODER, asked, max_false_reject=0))


def test_the_best_is_the_best_however_many_candidates_are_shown(sizes: None) -> None:
    """Fourteen that score more than the right one until their negatives are asked."""
    verbs, things = ("cancel", "check", "change", "open", "close"), ("refund", "invoice", "billing", "payment", "charge")
    refused = [Example(f"please {verb} my {thing} order now for acme") for thing in things for verb in verbs]
    states = {
        AdapterRef(f"a{i:02d}", 1): build_state(
            ENCODER,
            [Example(f"please {verb} my {thing} order now for cust{i:02d}", verb + thing) for verb in verbs for thing in things],
            negatives=refused,
        )
        for i in range(14)
    }
    states[AdapterRef("zz", 1)] = build_state(ENCODER, [Example(f"my {thing} thing", thing) for thing in things])
    router = Router.build(states)
    texts = [row.text for row in refused[:3]]
    expected = router.route(ENCODER, texts, k=15, max_false_reject=0)
    assert {decision.adapter for decision in expected} == {AdapterRef("zz", 1)}
    for k in (1, 2, 5):
        for decision, right in zip(router.route(ENCODER, texts, k=k, max_false_reject=0), expected, strict=True):
            assert (decision.adapter, decision.margin) == (right.adapter, right.margin)
            assert decision.candidates == right.candidates[:k]


def test_adding_what_is_there_replaces_it(sizes: None) -> None:
    router, ref = build(sorted(STATES)), WORLD.refs[0]
    other = World(1, 3, seed=77).state(0, 4)
    for replaced in (router.with_added({ref: other}), router.without(ref).with_added({ref: other})):
        assert_same(replaced, Router.build({**STATES, ref: other}, FITTED.calibration, FITTED.head))
    assert_same(router.with_added({ref: other}).with_added({ref: STATES[ref]}), router)


def test_a_newcomer_changes_no_score_of_the_others(sizes: None) -> None:
    newcomer = AdapterRef("aaa", 1)
    before = build(sorted(STATES))
    after = before.with_added({newcomer: World(1, 3, seed=5).state(0, 4)})
    for old, new in zip(before.route_features(QUERIES, k=20), after.route_features(QUERIES, k=20), strict=True):
        others = {ref: score for ref, score in new.candidates if ref != newcomer}
        assert others == pytest.approx(dict(old.candidates), abs=STEP)
        assert new.threshold == old.threshold and newcomer in dict(new.candidates)
    assert after.calibration is before.calibration and after.head is before.head


def test_a_snapshot_is_not_changed_by_the_next() -> None:
    before = build(sorted(STATES))
    digest, expected = before.digest, before.route_features(QUERIES, k=3)
    before.with_added({AdapterRef("aaa", 1): World(1, 3, seed=5).state(0, 4)}).without(WORLD.refs[0])
    assert before.digest == digest and before.route_features(QUERIES, k=3) == expected


def test_without_an_unknown_reference_is_the_same_router() -> None:
    router = build(sorted(STATES))
    assert_same(router.without(AdapterRef("nobody", 1)), router)


def test_the_digest_follows_everything_that_decides() -> None:
    router = build(sorted(STATES))
    others = [
        router.without(WORLD.refs[0]),
        router.without(AdapterRef("named-only", 1)),
        router.with_head(None),
        Router.build(STATES, fit({ref: STATES[ref] for ref in WORLD.refs}).calibration, FITTED.head),
        router.with_added({WORLD.refs[0]: World(1, 2, seed=1).state(0, 5)}),
    ]
    assert len({router.digest, *(other.digest for other in others)}) == 6


# ---- what is decided ----------------------------------------------------------------------------------------------------


def test_inputs_go_where_their_like_is() -> None:
    found = Router.build(STATES).route_features(QUERIES[:36], max_false_reject=0)
    homes = [WORLD.refs[i] for i in range(6) for _ in range(6)]
    assert np.mean([decision.adapter == home for decision, home in zip(found, homes, strict=True)]) > 0.9


def test_decisions_alone_are_decisions_in_a_batch(sizes: None) -> None:
    router = build(sorted(STATES))
    together = router.route_features(Features.concatenate([QUERIES] * 13), k=20)
    assert len(together) > router_module.CHUNK
    alone = [router.route_features(QUERIES[i], k=20)[0] for i in range(len(QUERIES))]
    assert_agree(together, alone * 13)


def test_the_score_is_the_best_candidate_from_its_centre() -> None:
    router = build(sorted(STATES))
    for decision in router.route_features(QUERIES, k=2):
        (best, first), (_, second) = decision.candidates
        centre = FITTED.calibration.centres[best]
        assert decision.score == pytest.approx(first - centre, abs=STEP)
        assert decision.margin == pytest.approx(first - second, abs=STEP)
        assert (decision.adapter == best) is (decision.score >= FITTED.calibration.threshold(0.05))
        assert decision.reason is (Reason.ACCEPTED if decision.adapter else Reason.BELOW_THRESHOLD)


def test_more_candidates_begin_with_the_fewer() -> None:
    router = build(sorted(STATES))
    many = router.route_features(QUERIES, k=50)
    assert all(len(decision.candidates) == len(router.refs) == 9 for decision in many)
    for k in (1, 2, 5):
        assert [d.candidates for d in router.route_features(QUERIES, k=k)] == [d.candidates[:k] for d in many]


def test_the_method_says_who_scored_the_best() -> None:
    router = build(sorted(STATES))
    assert router.route(ENCODER, ["questions about bank cards"], max_false_reject=0)[0].method is Method.DESCRIPTION
    assert {decision.method for decision in router.route_features(WORLD.sample(0, 3)[0], max_false_reject=0)} == {Method.KERNEL_RIDGE}
    assert {decision.method for decision in router.with_head(None).route_features(WORLD.sample(0, 3)[0])} == {Method.PROTOTYPES}


@pytest.mark.parametrize("dense_max", [4, 4096])
def test_ties_go_to_the_first_in_name_order(dense_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an index chose the candidates."""
    large_segments(monkeypatch, dense_max)
    states = {AdapterRef(f"copy{i:02d}", 1): build_state(ENCODER, [], "the same words everywhere") for i in range(50)}
    order = np.random.default_rng(0).permutation(50)
    router = Router.build({sorted(states)[i]: states[sorted(states)[i]] for i in order})
    decision = router.route(ENCODER, ["the same words"], k=3, max_false_reject=0)[0]
    assert [str(ref) for ref, _ in decision.candidates] == ["copy00@1", "copy01@1", "copy02@1"] and decision.margin == 0


def test_nothing_to_route_is_an_empty_answer() -> None:
    assert build(sorted(STATES)).route(ENCODER, []) == []


# ---- who cannot be routed -----------------------------------------------------------------------------------------------


def test_versions_without_exemplars_are_reached_by_name_only() -> None:
    router = Router.build({CARDS: build_state(ENCODER, [])})
    assert router.refs == () and router.versions == (CARDS,) and router.calibration is None
    for rate, threshold in ((0.05, None), (0.0, -math.inf)):
        found = router.route(ENCODER, ["freeze my card"], k=3, max_false_reject=rate)
        assert found == [Decision(None, None, threshold, None, Reason.NO_CANDIDATES, (), None)]
    assert Router.build({}).route(ENCODER, ["a", "b"])[1].reason is Reason.NO_CANDIDATES


def test_the_first_routable_version_keeps_those_reached_by_name() -> None:
    state = build_state(ENCODER, [Example("soup", "order"), Example("bread", "order")])
    grown = Router.build({CARDS: build_state(ENCODER, [])}).with_added({FOOD: state})
    assert grown.versions == (CARDS, FOOD) and grown.refs == (FOOD,)
    assert_same(grown, Router.build({CARDS: build_state(ENCODER, []), FOOD: state}), ENCODER_QUERIES)


def test_what_is_erased_is_held_no_more_and_the_rest_decides_as_before(sizes: None) -> None:
    """What is still routed is not erased."""
    gone, routed = WORLD.refs[0], WORLD.refs[1]
    router = build(sorted(STATES)).without(gone)
    erased = router.erased([gone, routed, AdapterRef("nobody", 1)])
    assert_same(erased, router)
    assert gone not in {ref for segment in erased._segments for ref in segment.refs} and erased.erased([gone]) is erased
    assert_same(erased.with_added({gone: STATES[gone]}), build(sorted(STATES)))


def test_a_version_may_lose_its_exemplars_and_get_them_back(sizes: None) -> None:
    router, ref = build(sorted(STATES)), WORLD.refs[1]
    bare = router.with_added({ref: build_state(ENCODER, [])})
    assert ref in bare.versions and ref not in bare.refs
    assert_same(bare.with_added({ref: STATES[ref]}), router)


def test_a_router_whose_last_version_left_has_no_candidates(sizes: None) -> None:
    router = build(WORLD.refs)
    for ref in WORLD.refs:
        router = router.without(ref)
    found = router.route_features(QUERIES[:3])
    assert router.refs == () and {decision.reason for decision in found} == {Reason.NO_CANDIDATES}


ENCODER_QUERIES = Features(ENCODER.encode(["soup", "cards"]), QUERIES.lexical[:2])

# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_vector_that_is_zero_or_not_finite_is_refused_by_position(bad: float) -> None:
    dense = QUERIES.dense.copy()
    dense[2] = bad
    for router in (build(sorted(STATES)), Router.build({})):
        with pytest.raises(InvalidInput) as caught:
            router.route_features(Features(dense, QUERIES.lexical))
        assert caught.value.fact == f"vector 3 of {len(QUERIES)} is zero or not finite."


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        build(sorted(STATES)).route_features(Features(np.ones((2, 8), np.float32), QUERIES.lexical[:2]))
    assert caught.value.fact == f"vectors of width 8 do not fit a router of width {DIM}."


@pytest.mark.parametrize("k", [0, -1, True, 1.0, "1", None])
def test_a_count_of_candidates_is_a_positive_whole_number(k: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        build(sorted(STATES)).route_features(QUERIES, k=k)
    assert caught.value.fact == f"k={k!r} is not a positive count of candidates."


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan, "5 %", True, None])
def test_a_rate_is_a_share(rate: Any) -> None:
    for router in (build(sorted(STATES)), Router.build({})):
        with pytest.raises(InvalidInput) as caught:
            router.route_features(QUERIES, max_false_reject=rate)
        assert str(caught.value) == f"max_false_reject={rate!r} is not a share. Give a number from 0 (never abstain) to 1: 5 % is 0.05."


def test_another_encoder_cannot_ask() -> None:
    with pytest.raises(ModelChanged, match=r"^the router's exemplars were encoded by 'hash:32', not by 'hash:64' .* Route with"):
        build(sorted(STATES)).route(HashEncoder(64), ["a text"])


@pytest.mark.parametrize("texts", [["fine", " "], "one text", ["fine", 3]])
def test_what_the_encoder_refuses_the_router_refuses(texts: Any) -> None:
    with pytest.raises(InvalidInput):
        build(sorted(STATES)).route(ENCODER, texts)


# ---- what is kept -------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> Router:
    router = build(sorted(STATES)[:5])
    for ref in sorted(STATES)[5:]:
        router = router.with_added({ref: STATES[ref]})
    router = router.without(WORLD.refs[0])
    router.save(folder)
    return router


def test_a_saved_router_is_the_same_router(sizes: None, tmp_path: Path) -> None:
    router = saved(tmp_path / "index" / "router")
    opened = Router.open(tmp_path / "index" / "router", FITTED.calibration)
    assert_same(opened, router)
    assert opened.route_features(QUERIES, k=20) == router.route_features(QUERIES, k=20)
    ref = WORLD.refs[0]
    assert_same(opened.with_added({ref: STATES[ref]}), build(sorted(STATES)))
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["router"]


def test_saving_again_replaces_what_lies_there(tmp_path: Path) -> None:
    saved(tmp_path / "router")
    build(WORLD.refs).with_head(None).save(tmp_path / "router")
    assert_same(Router.open(tmp_path / "router", FITTED.calibration), build(WORLD.refs).with_head(None))


def test_a_router_without_adapters_can_be_kept(tmp_path: Path) -> None:
    Router.build({}).save(tmp_path / "router")
    assert Router.open(tmp_path / "router", None).digest == Router.build({}).digest


def test_a_saved_file_of_a_segment_that_did_not_change_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor trusted: one that was damaged meanwhile is."""
    large_segments(monkeypatch, 5)
    router, folder = build(sorted(STATES)), tmp_path / "router"
    router.save(folder)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    grown = router.with_added({CARDS: build_state(ENCODER, [], "another one")})
    grown.save(folder)
    kept = {path.name for path in folder.iterdir() if before.get(path.name) == path.stat().st_ino}
    assert {Path(name).suffix for name in kept} == {".faiss", ".safetensors"}
    damaged = next(folder / name for name in sorted(kept))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    grown.save(folder)
    assert damaged.stat().st_ino != before[damaged.name]
    assert_same(Router.open(folder, FITTED.calibration), grown)


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of a saved router in turn: a flipped bit, cut short, emptied, missing, or something else."""
    large_segments(monkeypatch, 5)
    saved(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert {"SHA256SUMS", "router.json", "head.safetensors"} < set(names) and {Path(name).suffix for name in names} >= {".faiss"}
    for name in names:
        for number, damage in enumerate(DAMAGES):
            folder = tmp_path / f"{name}-{number}"
            shutil.copytree(tmp_path / "whole", folder)
            damage(folder / name)
            with pytest.raises(CorruptIndex):
                Router.open(folder, FITTED.calibration)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = [
    lambda path: flip(path, -1),
    lambda path: flip(path, path.stat().st_size // 2),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"something else"),
    lambda path: path.write_bytes(b"[]"),
    lambda path: path.unlink(),
]


def vouch_for(folder: Path) -> None:
    """Let the sums be those of what lies there, so that it is read."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.name != "SHA256SUMS"}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def test_the_sums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    saved(tmp_path / "router")
    written = (tmp_path / "router" / "SHA256SUMS").read_text()
    vouch_for(tmp_path / "router")
    assert (tmp_path / "router" / "SHA256SUMS").read_text() == written


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptIndex):
        Router.open(tmp_path / "nowhere", FITTED.calibration)


def test_the_router_of_another_calibration_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "router")
    for other in (fit({ref: STATES[ref] for ref in WORLD.refs}).calibration, None):
        with pytest.raises(CorruptIndex, match="not the router of these versions and this calibration"):
            Router.open(tmp_path / "router", other)


def test_another_routers_head_or_segment_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "router")
    other = fit({ref: STATES[ref] for ref in WORLD.refs})
    Router.build({ref: STATES[ref] for ref in WORLD.refs}, other.calibration, other.head).save(tmp_path / "other")
    own, others = (next(folder.glob("?" * 32 + ".safetensors")).name for folder in (tmp_path / "router", tmp_path / "other"))
    for name, other_name in (("head.safetensors", "head.safetensors"), (own, others), ("router.json", "router.json")):
        shutil.copytree(tmp_path / "router", tmp_path / name)
        shutil.copy(tmp_path / "other" / other_name, tmp_path / name / name)
        vouch_for(tmp_path / name)
        with pytest.raises(CorruptIndex):
            Router.open(tmp_path / name, FITTED.calibration)


@pytest.mark.parametrize("key, value", [("schema", 99), ("unroutable", {"../up@1": "x"}), ("gone", ["?"]), ("segments", 9), ("digest", "sha256:0")])
def test_facts_that_do_not_fit_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path / "router")
    path = tmp_path / "router" / "router.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    vouch_for(tmp_path / "router")
    with pytest.raises(CorruptIndex):
        Router.open(tmp_path / "router", FITTED.calibration)
