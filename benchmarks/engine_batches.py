"""One batch at a time: this engine beside the base alone, one merged adapter, PEFT's `adapter_names`, and PEFT group by group.

Each for 1, 8 and 64 rows, spread evenly over 1 to 64 adapters (one: Identical; as many as rows: Distinct; between: Uniform), and
skewed over them by Zipf's law. `half base rows` and `base rows` go beside adapters that are resident.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_rounds import Act, Figures, Settings, Shelf, against_base, batch_of, counted, minilm, mixed, seconds, traffic
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from adapter_hub.base_model import BaseKind, Encoded, FrozenBase
from adapter_hub.engine.engine import _Asked
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import task_model, tiny_model

TOKENS, OUTPUTS = 32, 15
DISTINCT = (1, 2, 4, 8, 16, 32, 64)
ENDS = (1, 8, 64)    # where all is measured, of a model whose forward takes seconds
NEW_TOKENS = 16
STEPS = 8
GENERATION_ROWS, GENERATION_DISTINCT = 16, (1, 4, 16)
SHAPE_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPE_QUICK = SHAPE_135M | {"hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 4}


def grid(
    kind: str, shelf: Shelf, other: PeftModel | None, act: Act, settings: Settings, *, fully: Collection[int] = DISTINCT, own: Any = None
) -> Figures:
    """`act(model, ids)` by each way, over the base alone; `own(ids, refs, merged)` where this engine's is another one than on the base.

    Skewed traffic and PEFT group by group are run for the numbers of adapters in `fully`.
    """
    rng, base, slots = np.random.default_rng(0), shelf.base, shelf.engine.slots
    figures: Figures = {}
    with slots.hold(shelf.refs) as held:
        merged = partial(slots.merged, shelf.refs[0], held[0])
        figures[f"{kind}, making a merged copy, ms"] = 1e3 * seconds(merged)
        for rows in settings.rows:
            ids = torch.tensor(rng.integers(3, 300, (rows, TOKENS)), device=base.device)

            def engine(refs: Sequence[AdapterRef | None], ids: torch.Tensor = ids) -> Act:
                return partial(own, ids, refs) if own else partial(mixed, shelf, partial(act, base.model, ids), refs, steps=kind == "decode")

            one = partial(own, ids, shelf.refs[:1] * rows, merged=True) if own else partial(act, merged(), ids)
            acts: dict[str, Act] = {"1 adapter, merged for a job": one}
            for distinct in [n for n in DISTINCT if n <= min(rows, len(shelf.refs))]:
                cells = {counted(distinct): "uniform"}
                if distinct in fully and distinct > 1:
                    cells[f"skewed over {counted(distinct)}"] = "skewed"
                for cell, shape in cells.items():
                    chosen = traffic(shape, distinct, rows, rng)
                    names = [str(i) for i in chosen]
                    acts[cell] = engine([shelf.refs[i] for i in chosen])
                    if other is not None:
                        acts[f"PEFT adapter_names, {cell}"] = partial(act, other, ids, adapter_names=names)
                    if other is not None and distinct in fully:
                        acts[f"PEFT set_adapter group by group, {cell}"] = partial(grouped, other, act, ids, names)
            if half := rows // 2:
                acts[f"half base rows, {counted(half)}"] = engine([None] * half + shelf.refs[:half])
            acts[f"base rows beside {len(shelf.refs)} resident"] = engine([None] * rows)
            found = against_base(partial(act, base.model, ids), acts, settings.rounds)
            figures |= {f"{kind}, {rows} rows, {name}": value for name, value in found.items()}
    return figures


def inputs_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plain(model: Any, ids: torch.Tensor, **more: Any) -> None:
    with torch.inference_mode():
        model(**inputs_of(ids), **more)


def peft(settings: Settings, shelf: Shelf, model: Any) -> PeftModel | None:
    return shelf.peft(model) if settings.peft else None


def grouped(peft: PeftModel, act: Act, ids: torch.Tensor, names: Sequence[str]) -> None:
    for name in dict.fromkeys(names):
        peft.set_adapter(name)
        act(peft, ids[[i for i, other in enumerate(names) if other == name]])


# ---- MiniLM ---------------------------------------------------------------------------------------------------------


def _count(settings: Settings) -> int:
    return 8 if settings.quick else max(DISTINCT)


def forward(settings: Settings, root: Path) -> Figures:
    """MiniLM, one forward of hidden states."""
    base = minilm(settings, root)
    shelf = Shelf(base, root, _count(settings), task_type="FEATURE_EXTRACTION")
    return grid("forward", shelf, peft(settings, shelf, task_model(base, "FEATURE_EXTRACTION")), plain, settings)


def classification(settings: Settings, root: Path) -> Figures:
    """MiniLM with a head of 15 labels an adapter: this engine from token ids to each row's labels and probabilities, PEFT to logits."""
    base = minilm(settings, root)
    shelf = Shelf(base, root, _count(settings), task_type="SEQ_CLS", outputs=OUTPUTS)
    engine = shelf.engine

    def labelled(ids: torch.Tensor, refs: Sequence[AdapterRef | None], merged: bool = False) -> None:
        batch, shares = batch_of(refs, merged=merged)
        encoded = [Encoded({"input_ids": row, "attention_mask": [1] * len(row)}, (), False) for row in ids.tolist()]
        with engine.slots.hold(batch.adapters) as held, torch.inference_mode():
            engine._hidden(batch, held, _Asked(shares, [engine._facts(row) for row in shares], [None] * len(encoded), encoded))

    return grid("classification", shelf, peft(settings, shelf, task_model(base, "SEQ_CLS", OUTPUTS)), plain, settings, own=labelled)


