"""The maths of `generate_delayed` (../update_generators/README.md) and its definition in PyTorch (reference.py)."""
