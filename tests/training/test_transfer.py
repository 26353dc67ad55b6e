"""Starting from others: what a combined start is, which adapters fit, and when a trial speaks for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapter_hub.adapters.weights import Adapter, LoraDelta, read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_classifier
from adapter_hub.training.transfer import Neighbour, combined, fault_of, judged, placed, start_of, transfer
from adapter_hub.training.trials import losses_after
from adapter_hub.training.warm import Start

CONFIG = TrainConfig(r=4, alpha=8, epochs=1, steps_min=0, learning_rate=5e-3)
COLOURS, SHAPES = ("red", "blue", "green"), ("round", "square")
ROWS = [Example(f"{frame} {word} {i}", word) for frame in ("a", "the", "my") for word in COLOURS for i in range(4)]
ONE, TWO = AdapterRef("one", 1), AdapterRef("two", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("model")))


def adapter(base: FrozenBase, folder: Path, labels: tuple[str, ...] = SHAPES, **lora: object) -> Adapter:
    return read_adapter(make_adapter(base, folder, outputs=len(labels), **lora), labels=labels)    # type: ignore[arg-type]


def pair(o: int, i: int, r: int, scaling: float, seed: int) -> LoraDelta:
    generator = torch.Generator().manual_seed(seed)
    return LoraDelta(torch.randn(r, i, generator=generator), torch.randn(o, r, generator=generator), scaling, None)


def dense(delta: LoraDelta) -> Tensor:
    return delta.scaling * delta.b.double() @ delta.a.double()


def best_of_rank(matrix: Tensor, r: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * s[:r] @ vt[:r]


# ---- the combined start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "i", "r"), [(24, 16, 4), (16, 24, 4), (12, 6, 4), (40, 40, 8)])
def test_a_combination_is_the_best_approximation_of_its_rank_to_the_sum_of_what_the_adapters_add(o: int, i: int, r: int) -> None:
    parts = [(pair(o, i, r, 2.0, 1), 0.7), (pair(o, i, r, 0.5, 2), 0.2), (pair(o, i, r, 1.0, 3), 0.1)]
    a, b = combined(parts, r, 1.5, torch.Generator())
    wanted = sum(weight * dense(delta) for delta, weight in parts)
    torch.testing.assert_close(1.5 * b.double() @ a.double(), best_of_rank(torch.as_tensor(wanted), r), atol=1e-5, rtol=1e-5)
    assert a.shape == (r, i) and b.shape == (o, r)


def test_one_adapter_alone_comes_back_as_itself_whatever_the_scaling() -> None:
    delta = pair(20, 12, 4, 2.0, 1)
    for scaling in (2.0, 8.0, 0.25):
        a, b = combined([(delta, 1.0)], 4, scaling, torch.Generator())
        torch.testing.assert_close(scaling * b.double() @ a.double(), dense(delta), atol=1e-5, rtol=1e-5)


def test_both_factors_get_the_same_share_of_the_singular_values() -> None:
    a, b = combined([(pair(20, 12, 4, 2.0, 1), 0.5), (pair(20, 12, 4, 2.0, 2), 0.5)], 4, 2.0, torch.Generator())
    torch.testing.assert_close(a @ a.T, b.T @ b, atol=1e-4, rtol=1e-4)


def test_it_is_not_the_product_of_averaged_factors() -> None:
    """Two adapters that do the same in other bases: the sum of what they add is that again, averaged factors are something else."""
    one = pair(20, 12, 4, 2.0, 1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    same = LoraDelta(turn.T @ one.a, one.b @ turn, 2.0, None)
    a, b = combined([(one, 0.5), (same, 0.5)], 4, 2.0, torch.Generator())
    torch.testing.assert_close(2.0 * b.double() @ a.double(), dense(one), atol=1e-5, rtol=1e-5)
    averaged = 2.0 * ((one.b + same.b) / 2) @ ((one.a + same.a) / 2)
    assert not torch.allclose(averaged.double(), dense(one), atol=1e-1)


@pytest.mark.parametrize(("r", "rslora"), [(2, False), (3, True), (8, False)])
def test_an_adapter_of_another_rank_begins_with_what_it_adds_as_far_as_the_rank_reaches(
    base: FrozenBase, tmp_path: Path, r: int, rslora: bool
) -> None:
    """Previously only ranks that were equal everywhere were a start."""
    config = replace(CONFIG, learning_rate=1e-12, use_rslora=rslora)
    near = Neighbour(ONE, 0.5, adapter(base, tmp_path / "a", r=r, lora_alpha=16, rank_pattern={"query": 1}, seed=1))
    starts = [start_of([near], base, config, "t", tmp_path / name) for name in ("start", "again")]
    first, again = (load_file(start.folder / "adapter_model.safetensors") for start in starts)
    assert all(torch.equal(first[key], again[key]) for key in first)
    result = train_classifier(base, ROWS, config=config, folder=tmp_path / "trained", start=starts[0])
    found = read_adapter(result.folder, labels=result.labels)
    for module, delta in near.adapter.deltas.items():
        torch.testing.assert_close(dense(found.deltas[module]), best_of_rank(dense(delta), 4), atol=1e-5, rtol=1e-5)


def test_directions_beyond_a_lower_rank_begin_as_fresh_ones_and_learn() -> None:
    """Zeros on both sides would stay zeros."""
    delta = pair(20, 12, 2, 2.0, 1)
    a, b = combined([(delta, 1.0)], 5, 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(0.5 * b.double() @ a.double(), dense(delta), atol=1e-5, rtol=1e-5)
    assert not b[:, 2:].any() and (a[2:].abs() <= 12**-0.5).all() and a[2:].std() > 0.1 and len(torch.unique(a[2:])) == 3 * 12
    again, other = (combined([(delta, 1.0)], 5, 0.5, torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert torch.equal(again, a) and torch.equal(other[:2], a[:2]) and not torch.equal(other[2:], a[2:])
    nothing = combined([(replace(delta, b=torch.zeros(20, 2)), 1.0)], 5, 0.5, torch.Generator().manual_seed(0))
    assert not nothing[1].any() and (nothing[0] != 0).all()


def test_a_module_narrower_than_the_rank_is_filled_up_with_nothing() -> None:
    delta = pair(3, 12, 4, 1.0, 1)
    a, b = combined([(delta, 1.0)], 4, 1.0, torch.Generator())
    assert a.shape == (4, 12) and b.shape == (3, 4)
    torch.testing.assert_close(b.double() @ a.double(), dense(delta), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_training_begins_with_what_the_neighbours_add_together_and_a_head_of_its_own(base: FrozenBase, tmp_path: Path, rslora: bool) -> None:
    near = [Neighbour(ref, close, adapter(base, tmp_path / str(ref), seed=i)) for i, (ref, close) in enumerate([(ONE, 0.6), (TWO, 0.2)])]
    config = replace(CONFIG, learning_rate=1e-12, use_rslora=rslora)
    start = start_of(near, base, config, "t", tmp_path / "start")
    assert not any("classifier" in key for key in load_file(start.folder / "adapter_model.safetensors"))
    result = train_classifier(base, ROWS, config=config, folder=tmp_path / "trained", start=start)
    found = read_adapter(result.folder, labels=result.labels)
    for module, delta in near[0].adapter.deltas.items():
        wanted = best_of_rank(0.75 * dense(delta) + 0.25 * dense(near[1].adapter.deltas[module]), 4)
        torch.testing.assert_close(dense(found.deltas[module]), wanted, atol=1e-5, rtol=1e-5)
    assert result.labels == tuple(sorted(COLOURS))


# ---- which fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "config", "says"),
    [
        ({}, CONFIG, ""),
        ({"lora_alpha": 64, "use_rslora": True}, CONFIG, ""),
        ({"r": 8}, CONFIG, ""),
        ({"r": 2}, CONFIG, ""),
        ({"rank_pattern": {"query": 2}}, CONFIG, ""),
        ({"use_dora": True}, CONFIG, "it is a DoRA, whose pairs are nothing without its magnitudes"),
        ({}, replace(CONFIG, use_dora=True), "the config asks for a DoRA"),
        ({"task_type": "TOKEN_CLS"}, CONFIG, "it is no classifier of one label among several"),
        ({"target_modules": ["query"]}, replace(CONFIG, target_modules=("value",)), "it adapts none of the modules"),
        ({"target_modules": ["query"]}, replace(CONFIG, target_modules=("query", "value")), ""),
    ],
)
def test_what_is_no_start_is_told_why(base: FrozenBase, tmp_path: Path, lora: dict[str, object], config: TrainConfig, says: str) -> None:
    fault = fault_of(adapter(base, tmp_path / "a", **lora), base, config)
    assert says in fault and bool(says) == bool(fault)


def test_a_prompt_template_is_no_start(base: FrozenBase, tmp_path: Path) -> None:
    found = replace(adapter(base, tmp_path / "a"), prompt_template="Say: {text}")
    assert "prompt template" in fault_of(found, base, CONFIG)


def test_of_an_adapter_of_all_layers_the_upper_ones_start_one_that_adapts_those_alone(base: FrozenBase, tmp_path: Path) -> None:
    config, found = replace(CONFIG, layers_share=0.5), adapter(base, tmp_path / "a")
    upper = placed(found, base, config)
    assert upper and not any(".layer.0." in module for module in upper) and len(upper) < len(found.deltas)
    start = start_of([Neighbour(ONE, 0.5, found)], base, config, "t", tmp_path / "start")
    assert train_classifier(base, ROWS, config=config, folder=tmp_path / "trained", start=start).labels


# ---- trials ---------------------------------------------------------------------------------------------------------


def test_the_best_start_is_taken_where_it_gains_more_than_its_standard_error_on_rows_that_did_not_choose_it() -> None:
    cold, gain = np.ones(8), np.array([0.3, 0.1, 0.3, 0.1, 0.3, 0.1, 0.3, 0.1])
    found = judged(cold, {(ONE,): cold - gain, (TWO,): cold - gain / 2}, 4)
    assert found.origins == (ONE,) and found.rows == 8 and found.advantage == found.trials[0].advantage == pytest.approx(0.2)
    assert found.error == pytest.approx(np.std(gain, ddof=1) / math.sqrt(8)) and found.trials[1].advantage == pytest.approx(0.1)


def test_the_luck_of_the_best_of_several_does_not_count_for_it() -> None:
    """Each start is good on one half alone, the other half shows it: on all rows both look better than a cold start."""
    cold, lucky = np.ones(8), np.array([0.5, 0.6, 0.5, 0.6, -0.4, -0.3, -0.4, -0.3])
    found = judged(cold, {(ONE,): cold - lucky, (TWO,): cold - lucky[::-1]}, 4)
    assert found.best is not None and found.best.advantage > 0 and found.advantage == pytest.approx(-0.35) and found.chosen is None


def test_what_gains_nothing_is_not_taken() -> None:
    cold = np.ones(6)
    for losses in (cold, cold + 0.1, cold - np.array([0.9, -0.8, 0.9, -0.8, 0.9, -0.8])):
        assert judged(cold, {(ONE,): losses}, 3).origins == ()


def test_of_starts_that_are_no_better_one_is_taken_a_fifth_of_the_time() -> None:
    """A single one exceeds its standard error a sixth of the time; of three the best would, on the rows that chose it, two fifths."""
    draws = np.random.default_rng(0)
    cold = np.zeros(40)
    taken = [judged(cold, {(AdapterRef("a", i),): draws.normal(size=40) for i in (1, 2, 3)}, 20).chosen is not None for _ in range(500)]
    assert 0.12 < np.mean(taken) < 0.28


def test_each_row_gets_its_own_loss_whatever_the_order_of_rows_long_and_short(base: FrozenBase) -> None:
    mixed = [Example(f"{row.text} {'so very ' * (i % 4)}", row.label) for i, row in enumerate(ROWS)]
    swapped = [replace(row, label="red" if row.label == "blue" else row.label) for row in mixed]
    changed = np.array([row.label == "blue" for row in mixed])
    right, back, wrong = (losses_after(base, mixed, asked, steps=30, config=CONFIG) for asked in (mixed, mixed[::-1], swapped))
    assert np.median(right) < math.log(2)    # it has learned them: by chance log 3
    np.testing.assert_allclose(back[::-1], right, atol=1e-4)
    np.testing.assert_allclose(wrong[~changed], right[~changed], atol=1e-4)
    assert np.median(wrong[changed]) > math.log(3)


def test_trials_of_one_start_are_repeated_exactly_and_meet_rows_that_they_were_not_trained_on(base: FrozenBase, tmp_path: Path) -> None:
    near = [Neighbour(ONE, 0.5, adapter(base, tmp_path / "a"))]
    start, first = transfer(base, ROWS, near, task="t", config=CONFIG, folder=tmp_path / "1", steps=1)
    again, second = transfer(base, ROWS, near, task="t", config=CONFIG, folder=tmp_path / "2", steps=1)
    assert first == second and (start is None) == (again is None) == (first.chosen is None)
    assert first.trials[0].origins == (ONE,) and first.rows == 12    # a fifth of 12 rows is 2, of each of three labels, twice


def test_the_rows_that_will_measure_the_version_choose_no_start(base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously the trials asked the very rows that the gate judged the version on."""
    met: list[Example] = []

    def watched(base: FrozenBase, rows: Sequence[Example], asked: Sequence[Example], **more: Any) -> Any:
        met.extend([*rows, *asked])
        return losses_after(base, rows, asked, **more)

    monkeypatch.setattr("adapter_hub.training.transfer.losses_after", watched)
    near = [Neighbour(ONE, 0.5, adapter(base, tmp_path / "a"))]
    transfer(base, ROWS, near, task="t", config=CONFIG, folder=tmp_path / "1", steps=1)
    result = train_classifier(base, ROWS, task="t", config=CONFIG, folder=tmp_path / "trained")
    assert result.validation and not {row.text for row in result.validation} & {row.text for row in met}
    met.clear()
    transfer(base, ROWS, near, task="t", config=CONFIG, folder=tmp_path / "2", steps=1, validated=True)
    assert {row.text for row in met} == {row.text for row in ROWS}


