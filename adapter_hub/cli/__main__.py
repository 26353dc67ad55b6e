"""`python -m adapter_hub.cli` is `adapter-hub`."""

from adapter_hub.cli.verbs import main

main()
