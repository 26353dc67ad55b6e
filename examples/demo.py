"""`make demo`: answer an inbox with the ten adapters that ship, learn an eleventh skill live, and prove that nothing else changed.

Works on a copy of registry/, needs no network and no data besides the files beside it. Exit code 1 if any proof fails.
"""

from __future__ import annotations

import os

# Before the libraries are imported: what they would print stands between a reader and the answer, and nothing here is downloaded.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
# Threads that wait for each other sleep: where others use the cores as well, spinning takes them from the very thread that is waited for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapter_hub import AdapterRef, Hub, Prediction

HERE = Path(__file__).parent
SKILL = "gardening"
REACHED_SHARE_MIN = 0.75    # of inputs that nothing was trained on; abstaining on some is the price of a 5 % threshold
console = Console(width=None if Console().is_terminal else 150, highlight=False)


@dataclass(frozen=True, slots=True)
class Proof:
    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Before:
    """What must be the same after learning."""

    named: list[AdapterRef | None]    # for each inbox message the version that answered it; None: the base model
    answers: str                      # sha256 of the inbox answered by those, named
    base: str                         # fingerprint, computed from the tensors in memory
    files: dict[str, str]             # sha256 of every file of every version
    new_inputs: list[Prediction]      # where the new skill's inputs went


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--registry", type=Path, default=HERE.parent / "registry", help="copied, never written to")
    shipped: Path = parser.parse_args().registry
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="adapter-hub-demo-") as folder:
        registry = Path(folder) / "registry"
        # The catalogue is left behind: it is rebuilt from the versions and their histories.
        shutil.copytree(shipped, registry, ignore=shutil.ignore_patterns("catalog.sqlite*", "index"))
        with Hub.open(registry) as hub:
            proofs = run(hub, registry)
    return summary(proofs, time.perf_counter() - started)


def run(hub: Hub, registry: Path) -> list[Proof]:
    inbox, new_rows = read(HERE / "inbox.jsonl"), read(HERE / f"{SKILL}_new.jsonl")
    console.rule("1. The inbox: ten adapters on one frozen base model, chosen from the text alone")
    started = time.perf_counter()
    predictions = hub.predict([row["text"] for row in inbox])
    seconds = time.perf_counter() - started
    console.print(inbox_table(inbox, predictions))
    right = sum(name_of(p) == row["expect"] for row, p in zip(inbox, predictions, strict=True))
    console.print(f"{right} of {len(inbox)} messages went where their author expects, {seconds:.1f} s with loading the models.\n")
    before = remember(hub, registry, inbox, new_rows, predictions)

    console.rule(f"2. An eleventh skill, live: {SKILL}")
    train = HERE / f"{SKILL}.jsonl"
    rows = read(train)
    console.print(f"training on {len(rows)} rows with {len({row['label'] for row in rows})} labels …")
    started = time.perf_counter()
    report = hub.learn(SKILL, train=train, description="Gardens: watering, planting, pruning, pests, soil, fertilizer.", tags=("demo",))
    seconds = time.perf_counter() - started
    console.print(f"{report.ref} learned in {seconds:.0f} s, {'promoted' if report.promoted else 'NOT promoted'}: {report.reason}\n")

    console.rule("3. The same hub, one skill later")
    hub.settle()    # it is routed by its prototypes already; here the router's head has learned of it too
    after = hub.predict([row["text"] for row in new_rows])
    console.print(new_table(new_rows, before.new_inputs, after))
    routed_now = hub.route([row["text"] for row in inbox])
    moved = sum(p.adapter != decision.adapter for p, decision in zip(predictions, routed_now, strict=True))
    console.print(f"{moved} of the {len(inbox)} inbox messages are routed elsewhere now. Routing may shift; a version's answers may not.\n")
    return [Proof("the new skill is in production", report.promoted, report.reason), *prove(hub, registry, inbox, new_rows, before, after)]


def remember(
    hub: Hub, registry: Path, inbox: Sequence[Mapping[str, Any]], new_rows: Sequence[Mapping[str, Any]], predictions: Sequence[Prediction]
) -> Before:
    named = [p.adapter for p in predictions]
    return Before(
        named=named,
        answers=digest(hub.predict([row["text"] for row in inbox], adapters=named)),
        base=hub.base.compute_fingerprint(),
        files=hashes(registry),
        new_inputs=hub.predict([row["text"] for row in new_rows]),
    )


