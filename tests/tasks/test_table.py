"""The table of tasks against the models' own configurations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_client import Client, ServerError, Values
from radapter_client.tensors import NUMPY
from radapter_serve.tasks.dense import SegmentOptions
from radapter_serve.tasks.table import TASKS, forms
from tests.helpers.small_release import Local, png
from tests.helpers.stand_ins import Recorder

MODELS = Path(__file__).parents[2] / "model_repository"


def test_the_page_of_the_http_api_has_every_tensor() -> None:
    page = (MODELS.parent / "docs" / "http-api.md").read_text(encoding="utf-8")
    kinds = "|".join(NUMPY)
    for name, task in TASKS.items():
        row = re.search(rf"^\|[^|]*`{name}`[^|]*\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)
        assert row, name
        for text, tensors in zip(row.groups(), (task.inputs, task.outputs), strict=True):
            named: dict[str, Any] = {}
            for names, kind, dims in re.findall(
                rf"((?:`\w+`(?:, | or )?)+) ({kinds}) \[([^\]]*)\]", text
            ):
                sizes = [int(dim) if dim == "1" else -1 for dim in dims.split(", ")]
                named |= dict.fromkeys(re.findall(r"`(\w+)`", names), (kind, sizes))
            if name.startswith("embed_"):  # one row of the page has both
                named = {key: value for key, value in named.items() if key in tensors}
            expected = {
                key: (tensor.datatype, list(tensor.dims)) for key, tensor in tensors.items()
            }
            for common in ("adapter", "alpha", "receipt"):  # a paragraph has these
                expected.pop(common, None)
            assert named == expected, name
    words = " ".join(page.split())
    for tensor in ("`adapter` BYTES [1]", "`alpha` FP32 [1]", "`receipt` BYTES [1]"):
        assert tensor in words


def test_a_client_in_the_process_asks_what_its_tensors_would_ask(local: Local) -> None:
    """`Model` hands over plain values, of which a transport makes tensors."""
    recorder = Recorder()
    masks = np.full((1, 20, 30), 255, np.uint8)
    names = ["cat, kitty", "Ölkäfer"]
    with Client(transport=recorder, release=1) as client:
        client.classify(png(0), names, templates=["a {}"], alpha=0.3, unknown=0.7, calibrated=True)
        client.classify(
            [png(0), png(1)],
            names,
            multi_label=True,
            threshold=0.3,
            examples={"Ölkäfer": [png(2), png(3)]},
            example_weight={"Ölkäfer": 0.7},
        )
        client.segment(png(0), names, short_side=20, stride=5, refine=1, alpha=0.3)
        client.segment(
            png(0),
            names,
            proposals=masks,
            proposal_scores=[[0.1, 0.7]],
            proposal_weight=0.3,
            threshold=0.7,
        )
        with pytest.raises(ServerError):  # the stand-in's answer has no version of an index
            client.search(
                ["a", "ü"],
                image=png(0),
                id="ü.png",
                weights=[1, -0.3, 2, 0.1],
                index="photos",
                where="path != 'ü'",
                min_score=0.3,
                offset=3,
                index_version="g-1",
            )
        client.search("a", index="photos", min_score="calibrated", thumbnails=True)
        client.embed_texts(["a", "ü"], alpha=0.3)
        client.embed_images([png(0), png(1)])

    def facts(request: Any) -> dict[str, Any]:
        """Without the images, whose headers may have been read already."""
        kept = {name: value for name, value in vars(request).items() if name != "images"}
        return {name: np.asarray(value).tolist() for name, value in kept.items()}

    assert len(recorder.inferences) == 8
    requests = []
    for request in recorder.inferences:
        task = TASKS[request.model]
        assert isinstance(request.inputs, Values)
        task.check(request.model, forms(request.inputs), 64)
        typed = task.request(dict(request.inputs.plain), request.outputs.__contains__)
        [read] = task.read(local.loaded, dict(request.inputs), request.outputs.__contains__)
        assert type(typed) is type(read) and facts(typed) == facts(read)
        requests.append(read)
    dense, proposed = requests[2:4]
    assert dense.options == SegmentOptions(short_side=20, stride=5, refine=1)
    assert proposed.options.proposal_weight == pytest.approx(0.3)
