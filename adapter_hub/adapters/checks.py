"""Does this adapter fit the base, and does it act? Asked before anything is stored.

What should be there is not computed here again: PEFT itself is put on a model without weights, and its keys and shapes are compared.
"""

from __future__ import annotations

import copy
import difflib
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from adapter_hub.adapters.config import HEADED, TaskType
from adapter_hub.adapters.patterns import matches_end
from adapter_hub.adapters.source import AdapterFiles
from adapter_hub.adapters.weights import ELSEWHERE, KEY_PREFIX, Adapter, LoraDelta, outputs_of, settings_of, tensors_of
from adapter_hub.base_model import BUILDING, BaseKind, FrozenBase
from adapter_hub.errors import DoesNotFit, NoEffect, UnsupportedOption, WrongBase
from adapter_hub.precision import Precision, float_weight

_WITHOUT_COPIES = "Save it with save_pretrained(folder, save_embedding_layers=False)."
_ADAPT_IT = "Adapt that module instead (target_modules), and train again."
_NO_DORA = "Train without use_dora, or leave embeddings out of target_modules."
HEAD_TOLERANCE, HEAD_TOLERANCE_NARROW = 1e-3, 0.2    # of the greatest number: what is more than rounding; in fewer than 32 bits
PROBE = ("The quick brown fox jumps over the lazy dog.", "What is the balance of my account?", "12 + 30 = 42")

_AUTO: dict[tuple[BaseKind, TaskType | None], tuple[Any, ...]] = {
    (BaseKind.ENCODER, TaskType.SEQ_CLS): (AutoModelForSequenceClassification,),
    (BaseKind.ENCODER, TaskType.TOKEN_CLS): (AutoModelForTokenClassification,),
    (BaseKind.ENCODER, TaskType.FEATURE_EXTRACTION): (AutoModel,),
    (BaseKind.ENCODER, None): (AutoModel,),
    (BaseKind.CAUSAL, TaskType.SEQ_CLS): (AutoModelForSequenceClassification,),
    (BaseKind.CAUSAL, TaskType.TOKEN_CLS): (AutoModelForTokenClassification,),
    (BaseKind.CAUSAL, TaskType.CAUSAL_LM): (AutoModelForCausalLM,),
    (BaseKind.CAUSAL, TaskType.FEATURE_EXTRACTION): (AutoModel, AutoModelForCausalLM),
    (BaseKind.CAUSAL, None): (AutoModel, AutoModelForCausalLM),
    (BaseKind.SEQ2SEQ, TaskType.SEQ_2_SEQ_LM): (AutoModelForSeq2SeqLM,),
}


def skeletons(base: FrozenBase, task_type: TaskType | None, outputs: int = 2) -> Iterator[PreTrainedModel]:
    """The models, without weights, on which an adapter of this task type may have been trained. Raises WrongBase for none."""
    autos = _AUTO.get((base.kind, task_type))
    if autos is None:
        raise WrongBase(f"a {task_type or 'plain'} adapter cannot run on {base.id!r}, which is {base.kind}.", hint="Register it with a fitting base.")
    for auto in autos:
        config = copy.deepcopy(base.model.config)
        config.num_labels = outputs
        config.pad_token_id = base.tokenizer.pad_token_id
        try:
            with BUILDING, torch.device("meta"):
                model = auto.from_config(config, dtype=base.dtype, trust_remote_code=False)
        except ValueError as error:
            raise WrongBase(f"transformers has no {auto.__name__} for {base.model.config.model_type!r}.", hint="Use another base.") from error
        yield model


def head_modules(model: PreTrainedModel, base: FrozenBase) -> list[str]:
    """The modules of a task's model that the base lacks: all that stands outside the transformer, and a pooler that the base's files lack."""
    inside = {base.canonical(name) for name in base.model.state_dict()}
    found = {}
    for name in model.state_dict():
        first, _, rest = name.partition(".")
        if first != model.base_model_prefix:
            found[first] = True
        elif base.canonical(name) not in inside:
            found[f"{first}.{rest.partition('.')[0]}"] = True
    return list(found)