# ---- a causal model shaped like Llama -------------------------------------------------------------------------------


def random_adapter(base: FrozenBase, folder: Path, *, seed: int, r: int, target_modules: str) -> Path:
    """A PEFT folder on every linear layer but the head, without a copy of the base, which `make_adapter` makes."""
    generator, tensors = torch.Generator(base.device).manual_seed(seed), {}
    layers = {name: module for name, module in base.model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    for name, module in layers.items():
        for part, shape in (("A", (r, module.in_features)), ("B", (module.out_features, r))):
            numbers = torch.randn(shape, generator=generator, device=base.device)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = (0.05 * numbers).to(base.dtype)
    targets = {name.rpartition(".")[2] for name in layers}
    LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=targets, base_model_name_or_path=base.id).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def llama(settings: Settings, root: Path, count: int) -> tuple[Shelf, PeftModel | None]:
    """Random weights: 135M parameters in float32, or 7B in bfloat16."""
    shape = SHAPE_QUICK if settings.quick else SHAPE_7B if settings.seven_b else SHAPE_135M
    tokens = {"vocab_size": 32000 if settings.seven_b else 49152, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**tokens, max_position_embeddings=512, tie_word_embeddings=not settings.seven_b, **shape)
    folder = tiny_model(root / "llama", "llama")    # for its tokenizer
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if settings.seven_b else torch.float32)
    for_peft = copy.deepcopy(model) if settings.peft else None
    base = FrozenBase(str(folder), folder, model, AutoTokenizer.from_pretrained(folder), BaseKind.CAUSAL, 512, 512)
    shelf = Shelf(base, root / "adapters", count, random_adapter)
    return shelf, peft(settings, shelf, for_peft)


def generated(model: Any, ids: torch.Tensor, **more: Any) -> None:
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(**inputs_of(ids), **settings, **more)


def generation(settings: Settings, root: Path) -> Figures:
    """16 prompts of 32 tokens, and 16 tokens more of each by `generate`."""
    shelf, other = llama(settings, root, max(GENERATION_DISTINCT))
    rng, base = np.random.default_rng(0), shelf.base
    ids = torch.tensor(rng.integers(3, 300, (GENERATION_ROWS, TOKENS)), device=base.device)
    run = partial(mixed, shelf, partial(generated, base.model, ids), steps=True)
    acts: dict[str, Act] = {}
    with shelf.engine.slots.hold(shelf.refs):
        for distinct in GENERATION_DISTINCT:
            chosen = traffic("uniform", distinct, GENERATION_ROWS, rng)
            acts[counted(distinct)] = partial(run, [shelf.refs[i] for i in chosen])
            if other is not None:
                acts[f"PEFT adapter_names, {counted(distinct)}"] = partial(generated, other, ids, adapter_names=[str(i) for i in chosen])
        acts["base rows beside 16 resident"] = partial(run, [None] * GENERATION_ROWS)
        found = against_base(partial(generated, base.model, ids), acts, settings.rounds)
    return {f"generation, {name}": value for name, value in found.items()}


def prefill(settings: Settings, root: Path) -> Figures:
    """Prompts of 32 tokens, to the first new token's logits."""
    shelf, other = llama(settings, root, _count(settings))
    return grid("prefill", shelf, other, partial(plain, use_cache=True, logits_to_keep=1), **_affordable(settings))


def decode(settings: Settings, root: Path) -> Figures:
    """8 steps of one token each, after a prompt of 32."""
    shelf, other = llama(settings, root, _count(settings))

    @cache
    def prompts(rows: int) -> Any:    # the base's own: what they hold changes no time
        with torch.inference_mode():
            return shelf.base.model(input_ids=torch.ones(rows, TOKENS, dtype=torch.long, device=shelf.base.device), use_cache=True).past_key_values

    def steps(model: Any, ids: torch.Tensor, **more: Any) -> None:
        kept = prompts(len(ids))
        with torch.inference_mode():
            for _ in range(STEPS):
                model(input_ids=ids[:, :1], past_key_values=kept, use_cache=True, **more)
        kept.crop(-STEPS)

    return grid("decode", shelf, other, steps, **_affordable(settings))


def _affordable(settings: Settings) -> dict[str, Any]:
    """A round takes minutes on a CPU: there are a third as many, and fewer cells."""
    if settings.device != "cpu":
        return {"settings": settings}
    return {"settings": replace(settings, rounds=max(2, settings.rounds // 3)), "fully": ENDS}
