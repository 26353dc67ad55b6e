"""Encoders: unit rows, the same for the same text in any company, and a clear word about what cannot be encoded."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_hub.base_model import BUILDING, DEFAULT_MODEL, RANDOMNESS
from adapter_hub.errors import InvalidInput, ModelNotFound
from adapter_hub.routing.encoder import GatheringEncoder, HashEncoder, SentenceEncoder, Vectors, load_encoder
from adapter_hub.testing import tiny_model

TEXTS = ["what is my balance?", "Überweisung nach 東京", "?!", "a " * 3000, "\x00\x07 control", "🙂", "what is my balance?"]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    try:
        return SentenceEncoder(DEFAULT_MODEL)
    except ModelNotFound as error:
        pytest.skip(f"the default model is not here: {error}")


def test_hash_rows_are_unit_and_do_not_depend_on_company() -> None:
    encoder = load_encoder("hash")
    together = encoder.encode(TEXTS)
    assert together.dtype == np.float32 and together.shape == (len(TEXTS), encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, row in zip(TEXTS, together, strict=True):
        assert (encoder.encode([text])[0] == row).all()


def test_hash_ids_name_the_width_and_the_fingerprint_follows_it() -> None:
    assert load_encoder("hash:512").dim == 512 and load_encoder("hash:512").id == "hash:512"
    assert load_encoder("hash:256").id == "hash"
    assert load_encoder("hash:512").fingerprint != load_encoder("hash").fingerprint == HashEncoder().fingerprint


def test_hash_is_the_same_function_for_ever() -> None:
    """Stored exemplars would be worthless otherwise: this row was computed when the encoder was made."""
    row = HashEncoder(8).encode(["freeze my card"])[0]
    np.testing.assert_allclose(row, [0.0, -0.609994, 0.152499, 0.304997, 0.457496, 0.304997, -0.457496, 0.0], atol=1e-6)


def test_likeness_of_form_is_likeness_of_hash_vectors() -> None:
    a, b, c = HashEncoder(512).encode(["freeze my credit card", "please freeze my card", "weather in Paris tomorrow"])
    assert a @ b > 0.4 > 0.15 > a @ c


@pytest.mark.parametrize("id", ["hash:", "hash:x", "hash:0", "hash:-5", "hash:1000000"])
def test_an_impossible_width_is_refused(id: str) -> None:
    with pytest.raises(InvalidInput):
        load_encoder(id)


@pytest.mark.parametrize("empty", ["", "   ", "\n\t"])
def test_an_empty_text_is_refused_by_position(empty: str) -> None:
    with pytest.raises(InvalidInput, match="text 2 of 3 is empty"):
        HashEncoder().encode(["a word", empty, "another"])


def test_one_string_is_not_a_list_of_texts() -> None:
    with pytest.raises(InvalidInput, match="list"):
        HashEncoder().encode("word")


def test_a_folder_that_is_no_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        load_encoder(str(tmp_path))


def test_the_device_is_named_where_the_encoder_is_and_must_be_there(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "bert")
    encoder = load_encoder(folder, device="cpu:0")
    assert isinstance(encoder, SentenceEncoder) and encoder._device == "cpu:0"
    assert (encoder.encode(["a word"]) == load_encoder(folder).encode(["a word"])).all()
    for id in ("hash", folder):
        with pytest.raises(InvalidInput, match="models cannot run on device 'nowhere'"):
            load_encoder(id, device="nowhere")


@pytest.mark.parametrize("lock", [RANDOMNESS, BUILDING])
def test_a_model_is_not_loaded_while_another_thread_draws_random_numbers_or_builds_one(lock: Any, tmp_path: Path) -> None:
    encoder = load_encoder(tiny_model(tmp_path / "bert"))
    with ThreadPoolExecutor(1) as threads:
        with lock:
            encoding = threads.submit(encoder.encode, ["a word"])
            with pytest.raises(TimeoutError):
                encoding.result(3)
        assert encoding.result(60).shape == (1, encoder.dim)


def test_sentence_rows_are_unit_and_agree_alone_and_together(minilm: SentenceEncoder) -> None:
    together = minilm.encode(TEXTS)
    assert together.dtype == np.float32 and together.shape == (len(TEXTS), minilm.dim) and minilm.dim == 384
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.vstack([minilm.encode([text]) for text in TEXTS]), together, atol=1e-5)
    assert (minilm.encode(TEXTS) == together).all()


def test_sentence_rows_are_what_sentence_transformers_gives(minilm: SentenceEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(minilm.path), device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(minilm.encode(TEXTS), expected, atol=1e-5)


def test_meaning_counts_not_form(minilm: SentenceEncoder) -> None:
    a, b, c = minilm.encode(["how much money is in my account", "what is my balance", "how much snow is in my garden"])
    assert a @ b > a @ c


class Slow(HashEncoder):
    """Holds its first call until `asked` is set, and cannot encode "damaged"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.asked = threading.Event()

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(len(texts))
        if len(self.calls) == 1:
            self.asked.wait(60)
        if "damaged" in texts:
            raise InvalidInput("a vector that is not finite.")
        return super().encode(texts)


def test_what_threads_encode_at_once_is_encoded_together_and_each_gets_its_own() -> None:
    slow = Slow()
    encoder = GatheringEncoder(slow)
    asked = [["first"], *([f"text {i}"] * (1 + i % 3) for i in range(15)), ["damaged"]]
    with ThreadPoolExecutor(len(asked)) as pool:
        futures = [pool.submit(encoder.encode, asked[0])]
        while not slow.calls:    # the first is being encoded
            time.sleep(0.001)
        futures += [pool.submit(encoder.encode, texts) for texts in asked[1:]]
        while len(encoder._waiting) < len(asked) - 1:    # all but the first wait for their turn
            time.sleep(0.001)
        slow.asked.set()
    for texts, future in zip(asked[:-1], futures, strict=False):
        assert np.array_equal(future.result(), HashEncoder().encode(texts))
    with pytest.raises(InvalidInput, match="not finite"):
        futures[-1].result()
    rows = sum(map(len, asked))
    assert slow.calls[:2] == [1, rows - 1]    # together; then, because one is damaged, each by itself, as they came
    assert sorted(slow.calls[2:]) == sorted(map(len, asked[1:]))


def test_the_fingerprint_is_of_the_content_not_the_place(minilm: SentenceEncoder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(minilm.path, copy)
    (copy / "README.md").write_text("another model card")
    assert SentenceEncoder(copy).fingerprint == minilm.fingerprint
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace("true", "TRUE", 1).replace("TRUE", "false", 1))
    assert SentenceEncoder(copy).fingerprint != minilm.fingerprint
