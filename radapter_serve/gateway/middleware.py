"""ASGI middlewares of one duty each, in the order in which `app` lists them: what a request passes
before it comes to its handler, and what its answer passes on the way back.

An answer is noted when it begins, so no figure depends on how fast a caller reads. `connections`
bounds the rest: how many connections there are, the handshake, the time that headers take,
pipelining, trailers, upgrades, and callers who do not read. It passes on nothing but HTTP.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radapter_serve.contract.errors import INTERNAL_ERROR
from radapter_serve.encoders.steps import encoder_ms
from radapter_serve.environment import otlp_endpoint
from radapter_serve.extras import install_command
from radapter_serve.gateway import openai
from radapter_serve.gateway.errors import TOO_LARGE, UNAUTHORIZED, Refused, let_go
from radapter_serve.gateway.journal import Entry
from radapter_serve.gateway.keys import Keys
from radapter_serve.gateway.metrics import GONE, Metrics
from radapter_serve.gateway.quotas import Quotas
from radapter_serve.gateway.settings import Log
from radapter_serve.gateway.upstream import LOG
from radapter_serve.release.release import TASKS

if TYPE_CHECKING:
    from radapter_serve.gateway.spans import Spans

REQUEST_ID = "X-Request-Id"
MAX_HEADERS = 32 * 1024  # bytes
PIECE = 512 * 1024  # bytes of an answer that the caller is given, and has to take, at once
MAX_DISCARDED = 2**20  # bytes of the body of a refused request that are read and thrown away
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


def _on_start(send: Send, note: Callable[[Message], object]) -> Send:
    """`send`, which shows `note` the status and the headers of an answer before they go out."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            note(message)
        await send(message)

    return sending


# What every request passes


@dataclass(frozen=True)
class RequestId:
    """Gives every request an id, which its answer has too, and the `Entry` of the journal."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get(REQUEST_ID, "")
        # What may stand in a log and a header, so that no caller writes lines of his own.
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope["state"]["entry"] = Entry(request_id)

        def name(answer: Message) -> None:
            MutableHeaders(scope=answer)[REQUEST_ID] = request_id

        await self.app(scope, receive, _on_start(send, name))


@dataclass(frozen=True)
class Pieces:
    """Hands over the next piece of an answer once the caller has taken the last."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) <= PIECE:
                await send(message)
                return
            more = message.get("more_body", False)
            for start in range(0, len(body), PIECE):
                end = start + PIECE
                piece = {**message, "body": body[start:end], "more_body": more or end < len(body)}
                await send(piece)

        await self.app(scope, receive, sending)


@dataclass(frozen=True)
class DiscardBody:
    """Reads and throws away what is left of a refused request's body, for `seconds` at most, before
    the answer goes out: a caller who is cut off while he sends never reads why. Where that is not
    to be done, the connection ends with the answer.
    """

    app: ASGIApp
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        is_over = False

        async def receiving() -> Message:
            nonlocal is_over
            message = await receive()
            is_over = not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = Headers(scope=scope)
                # Who sends `Expect` asks whether to send a body at all.
                is_left = is_longer(headers, MAX_DISCARDED) or "Expect" in headers
                size = 0
                with anyio.move_on_after(self.seconds):
                    while not (is_over or is_left):
                        size += len((await receiving()).get("body", b""))
                        is_left = size > MAX_DISCARDED
                if is_left or not is_over:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, receiving, sending)


def is_longer(headers: Headers, most: int) -> bool:
    """Whether a request says that its body has more bytes."""
    length = headers.get("Content-Length", "")
    return length.isdigit() and int(length[:18]) > most


@dataclass(frozen=True)
class Errors:
    """Turns every failure of what follows into an answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry: Entry = scope["state"]["entry"]
        try:
            await self.app(scope, receive, send)
            return
        except Refused as error:
            answer = _refusal(error, scope)
            let_go(error)
        except ClientDisconnect:
            answer = Response(status_code=499)
            entry.code = GONE
            entry.status = answer.status_code
        except Exception as error:
            LOG.exception("the gateway failed on the request %s", entry.id)
            let_go(error)
            why = "the gateway failed on this request; its log says why"
            answer = _refusal(Refused(500, INTERNAL_ERROR, why), scope)
        # Where an answer has begun already, uvicorn takes no other, and ends the connection.
        await answer(scope, receive, send)


def _refusal(error: Refused, scope: Scope) -> Response:
    """The answer that says why a request is refused, in the form of what was asked."""
    entry: Entry = scope["state"]["entry"]
    entry.code = error.code
    entry.status = error.status
    headers = {"Retry-After": str(error.retry_after)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    is_openai = scope["path"].startswith(openai.PREFIX)
    content = openai.refusal(error) if is_openai else {"error": str(error)}
    return JSONResponse(content, error.status, headers)


@dataclass(frozen=True)
class HeaderLimit:
    """Refuses a path and headers that are too long."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_size(scope)
        await self.app(scope, receive, send)


