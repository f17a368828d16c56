"""Triton model `classify`: images and labels (of the request, or a label set of the release) to the
best labels.
"""

from __future__ import annotations

from typing import Any

from radapter_serve.tasks.classify import Classify, ClassifyRequest, load_label_sets
from radapter_serve.triton.responses import answer, given_up, need, read
from radapter_serve.triton.version import Version


class TritonPythonModel:
    """Encodes the images of all waiting requests together, and scores each request against its own
    labels.
    """

    def initialize(self, args: dict[str, str]) -> None:
        version = Version(args)
        label_sets = load_label_sets(version.folder / "label_sets")
        self._task = Classify(
            version.release, version.embed_images(), version.embed_labels(), label_sets
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(
            requests, _request, self._task, lambda c: {"label": c.labels, "score": c.scores}
        )


def _request(request: Any) -> ClassifyRequest:
    label_set = read(request, "label_set")
    return ClassifyRequest(
        images=need(request, "image").ravel(),
        labels=read(request, "labels"),
        label_set=None if label_set is None else label_set.ravel(),
        templates=read(request, "templates"),
        top_k=_flat(request, "top_k"),
        alpha=read(request, "alpha"),
        multi_label=_flat(request, "multi_label"),
        threshold=_flat(request, "threshold"),
        calibrated=_flat(request, "calibrated"),
        cancelled=given_up(request),
    )


def _flat(request: Any, name: str) -> Any:
    array = read(request, name)
    return None if array is None else array.ravel()
