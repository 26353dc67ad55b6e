"""Translation: a small T5 that reads German, then one adapter for each further language or register, chosen from the sentence alone.

    python examples/translation.py [--base ID] [--folder PATH]

The base is trained here, from scratch, in some seconds: German sentences with their English, and sentences of the other tongues as such, as a
multilingual model has read them before anybody translates. A grammar writes the sentences. The router tells the languages apart; a German one
fits no adapter, so the base answers it. With --base another seq2seq model stands in its place: a hub id (downloaded once) or a folder.
"""

from __future__ import annotations

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from adapter_hub import Hub, Prediction
from adapter_hub.training.config import TrainConfig

TONGUES = ("german", "spanish", "french", "chat")    # the last is English as it is typed in a hurry
ARTICLES = {    # definite, indefinite
    "german": {"m": ("der", "ein"), "f": ("die", "eine"), "n": ("das", "ein")},
    "spanish": {"m": ("el", "un"), "f": ("la", "una")},
    "french": {"m": ("le", "un"), "f": ("la", "une")},
    "chat": {"": ("da", "a")},
}

FIRST, LATER = ("spanish", "chat"), "french"
STEPS, BATCH, RATE = 600, 64, 3e-3
LEARNED, ASKED = 320, 60    # sentences of each tongue that an adapter learns from, and that it is asked: no common ones
EXACT_MIN = 0.8             # share of sentences that are to be right to the word
WRITES = {"max_new_tokens": 16}
# A network this small wants a high rate and no regularisation; for a real T5 the defaults of TrainConfig will do.
CONFIG = TrainConfig(r=16, alpha=32, dropout=0.0, learning_rate=5e-3, epochs=16, label_smoothing=0.0)
Word = dict[str, str]
disable_progress_bar()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="a seq2seq model in place of the one that is trained here: hub id or folder")
    parser.add_argument("--folder", type=Path, help="keep base model and registry in this new folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="translation-") as folder:
        place = arguments.folder or Path(folder)
        base = arguments.base or trained(place / "base")
        with Hub.create(place / "registry", base_model=base, encoder="hash") as hub:    # hashed words tell languages apart: no second model
            claims = run(hub, own=arguments.base is None)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}  {claim}")
    return 0 if all(claims.values()) else 1


def run(hub: Hub, *, own: bool) -> dict[str, bool]:
    claims, base = {}, hub.base.compute_fingerprint()
    print("\n2. An adapter for each of two tongues.")
    for tongue in FIRST:
        learn(hub, tongue)
    known = [pair for tongue in FIRST for pair in pairs(tongue, ASKED, "asked")]
    before = digest(translated(hub, known, [tongue for tongue in FIRST for _ in range(ASKED)]))
    later = pairs(LATER, ASKED, "asked")
    early = sum((p.text or "").strip() == english for p, (_, english) in zip(translated(hub, later), later, strict=True))

    print(f"\n3. One more: {LATER}.")
    learn(hub, LATER)
    after = digest(translated(hub, known, [tongue for tongue in FIRST for _ in range(ASKED)]))

    print("\n4. Sentences of all tongues, one batch, nothing said of their language:")
    tongues = TONGUES if own else TONGUES[1:]    # what another base makes of German is its own affair
    mixed = [(tongue, *pair) for tongue in tongues for pair in pairs(tongue, ASKED, "asked")]
    found = translated(hub, [pair for _, *pair in mixed])
    for tongue in tongues:
        own_rows = [(p, text, (p.text or "").strip() == english) for p, (of, text, english) in zip(found, mixed, strict=True) if of == tongue]
        home = sum((p.adapter.name if p.adapter else "german") == tongue for p, _, _ in own_rows)
        right = sum(good for *_, good in own_rows)
        p, text, _ = next((row for row in own_rows if row[2]), own_rows[0])
        print(f"   {home} of {ASKED} answered by {f'{tongue}@1' if tongue in hub else 'the base model'}: {text!r} → {p.text!r}")
        claims[f"{tongue} is translated to the word in {right} of {ASKED} new sentences"] = right >= EXACT_MIN * ASKED
    print()
    claims[f"{LATER} was not before it was learned: {early} of {ASKED}"] = early < 0.1 * ASKED
    claims[f"{len(known)} earlier translations are byte for byte the same: {before[:12]} then, {after[:12]} now"] = before == after
    claims["the base model is the same"] = hub.base.compute_fingerprint() == base
    return claims


