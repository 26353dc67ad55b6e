"""Versions in a registry that bring nothing but a routing state: what a router needs of them."""

from __future__ import annotations

from adapter_hub.refs import AdapterRef
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.manifest import VersionFacts
from adapter_hub.registry.registry import Registry
from adapter_hub.routing.live import ROUTING_FILE
from adapter_hub.routing.statistics import RoutingState
from tests.routing.conftest import ENCODER

CONFIG = RegistryConfig(base_model="tiny", base_fingerprint="sha256:base", encoder=ENCODER.id, encoder_fingerprint=ENCODER.fingerprint, max_tokens=64)
FACTS = VersionFacts(base_model="tiny", base_fingerprint="sha256:base", encoder_fingerprint=ENCODER.fingerprint, peft={"peft_type": "LORA", "r": 8})


def add(registry: Registry, name: str, state: RoutingState, *, promote: bool = True) -> AdapterRef:
    """Other weights for every state, so that a purge of one does not ask for the others."""
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": state.digest.encode() + name.encode(), ROUTING_FILE: state.to_bytes()}
    return registry.add(name, FACTS, dict(files), promote=promote)
