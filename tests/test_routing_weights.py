"""The benchmark of routing without examples: its scores are what it says, and it runs where the public data is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adapter_hub.adapters.weights import LoraDelta

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("ADAPTER_HUB_DATA", "")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("routing_weights")


def test_scores_from_the_spectrum_are_those_of_the_whole_update(benchmark: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [LoraDelta(*(torch.randn(shape, generator=generator) for shape in ((3, 12), (7, 3))), 2.0, None) for _ in range(4)]
    x, wx = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 5, 7, generator=generator)
    scores = benchmark.Spectra.of(deltas).scores(x, wx)
    for adapter, delta in enumerate(deltas):
        whole = 2.0 * delta.b @ delta.a
        update = (x @ whole.T).norm(dim=-1)
        top = torch.linalg.eigh(whole.T @ whole).eigenvectors[:, -1]
        for kind, expected in {
            benchmark.ARROW: (x @ top).abs(),
            benchmark.SPECTR: update,
            benchmark.DIRECTIONS: (x @ torch.linalg.qr(delta.a.T).Q).norm(dim=-1),
            benchmark.SCALED: update / whole.norm(),
            benchmark.RELATIVE: update / wx.norm(dim=-1),
        }.items():
            torch.testing.assert_close(scores[kind][..., adapter], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not DATA, reason="needs ADAPTER_HUB_DATA, the folder of public data: benchmarks/README.md")
@pytest.mark.skipif(not (ROOT / "registry" / "hub.toml").exists(), reason="needs the adapters that ship: examples/clinc150_adapters.py makes them")
def test_examples_route_better_than_all_else_on_a_few_inputs(routed: Path, tmp_path: Path) -> None:
    registry = shutil.copytree(routed, tmp_path / "registry")
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "routing_weights.py"), "--data", DATA, "--registry", str(registry)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([*command, "--rows", "40", "--out", str(tmp_path / "r.json")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    top1 = {name: figures["test"]["top1"] for name, figures in report["methods"].items()}
    assert {name.partition(":")[0] for name in top1} == {"weights", "heads", "words", "examples"}
    assert top1.pop("examples: the router") > max(top1.values())
