"""Small real objects for tests: tiny transformers with a tokenizer, and PEFT adapters on them. Nothing here pretends.

    folder = tiny_model(tmp_path / "bert", "bert")
    hub = Hub.create(tmp_path / "registry", base_model=folder, encoder="hash")
    hub.register("colours", make_adapter(hub.base, tmp_path / "colours"), ["red", "blue"], labels=["warm", "cold"])
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from adapter_hub.base_model import BUILDING, RANDOMNESS, BaseKind, FrozenBase, without_bars
from adapter_hub.routing.encoder import HashEncoder

__all__ = ["SHAPES", "HashEncoder", "make_adapter", "tiny_model"]

SHAPES = ("bert", "gpt2", "llama", "t5")
VOCABULARY = 384    # 256 bytes, the special tokens, and the commonest pieces of a few sentences

_SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "what is the balance of my account and when is the bill due",
    "please book a table for two and tell me the weather tomorrow",
    "once upon a time there was a little girl who loved to play outside",
)


def tiny_model(folder: str | Path, shape: str = "bert", *, seed: int = 0, width: int = 32) -> Path:
    """Write a tiny transformer of this shape, random weights by `seed`, with a tokenizer for any text. Returns the folder."""
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        with RANDOMNESS, torch.random.fork_rng():
            torch.manual_seed(seed)
            model = _tiny(shape, width)
        # Trained weights are larger than fresh ones: without this every output would look alike.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2 and shape != "t5":
                    parameter.mul_(4.0)
        with without_bars():
            _tokenizer(shape).save_pretrained(folder)
            model.save_pretrained(folder)
    return folder


def make_adapter(
    base: FrozenBase,
    folder: str | Path,
    *,
    task_type: str | None = "auto",
    outputs: int = 2,
    seed: int = 0,
    size: float = 0.05,
    r: int = 4,
    target_modules: Any = "all-linear",
    base_name: str | None = None,
    **lora: Any,
) -> Path:
    """Write a PEFT folder for `base`, every tensor random by `seed` with deviation `size`, as if it had been trained.

    `task_type` "auto" is SEQ_CLS on an encoder, else the base's own. `outputs` is the width of a head; `lora` goes to LoraConfig.
    """
    folder = Path(folder)
    if task_type == "auto":
        task_type = {BaseKind.ENCODER: "SEQ_CLS", BaseKind.CAUSAL: "CAUSAL_LM", BaseKind.SEQ2SEQ: "SEQ_2_SEQ_LM"}[base.kind]
    if task_type == "TOKEN_CLS" and target_modules == "all-linear":
        lora.setdefault("exclude_modules", ["classifier", "score"])    # PEFT would take the head for one of the linear layers
    with RANDOMNESS, torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task_model(base, task_type, outputs)
        peft = get_peft_model(model, LoraConfig(task_type=task_type, r=r, target_modules=target_modules, **lora))
        for name, parameter in peft.named_parameters():
            if "lora_magnitude" in name:
                parameter.data *= 1 + size * torch.randn(parameter.shape)
            elif "lora_" in name or "modules_to_save" in name:
                parameter.data = size * torch.randn(parameter.shape)
    peft.peft_config["default"].base_model_name_or_path = base_name or base.id
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def task_model(base: FrozenBase, task_type: str | None, outputs: int = 2) -> PreTrainedModel:
    """A fresh transformers model with the base's weights and, for classification, a new head: what PEFT is put on."""
    bare = {BaseKind.ENCODER: AutoModel, BaseKind.CAUSAL: AutoModelForCausalLM, BaseKind.SEQ2SEQ: AutoModelForSeq2SeqLM}[base.kind]
    auto = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}.get(task_type or "", bare)
    more = {"num_labels": outputs} if auto is not bare else {}
    verbosity = logging.get_verbosity()
    cast(Any, logging).set_verbosity_error()
    try:
        with RANDOMNESS, BUILDING, without_bars():
            model = auto.from_pretrained(base.path, dtype=base.dtype, local_files_only=True, **more)
    finally:
        logging.set_verbosity(verbosity)
    model.config.pad_token_id = base.tokenizer.pad_token_id
    model.train(False)
    return cast(PreTrainedModel, model)


def load_peft(base: FrozenBase, folder: str | Path, task_type: str | None = None, outputs: int = 2) -> PeftModel:
    """PEFT's own model of an adapter: the reference that the engine is compared with."""
    return PeftModel.from_pretrained(task_model(base, task_type, outputs), os.fspath(folder)).eval()


def _tiny(shape: str, width: int) -> PreTrainedModel:
    tokens: Any = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if shape == "bert":
        return BertModel(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * width,
                max_position_embeddings=256, pad_token_id=0,
            )
        )
    if shape == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=256, **tokens))
    if shape == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=2 * width,
                max_position_embeddings=256, tie_word_embeddings=False, **tokens,
            )
        )
    if shape == "t5":
        return T5ForConditionalGeneration(
            cast(Any, T5Config)(
                vocab_size=VOCABULARY, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2, pad_token_id=0,
                eos_token_id=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )
        )
    raise ValueError(f"{shape!r} is not one of {', '.join(SHAPES)}")


def _tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has ids, and the vocabulary is the same on every machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    frame = {"bert": "<s> $A </s>", "t5": "$A </s>"}.get(shape, "<s> $A")
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    made: PreTrainedTokenizerFast = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", model_max_length=256
    )
    return made
