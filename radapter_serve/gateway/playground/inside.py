"""The page's way to the models: the client, through the gateway's own app, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from starlette.types import ASGIApp

from radapter_client import AsyncClient, Request, Timeout
from radapter_client._http import answer, encode, target

WHERE = "http://gateway"


class Inside:
    """An `AsyncTransport` into an app: whoever asks by it is checked and bounded as every caller.

    Args:
        app: the gateway.
        key: API key, or None where the gateway has none.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=WHERE, headers=headers)

    async def send(self, request: Request, timeout: float) -> Any:
        body, headers = encode(request) if request.action == "infer" else (None, {})
        asked = self._client.request("GET" if body is None else "POST", target(request), content=body, headers=headers)
        try:
            found = await asyncio.wait_for(asked, timeout)
        except asyncio.TimeoutError:
            raise Timeout(f"no answer within {timeout:g} s") from None
        return answer(request, found.status_code, found.content, found.headers, WHERE)

    async def close(self) -> None:
        await self._client.aclose()


def client(app: ASGIApp, key: str | None, seconds: float) -> AsyncClient:
    """A client of the gateway, for one event of the page."""
    return AsyncClient(WHERE, transport=Inside(app, key), timeout=seconds, retries=0)
