"""Triton model `segment`: an image and labels to a mask, by dense patches or by proposals that the
request brings.
"""

from radapter_serve.triton.task_model import TaskModel


class TritonPythonModel(TaskModel):
    """Segments one request after the other; the windows of an image go to `patch_encoder` in
    batches.
    """

    task = "segment"
