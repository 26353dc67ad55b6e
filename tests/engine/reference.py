"""The independent reference: PEFT, one adapter and one text at a time, on a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig

from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.testing import load_peft, task_model

FORMS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 16},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "dora": {"use_dora": True, "lora_alpha": 8},
    "patterns": {"r": 3, "lora_alpha": 5, "rank_pattern": {".*1.*": 6}, "alpha_pattern": {".*0.*": 11}},
    "rsdora": {"use_dora": True, "use_rslora": True, "r": 2},
}


def references(base: FrozenBase, folder: Path | None, task: str | None, texts: list[str], outputs: int = 3, **generation: Any) -> list[Any]:
    """What PEFT (or the plain base, for no folder) answers: probabilities, vectors, or the new text."""
    model = task_model(base, task, outputs) if folder is None else load_peft(base, folder, task, outputs)
    with torch.inference_mode():
        return [_one(base, model.eval(), task, text, generation) for text in texts]


def _one(base: FrozenBase, model: Any, task: str | None, text: str, generation: dict[str, Any]) -> Any:
    inputs = base.tokenizer(text, return_tensors="pt", truncation=True, max_length=base.max_tokens)
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        return torch.softmax(model(**inputs).logits[0], -1).numpy()
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs.pop("token_type_ids", None)
        config = GenerationConfig(**generation, pad_token_id=base.tokenizer.pad_token_id, eos_token_id=base.tokenizer.eos_token_id)
        written = model.generate(**inputs, generation_config=config)[0]
        new = written[inputs["input_ids"].shape[1] :] if base.kind is BaseKind.CAUSAL else written
        return base.tokenizer.decode(new, skip_special_tokens=True)
    plain = model.base_model.model if isinstance(model, PeftModel) else model
    body = plain.model if hasattr(plain, "lm_head") and hasattr(plain, "model") else getattr(plain, "transformer", plain)
    hidden = body(**inputs).last_hidden_state
    return base.pool(hidden, inputs["attention_mask"])[0].numpy()


def distance(mine: Any, theirs: Any) -> float:
    """Largest absolute difference; infinity where texts or shapes differ."""
    if isinstance(theirs, str):
        return 0.0 if mine == theirs else float("inf")
    return float(np.abs(np.asarray(mine) - theirs).max()) if np.shape(mine) == np.shape(theirs) else float("inf")
