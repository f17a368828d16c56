"""Ask a server by KServe's own client: python -m tests.helpers.use_kserve URL IMAGE TEXT ...

Prints the embeddings as JSON: of the texts, asked in JSON and in binary form, and of the image.
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


if __name__ == "__main__":
    _, address, place, *words = sys.argv
    print(json.dumps(asyncio.run(use(address, Path(place), words))))
