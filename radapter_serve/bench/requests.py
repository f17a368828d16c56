"""One request of each task, as a load sends it over and over."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from radapter_client import AsyncClient
from radapter_serve.bench.load import Send
from radapter_serve.errors import RAdapterError

TASKS = ("classify", "embed_image", "embed_text", "retrieve", "segment")
LABELS = ("a bicycle", "a bird", "a boat", "a car", "a cat", "a dog", "a house", "a person", "a street", "a tree")


@dataclass(frozen=True)
class Content:
    """What requests are about.

    Args:
        image: the bytes of an image file.
        labels: for classify and segment.
        label_set: instead of labels, one that was exported with the release.
        index: for retrieve.
    """

    image: bytes
    labels: tuple[str, ...] = LABELS
    label_set: str | None = None
    index: str | None = None


def picture(width: int = 640, height: int = 480, seed: int = 0) -> bytes:
    """A smooth random image as JPEG, about as large as a photo of that size."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def read_image(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        RAdapterError: it can't be read, or holds no image.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except Exception as error:  # Pillow raises many kinds
        why = getattr(error, "strerror", None) or "it is no image that can be read"
        raise RAdapterError(f"--image {path}: {why}") from None
    return data


def check(tasks: Sequence[str], content: Content) -> None:
    """Refuse tasks that can't be asked.

    Raises:
        RAdapterError: an unknown task, or retrieve without an index.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise RAdapterError(f"--tasks names {unknown[0]!r}; allowed are {', '.join(TASKS)}")
    if "retrieve" in tasks and content.index is None:
        raise RAdapterError("--tasks retrieve needs --index NAME; NAME is a folder of radapter-serve --indexes")


def sender(client: AsyncClient, task: str, content: Content) -> Send:
    """What sends one request of a task, one of `TASKS`.

    Texts differ from request to request, as no two users write the same.
    """
    labelled: dict[str, Any] = {"label_set": content.label_set} if content.label_set else {"labels": content.labels}

    async def send(number: int) -> object:
        if task == "classify":
            return await client.classify(content.image, **labelled)
        if task == "segment":
            return await client.segment(content.image, **labelled)
        if task == "embed_image":
            return await client.embed_images([content.image])
        text = f"a photo of {number} things"
        if task == "embed_text":
            return await client.embed_texts([text])
        return await client.search(text, index=str(content.index))

    return send
