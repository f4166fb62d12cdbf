"""Hypothesis: few, unhurried examples, the same ones every time."""

from hypothesis import settings

settings.register_profile("metaprune", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("metaprune")
