"""Triton model `retrieve`: a text or an image to the nearest images of an index."""

from radapter_serve.triton.models.retrieve import TritonPythonModel

__all__ = ["TritonPythonModel"]
