"""The OpenAPI document: it has every path of the gateway and no other, and answers keep to it."""

import json
from pathlib import Path
from typing import Any

import pytest

from radapter_serve.contract.errors import TIMED_OUT
from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.openapi import document
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import Refused
from radapter_serve.release.release import TASKS
from tests.helpers.fake_upstream import FakeUpstream
from tests.helpers.fuzz import FUZZ

PUBLISHED = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_has_every_path_and_method_and_no_other():
    app = Gateway(Settings(), FakeUpstream).app
    routes = set()
    route: Any
    for route in app.routes:
        is_inference = route.path.endswith("/infer")
        for name in TASKS if is_inference else ("{model}",):
            path = route.path.replace("{model}", name) if is_inference else route.path
            routes |= {(path, method.lower()) for method in route.methods - {"HEAD"}}
    described = {
        (path, method) for path, methods in document()["paths"].items() for method in methods
    }
    assert described == routes


def test_the_document_is_served_and_published_as_it_is_made(served):
    status, answer, _ = served.ask("/openapi.json")
    assert (status, answer) == (200, document())
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == document(), (
        "the API has changed: python -m radapter_serve.gateway.openapi > docs/openapi.json"
    )


@pytest.mark.parametrize("path", ["/v1/models", "/v2/models/classify", "/v2/models/classify/ready"])
@pytest.mark.parametrize("status", [431, 504])
def test_what_the_connection_or_a_silent_triton_refuses_is_documented(
    served, monkeypatch, path, status
):
    async def silent(*_: Any) -> Any:
        raise Refused(504, TIMED_OUT, "Triton does not answer")

    for name in ("config", "ready"):
        monkeypatch.setattr(served.upstream, name, silent)
    headers = {"X": "a" * 40_000} if status == 431 else {}
    answered, answer, _ = served.ask(path, **headers)
    assert answered == status
    place = path.replace("classify", "{model}")
    described: Any = document()["paths"][place]["get"]["responses"][str(status)]
    for name in ("responses", "schemas"):
        described = document()["components"][name][described["$ref"].rpartition("/")[2]]
        if name == "responses":
            described = described["content"]["application/json"]["schema"]
    kind = {"string": str}.get(described["properties"]["error"].get("type", ""), dict)
    assert isinstance(answer["error"], kind)


@pytest.mark.integration
def test_the_document_is_valid_openapi():
    from openapi_spec_validator import validate

    validate(document())


@pytest.mark.integration
def test_random_requests_get_documented_answers(url):
    """No 500, no other status or content type than the document names, no broken schema."""
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        count += 1

        @FUZZ
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            case.call_and_validate(checks=wanted)

        ask()
    # It leaves out the document itself.
    assert count == sum(len(methods) for methods in document()["paths"].values()) - 1
