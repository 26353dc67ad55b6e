"""Durable memory: immutable versions of adapters, the aliases that name them, and the history of both. No torch."""
