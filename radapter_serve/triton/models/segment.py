"""Triton model `segment`: an image and labels to a mask, by dense patches or by proposals that the
request brings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from radapter_serve.tasks.classify import load_label_sets
from radapter_serve.tasks.segment import LabelledMask, Segment, SegmentRequest
from radapter_serve.triton.responses import answer, each, given_up, need, read
from radapter_serve.triton.version import Version

OPTIONS = ("threshold", "short_side", "stride", "refine", "proposal_weight")


class TritonPythonModel:
    """Segments one request after the other; the windows of an image go to `patch_encoder` in
    batches.
    """

    def initialize(self, args: dict[str, str]) -> None:
        version = Version(args)
        patches = version.encode_patches if version.release.dense else None
        label_sets = load_label_sets(version.folder / "label_sets")
        self._task = Segment(
            version.release, version.encode_images, patches, version.embed_labels(), label_sets
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, _request, each(self._task), _outputs)


def _request(request: Any) -> SegmentRequest:
    label_set = read(request, "label_set")
    given = {name: read(request, name) for name in OPTIONS}
    return SegmentRequest(
        image=need(request, "image")[0],
        labels=read(request, "labels"),
        label_set=None if label_set is None else label_set[0],
        templates=read(request, "templates"),
        options={name: value[0].item() for name, value in given.items() if value is not None},
        proposals=read(request, "proposals"),
        proposal_scores=read(request, "proposal_scores"),
        alpha=read(request, "alpha"),
        cancelled=given_up(request),
    )


def _outputs(found: LabelledMask) -> dict[str, Any]:
    return {"mask": found.mask, "label": np.array(found.labels, object), "score": found.scores}
