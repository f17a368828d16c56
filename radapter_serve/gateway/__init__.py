"""HTTP gateway for untrusted callers, in front of Triton or an engine: checks API keys and
requests. Needs no torch.
"""
