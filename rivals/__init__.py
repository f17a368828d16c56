"""The systems that the paper compares R-Adapter with, each a short file, all of them trained and
judged alike.

A `Method` is a recipe: hyper-parameters, and how a `System` starts, learns from batches and embeds
images and classes. `METHODS` in rivals/methods.py names them all, and `python -m rivals.table`
makes the paper's tables of them.
"""
