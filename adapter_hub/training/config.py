"""How an adapter is trained: one frozen set of facts, checked when made. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from adapter_hub.adapters.config import parse_config
from adapter_hub.errors import AdapterRejected, InvalidInput

_SEE = "See adapter_hub.training.config.TrainConfig."
SCHEDULES = ("linear", "cosine", "constant_with_warmup")    # transformers' names
PRECISIONS = ("float32", "bfloat16", "auto")
TRACKERS = ("tensorboard", "wandb", "mlflow")    # transformers' names; each is its package's, too
ALL_LINEAR = "all-linear"    # every linear layer of the transformer that rows of a batch do not share, the head excepted; PEFT's word
LORA = ("alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "rank_pattern")
INITS = (True, False, "gaussian", "orthogonal")    # of the weights, that leave the base's as they are and need no data; PEFT's names


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """LoRA shape and optimiser settings. The defaults suit sentence encoders and 20 to 2,000 rows. Raises InvalidInput."""

    r: int = 8                             # rank
    alpha: int = 16                        # updates are scaled by alpha / r (alpha / √r with rsLoRA)
    dropout: float = 0.05                  # share of the adapter's inputs dropped while training, 0 to below 1
    target_modules: tuple[str, ...] | str = ALL_LINEAR    # a list of endings of names; a regular expression of whole names; or "all-linear"
    layers_share: float = 1.0              # share of the layers, from the top, that "all-linear" adapts; those below are computed once
    use_rslora: bool = False
    use_dora: bool = False
    pissa: bool = False                    # begin with the greatest singular vectors (PiSSA); written as a plain LoRA of rank 2 r
    epochs: int = 10                       # passes over the training rows
    patience: int = 0                      # stop after so many epochs without a better one; 0 runs all
    steps_min: int = 100                   # small sets get more epochs, until the optimiser took this many steps
    epochs_max: int = 40                   # so many at most for the sake of steps_min
    learning_rate: float = 1e-3
    batch_size: int = 16
    accumulation: int = 1                  # batches to a step of the optimiser
    warmup_ratio: float = 0.1              # share of the steps in which the rate rises from 0; then it falls to 0
    schedule: str = "linear"               # how the rate falls: one of SCHEDULES
    weight_decay: float = 0.01
    class_weights: bool = False            # of one label among several: rare ones weigh more, so that all together weigh the same
    r_drop: float = 0.0                    # weight of R-Drop: each batch runs twice, and what the passes disagree in is a loss
    noise: float = 0.0                     # NEFTune's alpha: uniform noise on the embeddings (alpha / √(tokens × width)); needs layers_share 1
    token_dropout: float = 0.0             # share of the tokens that a training batch does not see, 0 to below 1
    precision: str = "float32"             # one of PRECISIONS, of the arithmetic; weights are trained in float32. "auto": bfloat16 on CUDA
    base_dropout: bool = True              # train with the base's own dropout, too
    label_smoothing: float = 0.05          # of one label among several, 0 to below 1; keeps the head from being surer than it is right
    probe: bool = True                     # start the head from a linear probe of the frozen base, not from noise; a number's from the mean
    align_steps: int = 0                   # of a fresh classifier of texts: steps before the others, that need no labels (see `alignment`)
    validation_share: float = 0.1          # without validation rows, held out to choose the epoch, and as much again to measure
    seed: int = 0                          # with the task's name it decides the initial weights, the split and the order
    report_to: tuple[str, ...] = ()        # some of TRACKERS; `trackers` says where the logs are
    progress: bool = False                 # show the trainer's own bar and losses, on stderr
    lora: Mapping[str, Any] | None = field(default=None, hash=False)    # more of PEFT's LoraConfig, by its names: those of LORA

    def __post_init__(self) -> None:
        for name in ("report_to", "target_modules"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name, (fits, range_) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not fits(value) or (name in _WHOLE and not isinstance(value, int)):
                raise InvalidInput(f"{name}={value!r} is not {range_}.", hint=_SEE)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name}={getattr(self, name)!r} is not true or false.", hint=_SEE)
        if self.schedule not in SCHEDULES:
            raise InvalidInput(f"schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}.", hint=_SEE)
        if self.precision not in PRECISIONS:
            raise InvalidInput(f"precision={self.precision!r} is none of {', '.join(PRECISIONS)}.", hint=_SEE)
        if self.noise and self.layers_share < 1:
            fact = f"noise={self.noise} is put on the embeddings, and with layers_share={self.layers_share} they are computed once"
            raise InvalidInput(f"{fact}.", hint="Use layers_share=1, or token_dropout.")
        if self.pissa and (self.use_dora or self.use_rslora):
            other = "use_dora" if self.use_dora else "use_rslora"
            raise InvalidInput(f"pissa and {other} do not go together: what is written would not be a plain LoRA.", hint="Choose one of them.")
        if self.pissa and self.align_steps:
            fact = f"pissa and align_steps={self.align_steps} do not go together: what PiSSA takes out of the base is what it begins with"
            raise InvalidInput(f"{fact}.", hint="Choose one of them.")
        object.__setattr__(self, "lora", _checked_lora(self.lora, self.r, self.alpha))
        if self.pissa and (own := {"alpha_pattern", "init_lora_weights", "rank_pattern"}.intersection(self.lora or ())):
            raise InvalidInput(f"pissa and lora's {min(own)} do not go together: it has one rank, and its own weights.", hint="Choose one of them.")
        if not isinstance(self.report_to, tuple) or not set(self.report_to) <= set(TRACKERS):
            raise InvalidInput(f"report_to={self.report_to!r} is not a list of some of {', '.join(TRACKERS)}.", hint='As in ["tensorboard"].')
        endings = self.target_modules if isinstance(self.target_modules, tuple) else (self.target_modules,)
        if not endings or not all(isinstance(ending, str) and ending for ending in endings):
            raise InvalidInput(f"target_modules={self.target_modules!r} names no modules.", hint=f"Name some, or use {ALL_LINEAR!r}.")
        try:
            re.compile(self.target_modules if isinstance(self.target_modules, str) else "")
        except re.error as error:
            fact = f"target_modules={self.target_modules!r} is no regular expression: {error}"
            raise InvalidInput(f"{fact}.", hint='A list has endings of names: ["query", "value"].') from error

    def __repr__(self) -> str:
        """Without what is newer, where it is not used: what is kept of a training is known by this, and was before there were those fields."""
        shown = (one.name for one in dataclasses.fields(self) if one.name not in ("align_steps", "lora") or getattr(self, one.name))
        return f"TrainConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The config of one of PRESETS, with changes. Raises InvalidInput for a name that does not exist."""
        if name not in PRESETS:
            raise InvalidInput(f"{name!r} is not a preset.", hint=f"There are: {', '.join(PRESETS)}.")
        return cls.from_dict(dict(PRESETS[name]) | changes)

    @classmethod
    def of(cls, config: Self | Mapping[str, Any] | str | None) -> Self:
        """A config as it is, of a mapping (`from_dict`), a preset by its name, the defaults for None. Raises InvalidInput for anything else."""
        if isinstance(config, str):
            return cls.preset(config)
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if config is not None and not isinstance(config, cls):
            hint = f"Give one, a mapping of its settings, or the name of a preset: {', '.join(PRESETS)}."
            raise InvalidInput(f"the training config is {type(config).__name__}, not a TrainConfig.", hint=hint)
        return cls() if config is None else config

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The config of a JSON or TOML table, in which `preset` may name what it starts from. Raises InvalidInput for a name that does not exist."""
        if "preset" in settings:
            return cls.preset(str(settings["preset"]), **{name: value for name, value in settings.items() if name != "preset"})
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise InvalidInput(f"{unknown[0]!r} is not a training setting.", hint=f"There are: {', '.join(known)}.")
        return cls(**settings)


# What each costs and gives is in benchmarks/LOG.md.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"layers_share": 0.5, "epochs": 3, "steps_min": 60},
    "balanced": {"layers_share": 0.5, "epochs": 6},
    "thorough": {"r": 16, "alpha": 32, "epochs": 15, "patience": 4},
}


# Of PEFT's names those that are settings here, and what they are called.
_OWN = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"} | {name: name for name in ("target_modules", "use_dora", "use_rslora")}


class _Fixed(dict[str, Any]):
    """A mapping that stays as it was checked: types.MappingProxyType can neither be pickled nor copied. Raises TypeError for a change."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a TrainConfig's lora cannot be changed: make another config with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _Fixed, (dict(self),)


