"""Load on a running server, and what it makes of it: what a request is, how requests are sent, what comes of it.

A client like any other: it reaches the server through `radapter_client` alone. Nothing here imports torch.
"""
