"""Look for a better TrainConfig: many short trainings, judged on the rows that choose an epoch. Optuna proposes, `train` trains.

The rows that measure an adapter are neither trained on nor asked, so what `Hub.learn` says afterwards of a new name, with the same rows,
task and seed, is of inputs that the search never saw. A name in production is measured on rows held out otherwise. Optuna is an extra, and
imported when a search begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapter_hub.adapters.config import TaskType
from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example, as_examples
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.data import task_seed
from adapter_hub.training.trials import rehearse

STARTUP = 5            # trials drawn at random, before the sampler and the pruner have seen enough
FIXED = frozenset({"seed", "validation_share", "report_to", "progress"})    # another seed or split would compare rows, not settings
_REASON = "reason"     # why a trial failed, in Optuna's storage


@dataclass(frozen=True, slots=True)
class Span:
    """Any number from `low` to `high`, both included; a whole one where both are. `log`: as likely in each decade."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, "Span | Sequence[Any]"]    # what each setting may be: a span, or one of several values
SPACE: Space = {
    "learning_rate": Span(1e-4, 1e-2, log=True),
    "r": (4, 8, 16, 32),
    "batch_size": (8, 16, 32),
    "dropout": (0.0, 0.05, 0.1, 0.2),
    "label_smoothing": (0.0, 0.05, 0.1),
    "layers_share": (0.5, 1.0),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One training with these settings in place of the config's."""

    number: int                     # from 0, in the order of trying
    settings: Mapping[str, Any]
    score: float | None             # `rank` of the task's measures in its best epoch, higher is better; None where it failed
    pruned: bool                    # stopped, since at that epoch it was below the median of those before it
    epochs: int                     # that it ran
    seconds: float
    reason: str = ""                # why it failed


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best config found, and all that was tried."""

    config: TrainConfig
    score: float
    trials: tuple[Trial, ...]


def search(
    base: FrozenBase,
    rows: Iterable[Mapping[str, Any] | Example],
    *,
    task: str,
    config: TrainConfig | str | None = None,
    trials: int,
    space: Space | None = None,
    task_type: str = TaskType.SEQ_CLS,
    problem_type: str | None = None,
    prompt_template: str | None = None,
    validation: Iterable[Mapping[str, Any] | Example] | None = None,
    storage: Path | str | None = None,
    seconds_max: float | None = None,
) -> SearchResult:
    """Train up to `trials` configs of `space` (default SPACE) and return the one whose best epoch is best on the choosing rows.

    The first trial is `config` itself where the space holds it. Settings are proposed by TPE (Bergstra et al. 2011, "Algorithms for
    Hyper-Parameter Optimization", section 4); a trial below the median of the others at its epoch is stopped. Each has the same seed, rows
    and split. Where `r` varies and `alpha` does not, alpha / r stays the config's. After `seconds_max` no trial begins; the first always does.
    `storage` is an SQLite file that keeps each trial: called again, also after it was killed, the same search goes on to `trials`, and
    proposes what it would have proposed. One search at a time uses a storage, by a lock file beside it. Raises InvalidInput: no Optuna, a
    space that no config fits, no trial that ended, bad rows, a storage in use.
    """
    optuna = _optuna()
    rows, validation = as_examples(rows), None if validation is None else as_examples(validation)
    config = TrainConfig.of(config)
    space = _checked(SPACE if space is None else space, config)
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise InvalidInput(f"trials={trials!r} is not a whole number of at least 1.", hint="As in trials=20.")
    if seconds_max is not None and not (isinstance(seconds_max, int | float) and seconds_max > 0):
        raise InvalidInput(f"seconds_max={seconds_max!r} is not a number above 0.", hint="As in seconds_max=600.")
    kind: dict[str, Any] = {"task_type": task_type, "problem_type": problem_type, "prompt_template": prompt_template}
    told = [[[row.text, row.label, dict(row.extra)] for row in part] for part in (rows, validation or ())]
    facts = [base.fingerprint, task, repr(config), repr(sorted(space.items())), kind, told]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    begun = time.monotonic()
    with _alone(storage), _study(optuna, storage, identity) as study:
        while (done := len(_finished(optuna, study))) < trials:
            if done and seconds_max is not None and time.monotonic() - begun >= seconds_max:
                break
            # Seeded by the trial, not by the process: a search that goes on proposes what it would have proposed.
            study.sampler = optuna.samplers.TPESampler(seed=task_seed(config.seed, f"trial {done}", ()), n_startup_trials=STARTUP)
            waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))    # of a process killed right here: `ask` takes it
            if not done and not waiting and all(_holds(one, getattr(config, name)) for name, one in space.items()):
                study.enqueue_trial({name: getattr(config, name) for name in space})
            trial = study.ask()
            settings = {name: _suggested(trial, name, one) for name, one in space.items()}
            try:
                tried = _with(config, settings)
            except InvalidInput as error:    # two settings that do not go together
                trial.set_user_attr(_REASON, str(error))
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            told_off = False

            def watch(epoch: int, score: float, trial: Any = trial) -> bool:
                nonlocal told_off
                trial.report(score, epoch)
                told_off = bool(trial.should_prune())
                return not told_off

            score = rehearse(base, rows, task=task, validation=validation, config=tried, watch=watch, **kind)
            if not math.isfinite(score):
                trial.set_user_attr(_REASON, "its loss is not finite")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            elif told_off:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, score)
        table = tuple(_trial(optuna, number, one) for number, one in enumerate(_finished(optuna, study)))
    whole = [trial for trial in table if trial.score is not None and not trial.pruned]
    if not whole:
        reason = next((trial.reason for trial in table if trial.reason), "all were stopped")
        raise InvalidInput(f"none of {len(table)} trials came to its end: {reason}", hint="Change the space, or the config.")
    best = max(whole, key=lambda trial: (trial.score, -trial.number))
    assert best.score is not None
    return SearchResult(_with(config, best.settings), best.score, table)


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise InvalidInput("a search needs the package optuna, which is not installed.", hint="Install adapter-hub[search].") from error


@contextmanager
def _alone(storage: Path | str | None) -> Iterator[None]:
    """Raises InvalidInput while another search uses the storage: each would take the other's running trial for one that was killed."""
    if storage is None:
        yield
        return
    try:
        handle = os.open(f"{storage}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise InvalidInput(f"{str(storage)!r} cannot keep a search: {error}.", hint="Name another file.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidInput(f"another search is using {str(storage)!r}.", hint="Wait for it, or name another file.") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def _study(optuna: Any, storage: Path | str | None, identity: str) -> Iterator[Any]:
    """The study of this name, begun or gone on with, and Optuna's log left as it was. Raises InvalidInput where the file is no storage."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        try:
            kept = None if storage is None else optuna.storages.RDBStorage(f"sqlite:///{Path(storage)}")
            pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1)
            study = optuna.create_study(storage=kept, study_name=identity, direction="maximize", pruner=pruner, load_if_exists=True)
        except (importlib.import_module("sqlalchemy.exc").SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            raise InvalidInput(f"{str(storage)!r} cannot keep a search: {error}".splitlines()[0] + ".", hint="Name another file.") from error
        for left in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)    # of a process that was killed: tried again
        yield study
    finally:
        optuna.logging.set_verbosity(verbosity)


def _finished(optuna: Any, study: Any) -> list[Any]:
    """Those that count, in their order: not what a killed process left."""
    states = optuna.trial.TrialState
    return [one for one in study.get_trials(deepcopy=False) if one.state in (states.COMPLETE, states.PRUNED) or _REASON in one.user_attrs]


def _trial(optuna: Any, number: int, one: Any) -> Trial:
    scores, failed = one.intermediate_values, _REASON in one.user_attrs
    pruned = one.state == optuna.trial.TrialState.PRUNED
    seconds = one.duration.total_seconds() if one.duration else 0.0
    score = None if failed else max(scores.values())
    return Trial(number, dict(one.params), score, pruned, len(scores), seconds, one.user_attrs.get(_REASON, ""))


# ---- the space ------------------------------------------------------------------------------------------------------


def _checked(space: Space, config: TrainConfig) -> dict[str, Span | tuple[Any, ...]]:
    """Raises InvalidInput for a setting that does not exist or may not vary, and for a value that no config could have."""
    found: dict[str, Span | tuple[Any, ...]] = {}
    for name, given in space.items():
        if name in FIXED:
            raise InvalidInput(f"{name} is the same in each trial.", hint="Set it in the config.")
        one = given if isinstance(given, Span) else tuple(given)
        if isinstance(one, Span) and not (one.low < one.high and (one.low > 0 or not one.log)):
            raise InvalidInput(f"{name}: from {one.low} to {one.high} is no span.", hint="Give low < high, above 0 where log is true.")
        if not one or (isinstance(one, tuple) and not all(isinstance(value, int | float | str) for value in one)):
            raise InvalidInput(f"{name}: {one!r} are no values to choose from.", hint="Give numbers, names, true or false.")
        for value in (one.low, one.high) if isinstance(one, Span) else one:
            TrainConfig.from_dict({name: value})
        found[name] = one
    if not found:
        raise InvalidInput("the space is empty: there is nothing to search.", hint='As in {"learning_rate": Span(1e-4, 1e-2, log=True)}.')
    return found


def _whole(span: Span) -> bool:
    return isinstance(span.low, int) and isinstance(span.high, int)


def _holds(one: Span | tuple[Any, ...], value: Any) -> bool:
    return one.low <= value <= one.high if isinstance(one, Span) else value in one


def _suggested(trial: Any, name: str, one: Span | tuple[Any, ...]) -> Any:
    if not isinstance(one, Span):
        return trial.suggest_categorical(name, one)
    return (trial.suggest_int if _whole(one) else trial.suggest_float)(name, one.low, one.high, log=one.log)


def _with(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The config with these settings; the scale alpha / r stays where only r is among them. Raises InvalidInput."""
    scaled = {"alpha": max(1, round(config.alpha * settings["r"] / config.r))} if "r" in settings and "alpha" not in settings else {}
    return replace(config, **settings, **scaled)
