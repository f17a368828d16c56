"""What holds for every request before the gateway looks at it, and for every answer on its way out.

`connections` bounds the rest: how many connections there are, the handshake, the time that headers
take, pipelining, trailers, upgrades, and callers who do not read.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radapter_serve.gateway.errors import TOO_LARGE, UNAUTHORIZED, Refused

MAX_HEADERS = 32 * 1024  # bytes
PIECE = 512 * 1024  # bytes of an answer that the caller is given, and has to take, at once

Refuse = Callable[[Refused, Scope, Receive, Send], Awaitable[None]]


class Front:
    """An ASGI app in front of another.

    Args:
        app: that answers what is let through.
        refuse: sends a refusal.
        browsers: what a browser may ask; None where callers have keys, which no other site's page
            can send.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse, browsers: BrowserRule | None) -> None:
        self._app = app
        self._refuse = refuse
        self._browsers = browsers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            check_size(scope)
            if self._browsers is not None:
                self._browsers.check(Headers(scope=scope))
        except Refused as error:
            await self._refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, _in_pieces(send))


class BrowserRule:
    """Keeps other sites' pages out, where nothing else does: a browser sends what such a page asks.

    Args:
        host: that the gateway listens on, by name or address; None where it answers under every
            name.
    """

    def __init__(self, host: str | None) -> None:
        self._host = host

    def check(self, headers: Headers) -> None:
        """Let a request in by its `Host`, `Origin` and `Sec-Fetch-Site`.

        Raises:
            Refused: another site may have sent it.
        """
        hosts = headers.getlist("Host")
        if self._host is not None and not (len(hosts) == 1 and self._is_here(hosts[0])):
            # A name of another site may lead to this machine: to the browser, both are then one
            # site.
            raise Refused(
                403,
                UNAUTHORIZED,
                "without keys, the gateway answers under the names of this machine, such as"
                " localhost, only",
            )
        origins = headers.getlist("Origin")
        foreign = [origin for origin in origins if urlsplit(origin).netloc not in hosts]
        if foreign or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(
                403, UNAUTHORIZED, "without keys, a page of another site may not use the gateway"
            )

    def _is_here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self._host) or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def check_size(scope: Scope) -> None:
    """Raise `Refused` where path and headers have more than `MAX_HEADERS` bytes.

    The server's own limit is one of its buffer, which may hold more.
    """
    size = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEADERS:
        raise headers_too_large()


def headers_too_large() -> Refused:
    """The refusal of path and headers that are too long."""
    return Refused(431, TOO_LARGE, f"the headers have more than {MAX_HEADERS} bytes")


def _in_pieces(send: Send) -> Send:
    """`send`, which hands over the next piece of an answer once the caller has taken the last."""

    async def sending(message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or len(body) <= PIECE:
            await send(message)
            return
        more = message.get("more_body", False)
        for start in range(0, len(body), PIECE):
            end = start + PIECE
            piece = {**message, "body": body[start:end], "more_body": more or end < len(body)}
            await send(piece)

    return sending
