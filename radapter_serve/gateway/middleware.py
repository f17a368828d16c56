"""ASGI middlewares, one duty each, in the order in which `app` lists them.

A response is recorded when it starts, so no figure depends on how fast the caller reads. Limits on
connections are in `connections`: their number, handshakes, slow headers, pipelining, trailers,
upgrades, and callers who do not read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radapter_serve.contract.errors import INTERNAL_ERROR, RETRYABLE, SERVER_STOPPING
from radapter_serve.encoders.encoder import encoder_ms
from radapter_serve.errors import install_command
from radapter_serve.gateway import openai
from radapter_serve.gateway.access import ANYONE, ConcurrencyLimit, Keys, MemoryBudget, Quota
from radapter_serve.gateway.upstream import CODES, LOG, UNAUTHORIZED, Entry, Refused
from radapter_serve.process import otlp_endpoint
from radapter_serve.release.release import TASKS

if TYPE_CHECKING:
    from radapter_serve.gateway.spans import Spans

REQUEST_ID = "X-Request-Id"
# Upper bounds of the request time's histogram, in seconds
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
MAX_ADAPTERS = 100  # names of adapters among the labels of a metric
OTHER = "other"
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


def _on_start(send: Send, note: Callable[[Message], object]) -> Send:
    """Wrap `send` so that `note` first gets the response's status and headers."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            note(message)
        await send(message)

    return sending


# Middlewares of every request


@dataclass(frozen=True)
class RequestId:
    """Gives every request an `Entry`, an id, which the response repeats, and no key or quota."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get(REQUEST_ID, "")
        # Other characters could forge lines of a log.
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope["state"].update(entry=Entry(request_id), key=ANYONE, quota=None)

        def add_id(answer: Message) -> None:
            MutableHeaders(scope=answer)[REQUEST_ID] = request_id

        await self.app(scope, receive, _on_start(send, add_id))


@dataclass(frozen=True)
class Errors:
    """Turns every exception into an error response, in OpenAI's form below /v1."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry: Entry = scope["state"]["entry"]
        try:
            await self.app(scope, receive, send)
            return
        except ClientDisconnect:
            entry.code = "caller_gone"
            entry.status = 499
            answer = Response(status_code=499)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, Refused):
                refused = error
            elif isinstance(error, asyncio.CancelledError):  # the gateway stops, and it alone does
                refused = Refused(503, SERVER_STOPPING, RETRYABLE[SERVER_STOPPING])
            else:
                LOG.exception("the gateway failed on the request %s", entry.id)
                why = "the gateway failed on this request; its log says why"
                refused = Refused(500, INTERNAL_ERROR, why)
            entry.code = refused.code
            entry.status = refused.status
            headers = {}
            if refused.status in (429, 503):
                headers["Retry-After"] = str(refused.retry_after)
            if refused.status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            content = {"error": str(refused)}
            if scope["path"].startswith(openai.PREFIX):
                content = openai.refusal(refused)
            answer = JSONResponse(content, refused.status, headers)
            # A frame with a reference to its own exception is a cycle: it would keep its objects,
            # such as the body, in memory until the garbage collector runs.
            cause: BaseException | None = error
            while cause is not None:
                cause.__traceback__ = None
                cause = cause.__context__
            del refused
        # If a response has started already, uvicorn refuses this one and closes the connection.
        await answer(scope, receive, send)


@dataclass(frozen=True)
class BrowserRule:
    """Refuses requests from web pages of other sites, according to `Host`, `Origin` and
    `Sec-Fetch-Site`.
    """

    app: ASGIApp
    host: str | None  # that the gateway listens on; None allows any `Host`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("Host")
        # DNS rebinding: the name of another site may resolve to this machine.
        if self.host is not None and not (len(hosts) == 1 and self._is_local(hosts[0])):
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
        await self.app(scope, receive, send)

    def _is_local(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self.host) or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


# Middlewares of some paths


