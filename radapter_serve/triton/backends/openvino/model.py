"""Triton backend `openvino` in Python, for servers without the C++ backend of that name."""

from __future__ import annotations

from radapter_serve.triton.graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """A graph compiled by OpenVINO for the CPU."""

    runtime = "openvino"
