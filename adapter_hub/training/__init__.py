"""Make an adapter from labelled rows. The base model is never touched: training happens on a copy of its weights."""
