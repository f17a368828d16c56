"""Triton model `retrieve`: a text or an image to the nearest images of an index."""

from radapter_serve.triton.task_model import TaskModel


class TritonPythonModel(TaskModel):
    """Embeds the query by `embed_text` or `embed_image` of the same release, and searches the
    index.
    """

    task = "retrieve"
