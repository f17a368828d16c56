"""What the server answers: embed, classify, segment, retrieve.

A task takes encoders as functions; it imports neither torch nor a runtime.
"""
