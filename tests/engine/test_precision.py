"""Adapters on a base in fewer bits: as close to PEFT as those bits allow, whatever else is in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_hub.adapters.checks import applied, check_acts, check_fits
from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.errors import NoEffect
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from tests.engine.reference import CUDA, FORMS, distance, references

TEXTS = ["hello there my friend", "what is the balance", "a", "the quick brown fox jumps over the lazy dog, twice and thrice"]
LABELS = ("x", "y", "z")
TASKS = {"bert": ["SEQ_CLS", None], "gpt2": ["SEQ_CLS", "FEATURE_EXTRACTION"], "llama": ["SEQ_CLS", "FEATURE_EXTRACTION"]}


def shelf(base: FrozenBase, root: Path, tasks: list[str | None]) -> dict[AdapterRef, tuple[Path, str | None]]:
    return {
        AdapterRef(f"{task}-{form}".lower(), 1): (make_adapter(base, root / f"{task}-{form}", task_type=task, outputs=3, seed=seed, **settings), task)
        for task in tasks
        for seed, (form, settings) in enumerate(FORMS.items())
    }


def loads(folders: dict[AdapterRef, tuple[Path, str | None]], base: FrozenBase) -> Callable[[AdapterRef], Adapter]:
    def load(ref: AdapterRef) -> Adapter:
        folder, task = folders[ref]
        adapter = read_adapter(folder, labels=LABELS if task == "SEQ_CLS" else None)
        check_fits(adapter, base)
        check_acts(adapter, base)
        return adapter

    return cache(load)


def numbers(output: Any) -> np.ndarray:
    return np.array(list(output.scores.values()) or output.vector)


PACKED = pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("bitsandbytes"), reason="needs a CUDA device and bitsandbytes")
STEP = 2**-7    # between two numbers of bfloat16, as a share of them


def weights_of(base: FrozenBase) -> dict[str, torch.Tensor]:
    return copy.deepcopy(base.model.state_dict())


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bfloat16"), *(pytest.param("cuda", p, marks=CUDA) for p in ("bfloat16", "float16"))])
@pytest.mark.parametrize("shape", TASKS)
def test_a_mixed_batch_in_sixteen_bits_is_pefts_in_those_and_as_close_to_float32(shape: str, device: str, precision: str, tmp_path: Path) -> None:
    exact = FrozenBase.load(tiny_model(tmp_path / "base", shape))
    base = FrozenBase.load(exact.path, precision=precision, device=device)
    step = torch.finfo(base.dtype).eps
    before, folders = weights_of(base), shelf(exact, tmp_path, TASKS[shape])
    outputs = iter(Engine(base, loads(folders, base)).predict([Request(text, ref) for ref in folders for text in TEXTS]))
    mine_off, theirs_off = [], []
    for folder, task in folders.values():
        true, theirs = (references(one, folder, task, TEXTS) for one in (exact, base))
        for wanted, peft in zip(true, theirs, strict=True):
            mine = numbers(next(outputs))
            assert distance(mine, peft) <= 4 * step * max(1.0, float(abs(wanted).max()))
            mine_off.append(distance(mine, wanted) / abs(wanted).max())
            theirs_off.append(distance(peft, wanted) / abs(wanted).max())
    assert np.mean(mine_off) <= 1.25 * np.mean(theirs_off) and np.mean(mine_off) < step
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def one_at_a_time(base: FrozenBase, adapter: Adapter | None, text: str) -> np.ndarray:
    inputs = base.tokenize([text])
    with torch.inference_mode(), applied(base, adapter) if adapter else nullcontext():
        return base.pool(base.body(**inputs).last_hidden_state, inputs["attention_mask"])[0].float().cpu().numpy()


def test_an_adapter_that_does_less_than_the_bits_can_show_is_refused_with_that_reason(tmp_path: Path) -> None:
    exact = FrozenBase.load(tiny_model(tmp_path / "base"))
    faint = read_adapter(make_adapter(exact, tmp_path / "faint", task_type=None, size=1e-4))
    assert 0 < check_acts(faint, exact) < 1e-3
    with pytest.raises(NoEffect, match="does less than bfloat16 can show: register it at float32"):
        check_acts(faint, FrozenBase.load(exact.path, precision="bfloat16"))


@pytest.mark.parametrize("shape", TASKS)
def test_a_mixed_batch_in_eight_bits_is_one_adapter_and_one_text_at_a_time(shape: str, tmp_path: Path) -> None:
    exact = FrozenBase.load(tiny_model(tmp_path / "base", shape))
    base = FrozenBase.load(exact.path, precision="int8")
    before, folders = weights_of(base), shelf(exact, tmp_path, TASKS[shape][1:])
    load = loads(folders, base)
    versions = [None, *folders] if base.kind is BaseKind.ENCODER else [*folders]
    outputs = iter(Engine(base, load).predict([Request(text, ref) for ref in versions for text in TEXTS]))
    off, lost = [], []
    for ref in versions:
        for text in TEXTS:
            mine, (alone, true) = numbers(next(outputs)), (one_at_a_time(one, ref and load(ref), text) for one in (base, exact))
            size = max(1.0, float(abs(true).max()))
            off.append(distance(mine, alone) / size)
            lost.append(distance(mine, true) / size)
    # Where a sum lies between two steps, rounding decides which: such a row may differ by more, yet by less than eight bits cost.
    assert np.quantile(off, 0.8) <= 1e-5 and max(off) <= np.mean(lost)
    assert max(lost) < 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        *(("cpu", precision) for precision in ("bfloat16", "int8")),
        *(pytest.param("cuda", precision, marks=CUDA) for precision in ("bfloat16", "float16")),
        *(pytest.param("cuda", precision, marks=PACKED) for precision in ("int8", "nf4")),
    ],
)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "t5"])
def test_a_mixed_batch_writes_in_fewer_bits_what_each_row_writes_alone(shape: str, device: str, precision: str, tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "base", shape, width=32 if device == "cpu" else 64), precision=precision, device=device)
    folders = shelf(base, tmp_path, ["SEQ_2_SEQ_LM" if shape == "t5" else "CAUSAL_LM"])
    asked = [Request(text, ref) for ref in [None, *folders] for text in TEXTS]
    engine = Engine(base, loads(folders, base))
    first, again = ([o.text for o in engine.predict(asked, generation={"max_new_tokens": 6})] for _ in range(2))
    alone = [engine.predict([one], generation={"max_new_tokens": 6})[0].text for one in asked]
    assert first == again and np.mean([a == b for a, b in zip(first, alone, strict=True)]) > 0.9    # tokens of equal score may change places


@PACKED
@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("shape", TASKS)
def test_a_base_packed_by_bitsandbytes_runs_a_mixed_batch_as_one_adapter_at_a_time(shape: str, precision: str, tmp_path: Path) -> None:
    exact = FrozenBase.load(tiny_model(tmp_path / "base", shape, width=64))
    base = FrozenBase.load(exact.path, precision=precision, device="cuda")
    folders = shelf(exact, tmp_path, TASKS[shape][1:])
    load = loads(folders, base)
    outputs = iter(Engine(base, load).predict([Request(text, ref) for ref in folders for text in TEXTS]))
    for ref in folders:
        for text in TEXTS:
            mine, alone = numbers(next(outputs)), one_at_a_time(base, load(ref), text)
            assert distance(mine, alone) <= 8 * STEP * max(1.0, float(abs(alone).max()))
    assert base.compute_fingerprint() == exact.compute_fingerprint() and set(base.modules) == set(exact.modules)


def test_a_layer_that_its_model_keeps_at_float32_is_adapted_at_float32(tmp_path: Path) -> None:
    """As T5 keeps the last of each block where the rest is float16."""
    base = FrozenBase.load(tiny_model(tmp_path / "base", "t5"), precision="bfloat16")
    kept = [module.float() for name, module in base.modules.items() if name.endswith(".wo")]
    folder = make_adapter(base, tmp_path / "one", task_type="SEQ_2_SEQ_LM", seed=1)
    load = loads({AdapterRef("one", 1): (folder, "SEQ_2_SEQ_LM")}, base)
    asked = [Request(text, ref) for ref in (None, AdapterRef("one", 1)) for text in TEXTS]
    outputs = [output.text for output in Engine(base, load).predict(asked, generation={"max_new_tokens": 4, "min_new_tokens": 4})]
    assert kept and all(module.weight.dtype == torch.float32 for module in kept)
    assert len(outputs) == 2 * len(TEXTS)
