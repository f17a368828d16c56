"""The OpenAPI document of the HTTP API, made from the tables that the server itself reads."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from radapter_serve.gateway import kserve, openai
from radapter_serve.gateway.upstream import CODES
from radapter_serve.tasks.table import TASKS, Task
from radapter_serve.version import __version__

Schema = dict[str, Any]
_JSON = "application/json"
_BINARY = "application/octet-stream"
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
# Forms of answers: a type, a constant, a list of a form, or an object of forms by name, with `...`
# among the names if it may have others.
_READY = {"name": str, "ready": True}
_SERVER = {"name": str, "version": str, "extensions": [str]}
_TENSORS = [{"name": str, "datatype": str, "shape": [int]}]
_METADATA = {
    "name": str,
    "versions": [str],
    "platform": str,
    "inputs": _TENSORS,
    "outputs": _TENSORS,
}
_MODEL: dict[Any, Any] = {"id": str, "object": "model", "created": int, ...: ...}
_EMBEDDINGS: dict[Any, Any] = {
    "object": "list",
    "model": str,
    "usage": {"prompt_tokens": int, "total_tokens": int},
    "data": [{"object": "embedding", "index": int, "embedding": (str, [float])}],
    ...: ...,
}
# What is read: path, name and summary of the operation, and form of the answer
_READ: tuple[tuple[str, str, str, Any], ...] = (
    ("/health/live", "live", "Whether the server runs.", {"live": True}),
    ("/health/ready", "ready", "Whether every task answers.", {"ready": True}),
    ("/v2/health/live", "livev2", "Whether the server runs.", {"live": True}),
    ("/v2/health/ready", "readyv2", "Whether every task answers.", {"ready": True}),
    ("/metrics", "metrics", "What Prometheus reads.", str),
    ("/openapi.json", "openapi", "This document.", dict),
    ("/v2", "server", "Name, version and extensions of the server.", _SERVER),
    ("/v2/", "server_of_kserve", "Name, version and extensions of the server.", _SERVER),
    ("/v2/models/{model}", "metadata", "Inputs, outputs and releases of a task.", _METADATA),
    ("/v2/models/{model}/config", "config", "Inputs, outputs and facts of the releases.", dict),
    ("/v2/models/{model}/ready", "model_ready", "Whether a task is ready.", _READY),
    ("/v2/models/retrieve/indexes", "indexes", "Names of the indexes.", {"indexes": [str]}),
    (
        "/v1/models",
        "models",
        "The releases and the adapters that the key sees, as OpenAI's list of models.",
        {"object": "list", "data": [_MODEL]},
    ),
    ("/v1/models/{model}", "model", "One release or adapter, named as a model.", _MODEL),
)
# The type of a tensor's values in JSON
_KINDS = {
    "BOOL": "boolean",
    "BYTES": "string",
    "FP32": "number",
    "INT32": "integer",
    "UINT8": "integer",
    "UINT16": "integer",
}
# Parameters in a path
_PARAMETERS: dict[str, Schema] = {
    "model": {"schema": {"enum": list(TASKS)}},
    "version": {
        "description": "Number of the release.",
        "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"},
    },
}
_HEADER_LENGTH: Schema = {
    "name": kserve.HEADER_LENGTH,
    "in": "header",
    "description": "Bytes of JSON at the start of a body with binary tensors.",
    "schema": {"type": "integer", "minimum": 1},
}
_RECEIPT: Schema = {
    "description": (
        "JSON with the release, the adapter and its digest (null without one) and the alpha of the"
        " answer, if all rows have the same, and mapped, the recall of a mapped index; a task's"
        " JSON has it in its parameters, too."
    ),
    "schema": {"type": "string"},
}


@functools.cache
def document() -> Schema:
    """The document, OpenAPI 3.1, of all paths of the gateway and of `--engine process`."""
    code = {"enum": sorted(CODES)}
    text = {"type": "string", "description": f"[code] message; codes: {code['enum']}"}
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    openai_error = _schema({"message": str, "type": str, "param": str, "code": str})
    openai_error["properties"] |= {"param": nullable, "code": code}
    schemas: dict[str, Schema] = {
        "Error": {**_schema({"error": str}), "properties": {"error": text}},
        "OpenAIError": {**_schema({"error": dict}), "properties": {"error": openai_error}},
    }
    paths: dict[str, Schema] = {}
    for path, name, summary, form in _READ:
        kind = "text/plain" if path == "/metrics" else _JSON
        for place, suffix in _releases(path):
            paths[place] = _operation(place, name + suffix, summary, {kind: _schema(form)})
    for name, task in TASKS.items():
        title = name.title().replace("_", "")
        schemas[f"{title}Request"] = _request(name, task, schemas)
        schemas[f"{title}Answer"] = _answer(name, task)
        asked, answer = (
            {
                _JSON: {"$ref": f"#/components/schemas/{title}{end}"},
                _BINARY: {"type": "string", "format": "binary"},
            }
            for end in ("Request", "Answer")
        )
        for place, suffix in _releases(f"/v2/models/{name}/infer"):
            paths[place] = _operation(place, name + suffix, _SUMMARIES[name], answer, asked)
    paths["/v1/embeddings"] = _operation(
        "/v1/embeddings",
        "embeddings",
        "Embed texts and images, as OpenAI's API does.",
        {_JSON: _schema(_EMBEDDINGS)},
        {_JSON: openai.Body.model_json_schema()},
    )
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
                    "content": _contents({_JSON: {"$ref": f"#/components/schemas/{kind}"}}),
                }
                for kind in ("Error", "OpenAIError")
                for status, description in _ERRORS.items()
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schema(form: Any) -> Schema:
    """The schema of the values of a form."""
    if isinstance(form, dict):
        names = [name for name in form if name is not ...]
        schema: Schema = {
            "type": "object",
            "properties": {name: _schema(form[name]) for name in names},
            "required": names,
        }
        return schema if ... in form else {**schema, "additionalProperties": False}
    if isinstance(form, list):
        return {"type": "array", "items": _schema(form[0])}
    if isinstance(form, tuple):
        return {"anyOf": list(map(_schema, form))}
    if isinstance(form, type):
        kinds = {str: "string", int: "integer", float: "number", dict: "object", list: "array"}
        return {"type": kinds[form]}
    return {"const": form}


def _releases(path: str) -> list[tuple[str, str]]:
    """The path of the newest release and, below a task, of one by its number, each with the end of
    its operation's name.
    """
    found = re.fullmatch(r"(/v2/models/[^/]+)(|/config|/ready|/infer)", path)
    if found is None:
        return [(path, "")]
    return [(path, ""), (f"{found[1]}/versions/{{version}}{found[2]}", "_by_release")]


def _operation(
    path: str,
    name: str,
    summary: str,
    answer: dict[str, Schema],
    body: dict[str, Schema] | None = None,
) -> Schema:
    """An operation with its answer and its body, each a schema by content type."""
    parameters: list[Schema] = []
    for parameter in re.findall(r"{(\w+)}", path):
        known = _PARAMETERS[parameter]
        if path.startswith(openai.PREFIX):  # a release or an adapter
            known = {"schema": {"type": "string"}}
        parameters.append({"name": parameter, "in": "path", "required": True, **known})
    operation: Schema = {"operationId": name, "summary": summary, "parameters": parameters}
    success: Schema = {"description": "The answer.", "content": _contents(answer)}
    errors = list(_OF_ANY_PATH)
    if path.endswith("/ready") and "{model}" in path:
        errors.append(400)  # as Triton answers
    if "/health/" in path:
        operation["security"] = []
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _contents(body)}
        success["headers"] = {kserve.RECEIPT_HEADER: _RECEIPT}
        errors = list(_ERRORS)
        if _BINARY in body:
            parameters.append(_HEADER_LENGTH)
    operation["responses"] = {"200": success}
    for status in sorted(errors):
        # 431 is answered before the path is read.
        kind = "OpenAIError" if path.startswith(openai.PREFIX) and status != 431 else "Error"
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{kind}{status}"}
    return {"get" if body is None else "post": operation}


def _contents(schemas: dict[str, Schema]) -> Schema:
    return {kind: {"schema": schema} for kind, schema in schemas.items()}


def _request(name: str, task: Task[Any, Any], schemas: dict[str, Schema]) -> Schema:
    """The body of a request to a task: KServe's, with the tensors of the task."""
    schema = kserve.Header.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    of_any = parts.pop("Input")
    schemas.update(parts)
    tensors = []
    for tensor in task.inputs.values():
        size = len(tensor.dims) + (1 if task.batched else 0)
        properties = {
            **of_any["properties"],
            "name": {"const": tensor.name},
            "datatype": {"const": tensor.datatype},
            "shape": {**of_any["properties"]["shape"], "minItems": size, "maxItems": size},
            # Values are flat, or nested according to the shape.
            "data": {"type": "array", "items": {"type": [_KINDS[tensor.datatype], "array"]}},
        }
        tensors.append({**of_any, "properties": properties})
    schema["title"] = f"A request to {name}"
    schema["properties"]["inputs"]["items"] = {"oneOf": tensors}
    return schema


def _answer(name: str, task: Task[Any, Any]) -> Schema:
    """The JSON of a task's answer."""
    outputs = [
        _schema({"name": tensor.name, "datatype": tensor.datatype, "shape": [int], "data": list})
        for tensor in task.outputs.values()
    ]
    form: dict[Any, Any] = {"model_name": name, "model_version": str, "outputs": list, ...: ...}
    schema = _schema(form)
    schema["properties"]["outputs"]["items"] = {"oneOf": outputs}
    return schema


if __name__ == "__main__":
    print(json.dumps(document(), indent=1))
