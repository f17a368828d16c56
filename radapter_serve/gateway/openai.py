"""OpenAI's way in: releases are models, and `embed_text` and `embed_image` make the embeddings."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radapter_serve.contract.errors import IMAGE_TOO_LARGE, INVALID_IMAGE
from radapter_serve.gateway import embeddings
from radapter_serve.gateway.errors import SERVER_UNAVAILABLE, UNKNOWN_MODEL, Refused, escape
from radapter_serve.gateway.journal import Entry, timed_slot
from radapter_serve.gateway.limits import ConcurrencyLimit
from radapter_serve.gateway.models import Model
from radapter_serve.gateway.requests import Inference
from radapter_serve.gateway.upstream import Upstream

PREFIX = "/v1/"
NEWEST = "radapter"  # the newest release; NEWEST-N is release N
TASKS = {"texts": ("embed_text", "text"), "images": ("embed_image", "image")}


class OpenAI:
    """What the gateway answers below /v1.

    Args:
        upstream: that has the tasks.
        model: gives the configuration of a task; `fresh=0` has it asked for again.
        places: to run in.
    """

    def __init__(
        self,
        upstream: Upstream,
        model: Callable[..., Awaitable[Model]],
        concurrency: ConcurrencyLimit,
    ) -> None:
        self._upstream = upstream
        self._model = model
        self._concurrency = concurrency

    async def models(self) -> dict[str, Any]:
        """The list of releases."""
        releases = releases_of(await self._model("embed_text", fresh=0))
        newest = [_described(NEWEST, releases[max(releases)])] if releases else []
        named = [
            _described(f"{NEWEST}-{version}", facts)
            for version, facts in sorted(releases.items(), reverse=True)
        ]
        return {"object": "list", "data": newest + named}

    async def model(self, name: str) -> dict[str, Any]:
        """One release by its name."""
        _, facts = await self._release(name)
        return _described(name, facts)

    async def embed(self, asked: embeddings.Asked, seconds: float, entry: Entry) -> bytes:
        """The answer to a request for embeddings, all of them by one release.

        Args:
            asked: that is right as far as it goes.
            seconds: that it may take.
            entry: of the journal, which is told the release and the times.

        Raises:
            Refused: there is no such release, an image cannot be read, or a task fails.
        """
        end = time.monotonic() + seconds
        version, facts = await self._release(asked.model)
        asked.check_width(int(facts.get("embed_dim", 0)))
        async with timed_slot(self._concurrency, entry):
            try:
                rows, answered = await self._rows(asked, version, end, entry)
            except Refused as error:
                if version or error.code != UNKNOWN_MODEL:
                    raise
                # Another release took over in the middle.
                rows, answered = await self._rows(asked, version, end, entry)
        entry.release = answered
        return await embeddings.write(rows, f"{NEWEST}-{answered}", asked)

    async def _rows(
        self, asked: embeddings.Asked, version: str, end: float, entry: Entry
    ) -> tuple[list[NDArray[np.float32]], str]:
        """The embeddings in the order of the inputs, and the version that made them."""
        rows: dict[int, NDArray[np.float32]] = {}
        for kind, (task, tensor) in TASKS.items():
            values: dict[int, bytes] = getattr(asked, kind)
            places = list(values)
            step = (await self._model(task, version)).max_batch_size if places else 1
            for start in range(0, len(places), step):
                some = places[start : start + step]
                batch = np.empty((len(some), 1), object)
                batch[:, 0] = [values[place] for place in some]
                inputs: dict[str, NDArray[Any]] = {tensor: batch}
                if asked.alpha is not None:
                    inputs["alpha"] = np.full((len(some), 1), asked.alpha, np.float32)
                request = Inference(task, version, inputs)
                left = max(end - time.monotonic(), 1e-3)
                try:
                    reply = await self._upstream.infer(request, left, entry.followed)
                except Refused as error:
                    raise _placed(error, some) from None
                version = str(reply.version)  # the first that answers is asked for all the rest
                embeds = reply.outputs.get(f"{tensor}_embeds")
                if embeds is None or len(embeds) != len(some):
                    raise Refused(
                        503,
                        SERVER_UNAVAILABLE,
                        "the model server answers otherwise than radapter-serve does",
                    )
                rows.update(zip(some, embeds, strict=True))
        return [rows[place] for place in range(asked.count)], version

    async def _release(self, name: str) -> tuple[str, dict[str, Any]]:
        """Version, empty for the newest, and facts of a release by its name."""
        wanted = re.fullmatch(f"{NEWEST}(?:-([1-9][0-9]{{0,17}}))?", name)
        releases = releases_of(await self._model("embed_text"))
        found = _find(releases, wanted)
        if found is None:  # it may be served since a moment ago, and not be known yet
            releases = releases_of(await self._model("embed_text", fresh=0))
            found = _find(releases, wanted)
        if found is not None:
            return found
        known = ", ".join([NEWEST, *(f"{NEWEST}-{version}" for version in sorted(releases))])
        raise Refused(
            404, UNKNOWN_MODEL, f"no model {escape(name)} here; there are {known}", "model"
        )


def _find(
    releases: dict[int, dict[str, Any]], wanted: re.Match[str] | None
) -> tuple[str, dict[str, Any]] | None:
    """The version that a name asks for, empty for the newest, and its facts; None if there is
    none.
    """
    if wanted is None:
        return None
    if not wanted[1]:
        return ("", releases[max(releases)]) if releases else None
    version = int(wanted[1])
    return (wanted[1], releases[version]) if version in releases else None


def releases_of(model: Model) -> dict[int, dict[str, Any]]:
    """The facts of the releases by their versions, as a model's configuration has them."""
    facts = [json.loads(text) for text in model.releases.values()]
    return {int(one["version"]): one for one in facts}


def refusal(error: Refused) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    }


def _described(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """A release as an entry of the list; what is no field of OpenAI's, tools pass over."""
    try:
        created = int(datetime.fromisoformat(facts["created"]).timestamp())
    except (KeyError, ValueError):
        created = 0
    more = {
        key: facts.get(key)
        for key in ("version", "alpha", "architecture", "precision", "embed_dim")
    }
    return {"id": name, "object": "model", "created": created, "owned_by": "radapter-serve", **more}


def _placed(error: Refused, places: list[int]) -> Refused:
    """A task's refusal that names an image by its place in the batch, by its place among the
    inputs.
    """
    if error.message.startswith("alpha is "):
        return Refused(error.status, error.code, error.message, "alpha")
    found = re.match(r"image (\d+) of \d+: ", error.message)
    number = int(found[1]) if found else len(places)
    if (
        error.code not in (INVALID_IMAGE, IMAGE_TOO_LARGE)
        or number > len(places)
        or (not found and number > 1)
    ):
        return error
    name = embeddings.name_of(places[number - 1])
    return Refused(
        error.status, error.code, f"{name}: {error.message[found.end() if found else 0 :]}", name
    )
