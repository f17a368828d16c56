"""Triton model `segment`: an image and labels to a mask, by dense patches or by proposals that the
request brings.
"""

from radapter_serve.triton.models.segment import TritonPythonModel

__all__ = ["TritonPythonModel"]
