"""The maths of `generated_conv` (README.md) and its definition in PyTorch (reference.py)."""
