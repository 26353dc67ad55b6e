"""One frozen base model, one small adapter a task, and a router that picks the adapter from the input.

The public names, each imported from the module that owns it when it is first used: `import adapter_hub` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapter_hub.base_model import DEFAULT_MODEL as DEFAULT_MODEL
    from adapter_hub.base_model import FrozenBase as FrozenBase
    from adapter_hub.errors import HubError as HubError
    from adapter_hub.examples import Example as Example
    from adapter_hub.hub import Hub as Hub
    from adapter_hub.learning import LearnReport as LearnReport
    from adapter_hub.prediction import Prediction as Prediction
    from adapter_hub.prediction import PredictionStream as PredictionStream
    from adapter_hub.refs import AdapterRef as AdapterRef
    from adapter_hub.registry.manifest import Manifest as Manifest
    from adapter_hub.registry.observations import Observation as Observation
    from adapter_hub.routing.decision import Decision as Decision
    from adapter_hub.routing.decision import Reason as Reason

__version__ = "0.1.0"

_HOMES = {
    "Hub": "hub",
    "Prediction": "prediction",
    "PredictionStream": "prediction",
    "LearnReport": "learning",
    "Decision": "routing.decision",
    "Reason": "routing.decision",
    "AdapterRef": "refs",
    "Example": "examples",
    "Manifest": "registry.manifest",
    "Observation": "registry.observations",
    "FrozenBase": "base_model",
    "DEFAULT_MODEL": "base_model",
    "HubError": "errors",
}

__all__ = [
    "Hub",
    "Prediction",
    "PredictionStream",
    "LearnReport",
    "Decision",
    "Reason",
    "AdapterRef",
    "Example",
    "Manifest",
    "Observation",
    "FrozenBase",
    "DEFAULT_MODEL",
    "HubError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
