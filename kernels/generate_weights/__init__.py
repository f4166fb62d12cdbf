"""The maths of `generate_weights` (README.md) and its definition in PyTorch (reference.py)."""
