"""What the page's events do: each asks through the client, and gives HTML."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, TypeVar

import gradio

from radapter_client import AsyncClient, InvalidRequest, RAdapterClientError, Release
from radapter_serve.gateway.playground import shown
from radapter_serve.gateway.playground.door import key
from radapter_serve.inputs.names import names_of

T = TypeVar("T")
Connect = Callable[[str | None], AsyncClient]
NO_PICTURE = '<p class="note">Drop a picture on the left.</p>', ""


def told(handler: Callable[..., Awaitable[tuple[str, str]]]) -> Callable[..., Awaitable[tuple[str, str]]]:
    """A handler that shows why it gets no answer, in the answer's place."""

    @wraps(handler)
    async def telling(*given: Any) -> tuple[str, str]:
        try:
            return await handler(*given)
        except RAdapterClientError as error:
            return shown.wrong(error), ""

    return telling


class Ask:
    """The handlers of the page.

    Args:
        connect: a client of the gateway for a key.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        # One at a time, because each decodes a whole picture.
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="playground-drawing")

    async def begin(self, request: gradio.Request) -> tuple[Any, ...]:
        """What the page shows of the release: its facts, the slider of α or why there is none, label sets, indexes."""
        async with self._client(request) as client:
            try:
                release, indexes = await client.release(), await _indexes(client)
            except RAdapterClientError as error:
                return shown.wrong(error), gradio.skip(), "", gradio.skip(), gradio.skip()
        alpha = gradio.update(visible=release.dynamic_alpha, value=release.alpha)
        sets = gradio.update(choices=["", *release.label_sets], value="", visible=bool(release.label_sets))
        names = gradio.update(choices=indexes, value=indexes[0] if indexes else "")
        return shown.header(release), alpha, shown.why_no_slider(release), sets, names

    @told
    async def classify(
        self, picture: str, labels: str, label_set: str, alpha: float, request: gradio.Request
    ) -> tuple[str, str]:
        """The scores of a picture's labels."""
        if not picture:
            return NO_PICTURE
        async with self._client(request) as client:
            known = await client.release()
            names = {"label_set": label_set} if label_set else {"labels": lines(labels)}
            options: dict[str, Any] = {**names, "alpha": alpha if known.dynamic_alpha else None}
            found, seconds = await _timed(client.classify(image(picture), **options, top_k=10))
            return shown.scores(found), shown.took(seconds, await _who(client, found.release, known))

    @told
    async def search_text(self, text: str, index: str, count: float, request: gradio.Request) -> tuple[str, str]:
        """The images of an index that are nearest to a text."""
        return await self._search(request, index, count, text=text)

    @told
    async def search_picture(self, picture: str, index: str, count: float, request: gradio.Request) -> tuple[str, str]:
        """The images of an index that are nearest to the picture."""
        return await self._search(request, index, count, image=picture) if picture else NO_PICTURE

    async def _search(self, request: gradio.Request, index: str, count: float, **query: str) -> tuple[str, str]:
        async with self._client(request) as client:
            what: dict[str, Any] = {"image": image(query["image"])} if "image" in query else {**query}
            options: dict[str, Any] = {**what, "index": index or "", "top_k": int(count), "thumbnails": True}
            hits, seconds = await _timed(client.search(**options))
            return shown.gallery(hits), shown.took(seconds, await client.release())

    @told
    async def segment(
        self, picture: str, labels: str, threshold: float, side: float, alpha: float, request: gradio.Request
    ) -> tuple[str, str]:
        """The picture with its labels in colour."""
        if not picture:
            return NO_PICTURE
        async with self._client(request) as client:
            known = await client.release()
            options: dict[str, Any] = {"threshold": threshold or None, "short_side": int(side) or None}
            options["alpha"] = alpha if known.dynamic_alpha else None
            file = image(picture)
            found, seconds = await _timed(client.segment(file, lines(labels), **options))
            found = shown.smaller(found)  # at once, because many may wait to be drawn
            html = await asyncio.get_running_loop().run_in_executor(self._drawing, shown.segments, found, file)
            return html, shown.took(seconds, await _who(client, found.release, known))

    def _client(self, request: gradio.Request) -> AsyncClient:
        return self._connect(key(request.headers.get("authorization")))


def image(picture: str) -> bytes:
    """The file in a data URL, as a browser makes one of it; whether it is an image, the task says.

    Raises:
        InvalidRequest: it is no such URL.
    """
    found = re.match(r"data:[\w.+/-]{0,80};base64,", picture)
    try:
        data = base64.b64decode(picture[found.end() :], validate=True) if found else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise InvalidRequest("the picture cannot be read; drop another")
    return data


def lines(text: str | None) -> list[str]:
    """The labels of a text, one a line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


async def _timed(call: Awaitable[T]) -> tuple[T, float]:
    """The result of a call, and the seconds that it took."""
    start = time.perf_counter()
    return await call, time.perf_counter() - start


async def _who(client: AsyncClient, version: int, known: Release) -> Release:
    """The release of an answer, which a newer one may have given than that which was asked for before."""
    if version == known.version:
        return known
    return next((one for one in await client.releases() if one.version == version), known)


async def _indexes(client: AsyncClient) -> list[str]:
    """The names of the server's indexes, which its refusal of a name that is none lists."""
    try:
        await client.search("names", index=" ")
    except InvalidRequest as error:
        return names_of(str(error))
    except RAdapterClientError:  # the other tasks may answer all the same
        pass
    return []
