"""The HTTP API of the last release stays: `api-of-release.txt` lists what it takes and gives, a
fact a line. A fact may be added, and none may go; nothing new may be needed in a request.

At a release: python -m tests.gateway.test_stable_api > tests/gateway/api-of-release.txt
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radapter_serve.gateway.openapi import document
from radapter_serve.tasks.table import TASKS

RELEASED = Path(__file__).with_name("api-of-release.txt")
_SCHEMAS = "#/components/schemas/"
Schema = dict[str, Any]


def fields(schema: Schema, place: str, verb: str) -> Iterator[str]:
    """The fields of a schema as facts, at any depth; those of another named schema by its name."""
    if "$ref" in schema:
        yield f"{place}: {schema['$ref'].removeprefix(_SCHEMAS)}"
        return
    for name, inner in schema.get("properties", {}).items():
        yield f"{place} {verb} .{name}"
        if name in schema.get("required", ()) and verb == "takes":
            yield f"{place} needs .{name}"
        yield from fields(inner, f"{place}.{name}", verb)
    tensors = schema.get("items", {}).get("oneOf", ())
    for tensor in tensors:  # of KServe, told apart by name
        parts = tensor["properties"]
        yield f"{place} {verb} {parts['name']['const']} {parts['datatype'].get('const', 'any')}"
    if not tensors and isinstance(schema.get("items"), dict):
        yield from fields(schema["items"], f"{place}[]", verb)
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from fields(choice, place, verb)


def facts(api: Schema) -> set[str]:
    """All facts of an OpenAPI document that callers rely on."""
    promises: set[str] = set()
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            name = f"{method.upper()} {path}"
            promises.add(name)
            for parameter in operation.get("parameters", ()):
                promises.add(f"{name} takes {parameter['name']}")
                if parameter.get("required"):
                    promises.add(f"{name} needs {parameter['name']}")
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                promises.add(f"{name} takes {kind}")
                promises |= set(fields(content["schema"], f"{name} body", "takes"))
            answer = operation["responses"]["200"]
            for kind, content in answer.get("content", {}).items():
                promises.add(f"{name} gives {kind}")
                promises |= set(fields(content["schema"], f"{name} answer", "gives"))
    for name, schema in api["components"]["schemas"].items():
        verb = "takes" if name.endswith(("Request", "Parameters", "Output")) else "gives"
        promises |= set(fields(schema, name, verb))
    for name, task in TASKS.items():
        needed = [tensor.name for tensor in task.inputs.values() if not tensor.optional]
        promises |= {f"POST /v2/models/{name}/infer needs {tensor}" for tensor in needed}
    return promises


def broken(before: set[str], now: set[str]) -> list[str]:
    """What callers of the first API would miss, or lack, in the second."""
    gone = {fact for fact in before - now if " needs " not in fact}
    # What an operation or a field needs that is new itself breaks nobody.
    known = {fact.split(" takes ")[0] for fact in before}
    asked = {fact for fact in now - before if fact.partition(" needs ")[0] in known}
    return [f"gone: {fact}" for fact in sorted(gone)] + [f"new: {fact}" for fact in sorted(asked)]


def test_callers_of_the_last_release_are_served_as_before() -> None:
    before = set(RELEASED.read_text(encoding="utf-8").splitlines())
    changes = broken(before, facts(document()))
    assert not changes, (
        "the HTTP API breaks callers of the last release, which docs/stability.md allows in a major"
        f" version alone: {'; '.join(changes)}"
    )


def test_what_breaks_callers_is_seen() -> None:
    before = facts(document())
    api = copy.deepcopy(document())
    del api["paths"]["/v1/models"]
    request = api["components"]["schemas"]["ClassifyRequest"]
    del request["properties"]["inputs"]["items"]["oneOf"][0]
    request["required"].append("id")
    request["properties"]["more"] = {"type": "string"}  # may be added
    changes = broken(before, facts(api))
    assert changes[0] == "gone: ClassifyRequest.inputs takes image BYTES"
    assert "gone: GET /v1/models" in changes
    assert changes[-1] == "new: ClassifyRequest needs .id"
    assert not any("more" in change for change in changes)


if __name__ == "__main__":
    print("\n".join(sorted(facts(document()))))
