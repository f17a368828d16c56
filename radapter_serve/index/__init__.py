"""A collection of images as a folder of embeddings: built, extended, compared with its files, and
searched.

It takes a release to embed with; it knows of no server, and imports no torch.
"""
