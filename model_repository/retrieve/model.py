"""Triton model `retrieve`: a task of radapter_serve/tasks/table.py."""

from radapter_serve.triton.task_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
