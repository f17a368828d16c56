"""Data for training and evaluation: rows of images with their labels, captions or masks.

It reads and checks; what is learned or measured from the data lives in `training/` and
`evaluation/`. `source`, the base of recipes and suites, needs no library of data sets.
"""
