"""Make the ten adapters that ship in registry/: one for each domain of CLINC150, trained from the upstream data.

    git clone --depth 1 https://github.com/clinc/oos-eval
    python examples/clinc150_adapters.py --data oos-eval/data --registry my-registry     (about three minutes a domain on one core)

The data: Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", CC BY 3.0. None of its
texts are stored: the registry keeps vectors. The test split is not read here; benchmarks/clinc150.py measures on it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapter_hub import DEFAULT_MODEL, AdapterRef, Example, Hub, HubError
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_classifier

CREDIT = "Trained on CLINC150 (Larson et al. 2019, github.com/clinc/oos-eval), CC BY 3.0."
LICENSE = "CC-BY-3.0"
# Chosen on the validation split of one domain, credit_cards, the hardest.
CONFIG = TrainConfig(r=8, alpha=16, epochs=6, steps_min=0, batch_size=16, learning_rate=1e-3, label_smoothing=0.05, dropout=0.05)

DESCRIPTIONS = {
    "banking": "Bank accounts: balances, transfers, bills, frozen accounts, PINs, fraud.",
    "credit_cards": "Credit cards: limits, rewards, lost, declined or damaged cards, credit scores, APR.",
    "kitchen_and_dining": "Cooking and eating out: recipes, ingredients, calories, restaurants, reservations.",
    "home": "The household: lists, reminders, calendar, orders, music, lights and devices.",
    "auto_and_commute": "Cars and getting around: fuel, tires, maintenance, traffic, directions, rides.",
    "travel": "Trips: flights, hotels, visas, vaccines, luggage, exchange rates, translation.",
    "utility": "Everyday tools: weather, alarms, timers, calculations, spelling, calls, messages.",
    "work": "Employment: days off, pay, taxes, insurance, retirement savings, meetings.",
    "small_talk": "Chatting with the assistant: greetings, jokes, who and what it is.",
    "meta": "Controlling the assistant itself: language, accent, volume, names, yes and no, repeating.",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with data_full.json and domains.json")
    parser.add_argument("--registry", type=Path, default=Path("clinc150-registry"), metavar="DIR", help="where to make the registry")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="trained folders DIR/<domain> are taken, the others trained into it")
    parser.add_argument("--only", nargs="+", metavar="DOMAIN", help="these domains alone")
    arguments = parser.parse_args()
    try:
        make(arguments.data, arguments.registry, arguments.adapters, arguments.only)
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(data: Path, registry: Path, adapters: Path | None, only: Sequence[str] | None) -> None:
    splits = json.loads((data / "data_full.json").read_text(encoding="utf-8"))
    domains: dict[str, list[str]] = domains_of(data)
    names = list(only or domains)
    with tempfile.TemporaryDirectory() as scratch, Hub.create(registry, base_model=DEFAULT_MODEL, encoder=DEFAULT_MODEL) as hub:
        for name in names:
            rows = {split: of_domain(splits[split], domains[name]) for split in ("train", "val")}
            started = time.perf_counter()
            ref, metrics = add(hub, name, rows, (adapters or Path(scratch)) / name)
            seconds = time.perf_counter() - started
            print(f"{ref!s:24} validation accuracy {100 * metrics['accuracy']:.2f} %  {seconds:.0f} s", flush=True)
        calibration = hub.calibrate()
        print(f"calibration {calibration.id}; {registry} serves {len(names)} adapters")


def domains_of(data: Path) -> dict[str, list[str]]:
    """The ten domains and their 15 intents. Upstream's own file names them in words: 'credit cards'."""
    listed = json.loads((data / "domains.json").read_text(encoding="utf-8"))
    return {name.lower().replace("&", "and").replace(" ", "_"): intents for name, intents in listed.items()}


def of_domain(rows: Sequence[Sequence[str]], intents: Sequence[str]) -> list[Example]:
    return [Example(text, label) for text, label in rows if label in set(intents)]


def add(hub: Hub, name: str, rows: Mapping[str, Sequence[Example]], folder: Path) -> tuple[AdapterRef, Mapping[str, float]]:
    """Train the domain's adapter unless its folder is there, then register it; the new version and its metrics."""
    if not (folder / "adapter_config.json").exists():
        result = train_classifier(hub.base, rows["train"], task=name, validation=rows["val"], config=CONFIG, folder=folder)
        (folder / "labels.json").write_text(json.dumps(result.labels))
        (folder / "metrics.json").write_text(json.dumps(dict(result.metrics)))
    metrics = json.loads((folder / "metrics.json").read_text())
    ref = hub.register(
        name,
        folder,
        examples=rows["train"],
        evaluation=rows["val"],
        description=f"{DESCRIPTIONS[name]} {CREDIT}",
        labels=json.loads((folder / "labels.json").read_text()),
        tags=("clinc150",),
        license=LICENSE,
        metrics=metrics,
    )
    return ref, metrics


if __name__ == "__main__":
    raise SystemExit(main())
