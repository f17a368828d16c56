"""The body of `POST /v1/embeddings`, as OpenAI has it, to texts and images, and embeddings to its
answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from radapter_serve.contract.errors import INVALID_ARGUMENT, INVALID_IMAGE, TaskError
from radapter_serve.contract.labels import check_length
from radapter_serve.gateway.errors import Refused, bad_request, escape
from radapter_serve.gateway.requests import MAX_JSON_VALUES, Strict, from_json

MEDIA = ("image/jpeg", "image/jpg", "image/png", "image/webp")
CHARACTERS_PER_TOKEN = (
    4  # the gateway has no tokenizer, so what it says of the usage is an estimate
)
MAX_HEAD = 256  # characters of a data URL up to its comma
_PIECE = 2**20  # characters of base64, four of which are three bytes
_DATA_URL = re.compile(r"data:(image/|[^\s,]{0,200},)", re.IGNORECASE)
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF")
_TOKENS = (
    "input holds tokens, and a release has a tokenizer of its own; send texts. "
    "LangChain sends texts with OpenAIEmbeddings(check_embedding_ctx_length=False)"
)


class _Body(Strict):
    model: Annotated[str, Field(max_length=200)]
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    modality: Literal["text", "image"] | None = None


@dataclass
class Asked:
    """A request for embeddings that is right.

    Args:
        model: the release, by the name that the caller gave it.
        count: inputs in all.
        texts, images: by their places among the inputs: UTF-8, and files.
        in_base64: whether embeddings are wanted so, and not as numbers.
        alpha: of all inputs; None for the release's own.
        dimensions: that the caller expects; None where it says nothing.
        tokens: an estimate.
    """

    model: str
    count: int
    texts: dict[int, bytes] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    in_base64: bool = False
    alpha: float | None = None
    dimensions: int | None = None
    tokens: int = 0

    def check_width(self, width: int) -> None:
        """Raise `Refused` where embeddings of this many numbers are not what was asked for, or too
        many for JSON.
        """
        if self.dimensions not in (None, width):
            raise bad_request(
                f"dimensions is {self.dimensions}; embeddings of this release have {width}, and are"
                " not cut: leave dimensions out",
                "dimensions",
            )
        if not self.in_base64 and self.count * width > MAX_JSON_VALUES:
            raise bad_request(
                f"{self.count} embeddings of {width} numbers are too many for JSON; send at most "
                f"{MAX_JSON_VALUES // width} inputs, or ask for encoding_format base64",
                "encoding_format",
            )


def read(text: bytes, max_inputs: int) -> Asked:
    """Read and check the body of a request.

    Args:
        text: JSON.
        max_inputs: that it may have.

    Raises:
        Refused: the first thing that is wrong, with its place among the inputs, from 0 as in the
            answer.
    """
    body = from_json(_Body, text, "send fewer inputs")
    values = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(values, list) or not values:
        raise bad_request(
            "input is needed: a text, the data URL of an image, or a list of such", "input"
        )
    if all(
        type(value) is int or (type(value) is list and value and type(value[0]) is int)
        for value in values
    ):
        raise bad_request(_TOKENS, "input")
    if len(values) > max_inputs:
        raise bad_request(
            f"input has {len(values)} values; send at most {max_inputs} in a request", "input"
        )
    asked = Asked(
        body.model,
        len(values),
        in_base64=body.encoding_format == "base64",
        alpha=body.alpha,
        dimensions=body.dimensions,
    )
    for place in range(len(values)):
        # Memory: the text of an image goes when its bytes are there.
        value = values[place]
        values[place] = None
        _add(asked, place, value, body.modality)
    return asked


def name_of(place: int) -> str:
    """What messages call an input."""
    return f"input[{place}]"


def _add(asked: Asked, place: int, value: Any, modality: str | None) -> None:
    """Put one input where it belongs."""
    if type(value) is not str:
        _wrong(place, "is no text; send texts, or images as data URLs")
    if modality != "text":
        if _DATA_URL.match(value):
            asked.images[place] = _image(place, value)
            return
        if _URL.fullmatch(value):
            _wrong(
                place,
                'is a URL, and no image is fetched; send the image as a data URL, or "modality":'
                ' "text" to embed the URL as a text',
            )
        if modality == "image":
            _wrong(place, 'is no image; send a data URL, such as "data:image/jpeg;base64,..."')
    if not value.strip():
        _wrong(place, "is empty; give at least one word")
    try:
        check_length(value)
    except TaskError as error:
        raise bad_request(f"{name_of(place)}: {error.message}", name_of(place)) from None
    asked.texts[place] = value.encode()
    asked.tokens += -(-len(value) // CHARACTERS_PER_TOKEN)


def _image(place: int, url: str) -> bytes:
    """The bytes of a data URL."""
    # Only so much is looked at: the rest may be anything, and is long.
    comma = url.find(",", 0, MAX_HEAD)
    head = url[5 : comma if comma >= 0 else MAX_HEAD]
    media, _, parameters = head.lower().partition(";")
    if comma < 0 or media not in MEDIA or parameters.rpartition(";")[2] != "base64":
        _wrong(
            place,
            f"begins with {escape(head)}; images are data URLs of {', '.join(MEDIA)} in base64, and"
            ' a text that looks like one is sent with "modality": "text"',
        )
    try:
        file = _decoded(url, comma + 1)
    except ValueError:
        _wrong(place, "is a data URL with broken base64", INVALID_IMAGE)
    if not file.startswith(_MAGIC):
        _wrong(
            place,
            f"says {media}, but its {len(file)} bytes are no JPEG, PNG or WebP file",
            INVALID_IMAGE,
        )
    return file


def _decoded(text: str, start: int) -> bytes:
    """Base64 from a place on, a piece at a time: other threads wait while Python decodes one.

    Raises:
        ValueError: it is broken.
    """
    if text.find("=", start, len(text) - 2) >= 0:
        raise ValueError("the end comes in the middle")
    pieces = range(start, len(text), _PIECE)
    return b"".join(base64.b64decode(text[at : at + _PIECE], validate=True) for at in pieces)


def _wrong(place: int, what: str, code: str = INVALID_ARGUMENT) -> NoReturn:
    raise Refused(400, code, f"{name_of(place)} {what}", name_of(place))


async def write(rows: Sequence[NDArray[np.float32]], model: str, asked: Asked) -> bytes:
    """The answer, of which others are let through to the event loop now and then."""
    parts = []
    for place, row in enumerate(rows):
        value = (
            base64.b64encode(row.astype("<f4").tobytes()).decode()
            if asked.in_base64
            else row.tolist()
        )
        parts.append(
            json.dumps({"object": "embedding", "index": place, "embedding": value}, allow_nan=False)
        )
        if place % 64 == 63:
            await asyncio.sleep(0)
    usage = json.dumps({"prompt_tokens": asked.tokens, "total_tokens": asked.tokens})
    head = f'{{"object": "list", "model": {json.dumps(model)}, "usage": {usage}, "data": ['
    return f"{head}{', '.join(parts)}]}}".encode()