def learn(hub: Hub, tongue: str) -> None:
    rows = [{"text": text, "label": english} for text, english in pairs(tongue, LEARNED + ASKED, "asked")[ASKED:]]
    report = hub.learn(tongue, rows, config=CONFIG, task_type="SEQ_2_SEQ_LM", generation=WRITES)
    print(f"   {report.ref}: {report.verdict}: {report.reason}")
    if not report.promoted:
        raise SystemExit(f"{report.ref} was not promoted: {report.reason}")
    hub.calibrate(f"{report.ref} is new")    # the thresholds were fitted without it


def translated(hub: Hub, asked: Sequence[Sequence[str]], adapters: Sequence[str] | None = None) -> list[Prediction]:
    return hub.predict([text for text, _ in asked], adapters=adapters, generation=WRITES)


# ---- the base -------------------------------------------------------------------------------------------------------


def trained(folder: Path) -> Path:
    """A T5 of some 200,000 weights and its tokenizer, in a folder that transformers reads."""
    read = [text for tongue in TONGUES[1:] for text, _ in pairs(tongue, 500, "read")]
    lessons = [*pairs("german", 1500, "base"), *((text, text) for text in read)]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(
        (text for pair in lessons for text in pair), trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    )
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    print(f"1. A T5 of {model.num_parameters():,} weights learns German, {STEPS} steps; it reads the other tongues, and translates none of them.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    draw = random.Random(0)
    for _ in range(STEPS):
        batch = draw.sample(lessons, BATCH)
        asked, answers = (tokenizer(list(side), padding=True, return_tensors="pt") for side in zip(*batch, strict=True))
        targets = answers.input_ids.masked_fill(answers.attention_mask == 0, -100)
        model(input_ids=asked.input_ids, attention_mask=asked.attention_mask, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- the grammar ----------------------------------------------------------------------------------------------------


def words_by_sort() -> dict[str, list[Word]]:
    """Each word in English and in each tongue, nouns with their gender behind them."""
    words: dict[str, list[Word]] = {}
    for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        word = json.loads(line)
        words.setdefault(word["sort"], []).append(word)
    return words


def pairs(tongue: str, count: int, seed: str) -> list[tuple[str, str]]:
    """Different sentences and their English, the same ones for the same seed; of a greater count the first are those of a smaller one."""
    draw, found, words = random.Random(f"{tongue} {seed}"), {}, words_by_sort()
    while len(found) < count:
        person, thing, verb = (draw.choice(words[sort]) for sort in ("person", "thing", "verb"))
        kind, look, when = (draw.choice([None, *words[sort]]) for sort in ("of_person", "of_thing", "when"))
        indefinite, other = draw.randrange(2), draw.randrange(2)
        sentence = [*phrase(tongue, person, kind, indefinite), verb[tongue], *phrase(tongue, thing, look, other, object=True)]
        english = [("the", "a")[indefinite], *said(kind), person["english"], verb["english"], ("the", "a")[other], *said(look), thing["english"]]
        found[" ".join([*sentence, *said(when, tongue)])] = " ".join([*english, *said(when)])
    return list(found.items())


def said(word: Word | None, tongue: str = "english") -> list[str]:
    return [word[tongue]] if word else []


def phrase(tongue: str, noun: Word, adjective: Word | None, indefinite: int, object: bool = False) -> list[str]:
    """Article, adjective and noun as the tongue has them."""
    word, _, gender = noun[tongue].partition(" ")
    article = ARTICLES[tongue][gender][indefinite]
    accusative = tongue == "german" and object and gender == "m"
    if accusative:
        article = ("den", "einen")[indefinite]
    if adjective is None:
        return [article, word]
    form = adjective[tongue]
    if tongue == "german":
        form += "en" if accusative else {"m": "er", "f": "e", "n": "es"}[gender] if indefinite else "e"
    elif tongue == "spanish" and gender == "f" and form.endswith("o"):
        form = form[:-1] + "a"
    elif tongue == "french" and gender == "f" and not form.endswith("e"):
        form += "e"
    behind = tongue == "spanish" or (tongue == "french" and adjective["english"] not in ("small", "big"))
    return [article, word, form] if behind else [article, form, word]


def digest(predictions: Sequence[Prediction]) -> str:
    return hashlib.sha256(repr([(str(p.adapter), p.text) for p in predictions]).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
