"""OpenAI's API: releases are models, and `embed_text` and `embed_image` compute the embeddings."""

from __future__ import annotations

import asyncio
import base64
import difflib
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from radapter_serve.contract.embeddings import weighted_sum
from radapter_serve.contract.errors import (
    IMAGE_TOO_LARGE,
    INVALID_ARGUMENT,
    INVALID_IMAGE,
    UNKNOWN_MODEL,
    TaskError,
)
from radapter_serve.contract.labels import check_length, known_as
from radapter_serve.gateway.access import Key, Lease
from radapter_serve.gateway.kserve import MAX_JSON_VALUES, Strict, from_json, receipt_of
from radapter_serve.gateway.upstream import (
    SERVER_UNAVAILABLE,
    Entry,
    Inference,
    Refused,
    ServedModel,
    Upstream,
    bad_request,
)
from radapter_serve.release.adapters import AdaptersBeside
from radapter_serve.release.release import Release

PREFIX = "/v1/"
NEWEST = "radapter"  # the newest release; NEWEST-N is release N
MEDIA = ("image/jpeg", "image/jpg", "image/png", "image/webp")
MAX_INPUTS = 2048  # in a request
CHARACTERS_PER_TOKEN = 4  # an estimate: the gateway has no tokenizer
_DATA_URL = re.compile(r"data:(image/|[^\s,]{0,200},)", re.IGNORECASE)
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_MAX_URL_HEAD = 256  # characters of a data URL up to its comma
# Bytes of an embedding's number in memory: as it is computed, and in the answer
_NUMBER_BYTES = {"float": 4 + 24, "base64": 4 + 6}
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF")


Weight = Annotated[float, Field(allow_inf_nan=False)]


class Body(Strict):
    model: Annotated[str, Field(max_length=200)]
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32", "float16"] = "float32"
    dimensions: int | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    modality: Literal["text", "image"] | None = None


class Both(Strict):
    """A text with its image; their weights are in this order."""

    text: str
    image: str
    weights: Annotated[list[Weight] | None, Field(min_length=2, max_length=2)] = None


@dataclass
class EmbeddingsRequest:
    """A checked request; texts (UTF-8) and image files are keyed by their position in the input, of
    which one may have both.
    """

    body: Body  # without its input
    texts: dict[int, bytes] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    # Of each position that has a text and an image
    weights: dict[int, list[float]] = field(default_factory=dict)
    adapter: str = ""
    tokens: int = 0  # an estimate


def read(text: bytes) -> EmbeddingsRequest:
    """Parse and check a body; errors have the position of the input, from 0."""
    body = from_json(Body, text, "send fewer inputs")
    # The whole input: a list of texts, not of tokens
    values = [body.input] if isinstance(body.input, str) else body.input
    if not isinstance(values, list) or not values:
        raise bad_request(
            "input is needed: a text, the data URL of an image, or a list of such", "input"
        )
    if all(
        type(value) is int or (type(value) is list and value and type(value[0]) is int)
        for value in values
    ):
        raise bad_request(
            "input holds tokens, and a release has another tokenizer; send texts. LangChain"
            " sends texts with OpenAIEmbeddings(check_embedding_ctx_length=False)",
            "input",
        )
    if len(values) > MAX_INPUTS:
        raise bad_request(
            f"input has {len(values)} values; send at most {MAX_INPUTS} in a request", "input"
        )
    if body.embed_dtype == "float16" and body.encoding_format != "base64":
        raise bad_request(
            "embed_dtype is float16, which numbers in JSON are not; set encoding_format to base64",
            "embed_dtype",
        )
    request = EmbeddingsRequest(body)
    body.input = None
    # Each value: an image, or a text
    for place in range(len(values)):
        value = values[place]
        values[place] = None  # frees the base64 of an image once it is decoded
        if type(value) is dict and body.modality is None:
            # A text and an image, of which the embedding is the weighted sum.
            try:
                both = Both.model_validate(value)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                named = ascii(".".join(map(str, first["loc"])))[1:-1][:60]
                raise _wrong(
                    place, f"is not a text with its image: {named}: {first['msg']}"
                ) from None
            value.clear()
            weights = both.weights or [1.0, 1.0]
            largest = max(map(abs, weights))
            if not largest:
                raise _wrong(place, "has only weights of 0; change one")
            if not _DATA_URL.match(both.image):
                raise _wrong(place, "has an image that is no data URL; send the file as one")
            request.images[place] = _decode_image(place, both.image)
            request.weights[place] = [weight / largest for weight in weights]
            _add_text(request, place, both.text)
            continue
        if type(value) is not str:
            raise _wrong(place, "is not a text; send texts, or images as data URLs")
        if body.modality != "text" and _DATA_URL.match(value):
            request.images[place] = _decode_image(place, value)
            continue
        if body.modality != "text" and _URL.fullmatch(value):
            raise _wrong(
                place,
                'is a URL, and no image is fetched; send the image as a data URL, or "modality":'
                ' "text" to embed the URL as a text',
            )
        if body.modality == "image":
            raise _wrong(
                place, 'is not an image; send a data URL, such as "data:image/jpeg;base64,..."'
            )
        _add_text(request, place, value)
    return request


