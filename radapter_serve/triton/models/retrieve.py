"""Triton model `retrieve`: a text or an image to the nearest images of an index."""

from __future__ import annotations

import json
from functools import partial

from radapter_serve.triton.task_model import TaskModel


class TritonPythonModel(TaskModel):
    """Embeds the query by `embed_text` or `embed_image` of the same release, and searches the
    index.
    """

    task = "retrieve"

    def initialize(self, args: dict[str, str]) -> None:
        from radapter_serve.index.index import outdated  # here: as in `tasks.table`
        from radapter_serve.triton.index_metric import IndexMetric

        super().initialize(args)
        self._metric = None
        if is_newest(args):
            look = partial(outdated, self.loaded.indexes, self.loaded.release)
            self._metric = IndexMetric.start(look)

    def finalize(self) -> None:
        """Triton calls this before it takes the model away."""
        if self._metric is not None:
            self._metric.close()


def is_newest(args: dict[str, str]) -> bool:
    """Whether callers who name no release get this one.

    Args:
        args: what Triton gives to `initialize`.
    """
    policy = json.loads(args["model_config"]).get("version_policy", {})
    named = policy.get("specific", {}).get("versions", [])
    own = int(args["model_version"])
    return own == max(map(int, named), default=own)
