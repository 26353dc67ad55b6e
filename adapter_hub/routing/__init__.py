"""Choose the adapter from the input: encode, score against prototypes, decide or abstain. Knows no registry and no engine."""
