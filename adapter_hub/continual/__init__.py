"""The loop that keeps learning: what a new version is made from, and whether it goes live."""
