"""The gateway: HTTP for callers that are not trusted, in front of Triton or of an engine. It checks
keys and requests, and needs no torch.
"""
