"""KServe's open inference protocol: its operations, and its own client in Python."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radapter_serve import Model
from radapter_serve.release.release import TASKS
from tests.helpers.fake_upstream import INFER, TEXT, Served
from tests.helpers.fuzz import FUZZ
from tests.helpers.small_release import png

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


def kserve(*arguments: str) -> Any:
    """What `use_kserve` prints, in a process of its own, as KServe and Triton name their messages
    alike.
    """
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("pip install -e '.[integrations]'")
    command = [sys.executable, "-m", "tests.helpers.use_kserve", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout.splitlines()[-1])


@pytest.mark.integration
def test_the_client_of_kserve(url: str, releases: Path, tmp_path: Path) -> None:
    texts = ["a photo of a cat", "ü"]
    image = tmp_path / "image.png"
    image.write_bytes(png(1))
    answers = kserve(url, str(image), *texts)
    with Model(releases) as model:
        of_texts = model.embed_texts(texts)
        of_image = model.embed_images([image])
    for answer, expected in zip(answers, (of_texts, of_texts, of_image), strict=True):
        np.testing.assert_allclose(answer, expected, atol=1e-6)


@pytest.mark.integration
def test_answers_fit_the_document_of_kserves_own_server(url: str) -> None:
    """Random requests of that document get no 500, and each answer 200 has the form that it names;
    so has the answer to a right inference.
    """
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance

    api = kserve()
    # The protocol, and so the gateway, has no list of models, and loads none. What stands in a path
    # is the name of one of the tasks, and the newest release is asked.
    for path in ("/v2/models", *(path for path in api["paths"] if "repository" in path)):
        del api["paths"][path]
    for operations in api["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                names = {"model_name": sorted(TASKS), "model_version": ["2"]}
                parameter["schema"] = {"enum": names[parameter["name"]]}
    schema: Any = schemathesis.openapi.from_dict(api)
    schema.config.base_url = url
    right: Any = {**TEXT, "id": "42"}
    answered = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @FUZZ
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call()
            checks: list[Any] = [not_a_server_error]
            if response.status_code == 200:
                answered.add(case.path)
                checks.append(response_schema_conformance)
            case.validate_response(response, checks=checks)

        ask()
        if operation.path.endswith("infer"):
            case = operation.Case(path_parameters={"model_name": "embed_text"}, body=right)
            response = case.call()
            assert (response.status_code, response.json()["id"]) == (200, "42")
            case.validate_response(response, checks=[response_schema_conformance])
            answered.add(operation.path)
    assert answered == set(api["paths"])