def _add_text(request: EmbeddingsRequest, place: int, text: str) -> None:
    if not text.strip():
        raise _wrong(place, "is empty; give at least one word")
    try:
        check_length(text)
    except TaskError as error:
        raise bad_request(f"input[{place}]: {error.message}", f"input[{place}]") from None
    request.texts[place] = text.encode()
    request.tokens += -(-len(text) // CHARACTERS_PER_TOKEN)


def _decode_image(place: int, url: str) -> bytes:
    # Search only the beginning: the rest may be megabytes of base64.
    comma = url.find(",", 0, _MAX_URL_HEAD)
    head = url[5 : comma if comma >= 0 else _MAX_URL_HEAD]
    media, _, parameters = head.lower().partition(";")
    if comma < 0 or media not in MEDIA or parameters.rpartition(";")[2] != "base64":
        raise _wrong(
            place,
            f"begins with {head!a:.80}; images are data URLs of {', '.join(MEDIA)} in base64, and"
            ' a text that looks like one is sent with "modality": "text"',
        )
    try:
        file = base64.b64decode(url[comma + 1 :], validate=True)
    except ValueError:
        raise _wrong(place, "is a data URL with broken base64", INVALID_IMAGE) from None
    if not file.startswith(_MAGIC):
        raise _wrong(
            place,
            f"says {media}, but its {len(file)} bytes are not a JPEG, PNG or WebP file",
            INVALID_IMAGE,
        )
    return file


def _wrong(place: int, what: str, code: str = INVALID_ARGUMENT) -> Refused:
    return Refused(400, code, f"input[{place}] {what}", f"input[{place}]")


async def write(
    rows: Sequence[NDArray[np.float32]], model: str, request: EmbeddingsRequest, receipt: str = ""
) -> bytes:
    """Serialize an answer; lets other requests run after every 8 rows."""
    parts = []
    for place, row in enumerate(rows):
        embedding: Any = row.tolist()
        if request.body.encoding_format == "base64":
            kind = "<f2" if request.body.embed_dtype == "float16" else "<f4"
            embedding = base64.b64encode(row.astype(kind).tobytes()).decode()
        part = {"object": "embedding", "index": place, "embedding": embedding}
        parts.append(json.dumps(part, allow_nan=False))
        if place % 8 == 7:
            await asyncio.sleep(0)
    said = f'"receipt": {receipt}, ' if receipt else ""
    usage = json.dumps({"prompt_tokens": request.tokens, "total_tokens": request.tokens})
    head = f'{{"object": "list", "model": {json.dumps(model)}, "usage": {usage}, {said}"data": ['
    return f"{head}{', '.join(parts)}]}}".encode()


def refusal(error: Refused) -> dict[str, Any]:
    """The body of an error response in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    }


class OpenAI:
    """Answers requests below /v1; `model(task, version, fresh=0)` returns the facts of a task."""

    def __init__(
        self,
        upstream: Upstream,
        model: Callable[..., Awaitable[ServedModel]],
        asking: Callable[[Entry, Lease, int], AbstractAsyncContextManager[None]],
        repository: Path | None = None,  # with the list of adapters
    ) -> None:
        self._upstream = upstream
        self._model = model
        self._asking = asking
        self._adapters = None if repository is None else AdaptersBeside(repository, None)

    async def models(self, key: Key) -> dict[str, Any]:
        """The list of releases, the newest first, and of adapters; a key sees its own."""
        releases = (await self._model("embed_text", fresh=0)).facts()
        versions = sorted(releases, reverse=True)
        data = [_described(NEWEST, releases[version]) for version in versions[:1]]
        data += [_described(f"{NEWEST}-{version}", releases[version]) for version in versions]
        if not key.allows(""):
            data = []
        # An adapter of an older release alone is asked with this release.
        seen: set[str] = set()
        for version in versions:
            facts = releases[version]
            for name in await self._adapters_beside(facts, key):
                if name not in seen:
                    parent = NEWEST if version == versions[0] else f"{NEWEST}-{version}"
                    id = name if parent == NEWEST else f"{parent}:{name}"
                    data.append(_of_adapter(id, name, parent, facts))
                    seen.add(name)
        return {"object": "list", "data": data}

    async def model(self, name: str, key: Key) -> dict[str, Any]:
        """One release or adapter by its name."""
        version, adapter, facts = await self._release(name, key)
        if not adapter:
            return _described(name, facts)
        parent = f"{NEWEST}-{version}" if version else NEWEST
        return _of_adapter(name, adapter, parent, facts)

    async def _adapters_beside(self, facts: dict[str, Any], key: Key) -> list[str]:
        """Names of the adapters beside a release that a key sees."""
        if self._adapters is None:
            return []
        entries = await asyncio.to_thread(self._adapters.entries)
        release = Release.from_dict(facts)
        text_tower = release.text_tower.digest(release.alpha)
        return [
            name
            for name, entry in sorted(entries.items())
            if entry.text_tower == text_tower and key.allows(name)
        ]

    async def embed(
        self, request: EmbeddingsRequest, seconds: float, entry: Entry, lease: Lease, key: Key
    ) -> tuple[bytes, str]:
        """Answer a request within `seconds`, all of it from one release, which `entry` notes;
        returns the answer and its receipt.
        """
        end = time.monotonic() + seconds
        version, adapter, facts = await self._release(request.body.model, key)
        request.adapter = adapter
        entry.adapter = adapter or None
        width = facts.get("embed_dim")
        if not isinstance(width, int):
            raise Refused(
                503,
                SERVER_UNAVAILABLE,
                "the release does not say its embed_dim; export it again with radapter-export",
            )
        dimensions = request.body.dimensions
        if dimensions not in (None, width):
            raise bad_request(
                f"dimensions is {dimensions}; embeddings of this release have {width}, and"
                " no base here was trained to be cut (Matryoshka): leave dimensions out",
                "dimensions",
            )
        count = len(request.texts.keys() | request.images.keys())
        numbers = count * width
        if request.body.encoding_format == "float" and numbers > MAX_JSON_VALUES:
            raise bad_request(
                f"{count} embeddings of {width} numbers are too many for JSON; send at most"
                f" {MAX_JSON_VALUES // width} inputs, or ask for encoding_format base64",
                "encoding_format",
            )
        size = numbers * _NUMBER_BYTES[request.body.encoding_format]
        async with self._asking(entry, lease, size):
            with key.hiding_others([adapter]):
                try:
                    rows, answered, receipt = await self._rows(request, version, end, entry)
                except Refused as error:
                    if version or error.code != UNKNOWN_MODEL:
                        raise
                    # The release was replaced between two batches: start again with the new one.
                    rows, answered, receipt = await self._rows(request, version, end, entry)
        entry.release = answered
        model = request.body.model if adapter else f"{NEWEST}-{answered}"
        return await write(rows, model, request, receipt), receipt

    async def _rows(
        self, request: EmbeddingsRequest, version: str, end: float, entry: Entry
    ) -> tuple[list[NDArray[np.float32]], str, str]:
        """Return the embeddings in the order of the inputs, the version that computed them, and
        the receipt.
        """
        receipt = ""
        rows: dict[int, NDArray[np.float32]] = {}
        # The text and the image, each with its weight, of the positions that have both
        parts: dict[int, list[tuple[NDArray[np.float32], float]]] = {}
        for tensor, values in (("text", request.texts), ("image", request.images)):
            places = list(values)
            task = f"embed_{tensor}"
            step = (await self._model(task, version)).max_batch_size if places else 1
            for start in range(0, len(places), step):
                batch = places[start : start + step]
                column = np.empty((len(batch), 1), object)
                column[:, 0] = [values[place] for place in batch]
                inputs: dict[str, NDArray[Any]] = {tensor: column}
                if request.adapter:
                    inputs["adapter"] = np.full((len(batch), 1), request.adapter, object)
                if request.body.alpha is not None:
                    inputs["alpha"] = np.full((len(batch), 1), request.body.alpha, np.float32)
                left = max(end - time.monotonic(), 1e-3)
                try:
                    reply = await self._upstream.infer(
                        Inference(task, version, inputs), left, entry
                    )
                except Refused as error:
                    raise _at_input(error, batch) from None
                version = str(reply.version)  # for all further rows, too
                before = receipt
                receipt = receipt_of(reply)
                changed = bool(before) and receipt != before
                if changed or (request.adapter and not _is_of(receipt, request.adapter)):
                    raise Refused(
                        503,
                        SERVER_UNAVAILABLE,
                        "the model server did not answer all inputs with the same adapter as asked;"
                        " try again",
                    )
                embeds = reply.outputs.get(f"{tensor}_embeds")
                if embeds is None or len(embeds) != len(batch):
                    raise Refused(
                        503,
                        SERVER_UNAVAILABLE,
                        "the model server did not answer with an embedding of each input",
                    )
                for place, row in zip(batch, embeds, strict=True):
                    rows[place] = row
                    if place in request.weights:
                        weight = request.weights[place][tensor == "image"]
                        parts.setdefault(place, []).append((row, weight))
        for place, of_place in parts.items():
            both, weights = zip(*of_place, strict=True)
            total = weighted_sum(both, weights)
            if total is None:
                raise _wrong(place, "has weights that cancel to nothing; change one")
            rows[place] = total
        return [rows[place] for place in range(len(rows))], version, receipt

    async def _release(self, name: str, key: Key) -> tuple[str, str, dict[str, Any]]:
        """The version, empty for the newest, the adapter, empty for none, and the facts of a
        release, by the name of a model: a release, an adapter, or both with a colon.
        """
        wanted = re.fullmatch(f"{NEWEST}(?:-([1-9][0-9]{{0,17}}))?(?::(.{{1,200}}))?", name)
        version = "" if wanted is None else wanted[1] or ""
        adapter = "" if wanted is None else wanted[2] or ""
        if wanted is not None:
            key.check_adapters([adapter])
        releases: dict[int, dict[str, Any]] = {}
        names: list[str] = []
        # The cached configuration may lack a release that was just loaded: then ask again.
        for options in ({}, {"fresh": 0}):
            releases = (await self._model("embed_text", **options)).facts()
            if version:
                if int(version) in releases:
                    return version, adapter, releases[int(version)]
            elif releases:
                newest = releases[max(releases)]
                if wanted is not None:
                    return "", adapter, newest
                # A bare name is that of an adapter beside the newest release.
                names = await self._adapters_beside(newest, key)
                known = known_as(name, names)
                if known is not None:
                    return "", known, newest
        there = ", ".join([NEWEST, *(f"{NEWEST}-{version}" for version in sorted(releases))])
        near = difflib.get_close_matches(name, names, 3, 0.4)
        nearest = f"; the nearest adapters are: {', '.join(near)}" if near else ""
        message = f"no model {name!a:.80} here; there are {there}{nearest}"
        raise Refused(404, UNKNOWN_MODEL, message, "model")


def _described(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """A release as an entry of OpenAI's list of models, with additional facts."""
    try:
        created = int(datetime.fromisoformat(facts["created"]).timestamp())
    except (KeyError, ValueError):
        created = 0
    names = ("version", "alpha", "architecture", "precision", "runtime", "embed_dim")
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "radapter-serve",
        **{key: facts.get(key) for key in names},
    }


