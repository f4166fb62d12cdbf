"""The maths of `ragged_conv` (README.md) and its definition in PyTorch (reference.py)."""
