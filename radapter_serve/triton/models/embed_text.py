"""Triton model `embed_text`: texts to embeddings."""

from radapter_serve.triton.task_model import TaskModel


class TritonPythonModel(TaskModel):
    """Tokenizes the texts of all waiting requests together; each text is encoded once, with others
    of its length.
    """

    task = "embed_text"
