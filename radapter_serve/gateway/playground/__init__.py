"""The playground: a page to ask a release by hand, which the gateway serves at /playground.

Gradio draws it. `door.py` keeps all of Gradio closed that the page does not need.
"""