def without_copies(files: AdapterFiles, base: FrozenBase) -> AdapterFiles:
    """The files without the base's own tensors, which PEFT saves too where an embedding or the output layer is adapted, or when told to.

    Each must be the base's, but for the rounding of the type in which it is stored or held. Raises DoesNotFit naming one that differs,
    CorruptAdapter, UnsupportedOption. Of another shape it stays, for `check_fits` to say why.
    """
    settings, tensors, model = settings_of(files), tensors_of(files), cast(Any, base.model)
    vocabulary = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    copies = []
    for key, tensor in sorted(tensors.items()):
        name, _, part = key.removeprefix(KEY_PREFIX).rpartition(".")
        module = base.modules.get(base.canonical(name.removesuffix(".base_layer")))
        saved = any(matches_end(pattern, name) for pattern in settings.modules_to_save)
        if not name.endswith(".base_layer") and (module not in vocabulary or saved):
            continue
        own = getattr(module, part, None)
        if not isinstance(own, Tensor) or own.shape != tensor.shape:
            continue
        own = own.detach().cpu()
        if not own.is_floating_point():
            raise DoesNotFit(f"tensor {key!r} cannot be compared with the base's own at {base.precision}.", hint=_WITHOUT_COPIES)
        if not torch.equal(own.to(tensor.dtype), tensor) and not torch.equal(tensor.to(own.dtype), own):
            most = float((own.double() - tensor.double()).abs().max())
            fact = f"tensor {key!r} is the base's own layer, and differs from it by up to {most:.2g}: it was trained on another base, or whole"
            raise DoesNotFit(f"{fact}.", hint="Register it with a registry for that base, or train LoRA on the layer alone.")
        copies.append(key)
    kept = {key: tensor for key, tensor in tensors.items() if key not in copies}
    return replace(files, weights=save(kept, metadata={"format": "pt"})) if copies else files


def check_fits(adapter: Adapter, base: FrozenBase) -> None:
    """Every tensor has its place in the base, every place that the config names has its tensor, and the shapes are equal.

    Raises DoesNotFit naming the first difference, WrongBase, UnsupportedOption.
    """
    _check_vocabulary(adapter, base)
    outputs = outputs_of(adapter.head) if adapter.head else 2
    found = {_canonical(base, key): tensor for key, tensor in adapter.tensors.items()}
    inside = {base.canonical(name) for name in base.model.state_dict()}
    faults = [_fault(adapter, base, model, found, inside) for model in skeletons(base, adapter.task_type, outputs)]
    if None not in faults:
        raise DoesNotFit(f"{faults[0]}.", hint="It was trained on another model, or its config and weights do not belong together.")
    for name in adapter.head:
        if base.canonical(name) in inside:
            raise UnsupportedOption("modules_to_save", name, "it replaces weights of the frozen base; only heads are saved whole", hint=_ADAPT_IT)
    for name, delta in adapter.deltas.items():
        module = base.modules.get(base.canonical(name))
        if not isinstance(module, nn.Embedding if delta.embedding else nn.Linear | Conv1D):
            reason = f"a {type(module).__name__} cannot be adapted, only linear modules and embeddings"
            raise UnsupportedOption("target_modules", name, reason, hint=ELSEWHERE)
        if delta.embedding and delta.magnitude is not None:
            raise UnsupportedOption("use_dora", True, f"{name} is an embedding, and only linear modules are run as DoRA", hint=_NO_DORA)


def _check_vocabulary(adapter: Adapter, base: FrozenBase) -> None:
    """All adapters share the base's tokens, and their vectors. Raises DoesNotFit, naming the tensor."""
    model = cast(Any, base.model)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = {name: cast(Tensor, module.weight).shape[0] for name, module in base.modules.items() if module in layers}    # tokens, by module
    found = {name.removesuffix(".weight"): tensor.shape[0] for name, tensor in adapter.head.items() if name.endswith(".weight")}
    adapted = {name: delta.a.shape[1] if delta.embedding else delta.b.shape[0] for name, delta in adapter.deltas.items()}
    for name, tokens in sorted((found | adapted).items()):    # a file has no order
        size = sizes.get(base.canonical(name))
        if size is None:
            continue
        if tokens != size:
            fact = f"{name!r} of the adapter has {tokens} tokens, the base has {size}: it was trained with a resized vocabulary"
            raise DoesNotFit(f"{fact}.", hint="Save the resized base as a model of its own, and register the adapter with a registry for that.")
        saved = any(matches_end(module, name) for module in adapter.settings.modules_to_save)
        if name in found and not saved:
            raise DoesNotFit(
                f"tensor '{name}.weight' is the base's own, saved by PEFT's save_embedding_layers.",
                hint=_WITHOUT_COPIES,
            )


