"""The maths of `score_logits` (README.md) and its definition in PyTorch (reference.py)."""
