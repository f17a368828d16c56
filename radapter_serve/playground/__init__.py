"""The playground: a page to ask a server by hand, in a browser.

It is a client like any other: Gradio draws it, and our own Python client asks.
"""
