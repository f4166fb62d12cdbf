"""The maths of `scale_and_shift` (README.md) and its definition in PyTorch (reference.py)."""
