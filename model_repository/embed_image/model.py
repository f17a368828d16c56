"""Triton model `embed_image`: encoded images to embeddings."""

from radapter_serve.triton.models.embed_image import TritonPythonModel

__all__ = ["TritonPythonModel"]
