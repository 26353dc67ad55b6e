"""benchmarks/engine.py says what is wrong with its arguments before anything is measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["--rows", "a"], "argument --rows: 'a' is none of 1,8,64"),
        (["--rows", "8,5"], "argument --rows: '5' is none of 1,8,64"),
        (["--rounds", "0"], "argument --rounds: '0' is not a whole number of at least 1"),
        (["--only", "jobs"], "--only jobs needs --data DIR"),
        (["--only", "jobs", "--data", "nowhere"], "--data: there is no folder nowhere/clinc150"),
        (["--only", "forwards"], "--only: there is no forwards"),
    ],
)
def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], fact: str) -> None:
    """Previously they ended in tracebacks, or in silence."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["engine.py", *args])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("engine").main()
    assert caught.value.code == 2 and fact in capsys.readouterr().err
