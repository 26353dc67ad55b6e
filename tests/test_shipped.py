"""What ships with the project is whole: ten adapters, an inbox that asks all of them and none, and a demonstration that holds."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from adapter_hub.hub import Hub
from adapter_hub.registry.config import read_config
from adapter_hub.registry.manifest import Manifest
from adapter_hub.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "registry"
DOMAINS = {
    "auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining", "meta", "small_talk", "travel", "utility", "work",
}
INTENTS_OF_A_DOMAIN = 15
BYTES_MAX = 25 << 20

pytestmark = pytest.mark.skipif(not (SHIPPED / "hub.toml").exists(), reason="needs the adapters that ship: examples/clinc150_adapters.py makes them")


def manifests() -> list[Manifest]:
    return [Manifest.from_bytes(path.read_bytes(), source=path) for path in sorted(SHIPPED.glob("adapters/*/*/manifest.json"))]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()]


def test_one_adapter_for_each_domain_of_clinc150_with_a_name_for_each_of_its_intents() -> None:
    labels = {manifest.name: manifest.labels or () for manifest in manifests()}
    assert labels.keys() == DOMAINS
    assert {name: len(set(found)) for name, found in labels.items()} == dict.fromkeys(DOMAINS, INTENTS_OF_A_DOMAIN)
    assert len({label for found in labels.values() for label in found}) == len(DOMAINS) * INTENTS_OF_A_DOMAIN


def test_all_were_made_for_the_base_and_encoder_that_the_registry_names() -> None:
    config = read_config(SHIPPED / "hub.toml")
    assert {(m.base_fingerprint, m.encoder_fingerprint) for m in manifests()} == {(config.base_fingerprint, config.encoder_fingerprint)}


def test_what_ships_is_small_enough_for_a_checkout() -> None:
    derived = ("catalog.sqlite", "index", ".")    # made where the registry was opened or routed
    parts = [path for path in SHIPPED.iterdir() if not path.name.startswith(derived)]
    sizes = [path.stat().st_size for part in parts for path in (part, *part.rglob("*")) if path.is_file()]
    assert sum(sizes) < BYTES_MAX


def test_the_inbox_asks_every_domain_and_what_belongs_to_none() -> None:
    inbox = rows_of("inbox.jsonl")
    assert len(inbox) >= 60 and len({row["text"] for row in inbox}) == len(inbox)
    assert {row["expect"] for row in inbox} == {*DOMAINS, None}


def test_what_the_demonstration_asks_of_the_new_skill_was_not_trained_on() -> None:
    train, asked = rows_of("gardening.jsonl"), rows_of("gardening_new.jsonl")
    assert not {row["text"] for row in train} & {row["text"] for row in asked}
    assert {row["label"] for row in asked} <= {row["label"] for row in train}


def test_every_proof_of_the_demonstration_holds(routed: Path, tmp_path: Path) -> None:
    """With one epoch of training: the proofs are of what stays the same, and of where inputs go."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec and spec.loader
    demo = sys.modules["demo"] = importlib.util.module_from_spec(spec)    # its dataclasses look for their module there
    spec.loader.exec_module(demo)
    registry = shutil.copytree(routed, tmp_path / "registry")
    inbox, new_rows = rows_of("inbox.jsonl"), rows_of("gardening_new.jsonl")
    with Hub.open(registry) as hub:
        predictions = hub.predict([row["text"] for row in inbox])
        right = sum((p.adapter.name if p.adapter else None) == row["expect"] for p, row in zip(predictions, inbox, strict=True))
        assert right >= 0.8 * len(inbox)
        before = demo.remember(hub, registry, inbox, new_rows, predictions)
        hub.learn("gardening", ROOT / "examples" / "gardening.jsonl", config=TrainConfig(epochs=1, steps_min=0), promote="always")
        hub.settle()
        after = hub.predict([row["text"] for row in new_rows])
        proofs = demo.prove(hub, registry, inbox, new_rows, before, after)
    assert len(proofs) == 6 and [proof.claim for proof in proofs if not proof.holds] == []
