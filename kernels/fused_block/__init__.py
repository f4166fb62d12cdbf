"""The maths of `fused_block` (README.md) and its definition in PyTorch (reference.py)."""
