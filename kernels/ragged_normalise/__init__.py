"""The maths of `ragged_normalise` (README.md) and its definition in PyTorch (reference.py)."""
