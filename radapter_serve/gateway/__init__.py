"""The gateway: the way in for callers that are not trusted, in front of a Triton that only this
machine reaches.

It owns no model. It checks who asks and what, and passes on what is right; nothing here imports
torch.
"""