def check_acts(adapter: Adapter, base: FrozenBase) -> float:
    """The largest change of a hidden state or logit on a probe batch.

    Raises NoEffect if it is zero or not finite, UnsupportedOption where rows of one batch could not have adapters of their own, WrongBase
    where the head would not give a row of a mixed batch what it gives the text alone.
    """
    with torch.inference_mode():
        check_rows(adapter, base)
        plain = _probe(base)
        with applied(base, adapter):
            changed = _probe(base)
        check_head_runs(adapter, base)
    if not torch.isfinite(changed).all():
        raise NoEffect("with the adapter the base's output is not finite on a probe batch.", hint="Training diverged: train it again.")
    effect = float((changed - plain).abs().max())
    if effect == 0:
        hint = "It was never trained (B is zero), or something went wrong when it was saved."
        if base.precision is not Precision.FLOAT32:
            hint = f"It was never trained (B is zero), or does less than {base.precision} can show: register it at float32."
        raise NoEffect("the adapter leaves the base's output unchanged on a probe batch.", hint=hint)
    return effect


def check_head_runs(adapter: Adapter, base: FrozenBase) -> None:
    """Raises WrongBase where the head would not give a row of a mixed batch what it gives the text alone."""
    if not adapter.head:
        return
    model = next(skeletons(base, adapter.task_type, outputs_of(adapter.head)))
    # The frozen one: what is built here is the head alone.
    setattr(model, model.base_model_prefix, _with_pooler(base.body, model) if lacks_pooler(model, base) else base.body)
    model.load_state_dict({name: tensor.to(base.device, base.dtype) for name, tensor in adapter.head.items()}, strict=False, assign=True)
    if reason := run_fault(model.train(False), base, base.precision):
        raise WrongBase(f"a {adapter.task_type} adapter cannot run on {base.id!r}: {reason}.", hint="Register it with a fitting base.")


def _with_pooler(body: nn.Module, model: PreTrainedModel) -> nn.Module:
    """The same modules once more, and this model's pooler beside them: the base stays without."""
    found = copy.copy(body)
    found._modules = body._modules | {"pooler": model.base_model.pooler}  # type: ignore[dict-item]
    return found


