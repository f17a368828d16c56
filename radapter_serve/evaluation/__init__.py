"""Judging models: zero-shot classification and the α curve."""
