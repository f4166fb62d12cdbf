"""The maths of `ragged_depthwise` (README.md) and its definition in PyTorch (reference.py)."""
