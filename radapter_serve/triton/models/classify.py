"""Triton model `classify`: images and labels (of the request, or a label set of the release) to the
best labels.
"""

from radapter_serve.triton.task_model import TaskModel


class TritonPythonModel(TaskModel):
    """Encodes the images of all waiting requests together, and scores each request against its own
    labels.
    """

    task = "classify"
