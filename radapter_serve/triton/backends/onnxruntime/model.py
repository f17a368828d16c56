"""Triton backend `onnxruntime` in Python, for servers without the C++ backend of that name."""

from __future__ import annotations

from radapter_serve.triton.graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """A graph in an ONNX Runtime session."""

    runtime = "onnxruntime"
