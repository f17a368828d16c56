"""Triton model `classify`: images and labels (of the request, or a label set of the release) to the
best labels.
"""

from radapter_serve.triton.models.classify import TritonPythonModel

__all__ = ["TritonPythonModel"]
