"""The maths of `update_generators_` (README.md) and its definition in PyTorch (reference.py)."""