def check_size(scope: Scope) -> None:
    """Raise `Refused` where path and headers have more than `MAX_HEADERS` bytes."""
    # The server's own limit is one of its buffer, which may hold more.
    size = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEADERS:
        raise headers_too_large()


def headers_too_large() -> Refused:
    """The refusal of path and headers that are too long."""
    return Refused(431, TOO_LARGE, f"the headers have more than {MAX_HEADERS} bytes")


@dataclass(frozen=True)
class BrowserRule:
    """Keeps other sites' pages out, where nothing else does: a browser sends what such a page asks.
    `host` is what the gateway listens on, by name or address; None where it answers under every
    name.
    """

    app: ASGIApp
    host: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.check(Headers(scope=scope))
        await self.app(scope, receive, send)

    def check(self, headers: Headers) -> None:
        """Raise `Refused` where another site may have sent a request, by its `Host`, `Origin` and
        `Sec-Fetch-Site`.
        """
        hosts = headers.getlist("Host")
        if self.host is not None and not (len(hosts) == 1 and self._is_here(hosts[0])):
            # A name of another site may lead to this machine: to the browser, both are then one
            # site.
            raise Refused(
                403,
                UNAUTHORIZED,
                "without keys, the gateway answers under the names of this machine, such as"
                " localhost, only",
            )
        origins = headers.getlist("Origin")
        foreign = [origin for origin in origins if origin.partition("//")[2] not in hosts]
        if foreign or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(
                403, UNAUTHORIZED, "without keys, a page of another site may not use the gateway"
            )

    def _is_here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self.host) or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


# What requests of some paths pass


@dataclass(frozen=True)
class Trace:
    """Sends a span of each inference."""

    app: ASGIApp
    spans: Spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry: Entry = scope["state"]["entry"]
        span = self.spans.begin(Headers(scope=scope), scope["method"], scope["route"].path)
        entry.followed.traceparent = span.traceparent

        def end(answer: Message) -> None:
            # Whoever has no key is not to say what is sent to the collector.
            if entry.code != UNAUTHORIZED:
                span.end(entry)

        await self.app(scope, receive, _on_start(send, end))


def open_spans() -> Spans | None:
    """What sends spans; None where they are not asked for, or can't be sent."""
    kind = None if otlp_endpoint() is None else _spans()
    return None if kind is None else kind()


def what_spans_lack() -> str | None:
    """What a user should know where spans are asked for and can't be sent; None if nothing."""
    variable = otlp_endpoint()
    if variable is None or _spans() is not None:
        return None
    return (
        f"{variable} is set, but no traces are sent, because OpenTelemetry is not installed;"
        f" {install_command('otel')}"
    )


def _spans() -> type[Spans] | None:
    try:
        from radapter_serve.gateway.spans import Spans  # here: it takes a while, and few need it
    except ImportError:
        return None
    return Spans


@dataclass(frozen=True)
class Journal:
    """Writes a line of each request."""

    app: ASGIApp
    log: Log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        entry: Entry = scope["state"]["entry"]

        def write(answer: Message) -> None:
            entry.bytes_out = int(Headers(raw=answer["headers"])["Content-Length"])
            entry.ms = round(1e3 * (time.monotonic() - start), 3)
            if entry.followed.steps:
                entry.encoder_ms = round(encoder_ms(entry.followed.steps), 3)
            entry.write(self.log)

        await self.app(scope, receive, _on_start(send, write))


@dataclass(frozen=True)
class Count:
    """Counts each inference in the metrics, by its task, its outcome and its key."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        entry: Entry = scope["state"]["entry"]
        model = scope["path_params"].get("model", "embeddings")
        if model in TASKS or scope["path"].startswith(openai.PREFIX):
            entry.task = model

        def count(answer: Message) -> None:
            self.metrics.count(entry.task or "none", entry.code, time.monotonic() - start)
            if entry.key is not None:
                self.metrics.count_key(entry.key, entry.code)

        await self.app(scope, receive, _on_start(send, count))


@dataclass(frozen=True)
class RequireKey:
    """Lets in callers with a key, and says what is left of its limits."""

    app: ASGIApp
    keys: Keys
    quotas: Quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = self.keys.check(Headers(scope=scope).get("Authorization"))
        scope["state"]["entry"].key = key.name
        scope["state"]["quota"] = self.quotas.of(key)
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class LimitKey:
    """Counts an inference among those that its key has under way, until it has an answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as running:
            running.enter_context(scope["state"]["quota"].request())
            await self.app(scope, receive, _on_start(send, lambda _: running.close()))
