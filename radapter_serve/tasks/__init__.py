"""The tasks of a server: embed, classify, segment, retrieve.

A task yields the rows that it needs encoded; it imports neither torch nor a runtime.
"""
