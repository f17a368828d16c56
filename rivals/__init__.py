"""The systems that the paper compares R-Adapter with, alike ones in one file, all of them trained
and judged alike.

A `Method` is a recipe: hyper-parameters, and how a `System` starts, learns from batches and embeds
images and classes. `METHODS` in rivals/tables.py names them all, and `python -m rivals.table`
makes the paper's tables of them.
"""
