"""Triton backend `tensorrt` in Python, for servers without the C++ backend of that name; same
configs, same numbers.

Slower than that one: each batch is copied to the GPU and back, and waited for.
"""

from __future__ import annotations

from radapter_serve.triton.graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """An engine of TensorRT."""

    runtime = "tensorrt"
    title = "TensorRT"