@contextmanager
def applied(base: FrozenBase, adapter: Adapter) -> Iterator[None]:
    """While open, this thread's forwards of the base have this one adapter: slow and obvious, the reference for the engine."""
    handles = []
    try:
        for name, delta in adapter.deltas.items():
            handles.append(base.modules[base.canonical(name)].register_forward_hook(_adding(delta)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def dora_gain(weight: Tensor, delta: LoraDelta) -> Tensor:
    """m / ‖W + s B A‖ by output (o,), for W (o, i). Raises nothing; m must be there. (Liu et al. 2024, eq. 5; as PEFT computes it.)"""
    assert delta.magnitude is not None
    norm: Tensor = torch.linalg.norm(weight + delta.scaling * (delta.b @ delta.a), dim=1)
    return delta.magnitude / norm


def embedding_scale(module: nn.Embedding) -> float:
    """What the module multiplies its own vectors by: Gemma's does, and PEFT multiplies its update so too."""
    return float(getattr(module, "embed_scale", 1.0))


def _adding(read: LoraDelta) -> Any:
    thread = threading.get_ident()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:    # others go on predicting while an adapter is checked
            return None
        delta = _alike(read, output)    # some models keep single layers at float32: T5's last of a block, at float16
        if isinstance(module, nn.Embedding):
            return output + delta.scaling * embedding_scale(module) * (nn.functional.embedding(inputs[0], delta.a.T) @ delta.b.T)
        update = delta.scaling * (inputs[0] @ delta.a.T @ delta.b.T)
        if delta.magnitude is None:
            return output + update
        bias = 0 if module.bias is None else module.bias
        gain = dora_gain(float_weight(module).to(delta.a.dtype), delta)
        return output + (gain - 1) * (output - bias) + gain * update  # type: ignore[operator]

    return hook


def _alike(delta: LoraDelta, output: Tensor) -> LoraDelta:
    """Where this output is, and of its type."""
    magnitude = None if delta.magnitude is None else delta.magnitude.to(output)
    return replace(delta, a=delta.a.to(output), b=delta.b.to(output), magnitude=magnitude)


def head_fault(model: PreTrainedModel, base: FrozenBase) -> str | None:
    """Why the head of a task's model, weights or not, has no place on this base, to be read as a sentence; None where it has."""
    body, own = type(model.base_model).__name__, type(base.body).__name__
    if body != own:
        return f"the head of {type(model).__name__} is fed by a {body}, and the base is a {own}"
    if lacks_pooler(model, base) and isinstance(model.base_model.pooler, nn.Linear):
        return f"the base was saved without its pooler, of which {body} computes a part itself: it cannot be learned as a part of the head"
    return None


def lacks_pooler(model: PreTrainedModel, base: FrozenBase) -> bool:
    """Whether a task's model has a pooler that the base's files lack: it is a part of the head then."""
    return getattr(model.base_model, "pooler", None) is not None and getattr(base.body, "pooler", None) is None


@torch.inference_mode()
def run_fault(model: PreTrainedModel, base: FrozenBase, precision: Precision) -> str | None:
    """Why the head of a task's model, held in `precision`, cannot be run on what the base computes for a mixed batch, as a sentence; or None.

    The transformer hears only of tokens and mask there, and texts are padded on the right to the longest.
    """
    name, body, rows = type(model).__name__, cast(Any, model.base_model), base.encode(PROBE)
    short = min(rows, key=len)
    one, many = ({key: inputs[key] for key in ("input_ids", "attention_mask")} for inputs in (base.pad([short]), base.pad(rows)))
    try:
        own, alone, plain, plain_alone = model(**many).logits, model(**one).logits, body(**many), body(**one)
        fed = plain
        if lacks_pooler(model, base):    # as the engine does, which has nothing but the base's hidden states for it
            fed = type(plain)(**{**plain, "pooler_output": body.pooler(plain.last_hidden_state)})
        thread = threading.get_ident()    # it may be the base's own body, on which others go on predicting
        handle = body.register_forward_hook(lambda *_: fed if threading.get_ident() == thread else None)
        try:
            replayed = model(**many).logits
        finally:
            handle.remove()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{name} cannot be run on a text alone: {str(error)[:200]}"
    tolerance = HEAD_TOLERANCE if precision is Precision.FLOAT32 else HEAD_TOLERANCE_NARROW
    for found, lone in ((plain.last_hidden_state, plain_alone.last_hidden_state), (own, alone)):
        beside = found[rows.index(short)]
        beside = beside[: lone.shape[1]] if lone.ndim == 3 else beside    # of each token, or of the text
        if (lone[0] - beside).abs().max() > tolerance * found.abs().max():
            return f"{name} answers a text otherwise beside a longer one, to whose length it is padded"
    if own.shape != replayed.shape or (own - replayed).abs().max() > tolerance * own.abs().max():
        if fed is not plain:
            return f"the base was saved without its pooler, and what {name} pools are not the hidden states alone"
        return f"{name} tells its transformer more than a text's tokens, which the rows of other adapters would hear"
    return None


def check_rows(adapter: Adapter, base: FrozenBase) -> None:
    """Raises UnsupportedOption where an adapted module does not see each row of a batch by itself."""
    for name, reason in row_faults(base, list(adapter.deltas)).items():
        raise UnsupportedOption("target_modules", name, reason, hint=ELSEWHERE)


@torch.inference_mode()
def row_faults(base: FrozenBase, names: Sequence[str]) -> dict[str, str]:
    """Why a module cannot be adapted, of those that cannot: each must be called, and see the rows of a batch one after another, since the
    engine tells them apart by place."""
    modules = {name: base.modules[base.canonical(name)] for name in names}
    one, many = (_leading_sizes(base, list(modules.values()), rows) for rows in (1, len(PROBE)))
    found = {}
    for name, module in modules.items():
        if not one[module]:
            found[name] = "the base does not call this module, so adapting it does nothing"
        elif many[module] != [size * len(PROBE) for size in one[module]]:
            found[name] = "the base gives this module an input that all rows of a batch share"
    return found


def _leading_sizes(base: FrozenBase, modules: list[nn.Module], rows: int) -> dict[nn.Module, list[int]]:
    """The first dimension of each input of these modules, call by call, in a forward of so many rows."""
    thread = threading.get_ident()
    sizes: dict[nn.Module, list[int]] = {module: [] for module in modules}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            sizes[module].append(inputs[0].shape[0])

    handles = [module.register_forward_pre_hook(note) for module in sizes]
    try:
        _probe(base, rows)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _probe(base: FrozenBase, rows: int = len(PROBE)) -> Tensor:
    inputs = {key: value[:rows] for key, value in base.tokenize(PROBE).items()}
    if base.kind is BaseKind.SEQ2SEQ:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    result = base.model(**inputs)
    if base.kind is not BaseKind.ENCODER:
        return cast(Tensor, result.logits)
    pooled = result.get("pooler_output")    # an adapter may act on the pooler alone
    return torch.cat([part.flatten() for part in (result.last_hidden_state, pooled) if part is not None])


def _fault(adapter: Adapter, base: FrozenBase, model: PreTrainedModel, found: dict[str, Tensor], inside: set[str]) -> str | None:
    if adapter.head and (reason := head_fault(model, base)):
        return reason
    for name in model.state_dict() if adapter.task_type in HEADED else ():    # vectors are pooled from hidden states: a pooler may be missing
        if name not in adapter.head and base.canonical(name) not in inside:
            return f"the head's tensor {name!r} is neither in the base nor in the adapter: name its module in modules_to_save"
    targets = adapter.settings.target_modules
    if isinstance(targets, tuple) and (fault := _absent(targets, model)):    # PEFT is content with any one of them
        return fault
    try:
        return _first_fault(_expected(adapter, base, model), found)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        return f"PEFT cannot put this config on {base.id!r}: {str(error)[:300]}"


def _absent(targets: Sequence[str], model: PreTrainedModel) -> str | None:
    modules = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            kinds = {part for name in modules for part in (name, name.rpartition(".")[2])}
            closest = ", ".join(map(repr, difflib.get_close_matches(target, sorted(kinds), n=3, cutoff=0.5)))
            return f"target_modules names {target!r}, and the base has no such module" + (f" (closest: {closest})" if closest else "")
    return None


def _expected(adapter: Adapter, base: FrozenBase, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Canonical key -> shape of every tensor that PEFT would save for this config on this model."""
    settings = {key: value for key, value in adapter.settings.raw.items() if key in LoraConfig.__dataclass_fields__}
    settings |= {"inference_mode": True, "init_lora_weights": False, "runtime_config": LoraConfig().runtime_config}
    # On the meta device by torch's own context, which holds for this thread: PEFT's low_cpu_mem_usage patches torch for all of them.
    with BUILDING, warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(**settings))
        tensors = get_peft_model_state_dict(peft, save_embedding_layers=False)
    return {_canonical(base, key): tuple(tensor.shape) for key, tensor in tensors.items()}


def _canonical(base: FrozenBase, key: str) -> str:
    return base.canonical(key.removeprefix(KEY_PREFIX))


def _first_fault(expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> str | None:
    for key in sorted(found.keys() - expected.keys()):
        closest = difflib.get_close_matches(key, expected, n=1)
        return f"tensor {key!r} has no place in the base" + (f" (closest: {closest[0]!r})" if closest else "")
    for key in sorted(expected.keys() - found.keys()):
        return f"the config names {key!r}, and the weights lack it"
    for key, shape in sorted(expected.items()):
        if tuple(found[key].shape) != shape:
            return f"tensor {key!r} has shape {tuple(found[key].shape)}, the base and the config's rank need {shape}"
    return None
