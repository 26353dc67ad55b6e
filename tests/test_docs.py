"""The documents say what is there: commands, files, verbs and modules that README names exist, and its code runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "registry" / "hub.toml"


def test_every_make_command_in_the_documents_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = re.findall(r"^make ((?:[a-z]+ ?)+)|`make ((?:[a-z]+ ?)+)", README + CONTRIBUTING, re.MULTILINE)
    named = {target for pair in commands for target in "".join(pair).split()}
    assert {"demo", "test"} <= named <= targets


def test_every_make_target_is_explained_by_make_help() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) - {"help"} == set(re.findall(r'@echo "make ([a-z]+) ', makefile))


def test_the_tree_in_the_readme_lists_every_module_and_no_other() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    package = ROOT / "adapter_hub"
    modules = {path.name for path in package.glob("*.py")} | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert listed == modules
    folders = set(re.findall(r"^([a-z]\S*/) ", tree, re.MULTILINE))
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_every_relative_link_and_named_file_exists() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        (document.name, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
        if not (document.parent / target).exists()
    ]
    assert missing == []
    named = re.findall(r"`((?:tests|benchmarks|docs|examples)/[\w./-]+\.\w+|constraints\.txt|CONTRIBUTING\.md)`", README + CONTRIBUTING)
    named = [name for name in named if "NNN" not in name]
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_every_decision_is_in_the_index_under_its_own_title() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        number, title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split(": ", 1)
        assert f"| [{number}]({path.name}) | {title} |" in index


def test_the_example_of_an_own_adapter_runs_and_says_what_was_trained() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "own_adapter.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clock@1 answers ' half past nine'\n" in done.stdout


def test_no_file_names_a_package_index() -> None:
    files = ["Makefile", "constraints.txt", "pyproject.toml", ".ci/run", "README.md", "CONTRIBUTING.md"]
    assert [file for file in files if re.search(r"https?://|index-url +h", (ROOT / file).read_text(encoding="utf-8"))] == []


@pytest.mark.skipif(not SHIPPED.exists(), reason="needs the adapters that ship: examples/clinc150_adapters.py makes them")
def test_the_python_blocks_of_the_readme_run_from_a_checkout(routed: Path, tmp_path: Path) -> None:
    """One after another, as they stand; one trial of a search for twenty."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # A copy: the blocks may write a catalogue, and a checkout may be read-only.
    shutil.copytree(routed, tmp_path / "registry")
    asked = {"contract": "is clause {} of this contract binding", "tax": "how is income of kind {} taxed"}
    rows = [{"text": text.format(number), "label": label} for label, text in asked.items() for number in "one two three four five six".split()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    program = "\n".join(blocks).replace("trials=20", "trials=1")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert re.match(r"[a-z_]+@\d+ \w+ accepted", first)