def _is_of(receipt: str, adapter: str) -> bool:
    """True if a receipt names an adapter, in any Unicode form."""
    named = json.loads(receipt)["adapter"] if receipt else None
    return named is not None and known_as(adapter, [named]) is not None


def _of_adapter(name: str, adapter: str, parent: str, facts: dict[str, Any]) -> dict[str, Any]:
    """An adapter as an entry of OpenAI's list of models; its parent is a release."""
    described = {**_described(name, facts), "parent": parent, "adapter": adapter}
    del described["alpha"]  # that of the release
    return described


def _at_input(error: Refused, places: list[int]) -> Refused:
    """Change an error so that it has an image's position in the input, not in the batch."""
    if error.message.startswith("alpha is "):
        return Refused(error.status, error.code, error.message, "alpha")
    in_batch = re.match(r"image (\d+) of \d+: ", error.message)
    if in_batch is None and len(places) > 1:
        return error
    number = 1 if in_batch is None else int(in_batch[1])
    if error.code not in (INVALID_IMAGE, IMAGE_TOO_LARGE) or number > len(places):
        return error
    name = f"input[{places[number - 1]}]"
    message = error.message if in_batch is None else error.message[in_batch.end() :]
    return Refused(error.status, error.code, f"{name}: {message}", name)
