"""The maths of `ragged_max_pool` (README.md) and its definition in PyTorch (reference.py)."""
