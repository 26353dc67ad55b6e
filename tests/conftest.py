"""What every test runs under: no network, no deadlines. The number of torch threads is left as the machine sets it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # on shared cores, threads that spin while they wait take them from each other

from hypothesis import HealthCheck, settings

# The first example of a property pays for imports and weights: a deadline would measure those.
settings.register_profile("hub", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hub")
