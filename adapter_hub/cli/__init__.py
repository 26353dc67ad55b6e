"""The command line: `arguments` is what verbs take, `verbs` and `overview` are the verbs, `console` is what people and programs see."""

from adapter_hub.cli import overview as overview
from adapter_hub.cli.verbs import app, main

__all__ = ["app", "main"]
