"""What the server answers: embed, classify, segment, retrieve; with the glue to Triton's Python backend.

A task takes encoders as functions; it imports neither torch nor a runtime.
"""