def prove(
    hub: Hub,
    registry: Path,
    inbox: Sequence[Mapping[str, Any]],
    new_rows: Sequence[Mapping[str, Any]],
    before: Before,
    after: Sequence[Prediction],
) -> list[Proof]:
    texts = [row["text"] for row in inbox]
    here = digest(hub.predict(texts, adapters=before.named))
    # A second hub reads every version from disk again: what is proved is not only that memory was left alone.
    with Hub.open(registry) as fresh:
        reopened = digest(fresh.predict(texts, adapters=before.named))
    base = hub.base.compute_fingerprint()
    files = hashes(registry)
    changed = [name for name, sha256 in before.files.items() if files.get(name) != sha256]
    verified = hub.verify()
    reached = sum(name_of(p) == SKILL for p in after)
    early = sum(name_of(p) == SKILL for p in before.new_inputs)
    labelled = sum(p.label == row["label"] for row, p in zip(new_rows, after, strict=True))
    count = len(new_rows)
    then = before.answers[:16]
    return [
        Proof("the base model is the same", base == before.base, f"fingerprint {base[:23]}…, computed from its tensors before and after"),
        Proof(f"{len(texts)} earlier answers are byte-identical", here == before.answers, f"sha256 {then}… then, {here[:16]}… now"),
        Proof("so they are in a hub opened afresh", reopened == before.answers, f"sha256 {reopened[:16]}…"),
        Proof("no stored file changed", not changed, ", ".join(changed) or f"{len(before.files)} files of the shipped versions hashed"),
        Proof("verify finds no damage", bool(verified.ok), "every file of every version against its manifest"),
        Proof(
            "new inputs reach the new skill",
            early == 0 and reached >= REACHED_SHARE_MIN * count,
            f"{reached} of {count} now, {early} before; {labelled} with the right label; none was trained on",
        ),
    ]


def summary(proofs: Sequence[Proof], seconds: float) -> int:
    console.rule("4. Proofs")
    table = Table(box=None, show_header=False)
    for proof in proofs:
        verdict = Text("holds", style="green") if proof.holds else Text("FAILS", style="bold red")
        table.add_row(verdict, proof.claim, Text(proof.evidence, style="dim"))
    console.print(table)
    failed = [proof.claim for proof in proofs if not proof.holds]
    if failed:
        console.print(f"\n{len(failed)} of {len(proofs)} proofs FAIL: {'; '.join(failed)}. ({seconds:.0f} s)", style="bold red")
        return 1
    console.print(f"\nAll {len(proofs)} proofs hold: one skill more, nothing forgotten. ({seconds:.0f} s)", style="bold green")
    return 0


# ---- reading and hashing --------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def name_of(prediction: Prediction) -> str | None:
    return prediction.adapter.name if prediction.adapter else None


def digest(predictions: Sequence[Prediction]) -> str:
    """sha256 of all that the answers hold: versions, labels, every score and vector to the last bit."""
    total = hashlib.sha256()
    for p in predictions:
        total.update(f"{p.adapter}\x00{p.label}\x00".encode())
        total.update("".join(f"{label}={float(score).hex()}\x00" for label, score in p.scores.items()).encode())
        total.update(b"" if p.vector is None else p.vector.tobytes())
    return total.hexdigest()


def hashes(registry: Path) -> dict[str, str]:
    """sha256 of each file of each version. Histories are left out: they grow."""
    files = sorted(path for path in (registry / "adapters").glob("*/[0-9]*/*") if path.is_file())
    return {str(path.relative_to(registry)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- tables ---------------------------------------------------------------------------------------------------------


def inbox_table(rows: Sequence[Mapping[str, Any]], predictions: Sequence[Prediction]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("message", "adapter", "label"):
        table.add_column(column, overflow="fold")
    for column in ("score", "threshold"):
        table.add_column(column, justify="right")
    table.add_column("reason")
    for row, p in zip(rows, predictions, strict=True):
        where = Text(str(p.adapter), style="cyan") if p.adapter else Text("base model", style="dim")
        as_expected = name_of(p) == row["expect"]
        where.append("" if as_expected else f"  (expected {row['expect'] or 'base model'})", style="yellow")
        scores = (number(p.decision.score), number(p.decision.threshold))
        table.add_row(Text(row["text"]), where, p.label or "–", *scores, str(p.decision.reason))
    return table


def new_table(rows: Sequence[Mapping[str, Any]], before: Sequence[Prediction], after: Sequence[Prediction]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("new input", "before", "now", "label"):
        table.add_column(column)
    for row, then, now in zip(rows, before, after, strict=True):
        label = Text(now.label or "–").append("" if now.label == row["label"] else f"  (expected {row['label']})", style="yellow")
        table.add_row(Text(row["text"]), *(str(p.adapter) if p.adapter else "base model" for p in (then, now)), label)
    return table


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
