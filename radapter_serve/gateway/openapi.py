"""The OpenAPI document of the HTTP API, made from the tables that the server itself reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from radapter_serve.gateway import kserve, openai
from radapter_serve.gateway.upstream import CODES
from radapter_serve.tasks.table import TASKS, Task
from radapter_serve.version import __version__

Schema = dict[str, Any]
_JSON = "application/json"
_BINARY = "application/octet-stream"
_TEXT: Schema = {"type": "string"}
# The error responses of a path, by status.
_ERRORS = {
    400: "The request is wrong.",
    401: "There is no valid key in the header `Authorization: Bearer KEY`.",
    403: "A page of another site asked, or another host was named, where no keys are asked.",
    404: "There is no such model, release or path.",
    405: "The path has no such method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The content type is another one, or the body is compressed.",
    429: "Too many requests are under way, or a limit of the key is reached.",
    431: "The path and the headers are too large.",
    500: "The server failed on the request.",
    503: "A part of the server starts, stops or does not answer.",
    504: "The request took longer than it may.",
}
_OF_ANY_PATH = (401, 403, 404, 405, 431, 500, 503, 504)
_SUMMARIES = {
    "embed_image": "Embed images.",
    "embed_text": "Embed texts.",
    "retrieve": "Search an index with texts, images and ids.",
    "segment": "Label each pixel of an image.",
    "classify": "Rank labels for each image.",
}


@functools.cache
def document() -> Schema:
    """The document, OpenAPI 3.1, of all paths of the gateway and of `--engine process`."""
    schemas: dict[str, Schema] = {}
    paths: dict[str, Schema] = {}

    # Tasks
    for name, task in TASKS.items():
        title = name.title().replace("_", "")
        schemas[f"{title}Request"] = _asked(name, task, schemas)
        schemas[f"{title}Answer"] = _answer(name, task)
        asked = {"$ref": f"#/components/schemas/{title}Request"}
        answer = {"$ref": f"#/components/schemas/{title}Answer"}
        for place, suffix, parameters in _RELEASES:
            paths[f"/v2/models/{name}{place}/infer"] = {
                "post": {
                    "operationId": f"{name}{suffix}",
                    "summary": _SUMMARIES[name],
                    "parameters": [*parameters, _HEADER_LENGTH],
                    "requestBody": {
                        "required": True,
                        "content": {
                            _JSON: {"schema": asked},
                            _BINARY: {"schema": {"type": "string", "format": "binary"}},
                        },
                    },
                    "responses": _responses(
                        {_JSON: answer, _BINARY: {"type": "string", "format": "binary"}},
                        list(_ERRORS),
                        has_receipt=True,
                    ),
                }
            }

    # Facts about the tasks
    tensors = _list(_object({"name": _TEXT, "datatype": _TEXT, "shape": _list(_WHOLE)}))
    metadata = _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": tensors,
            "outputs": tensors,
        }
    )
    facts: Sequence[tuple[str, str, str, Schema]] = (
        ("", "metadata", "Inputs, outputs and releases of a task.", metadata),
        ("/config", "config", "Inputs, outputs and facts of the releases.", {"type": "object"}),
        (
            "/ready",
            "model_ready",
            "Whether a task is ready.",
            _object({"name": _TEXT, "ready": {"const": True}}),
        ),
    )
    for end, operation, summary, schema in facts:
        # A task that is not ready answers 400, as Triton does.
        errors = [400] if end == "/ready" else []
        for place, suffix, parameters in _RELEASES:
            paths[f"/v2/models/{{model}}{place}{end}"] = _get(
                f"{operation}{suffix}", summary, schema, [_MODEL, *parameters], errors
            )

    # OpenAI's API
    vector: Schema = {"anyOf": [_TEXT, _list({"type": "number"})]}
    row = _object({"object": {"const": "embedding"}, "index": _WHOLE, "embedding": vector})
    embeddings = _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _WHOLE, "total_tokens": _WHOLE}),
            "data": _list(row),
        },
        open=True,
    )
    paths["/v1/embeddings"] = {
        "post": {
            "operationId": "embeddings",
            "summary": "Embed texts and images, as OpenAI's API does.",
            "requestBody": {
                "required": True,
                "content": {_JSON: {"schema": _of(openai.Body, schemas)}},
            },
            "responses": _responses(
                {_JSON: embeddings}, list(_ERRORS), "OpenAIError", has_receipt=True
            ),
        }
    }
    described = _object({"id": _TEXT, "object": {"const": "model"}, "created": _WHOLE}, open=True)
    paths["/v1/models"] = _get(
        "models",
        "The releases and the adapters that the key sees, as OpenAI's list of models.",
        _object({"object": {"const": "list"}, "data": _list(described)}),
        error="OpenAIError",
    )
    paths["/v1/models/{model}"] = _get(
        "model",
        "One release or adapter, named as a model.",
        described,
        [{**_MODEL, "schema": _TEXT}],
        error="OpenAIError",
    )

    # The indexes, the server, its metrics and health, and this document
    server = _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)})
    about = "Name, version and extensions of the server."
    indexes = _object({"indexes": _list(_TEXT)})
    others: Sequence[tuple[str, str, str, Schema]] = (
        ("/v2/models/retrieve/indexes", "indexes", "Names of the indexes.", indexes),
        ("/v2", "server", about, server),
        ("/v2/", "server_of_kserve", about, server),
        ("/metrics", "metrics", "What Prometheus reads.", _TEXT),
        ("/openapi.json", "openapi", "This document.", {"type": "object"}),
        ("/health/live", "live", "Whether the server runs.", _flag("live")),
        ("/health/ready", "ready", "Whether every task answers.", _flag("ready")),
        ("/v2/health/live", "livev2", "Whether the server runs.", _flag("live")),
        ("/v2/health/ready", "readyv2", "Whether every task answers.", _flag("ready")),
    )
    for path, operation, summary, schema in others:
        paths[path] = _get(operation, summary, schema)
        if "/health/" in path:
            paths[path]["get"]["security"] = []
    paths["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": _TEXT}}

    code = {"enum": sorted(CODES)}
    schemas["Error"] = _object(
        {"error": {"type": "string", "description": f"[code] message; codes: {code['enum']}"}}
    )
    error = {
        "message": _TEXT,
        "type": _TEXT,
        "param": {"anyOf": [_TEXT, {"type": "null"}]},
        "code": code,
    }
    schemas["OpenAIError"] = _object({"error": _object(error)})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "radapter-serve",
            "version": __version__,
            "description": "KServe v2 inference and OpenAI's embeddings on releases of CLIP.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": dict(sorted(paths.items())),
        "security": [{"key": []}, {}],
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {
                f"{kind}{status}": {
                    "description": description,
                    "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{kind}"}}},
                }
                for kind in ("Error", "OpenAIError")
                for status, description in _ERRORS.items()
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


# The type of a tensor's values in JSON
_KINDS = {
    "BOOL": "boolean",
    "BYTES": "string",
    "FP32": "number",
    "INT32": "integer",
    "UINT8": "integer",
    "UINT16": "integer",
}
_WHOLE: Schema = {"type": "integer"}
_RECEIPT: Schema = {
    "description": (
        "JSON with the release, the adapter and its digest (null without one) and the alpha of the"
        " answer, if all rows have the same, and mapped, the recall of a mapped index; a task's"
        " JSON has it in its parameters, too."
    ),
    "schema": {"type": "string"},
}
_MODEL: Schema = {
    "name": "model",
    "in": "path",
    "required": True,
    "schema": {"enum": list(TASKS)},
}
_VERSION: Schema = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "Number of the release.",
    "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"},
}
# The newest release of a task, and one by its number: path, end of the operation's name, parameters
_RELEASES: Sequence[tuple[str, str, Sequence[Schema]]] = (
    ("", "", ()),
    ("/versions/{version}", "_by_release", (_VERSION,)),
)
_HEADER_LENGTH: Schema = {
    "name": kserve.HEADER_LENGTH,
    "in": "header",
    "description": "Bytes of JSON at the start of a body with binary tensors.",
    "schema": {"type": "integer", "minimum": 1},
}


def _object(properties: Mapping[str, Schema], *, open: bool = False) -> Schema:
    """The schema of an object that has all these properties, and others if it is `open`."""
    schema: Schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
    }
    return schema if open else {**schema, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _flag(name: str) -> Schema:
    return _object({name: {"const": True}})


def _get(
    operation: str,
    summary: str,
    schema: Schema,
    parameters: Sequence[Schema] = (),
    errors: Sequence[int] = (),
    error: str = "Error",
) -> Schema:
    """The path of an operation without a body."""
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            "parameters": list(parameters),
            "responses": _responses({_JSON: schema}, [*errors, *_OF_ANY_PATH], error),
        }
    }


def _responses(
    contents: Mapping[str, Schema],
    errors: Sequence[int],
    error: str = "Error",
    *,
    has_receipt: bool = False,
) -> Schema:
    """The responses of an operation: its answer in one or two content types, and errors."""
    answer: Schema = {"description": "The answer."}
    if has_receipt:
        answer["headers"] = {kserve.RECEIPT_HEADER: _RECEIPT}
    responses: Schema = {
        "200": {
            **answer,
            "content": {kind: {"schema": schema} for kind, schema in contents.items()},
        }
    }
    for status in sorted(errors):
        kind = "Error" if status == 431 else error  # it is refused before its path is read
        responses[str(status)] = {"$ref": f"#/components/responses/{kind}{status}"}
    return responses


def _of(model: type[BaseModel], schemas: dict[str, Schema]) -> Schema:
    """The schema of a body that pydantic checks; the models inside it are added to `schemas`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    return schema


