"""KServe's open inference protocol: its operations, and its own client in Python."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from radapter_serve import Model
from tests.helpers.fake_upstream import INFER, TEXT, Served
from tests.helpers.small_release import png
from tests.helpers.ways import in_process

# The operations of KServe's own OpenAPI document (kserve/open-inference-protocol, version 2.0 of
# open_inference_rest.yaml), and the fields that it requires of each answer.
OPERATIONS = {
    "GET /v2/health/live": (),
    "GET /v2/health/ready": (),
    "GET /v2/": ("name", "version", "extensions"),
    "GET /v2/models/embed_text/versions/1": ("name", "platform"),
    "GET /v2/models/embed_text/versions/1/ready": (),
    "POST /v2/models/embed_text/versions/1/infer": ("model_name", "outputs"),
}
# What it requires of a tensor, in metadata and in an answer.
TENSOR = {"name", "shape", "datatype"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_of_the_protocol_is_answered(served: Served, operation: str) -> None:
    method, _, path = operation.partition(" ")
    status, answer, _ = served.ask(path, TEXT if method == "POST" else None)
    assert status == 200
    for field in OPERATIONS[operation]:
        assert field in answer
    for tensor in (*answer.get("inputs", ()), *answer.get("outputs", ())):
        assert tensor.keys() >= TENSOR | ({"data"} if method == "POST" else set())


def test_a_request_may_name_the_model_of_its_path(served: Served) -> None:
    """KServe's own client sends it in the body, too."""
    assert served.ask(INFER, {"model_name": "embed_text", **TEXT})[0] == 200
    status, answer, _ = served.ask(INFER, {"model_name": "classify", **TEXT})
    message = "[invalid_argument] model_name is 'classify', and the path names embed_text"
    assert (status, answer["error"]) == (400, message)


@pytest.mark.integration
def test_the_client_of_kserve(releases: Path, tmp_path: Path) -> None:
    """In a process of its own: its messages of gRPC have the names of Triton's."""
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("pip install -e '.[integrations]'")
    texts = ["a photo of a cat", "ü"]
    image = tmp_path / "image.png"
    image.write_bytes(png(1))
    (tmp_path / "indexes").mkdir()
    with in_process(releases, tmp_path / "indexes") as running:
        command = [
            sys.executable,
            "-m",
            "tests.helpers.use_kserve",
            running.url,
            str(image),
            *texts,
        ]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    answers = json.loads(printed.stdout.splitlines()[-1])
    with Model(releases) as model:
        of_texts = model.embed_texts(texts)
        of_image = model.embed_images([image])
    for answer, expected in zip(answers, (of_texts, of_texts, of_image), strict=True):
        np.testing.assert_allclose(answer, expected, atol=1e-6)
