"""`python -m adapter_hub` is `adapter-hub`."""

from adapter_hub.cli.verbs import main

main()
