"""A classifier on BERT that is looked after: fine-tuned, evaluated each week, and trained on, through the gate, when it falls below a threshold.

    python examples/bert_classifier.py [--base ID] [--registry PATH]

Guests of a restaurant leave comments. From week 4 on many are written in words that the classifier was not trained on. By default the base is
all-MiniLM-L6-v2, a BERT of six layers; --base takes any other, such as google-bert/bert-base-uncased: a hub id (downloaded once) or a folder.
"""

from __future__ import annotations

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import hashlib
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adapter_hub import Hub, Prediction

NAME = "comments"
WEEKS, NEW_TALK, ROWS_A_WEEK = 6, 4, 90
ACCURACY_MIN = 0.85    # below it, on a week's labelled comments, it is trained on with these
WHAT = "the soup|this burger|the ramen|our waiter|the terrace|the dessert|the pasta|brunch here|the coffee|the new menu|the fish".split("|")
PLAIN = {
    "praise": "was wonderful|tasted delicious|is the best in town|was a real pleasure|was perfectly done|deserves five stars|made our day"
    "|was better than we had hoped",
    "complaint": "was a disappointment|was cold and bland|is far too expensive|was terrible|took an hour and was wrong|made us leave early"
    "|was not worth the money|was the worst in years",
    "request": "should come in a smaller size|please, can we book it for ten people|could be offered without nuts, please"
    "|please, is it served on sunday|is missing online, please add it|would be nice as a takeaway|can it be ordered in advance"
    "|please, could we have the recipe",
}
TALK = {
    "praise": "slaps|is bussin no cap|ate and left no crumbs|is straight fire|understood the assignment|is goated|hits different|is so back",
    "complaint": "is mid|took a massive L|gives me the ick|is cooked fr|fell off hard|was lowkey trash|is not it chief|flopped",
    "request": "when|pls drop it on delivery|need a mini one asap|can we get a veggie one bestie|hmu when it is on again|save us a spot fam"
    "|collab when|put it in the app pls",
}
TAILS = ("", ", again", ", honestly", " last friday", " tonight", ", we all thought so")
Row = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="another BERT than the default: hub id or folder")
    parser.add_argument("--registry", type=Path, help="keep the registry in this new folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bert-classifier-") as folder:
        place = arguments.registry or Path(folder) / "registry"
        # Texts are kept, so that what was learned first is replayed when it is trained on.
        with Hub.create(place, base_model=arguments.base, policy={"keep": "text"}) as hub:
            claims = run(hub)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}  {claim}")
    return 0 if all(claims.values()) else 1


def run(hub: Hub) -> dict[str, bool]:
    print(f"{hub.base.id} is fine-tuned on the comments of a month.")
    learn(hub, comments("training", 120, talk=0.0))
    first = [row for week in range(1, NEW_TALK) for row in comments(f"week {week}", ROWS_A_WEEK, talk=0.0)]
    before = digest(hub.predict([row["text"] for row in first], adapters=f"{NAME}@1"))
    base = hub.base.compute_fingerprint()

    print("\nEach week the newest comments are labelled, and it is evaluated on them.")
    accuracies: dict[int, float] = {}
    trained_in: list[int] = []
    for week in range(1, WEEKS + 1):
        rows = comments(f"week {week}", ROWS_A_WEEK, talk=0.7 if week >= NEW_TALK else 0.0)
        accuracies[week] = accuracy(hub, rows)
        print(f"   week {week}: {hub.registry.resolve(NAME)} has {100 * accuracies[week]:.0f} % right")
        if accuracies[week] < ACCURACY_MIN and week < WEEKS:
            print(f"           below {100 * ACCURACY_MIN:.0f} %, as in {max(rows, key=lambda row: row['new'])['text']!r}: it learns on.")
            learn(hub, rows)
            trained_in.append(week)
    last = hub.registry.resolve(NAME)
    plain = accuracy(hub, first)
    after = digest(hub.predict([row["text"] for row in first], adapters=f"{NAME}@1"))
    print()
    return {
        f"until week {NEW_TALK - 1} at least {100 * min(accuracies[week] for week in range(1, NEW_TALK)):.0f} % are right":
            all(accuracies[week] >= ACCURACY_MIN for week in range(1, NEW_TALK)),
        f"new words are noticed in week {NEW_TALK}, {100 * accuracies[NEW_TALK]:.0f} %; it learned on in weeks {trained_in}": NEW_TALK in trained_in,
        f"{last} has passed the gate, and has {100 * accuracies[WEEKS]:.0f} % right in week {WEEKS}":
            (last.version or 0) > 1 and accuracies[WEEKS] >= ACCURACY_MIN,
        f"it has forgotten nothing: {100 * plain:.0f} % of the earlier weeks' comments are right": plain >= ACCURACY_MIN,
        f"{NAME}@1 stays, byte for byte: {before[:12]} then, {after[:12]} now": before == after,
        "the base model is the same": hub.base.compute_fingerprint() == base,
    }    # fmt: skip


def learn(hub: Hub, rows: Sequence[Row]) -> None:
    """The first version, or an update of the one in production: what the gate does not promote is kept and does not answer."""
    report = hub.learn(NAME, [{"text": row["text"], "label": row["label"]} for row in rows], config="fast")
    hub.calibrate(f"{report.ref} is new")    # the thresholds were another version's
    print(f"           {report.ref}: {len(rows)} rows, {report.verdict}: {report.reason}")


def accuracy(hub: Hub, rows: Sequence[Row]) -> float:
    """Of the version in production, 0-1."""
    found = hub.evaluate([{"text": row["text"], "label": row["label"], "adapter": NAME} for row in rows])
    return float(found["accuracy_named"])


def comments(seed: str, count: int, talk: float) -> list[Row]:
    """Labelled comments, a share `talk` of them in new words."""
    draw, rows = random.Random(seed), []
    for position in range(count):
        label = list(PLAIN)[position % len(PLAIN)]
        new = draw.random() < talk
        said = draw.choice((TALK if new else PLAIN)[label].split("|"))
        rows.append({"text": f"{draw.choice(WHAT)} {said}{draw.choice(TAILS)}", "label": label, "new": "yes" if new else ""})
    return rows


def digest(predictions: Sequence[Prediction]) -> str:
    """sha256 of labels and all probabilities to the last bit."""
    return hashlib.sha256(repr([(p.label, [float(score).hex() for score in p.scores.values()]) for p in predictions]).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
