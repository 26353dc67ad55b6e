"""`adapter_config.json`: which of PEFT's options an adapter may set, and what they mean for each module. No torch.

The list is an allow-list. An option that the engine does not execute is refused by name: ignoring it would answer wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapter_hub.adapters.patterns import check_pattern, matches_end
from adapter_hub.errors import CorruptAdapter, UnsupportedOption


class TaskType(StrEnum):
    """PEFT's names for what an adapter does. A config without one gives embeddings on an encoder."""

    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class ProblemType(StrEnum):
    """transformers' names for what the outputs of a SEQ_CLS head mean."""

    SINGLE = "single_label_classification"    # one of the labels
    MULTI = "multi_label_classification"      # any of the labels, each by itself
    REGRESSION = "regression"                 # a number


HEADED = frozenset({TaskType.SEQ_CLS, TaskType.TOKEN_CLS})

# Options that only matter while training, and facts about the file itself.
_INERT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout"}
    | {"lora_ga_config", "megatron_core", "peft_version", "revision", "runtime_config"}
)
_EXECUTED = frozenset(
    {"exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "alpha_pattern"}
    | {"modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_dora", "use_rslora"}
)
# Initialisations that leave the base's own weights as they are.
_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva"})
_REASONS = {
    "trainable_token_indices": "it replaces vectors of the base's vocabulary, and all adapters of a batch share one; LoRA on the embedding "
    "(`embed_tokens` in target_modules) is run",
}
_OFF: tuple[object, ...] = (None, False, 0, "", "none", [], {})


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of a LoRA config that changes what is computed. Names of modules are as the trained model called them."""

    r: int                                         # rank, where rank_pattern says nothing else
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    target_modules: tuple[str, ...] | str | None   # endings of names; or a regular expression or "all-linear"
    modules_to_save: tuple[str, ...]
    task_type: TaskType | None
    base_model_name_or_path: str | None
    raw: Mapping[str, Any] = field(repr=False)     # the file as it stands

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """α / r, or α / √r with rsLoRA (Kalajdzievski 2023), by this module's own α and r."""
        rank = self.rank(module)
        return float(_by_pattern(self.alpha_pattern, module, self.lora_alpha)) / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(config: Mapping[str, Any], source: object = "adapter_config.json") -> LoraSettings:
    """Check every key of PEFT's config. Raises UnsupportedOption by name, CorruptAdapter for values of the wrong form."""
    if not isinstance(config, Mapping):
        raise CorruptAdapter(str(source), "it is not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = "Train a LoRA, or make one of it with peft.convert_to_lora."
        raise UnsupportedOption("peft_type", kind, "only LORA adapters are executed", hint=hint)
    for key, value in config.items():
        if key not in _EXECUTED and key not in _INERT and not _is_default(key, value):
            raise UnsupportedOption(key, value, *([_REASONS[key]] if key in _REASONS else []))
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and not (isinstance(init, str) and init in _HARMLESS_INITS):
        hint = "Save it with save_pretrained(folder, path_initial_model_for_weight_conversion=…): that makes a plain LoRA of it."
        raise UnsupportedOption("init_lora_weights", init, "it alters the base's weights", hint=hint)
    task = config.get("task_type")
    if task is not None and not (isinstance(task, str) and task in TaskType.__members__):
        raise UnsupportedOption("task_type", task, f"known are {', '.join(TaskType)}", hint="Name one that it was trained for.")
    targets = config.get("target_modules")
    try:
        settings = LoraSettings(
            r=_whole(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            rank_pattern={str(k): _whole(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            target_modules=targets if targets is None or isinstance(targets, str) else _names("target_modules", targets),
            modules_to_save=_names("modules_to_save", config.get("modules_to_save") or ()),
            task_type=TaskType(task) if task else None,
            base_model_name_or_path=_text_or_none(config.get("base_model_name_or_path")),
            raw=dict(config),
        )
        for pattern in _patterns(settings):
            check_pattern(pattern)
    except KeyError as error:
        raise CorruptAdapter(str(source), f"it has no {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptAdapter(str(source), f"a value has the wrong form ({error})") from error
    if not math.isfinite(settings.lora_alpha):
        raise CorruptAdapter(str(source), "lora_alpha is not finite")
    return settings


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches_end(pattern, module)), default)


def _patterns(settings: LoraSettings) -> tuple[str, ...]:
    """Everything in a config that PEFT reads as a regular expression."""
    found: list[str] = [*settings.rank_pattern, *settings.alpha_pattern, *settings.modules_to_save]
    for value in (settings.target_modules, settings.raw.get("exclude_modules"), settings.raw.get("layers_pattern")):
        found += [value] if isinstance(value, str) else []
    listed = settings.raw.get("layers_pattern")
    return (*found, *(_names("layers_pattern", listed) if isinstance(listed, list) else ()))


def _names(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key}={value!r} is not a list of names")
    return tuple(value)


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value or None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a rank")
    return value


def _is_default(key: str, value: object) -> bool:
    from peft import LoraConfig

    return value in _OFF or value == getattr(LoraConfig(), key, None)
