"""The maths of `code_gradients` (../update_generators/README.md) and its definition in PyTorch (reference.py)."""