def test_a_start_that_adds_nothing_is_the_cold_one_but_for_what_is_random(base: FrozenBase, tmp_path: Path) -> None:
    """After no step the answers are the probe's on the base: a start of B = 0 changes none of them."""
    still = adapter(base, tmp_path / "a", size=0.0)
    start = start_of([Neighbour(ONE, 0.5, still)], base, CONFIG, "t", tmp_path / "start")
    config = replace(CONFIG, learning_rate=1e-12)
    cold, warm = (losses_after(base, ROWS[:24], ROWS[24:], steps=1, config=config, start=one) for one in (None, start))
    np.testing.assert_allclose(warm, cold, atol=1e-6)


def test_too_few_rows_or_no_neighbour_start_cold(base: FrozenBase, tmp_path: Path) -> None:
    few = [Example("a red one", "red"), Example("a blue one", "blue")]
    near = [Neighbour(ONE, 0.5, adapter(base, tmp_path / "a"))]
    for rows, neighbours in ((few, near), (ROWS, [])):
        start, found = transfer(base, rows, neighbours, task="t", config=CONFIG, folder=tmp_path / "s", unfit={TWO: "why"})
        assert start is None and found.origins == () and found.to_json() == {"trials": [], "unfit": {"two@1": "why"}}
        why = "no adapter fits to start from" if rows is ROWS else "2 rows are too few to hold some out"
        assert found.note == f"it starts cold: {why}"    # previously one sentence for both


def test_the_note_says_of_each_figure_on_which_rows_it_is() -> None:
    """Previously what was chosen gained on the other half stood as the gain of the best start, which its trial gives otherwise."""
    cold, lucky = np.ones(8), np.array([0.5, 0.6, 0.5, 0.6, -0.4, -0.3, -0.4, -0.3])
    found = judged(cold, {(ONE,): cold - lucky, (TWO,): cold - lucky[::-1]}, 4)
    one = found.trials[0]
    best = f"the best start gains {one.advantage:+.3f} ± {one.error:.3f} nats a row on 8 rows"
    assert found.note == f"it starts cold: {best}, and what one half of them chose -0.350 ± {found.error:.3f} on the other half"
    alone = judged(cold, {(ONE,): cold - lucky}, 4)
    assert alone.note == f"it starts cold: {best}"


def test_a_start_without_a_head_needs_no_labels_in_common(base: FrozenBase, tmp_path: Path) -> None:
    found = start_of([Neighbour(ONE, -0.5, adapter(base, tmp_path / "a"))], base, CONFIG, "t", tmp_path / "start")
    assert found == Start(tmp_path / "start", ())
    assert losses_after(base, ROWS[:24], ROWS[24:], steps=2, config=CONFIG, start=found).shape == (12,)
