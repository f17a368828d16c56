"""Indexes of images, as folders of embeddings: built, extended, verified, and searched.

This package embeds with a release; it knows of no server, and does not import torch.
"""
