"""Triton model `embed_image`: encoded images to embeddings."""

from radapter_serve.triton.task_model import TaskModel


class TritonPythonModel(TaskModel):
    """Decodes and resizes the images of all waiting requests together, then makes one call to
    `image_encoder`.
    """

    task = "embed_image"