def _fixed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _Fixed({name: _fixed(one) for name, one in value.items()})
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


def module_pattern(modules: str | Sequence[str] | None) -> str:
    """A regular expression, of the whole name, of what PEFT takes as one, or as endings of names; empty for none."""
    return modules if isinstance(modules, str) else rf"(.*\.)?({'|'.join(map(re.escape, modules))})" if modules else ""


def _checked_lora(lora: Mapping[str, Any] | None, r: int, alpha: int) -> Mapping[str, Any] | None:
    """A copy as JSON would have it, fixed; None for nothing. Raises InvalidInput for what no adapter could be trained or registered with."""
    if not isinstance(lora, Mapping | None):
        raise InvalidInput(f"lora={lora!r} is not a mapping of PEFT's names to values.", hint='As in {"rank_pattern": {"query": 4}}.')
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(lora or {})))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"lora cannot be written to an adapter's config: {error}.", hint="Give lists, names and numbers.") from error
    for name in found:
        if name in _OWN:
            raise InvalidInput(f"lora has {name!r}, which is a setting beside it.", hint=f"Use {_OWN[name]}=….")
    if "modules_to_save" in found:
        fact = "lora has 'modules_to_save': the head is always saved whole, and the base's own modules are frozen"
        raise InvalidInput(f"{fact}.", hint="Leave it out; name modules of the base to adapt in target_modules.")
    init = found.get("init_lora_weights", True)
    if init not in INITS or isinstance(init, int) is not isinstance(init, bool):    # 1 == True
        raise InvalidInput(f"lora has init_lora_weights={init!r}, not one of {', '.join(map(str, INITS))}.", hint="For PiSSA use pissa=True.")
    for name, (fits, form) in _FORMS.items():
        if found.get(name) not in _NOTHING and not fits(found[name]):
            raise InvalidInput(f"lora has {name}={found[name]!r}, which is not {form}.", hint=_SEE)
    try:
        parse_config({"peft_type": "LORA", "r": r, "lora_alpha": alpha, **found})
    except AdapterRejected as error:
        raise InvalidInput(error.fact.replace("adapter_config.json", "lora", 1), hint=f"There are: {', '.join(LORA)}.") from error
    if unknown := sorted(found.keys() - set(LORA)):
        raise InvalidInput(f"lora has {unknown[0]!r}, which is nothing to be set here.", hint=f"There are: {', '.join(LORA)}.")
    found = {name: value for name, value in found.items() if value not in _NOTHING}
    ranks = found.get("rank_pattern", {}).values() or [r]    # with patterns no module need have r
    if init == "orthogonal" and (odd := [rank for rank in ranks if rank % 2]):
        raise InvalidInput(f"lora has init_lora_weights='orthogonal', which needs even ranks, and one is {odd[0]}.", hint=f"Use {odd[0] + 1}.")
    return _fixed(found) if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _or_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(fits, value)) if isinstance(value, list) else fits(value)


