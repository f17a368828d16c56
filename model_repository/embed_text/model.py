"""Triton model `embed_text`: texts to embeddings."""

from radapter_serve.triton.models.embed_text import TritonPythonModel

__all__ = ["TritonPythonModel"]