def _asked(name: str, task: Task[Any, Any], schemas: dict[str, Schema]) -> Schema:
    """The body of a request to a task: KServe's, with the tensors of the task."""
    schema = _of(kserve.Header, schemas)
    schemas.pop("Input", None)
    tensors = []
    for tensor in task.inputs.values():
        # Values are flat, or nested according to the shape.
        kind = _KINDS[tensor.datatype]
        size = len(tensor.dims) + (1 if task.batched else 0)
        described = _object(
            {
                "name": {"const": tensor.name},
                "datatype": {"const": tensor.datatype},
                "shape": {
                    **_list({"type": "integer", "minimum": 1}),
                    "minItems": size,
                    "maxItems": size,
                },
                "data": _list({"type": [kind, "array"]}),
            }
        )
        sizes = {"binary_data_size": {"type": "integer", "minimum": 0}}
        described["properties"]["parameters"] = {"type": "object", "properties": sizes}
        described["required"] = ["name", "datatype", "shape"]
        tensors.append(described)
    schema["title"] = f"A request to {name}"
    schema["properties"]["inputs"]["items"] = {"oneOf": tensors}
    return schema


def _answer(name: str, task: Task[Any, Any]) -> Schema:
    """The JSON of a task's answer."""
    outputs = [
        _object(
            {
                "name": {"const": tensor.name},
                "datatype": {"const": tensor.datatype},
                "shape": _list({"type": "integer", "minimum": 0}),
                "data": {"type": "array"},
            }
        )
        for tensor in task.outputs.values()
    ]
    return _object(
        {
            "model_name": {"const": name},
            "model_version": _TEXT,
            "outputs": _list({"oneOf": outputs}),
        },
        open=True,
    )


if __name__ == "__main__":
    print(json.dumps(document(), indent=1))
