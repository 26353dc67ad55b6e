"""The independent reference: PEFT, one adapter and one text at a time, on a model of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.testing import load_peft, task_model

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]

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
    model.to(base.device)
    with torch.inference_mode():
        return [_one(base, model.eval(), task, text, generation) for text in texts]


def mixed_references(
    base: FrozenBase, folders: Sequence[Path], weights: Sequence[float], task: str | None, texts: list[str], outputs: int = 3, **generation: Any
) -> list[Any]:
    """What PEFT's own exact sum answers (`add_weighted_adapter`, "cat"); the logits of each head on it are weighed in a loop.

    The first folder may not be rsLoRA: PEFT would scale the whole sum by it.
    """
    model: Any = None
    heads = []
    for i, folder in enumerate(folders):
        # PEFT refuses to sum adapters with heads, so each gives its LoRA tensors alone; the sum goes where the first may go.
        tensors = load_file(folder / "adapter_model.safetensors")
        heads.append({key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items() if ".lora_" not in key})
        config = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": None, "task_type": None}
        if heads[0]:
            config["exclude_modules"] = ["classifier", "score"]
        with tempfile.TemporaryDirectory() as bare:
            save_file({key: tensor for key, tensor in tensors.items() if ".lora_" in key}, Path(bare) / "adapter_model.safetensors")
            (Path(bare) / "adapter_config.json").write_text(json.dumps(config))
            if model is None:
                model = PeftModel.from_pretrained(task_model(base, task, outputs), bare, adapter_name="0")
            else:
                model.load_adapter(bare, str(i))
    model.add_weighted_adapter([str(i) for i in range(len(folders))], list(weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    model.to(base.device).eval()
    with torch.inference_mode():
        if task not in ("SEQ_CLS", "TOKEN_CLS"):
            return [_one(base, model, task, text, generation) for text in texts]
        return [_weighed(base, model, heads, weights, text) for text in texts]


def _weighed(base: FrozenBase, model: Any, heads: Sequence[dict[str, torch.Tensor]], weights: Sequence[float], text: str) -> Any:
    inputs = base.tokenizer(text, return_tensors="pt", truncation=True, max_length=base.max_tokens).to(base.device)
    logits: Any = 0.0
    for head, weight in zip(heads, weights, strict=True):
        assert not model.base_model.model.load_state_dict(head, strict=False).unexpected_keys
        logits = logits + weight * model(**inputs).logits[0]
    return torch.softmax(logits.float(), -1).cpu().numpy()


def _one(base: FrozenBase, model: Any, task: str | None, text: str, generation: dict[str, Any]) -> Any:
    inputs = base.tokenizer(text, return_tensors="pt", truncation=True, max_length=base.max_tokens).to(base.device)
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        return torch.softmax(model(**inputs).logits[0].float(), -1).cpu().numpy()
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs.pop("token_type_ids", None)
        config = GenerationConfig(**generation, pad_token_id=base.tokenizer.pad_token_id, eos_token_id=base.tokenizer.eos_token_id)
        written = model.generate(**inputs, generation_config=config)[0]
        new = written[inputs["input_ids"].shape[1] :] if base.kind is BaseKind.CAUSAL else written
        return base.tokenizer.decode(new, skip_special_tokens=True)
    plain = model.base_model.model if isinstance(model, PeftModel) else model
    body = plain.model if hasattr(plain, "lm_head") and hasattr(plain, "model") else getattr(plain, "transformer", plain)
    hidden = body(**inputs).last_hidden_state
    return base.pool(hidden, inputs["attention_mask"])[0].float().cpu().numpy()


def distance(mine: Any, theirs: Any) -> float:
    """Largest absolute difference; infinity where texts or shapes differ."""
    if isinstance(theirs, str):
        return 0.0 if mine == theirs else float("inf")
    return float(np.abs(np.asarray(mine) - theirs).max()) if np.shape(mine) == np.shape(theirs) else float("inf")