_NOTHING: tuple[object, ...] = (None, [], {})
# Of those of LORA that PEFT does not check, or tells of in words of its own.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha_pattern": (lambda value: isinstance(value, dict) and all(map(_is_number, value.values())), "a mapping of names to numbers"),
    "rank_pattern": (lambda value: isinstance(value, dict), "a mapping of names to ranks"),
    "exclude_modules": (_or_list(_is_name), "a regular expression, or a list of names"),
    "layers_pattern": (_or_list(_is_name), "a name, or a list of names"),
    "layers_to_transform": (_or_list(_is_layer), "a layer's number from 0, or a list of them"),
}


def _at_least(low: float) -> Callable[[float], bool]:
    return lambda value: low <= value < float("inf")


_COUNT = (_at_least(1), "a whole number of at least 1")
_SHARE = (lambda value: 0 <= value < 1, "a share from 0 to below 1")
_POSITIVE = (lambda value: 0 < value < float("inf"), "a number above 0")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "r": _COUNT,
    "alpha": _COUNT,
    "dropout": _SHARE,
    "epochs": _COUNT,
    "steps_min": (_at_least(0), "a whole number of at least 0"),
    "align_steps": (_at_least(0), "a whole number of at least 0"),
    "epochs_max": _COUNT,
    "patience": (_at_least(0), "a whole number of at least 0"),
    "accumulation": _COUNT,
    "layers_share": (lambda value: 0 < value <= 1, "a share above 0, at most 1"),
    "learning_rate": _POSITIVE,
    "r_drop": (_at_least(0), "a number of at least 0"),
    "noise": (_at_least(0), "a number of at least 0"),
    "token_dropout": _SHARE,
    "batch_size": _COUNT,
    "warmup_ratio": _SHARE,
    "weight_decay": (_at_least(0), "a number of at least 0"),
    "label_smoothing": _SHARE,
    "validation_share": (lambda value: 0 < value < 1, "a share above 0 and below 1"),
    "seed": (_at_least(0), "a whole number of at least 0"),
}
_SWITCHES = ("base_dropout", "class_weights", "use_rslora", "use_dora", "pissa", "probe", "progress")
_WHOLE = frozenset({"r", "alpha", "epochs", "steps_min", "epochs_max", "batch_size", "seed", "patience", "accumulation", "align_steps"})
