"""Triton backend in Python of each of our runtimes, for servers without the C++ backend of its
name.
"""

from radapter_serve.triton.graph_model import GraphModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
