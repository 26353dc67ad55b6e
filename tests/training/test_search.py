"""A search finds the better config on the rows that choose, goes on after a kill as if nothing had been, and says what it tried."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.search import SPACE, SearchResult, Space, Span, search
from adapter_hub.training.train import train_classifier
from adapter_hub.training.trials import rehearse

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("hammer", "saw", "drill", "pliers")}
FRAMES = ("a {}", "the {}", "my {}", "her {}", "one {}", "{}", "no {}", "this {}")
ROWS = [Example(frame.format(word), label) for frame in FRAMES for label, words in WORDS.items() for word in words]
CONFIG = TrainConfig(r=2, alpha=4, epochs=3, steps_min=0, batch_size=16, learning_rate=2e-3)
FEW: Space = {"learning_rate": Span(1e-7, 1e-2, log=True), "r": (2, 4)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("model")))


def facts(result: SearchResult) -> list[object]:
    return [replace(trial, seconds=0.0) for trial in result.trials]


def test_a_search_without_optuna_names_the_extra(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)    # as Python marks what cannot be imported
    with pytest.raises(InvalidInput, match=r"needs the package optuna, .*Install adapter-hub\[search\]"):
        search(base, ROWS, task="t", trials=1)


def test_rehearsed_is_what_training_keeps_and_a_watcher_may_end_it(base: FrozenBase, tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    score = rehearse(base, ROWS, task="t", config=CONFIG, watch=lambda *epoch: told.append(epoch) is None)
    trained = train_classifier(base, ROWS, task="t", config=CONFIG, folder=tmp_path)
    assert [epoch for epoch, _ in told] == [1, 2, 3] and score == max(rank for _, rank in told)
    assert told[int(trained.metrics["epoch"]) - 1][1] == score < 0    # the log loss of the rows that choose
    assert rehearse(base, ROWS, task="t", config=CONFIG, watch=lambda *_: False) == told[0][1]
    patient = replace(CONFIG, patience=1, epochs=6, learning_rate=1e-12, probe=False)    # nothing gets better
    assert rehearse(base, ROWS, task="t", config=patient, watch=lambda *_: True) < 0


def test_the_best_of_three_is_kept_and_the_config_itself_is_the_first(base: FrozenBase, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    result = search(base, ROWS, task="t", config=CONFIG, trials=3, space=FEW, storage=tmp_path / "trials.sqlite")
    first, *others = result.trials
    assert first.settings == {"learning_rate": CONFIG.learning_rate, "r": CONFIG.r}
    assert first.score == rehearse(base, ROWS, task="t", config=CONFIG, watch=lambda *_: True)
    assert result.score == max(-math.inf if trial.score is None else trial.score for trial in result.trials) and len(others) == 2
    best = next(trial for trial in result.trials if trial.score == result.score)
    assert result.config == replace(CONFIG, **best.settings, alpha=2 * best.settings["r"])
    again = search(base, ROWS, task="t", config=CONFIG, trials=3, space=FEW, storage=tmp_path / "trials.sqlite")
    assert again == result    # to the second: nothing was trained


def test_a_search_that_goes_on_proposes_what_it_would_have_proposed(base: FrozenBase, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    storage, config = tmp_path / "trials.sqlite", replace(CONFIG, epochs=1)
    search(base, ROWS, task="t", config=config, trials=2, space=FEW, storage=storage)
    url = f"sqlite:///{storage}"
    [name] = optuna.get_all_study_names(url)
    optuna.load_study(study_name=name, storage=url).ask()    # what a killed process leaves: a trial that runs for ever
    whole = search(base, ROWS, task="t", config=config, trials=4, space=FEW)
    assert facts(search(base, ROWS, task="t", config=config, trials=4, space=FEW, storage=storage)) == facts(whole)
    assert len({trial.settings["learning_rate"] for trial in whole.trials}) == 4
    search(base, ROWS, task="another", config=config, trials=1, space=FEW, storage=storage)
    assert len(optuna.get_all_study_names(url)) == 2    # another search has no part in this one


def test_a_kill_before_the_first_trial_was_asked_for_leaves_it_to_be_tried(base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously Optuna 5 could not tell a trial that waits, and the storage was of no use any more."""
    optuna = pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    storage, config = tmp_path / "trials.sqlite", replace(CONFIG, epochs=1)
    with monkeypatch.context() as killed:
        killed.setattr(optuna.Study, "ask", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            search(base, ROWS, task="t", config=config, trials=2, space=FEW, storage=storage)
    [name] = optuna.get_all_study_names(f"sqlite:///{storage}")
    left = optuna.load_study(study_name=name, storage=f"sqlite:///{storage}").trials
    assert [trial.state.name for trial in left] == ["WAITING"]
    whole = search(base, ROWS, task="t", config=config, trials=2, space=FEW)
    assert facts(search(base, ROWS, task="t", config=config, trials=2, space=FEW, storage=storage)) == facts(whole)


def test_two_searches_at_once_do_not_share_a_storage(base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously the second took the trial that the first was running for one of a killed process."""
    optuna = pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    storage, ask = tmp_path / "trials.sqlite", optuna.Study.ask
    refused: list[str] = []

    def asked(study: object) -> object:
        monkeypatch.setattr(optuna.Study, "ask", ask)
        with pytest.raises(InvalidInput, match="another search is using") as caught:
            search(base, ROWS, task="another", config=CONFIG, trials=1, space=FEW, storage=storage)
        refused.append(str(caught.value))
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", asked)
    result = search(base, ROWS, task="t", config=replace(CONFIG, epochs=1), trials=1, space=FEW, storage=storage)
    assert len(refused) == 1 and len(result.trials) == 1 and result.trials[0].score is not None
    with pytest.raises(InvalidInput, match="cannot keep a search"):
        search(base, ROWS, task="t", trials=1, storage=tmp_path / "absent" / "trials.sqlite")


def test_settings_that_do_not_go_together_are_told_in_the_table_and_time_ends_a_search(base: FrozenBase) -> None:
    pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    odd = replace(CONFIG, epochs=1, layers_share=0.5)
    with pytest.raises(InvalidInput, match=r"none of 2 trials came to its end: noise=5\.0 is put on the embeddings"):
        search(base, ROWS, task="t", config=odd, trials=2, space={"noise": (5.0,)})
    assert len(search(base, ROWS, task="t", config=odd, trials=50, space=FEW, seconds_max=1e-6).trials) == 1


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({}, "the space is empty"),
        ({"seed": (0, 1)}, "seed is the same in each trial"),
        ({"rate": (0.1,)}, "'rate' is not a training setting"),
        ({"r": (0, 4)}, "r=0 is not"),
        ({"dropout": Span(0.5, 0.1)}, "no span"),
        ({"dropout": Span(0.0, 0.1, log=True)}, "above 0 where log"),
        ({"target_modules": (("query",),)}, "no values to choose from"),
    ],
)
def test_a_space_that_no_config_fits_is_refused_by_name(base: FrozenBase, space: Space, says: str) -> None:
    pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    with pytest.raises(InvalidInput, match=says):
        search(base, ROWS, task="t", trials=1, space=space)


def test_bad_counts_and_files_are_refused(base: FrozenBase, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra 'search' is not installed")
    with pytest.raises(InvalidInput, match="trials=0 is not a whole number"):
        search(base, ROWS, task="t", trials=0)
    (tmp_path / "notes").write_text("these are notes, and no database at all " * 20)
    with pytest.raises(InvalidInput, match="cannot keep a search"):
        search(base, ROWS, task="t", trials=1, storage=tmp_path / "notes")
    assert SPACE["learning_rate"] == Span(1e-4, 1e-2, log=True)
