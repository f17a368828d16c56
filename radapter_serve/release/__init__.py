"""Releases: their facts, their place in a model repository, and samples that verify what they
compute.

This package runs no graph and does not import torch.
"""
