"""Ask a server by KServe's own client: python -m tests.helpers.use_kserve URL IMAGE TEXT ...

Prints the embeddings as JSON: of the texts, asked in JSON and in binary form, and of the image.
Without arguments it prints the OpenAPI document of KServe's own server in Python.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


async def use(url: str, image: Path, texts: list[str]) -> list[Any]:
    """Ask for health, for a model that is there and one that is not, and for embeddings."""
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "embed_text")
    assert not await client.is_model_ready(url, "embed_sound")
    embeddings = []
    for name, values, binary in (
        ("text", texts, False),
        ("text", texts, True),
        ("image", [image.read_bytes()], True),
    ):
        tensor = InferInput(name, [len(values), 1], "BYTES")
        column = np.array(values, object).reshape(-1, 1)
        tensor.set_data_from_numpy(column, binary_data=binary)
        model = f"embed_{name}"
        answer = await client.infer(url, InferRequest(model, [tensor]), model_name=model)
        [embeds] = [each for each in answer.outputs if each.name == f"{name}_embeds"]
        embeddings.append(embeds.as_numpy().tolist())
    await client.close()
    return embeddings


def document() -> dict[str, Any]:
    """The OpenAPI document of KServe's server, with the answer to an inference, which it leaves
    open, as the server checks it.
    """
    from fastapi import FastAPI
    from kserve.protocol.rest.v2_datamodels import InferenceResponse
    from kserve.protocol.rest.v2_endpoints import register_v2_endpoints

    app = FastAPI()
    register_v2_endpoints(app, None, None)
    api: dict[str, Any] = app.openapi()
    schemas = api["components"]["schemas"]
    answer = InferenceResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= answer.pop("$defs")
    content = api["paths"]["/v2/models/{model_name}/infer"]["post"]["responses"]["200"]["content"]
    content["application/json"]["schema"] = answer
    return api


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(document()))
        sys.exit()
    _, address, place, *words = sys.argv
    print(json.dumps(asyncio.run(use(address, Path(place), words))))
