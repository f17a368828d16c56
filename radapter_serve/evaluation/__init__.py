"""How good a model is, at any α: classification, retrieval and segmentation, measured and drawn.

A model is an adapter in torch, a merged checkpoint, a release or a live server; training lives next door.
"""