class Metrics:
    """Prometheus metrics of a gateway; no label has a value that a caller sends."""

    def __init__(self, concurrency: ConcurrencyLimit, memory: MemoryBudget) -> None:
        self._registry = CollectorRegistry()
        registered: dict[str, Any] = {"namespace": "radapter_gateway", "registry": self._registry}
        self._seconds = Histogram(
            "request_seconds",
            "From a request's headers to its answer",
            ["task"],
            buckets=_BUCKETS,
            **registered,
        )
        self._requests = Counter("requests", "By outcome", ["task", "code"], **registered)
        self._requests_of_key = Counter(
            "key_requests", "By the caller's key and outcome", ["key", "code"], **registered
        )
        self._requests_of_adapter = Counter(
            "adapter_requests",
            f"By the adapter that answered, and outcome; {OTHER} beyond {MAX_ADAPTERS} names",
            ["adapter", "code"],
            **registered,
        )
        self._adapters: set[str] = set()  # that have answered, so none is a caller's invention
        self._images_of_key = Counter(
            "key_images", "Images that were sent with a key", ["key"], **registered
        )
        self._releases = Gauge(
            "release_info",
            "1 for a release that is served, as it is computed",
            ["release", "precision", "runtime"],
            **registered,
        )
        self._rechecks = Counter(
            "rechecks",
            "Stored samples that encoders were asked for again, by outcome",
            ["encoder", "outcome"],
            **registered,
        )
        running = Gauge("running", "Requests that Triton or the engine works on", **registered)
        running.set_function(lambda: concurrency.running)
        waiting = Gauge("waiting", "Requests in the queue", **registered)
        waiting.set_function(lambda: concurrency.waiting)
        Gauge("body_bytes", "Bytes of bodies and answers in memory", **registered).set_function(
            lambda: memory.held
        )

    def name_releases(self, releases: Mapping[int, Mapping[str, Any]]) -> None:
        """Name the served releases, from their facts."""
        self._releases.clear()
        for version, facts in releases.items():
            self._releases.labels(version, facts.get("precision"), facts.get("runtime")).set(1)

    def count_recheck(self, encoder: str, outcome: str) -> None:
        """Count an answer of an encoder to a stored sample."""
        self._rechecks.labels(encoder, outcome).inc()

    def count(self, entry: Entry, seconds: float) -> None:
        """Count an inference by its task, code and key."""
        code = entry.code if entry.code in (*CODES, "ok", "caller_gone") else "other"
        self._requests.labels(entry.task or "none", code).inc()
        if entry.task is not None:
            self._seconds.labels(entry.task).observe(seconds)
        if entry.adapter is not None:
            if code == "ok" and len(self._adapters) < MAX_ADAPTERS:
                self._adapters.add(entry.adapter)
            adapter = entry.adapter if entry.adapter in self._adapters else OTHER
            self._requests_of_adapter.labels(adapter, code).inc()
        if entry.key is not None:
            self._requests_of_key.labels(entry.key, code).inc()

    def count_images(self, key: str, count: int) -> None:
        self._images_of_key.labels(key).inc(count)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class Record:
    """Records a request when its response starts: a log line and, for an inference, more."""

    app: ASGIApp
    log: bool
    metrics: Metrics | None = None
    spans: Spans | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        entry: Entry = scope["state"]["entry"]
        if self.metrics is not None:
            model = scope["path_params"].get("model", "")
            if scope["path"].startswith(openai.PREFIX):
                entry.task = "embeddings"
            elif model in TASKS:
                entry.task = model
        span = None
        if self.spans is not None:
            headers = Headers(scope=scope)
            span = self.spans.begin(headers, scope["method"], scope["route"].path, entry)

        def record(answer: Message) -> None:
            seconds = time.monotonic() - start
            if self.metrics is not None:
                self.metrics.count(entry, seconds)
            if self.log:
                entry.bytes_out = int(Headers(raw=answer["headers"])["Content-Length"])
                entry.ms = 1e3 * seconds
                if entry.spans:
                    entry.encoder_ms = encoder_ms(entry.spans)
                entry.write()
            # A caller without a key must not send spans to the collector.
            if self.spans is not None and span is not None and entry.code != UNAUTHORIZED:
                self.spans.end(span, entry)

        await self.app(scope, receive, _on_start(send, record))


@dataclass(frozen=True)
class RequireKey:
    """Refuses callers without a key. An inference counts towards the key's quota; its images are
    counted by `quota` in the request's state.
    """

    app: ASGIApp
    keys: Keys
    quotas: dict[str, Quota] | None = None  # by name of the key; None for routes without inference
    at_once: int = 1  # requests of a key whose line sets no limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = self.keys.check(Headers(scope=scope).get("Authorization"))
        scope["state"]["entry"].key = key.name
        scope["state"]["key"] = key
        if self.quotas is None:
            await self.app(scope, receive, send)
            return
        quota = self.quotas.get(key.name)
        if quota is None or quota.key != key:  # the key is new, or its limits have changed
            quota = self.quotas[key.name] = Quota(key, self.at_once)
        scope["state"]["quota"] = quota
        with quota.request():
            await self.app(scope, receive, send)


@dataclass(frozen=True)
class HoldMemory:
    """Gives a request a `lease` of memory, until the last byte of its answer is sent."""

    app: ASGIApp
    memory: MemoryBudget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.memory.lease() as lease, anyio.CancelScope() as answering:
            scope["state"]["lease"] = lease
            # An answer that is given up ends in the middle, and so does its connection.
            await self.app(scope, receive, _on_start(send, lambda _: lease.lend(answering.cancel)))


def open_spans() -> Spans | None:
    """Return a `Spans`; None if tracing is off or OpenTelemetry is not installed."""
    variable = otlp_endpoint()
    if variable is None:
        return None
    try:
        from radapter_serve.gateway.spans import Spans  # here: loads slowly, and few need it
    except ImportError:
        LOG.warning(
            "%s is set, but no traces are sent, because OpenTelemetry is not installed; %s",
            variable,
            install_command("otel"),
        )
        return None
    return Spans()
