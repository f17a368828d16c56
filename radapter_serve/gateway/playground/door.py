"""What of Gradio is open: the page with its scripts, and its own events. Everything else never reaches Gradio.

Gradio's app also has routes for files, uploads, sessions, a proxy and more, and it fetches a URL that stands where a
file could. The page needs none of them: pictures travel as texts in the events.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radapter_serve.gateway.app import Gateway, Gone, refusal, while_there
from radapter_serve.gateway.errors import NOT_FOUND, UNAUTHORIZED, UNSUPPORTED_TYPE, Refused, bad
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import LOG
from radapter_serve.inputs.errors import INTERNAL_ERROR

PATH = "/playground"
EVENT = f"{PATH}/gradio_api/run/predict"
_OPEN = re.compile(rf"{PATH}/(theme\.css|(assets|static)/[\w./@-]+)?")
# All that Gradio sees of a request. Without Origin it never lets another site read an answer.
_HEADERS = {b"host", b"authorization", b"content-type", b"if-none-match", b"x-forwarded-proto", b"x-forwarded-host"}
_SEALS = {
    # Nothing is loaded from another host or sent to one, whatever a script wants. Gradio compiles its templates.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Kinds = dict[int, list["tuple[float, float] | None"]]
Value = Annotated[float, Field(allow_inf_nan=False, strict=True)] | Annotated[str, Field(strict=True)] | None


class Event(BaseModel):
    """What the page sends: numbers and texts, so that no value can name a file or a URL for Gradio to open."""

    fn_index: int
    data: Annotated[list[Value], Field(max_length=16)]


class Door:
    """An ASGI app in front of Gradio's.

    Args:
        page: Gradio's app.
        kinds: of each event of the page, by its number: for each of its values, the least and the most that a number
            may be, or None for a text.
        gateway: whose keys and memory are used.
        settings: of the gateway.
    """

    def __init__(self, page: ASGIApp, kinds: Kinds, gateway: Gateway, settings: Settings) -> None:
        self._page, self._kinds, self._gateway, self._settings = page, kinds, gateway, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self._check(request)
            if scope["path"] == EVENT:
                with self._gateway.memory.share() as take:
                    body = await self._event(request, take)
                    answer = await while_there(request, self._answer(scope, body), self._settings.timeout)
                    await answer(scope, receive, send)
            else:
                await self._page(_seen(scope, b"accept-encoding"), receive, _sealed(send))
        except Refused as error:
            await _closed(error, request)(scope, receive, send)
        except (Gone, ClientDisconnect):
            pass

    def _check(self, request: Request) -> None:
        """Whether the request may go on; who asks comes first."""
        if self._gateway.keys is None and not self._settings.no_api_keys and not _here(request.headers.get("Host", "")):
            # A name of another site may lead here, and its scripts then belong to this page.
            raise Refused(
                403,
                UNAUTHORIZED,
                "without keys, the page is at http://localhost and http://127.0.0.1 only, on its port",
            )
        if self._gateway.keys is not None:
            self._gateway.keys.check(f"Bearer {key(request.headers.get('Authorization')) or ''}")
        path = request.scope["path"]
        method = "POST" if path == EVENT else "GET"
        if path != EVENT and not (_OPEN.fullmatch(path) and ".." not in path):
            raise Refused(404, NOT_FOUND, f"this path of the playground is not open; its page is {PATH}/")
        if request.method != method:
            raise Refused(405, NOT_FOUND, f"{request.method} of this path is not open; {method} is")
        if method == "POST" and request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise Refused(403, UNAUTHORIZED, "another site may not use this page in its visitor's name")

    async def _event(self, request: Request, take: Any) -> bytes:
        """The body of an event, with nothing in it that the page does not send."""
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, UNSUPPORTED_TYPE, "an event of the page is application/json")
        body = await self._gateway.body(request, take)
        try:
            event = Event.model_validate_json(body)
        except ValidationError:
            raise bad("this is no event of the page") from None
        kinds = self._kinds.get(event.fn_index)
        if kinds is None or len(kinds) != len(event.data) or not all(map(_fits, event.data, kinds)):
            raise bad("this is no event of the page")
        return event.model_dump_json().encode()  # without a session: Gradio keeps nothing of its callers

    async def _answer(self, scope: Scope, body: bytes) -> Response:
        """Gradio's answer to an event."""
        status, parts = 500, list[bytes]()

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        try:
            await self._page(_seen(scope), receive, send)
        except Exception:
            LOG.exception("the playground failed on an event")
            raise Refused(500, INTERNAL_ERROR, "the gateway failed on this request; its log says why") from None
        headers = {**_SEALS, "Cache-Control": "no-store"}
        return Response(b"".join(parts), status, headers, "application/json")


def key(authorization: str | None) -> str | None:
    """The key of a browser's login: the password of `Authorization: Basic`, whatever the name."""
    kind, _, given = (authorization or "").partition(" ")
    try:
        both = base64.b64decode(given, validate=True).decode() if kind.lower() == "basic" else ""
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return both.partition(":")[2] or None


def _here(host: str) -> bool:
    """Whether the `Host` of a request names this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _fits(value: float | str | None, kind: tuple[float, float] | None) -> bool:
    """Whether a value of an event is of the kind that belongs there."""
    if kind is None:
        return not isinstance(value, float)
    return isinstance(value, float) and kind[0] <= value <= kind[1]


def _seen(scope: Scope, *more: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS or name in more]
    return {**scope, "headers": headers, "query_string": b""}


def _sealed(send: Send) -> Send:
    """`send`, with the headers that keep the page to itself."""
    seals = [(name.lower().encode(), value.encode()) for name, value in _SEALS.items()]

    async def sealed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *seals]}
        await send(message)

    return sealed


def _closed(error: Refused, request: Request) -> Response:
    response = refusal(error, request)
    response.headers.update(_SEALS)
    if error.status == 401:  # the browser asks for a name and a password
        response.headers["WWW-Authenticate"] = 'Basic realm="Any name, and a key of this gateway as the password"'
    return response
