"""The methods that the paper compares with R-Adapter, trained and evaluated in the same way;
similar methods share a file.

A `Method` is a recipe: hyper-parameters, and how a `System` starts, learns from batches, and embeds
images and classes. `METHODS` in rivals/tables.py lists all methods, and `python -m rivals.table`
makes the paper's tables.
"""
