"""Data for training and evaluation: rows of images with their labels, captions or masks.

This package reads and checks data; `training/` and `evaluation/` use it. `source`, the base class
of recipes and suites, does not need the library `datasets`.
"""
