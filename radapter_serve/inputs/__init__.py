"""What a request brings, made into what an encoder takes: pixels, tokens, labels, α. Training and
serving share it.

numpy and Pillow only: neither torch nor a runtime belongs here.
"""
