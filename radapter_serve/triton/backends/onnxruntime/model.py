"""Triton backend `onnxruntime` in Python, for servers without the C++ backend of that name; same
configs, same numbers.

Of the C++ backend's parameters it knows those of `radapter_serve.encoders.runtimes.load_graph`.
"""

from __future__ import annotations

from radapter_serve.triton.graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """A graph in an ONNX Runtime session."""

    runtime = "onnxruntime"
    title = "ONNX Runtime"
