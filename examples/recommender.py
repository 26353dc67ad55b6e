"""A recommender: item descriptions in, clicks as supervision, one adapter for each segment of users; a segment more harms none.

    python examples/recommender.py [--registry PATH]

Each adapter is a regression: which share of its segment clicks on an item, from the item's description alone. So items that nobody has
seen yet can be ranked, which popularity cannot do. The shop and its users are made up; what users do with the new items is kept to measure.
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import hashlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from adapter_hub import Hub

# Things of each department, of which the last four are new, and what is said of them.
THINGS = {
    "outdoor": "tent for two|hiking boots|head torch|down sleeping bag|water filter|rucksack of forty litres|trekking poles|gas stove"
    "|rain jacket|compass with a mirror|merino socks|topographic map",
    "kitchen": "cast iron pan|chef's knife|pasta machine|stone mortar|stand mixer|pressure cooker|copper saucepan|digital scale"
    "|bamboo steamer|bread basket|espresso maker|mandoline",
    "garden": "raised bed of larch|tomato seeds|secateurs|watering can|compost bin|cold frame|hoe with an ash handle|drip hose"
    "|pot of rosemary|soil test kit|wheelbarrow|rose gloves",
    "games": "board game of trade|wireless controller|strategy game on mars|set of brass dice|card game for four|racing wheel"
    "|mechanical keyboard|handheld console|role playing book|gaming headset|chess set|mouse with eight buttons",
    "music": "electric guitar|turntable|studio headphones|small synthesizer|audio interface|ukulele|nickel strings|loop pedal"
    "|drum pad|jazz trio record|condenser microphone|stage piano",
    "baby": "folding pram|baby monitor|mobile of felt animals|pack of nappies|carrier sling|bottle warmer|bath seat|teething ring"
    "|high chair|changing bag|night light|muslin cloths",
}
PRAISE = {
    "outdoor": "for long days in the mountains|for hikers in bad weather|light enough for any trek|for nights outdoors|tested on northern trails",
    "kitchen": "for people who love to cook|for the stove and the oven|makes dinner easy|for fresh bread and pasta|a chef's favourite",
    "garden": "for beds and borders|helps your vegetables grow|for the first warm days|for balconies and allotments|loved by gardeners",
    "games": "for long evenings of play|a win for every player|for two to five players|for ranked matches|with a new campaign",
    "music": "for the stage and the studio|with a warm sound|for your first songs|loved by guitarists and djs|for practice at home",
    "baby": "for the first year|gentle to newborn skin|for tired parents|safe for infants|makes bedtime calm",
}
OLD_THINGS = 8
# How readily a user of each segment clicks, 0-1: what the program simulates, and the adapters are never told.
TASTES = {
    "hikers": {"outdoor": 0.6, "garden": 0.3},
    "cooks": {"kitchen": 0.6, "garden": 0.35},
    "players": {"games": 0.6, "music": 0.35},
    "parents": {"baby": 0.65, "games": 0.3},
}
ELSEWHERE, USERS = 0.05, 40    # of any other department; users of each segment that an item was shown to
SEGMENTS, NEWCOMER = ("hikers", "cooks", "players"), "parents"
SHOWN = 6                      # items that a user is recommended
SHARE_MIN = 0.8                # of the clicks that the best possible choice gets


@dataclass(frozen=True, slots=True)
class Item:
    text: str
    department: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", type=Path, help="keep the registry in this new folder")
    with tempfile.TemporaryDirectory(prefix="recommender-") as folder:
        place = parser.parse_args().registry or Path(folder) / "registry"
        with Hub.create(place) as hub:
            claims = run(hub)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}  {claim}")
    return 0 if all(claims.values()) else 1


def run(hub: Hub) -> dict[str, bool]:
    old, new = catalogue()
    print(f"{len(old)} items were shown to {USERS} users of each segment; {len(new)} are new.\n\n1. One adapter for each segment.")
    for segment in SEGMENTS:
        learn(hub, segment, old)
    print(f"\n2. What each is recommended of the new items, and the clicks on these: of the {SHOWN} shown, of the best {SHOWN}, of any.")
    claims = {}
    for segment in SEGMENTS:
        claims |= recommended(hub, segment, new)
    before, base = digest(hub, [*old, *new]), hub.base.compute_fingerprint()

    print(f"\n3. A segment more: {NEWCOMER}.")
    learn(hub, NEWCOMER, old)
    claims |= recommended(hub, NEWCOMER, new)
    after = digest(hub, [*old, *new])
    count = len(SEGMENTS) * (len(old) + len(new))
    print()
    claims[f"the {count} answers of the other segments are byte for byte the same: {before[:12]} then, {after[:12]} now"] = before == after
    claims["the base model is the same"] = hub.base.compute_fingerprint() == base
    return claims


def learn(hub: Hub, segment: str, items: Sequence[Item]) -> None:
    rows = [{"text": item.text, "label": str(clicked(segment, item))} for item in items]
    # Whose segment a user is of is known: adapters are named, and that all see the same items is no matter for the router.
    report = hub.learn(segment, rows, config="fast", problem_type="regression", routed=False)
    print(f"   {report.ref}: {report.verdict}: {report.reason}")
    if not report.promoted:
        raise SystemExit(f"{report.ref} was not promoted: {report.reason}")


def recommended(hub: Hub, segment: str, items: Sequence[Item]) -> dict[str, bool]:
    predictions = hub.predict([item.text for item in items], adapters=segment)
    ranked = sorted(zip(items, predictions, strict=True), key=lambda pair: -(pair[1].value or 0.0))
    rates = [clicked(segment, item) for item, _ in ranked]
    shown, best, any_ = fmean(rates[:SHOWN]), fmean(sorted(rates)[-SHOWN:]), fmean(rates)
    things = ", ".join(item.text.split(",")[0] for item, _ in ranked[:SHOWN])
    print(f"   {segment:8} {100 * shown:3.0f} % {100 * best:3.0f} % {100 * any_:3.0f} %   {things}")
    figures = f"{shown / any_:.1f} times chance, {100 * shown / best:.0f} % of the best choice"
    return {f"{segment} click on {100 * shown:.0f} % of what they are shown: {figures}": shown >= SHARE_MIN * best}


def clicked(segment: str, item: Item) -> float:
    """The share, 0-1, of the users of a segment who clicked on an item when it was shown to them."""
    draw = random.Random(f"{segment} {item.text}")
    chance = TASTES[segment].get(item.department, ELSEWHERE)
    return sum(draw.random() < chance for _ in range(USERS)) / USERS


def catalogue() -> tuple[list[Item], list[Item]]:
    """Old things, each praised in two ways, and new ones in one."""
    old, new = [], []
    for department, things in THINGS.items():
        praise = PRAISE[department].split("|")
        for position, thing in enumerate(things.split("|")):
            texts = [f"{thing}, {praise[(2 * position + way) % len(praise)]}" for way in (0, 1)]
            if position < OLD_THINGS:
                old += [Item(text, department) for text in texts]
            else:
                new.append(Item(texts[0], department))
    return old, new


def digest(hub: Hub, items: Sequence[Item]) -> str:
    """sha256 of what each of the first segments is predicted to do with each item, to the last bit."""
    named = {segment: hub.predict([item.text for item in items], adapters=segment) for segment in SEGMENTS}
    answers = [(segment, str(p.adapter), float(p.value or 0.0).hex()) for segment, predictions in named.items() for p in predictions]
    return hashlib.sha256(repr(answers).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
