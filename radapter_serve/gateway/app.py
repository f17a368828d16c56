"""The gateway as an ASGI app: KServe v2 over HTTP, and OpenAI's embeddings, in front of an
`Upstream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from radapter_client import Reply
from radapter_serve import __version__
from radapter_serve.contract.errors import INTERNAL_ERROR
from radapter_serve.encoders.steps import encoder_ms
from radapter_serve.gateway import answers, embeddings, openai, requests, tracing
from radapter_serve.gateway.errors import (
    NOT_FOUND,
    SERVER_UNAVAILABLE,
    TOO_LARGE,
    UNKNOWN_MODEL,
    UNSUPPORTED_TYPE,
    Refused,
    bad_request,
    escape,
    let_go,
    timeout_error,
)
from radapter_serve.gateway.front import BrowserRule, Front
from radapter_serve.gateway.health import Health
from radapter_serve.gateway.journal import Entry, WithRequestId, timed_slot
from radapter_serve.gateway.keys import Keys
from radapter_serve.gateway.limits import Aside, ConcurrencyLimit, MemoryBudget
from radapter_serve.gateway.metrics import GONE, Metrics
from radapter_serve.gateway.models import Model, list_indexes
from radapter_serve.gateway.quotas import Quota, Quotas
from radapter_serve.gateway.settings import MIB, TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import LOG, Upstream
from radapter_serve.release.release import TASKS

# Of the body of a refused request, what is read and thrown away: a caller who is cut off while he
# sends it never reads why.
MAX_DISCARDED = 2**20  # bytes
# A body with more JSON, or one that is larger, is read in a thread; small ones don't wait behind
# large ones there.
SMALL_JSON = 2**16  # bytes
SMALL_BODY = 2**22
FRESH = 5.0  # seconds after which a model's configuration is asked for again
EMBEDDINGS = "embeddings"
_COUNTED = ("infer", EMBEDDINGS)  # the handlers that take a body
_TYPES = ("", "application/json", "application/octet-stream")
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class ClientDisconnected(Exception):
    """The caller closed the connection."""


class Gateway:
    """What the gateway answers.

    Args:
        settings: what it allows.
        connect: makes the way to Triton, in the event loop of the app.
        timeouts: how long it waits for others.

    Attributes:
        app: serves it, while it is `opened`.
        keys: that let callers in; None where there are none.
        memory: of the bodies of all requests.
        metrics: what it counts.
        health: while it is `opened`.
    """

    app: ASGIApp
    keys: Keys | None
    memory: MemoryBudget
    health: Health
    metrics: Metrics

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], Upstream],
        timeouts: Timeouts = TIMEOUTS,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._timeouts = timeouts
        self.keys = None if settings.api_keys is None else Keys(settings.api_keys)
        self._quotas = Quotas()
        self._models: dict[tuple[str, str], tuple[float, Model]] = {}
        self._outdated: Mapping[str, bool] = {}
        self._concurrency = ConcurrencyLimit(settings.max_concurrent, settings.max_queue)
        self.memory = MemoryBudget(int(settings.max_memory * MIB))
        self._small_bodies = Aside("small-bodies")
        self._large_bodies = Aside("large-bodies")
        self.metrics = Metrics(self._concurrency, self.memory)
        task = "/v2/models/{model}"
        # The first that fits is taken, so what is asked for most often comes first.
        paths: list[tuple[str, Handler]] = [
            *(
                (f"{task}{version}{tail}", handler)
                for tail, handler in (
                    ("/infer", self.infer),
                    ("/config", self.config),
                    ("/ready", self.model_ready),
                    ("/stats", self.statistics),
                )
                for version in ("", "/versions/{version}")
            ),
            ("/v2/models/stats", self.statistics),
            ("/v2/models/retrieve/indexes", self.indexes),
            (task, self.metadata),
            (f"{task}/versions/{{version}}", self.metadata),
            *(
                (f"{prefix}/health/{name}", getattr(self, name))
                for prefix in ("", "/v2")
                for name in ("live", "ready")
            ),
            ("/metrics", self.prometheus),
            ("/v2", self.server),
            (f"{openai.PREFIX}embeddings", self.embeddings),
            (f"{openai.PREFIX}models", self.releases),
            (f"{openai.PREFIX}models/{{model}}", self.releases),
        ]
        routes = [
            Route(
                path,
                self._guarded(handler, path),
                methods=["POST" if handler.__name__ in _COUNTED else "GET"],
            )
            for path, handler in paths
        ]
        closed: Any = self._closed
        app = Starlette(routes=routes, exception_handlers={404: closed, 405: closed})
        app.router.redirect_slashes = False
        browsers = None
        if self.keys is None:
            browsers = BrowserRule(None if settings.no_api_keys else settings.host)
        self.app = WithRequestId(Front(app, self._refuse, browsers))

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Where `app` can be asked: in the event loop in which it answers."""
        self._upstream = self._connect()
        self._spans = tracing.spans()
        self.health = Health(self._upstream)
        self._openai = openai.OpenAI(self._upstream, self._model, self._concurrency)
        try:
            yield
        finally:
            await self._upstream.close()
            self._small_bodies.close()
            self._large_bodies.close()
            if self._spans is not None:
                await asyncio.to_thread(self._spans.close, self._timeouts.spans)

    # What it answers

    async def live(self, request: Request) -> Response:
        """The gateway runs."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Every task answers."""
        why = await self.health.trouble()
        if why is not None:
            raise Refused(503, SERVER_UNAVAILABLE, why)
        return JSONResponse({"ready": True})

    async def prometheus(self, request: Request) -> Response:
        """What Prometheus reads; by a key, as everything else, so that one rule holds for the whole
        port.
        """
        # Else what was known last.
        with anyio.move_on_after(self._timeouts.index), contextlib.suppress(OSError):
            self._outdated = await self._upstream.outdated_indexes()
        text = self.metrics.text(self._outdated)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def statistics(self, request: Request) -> Response:
        raise Refused(
            404,
            NOT_FOUND,
            "the statistics of models are not open here; GET /metrics counts requests and their"
            " seconds",
        )

    async def server(self, request: Request) -> Response:
        return JSONResponse(
            {
                "name": "radapter-gateway",
                "version": __version__,
                "extensions": ["binary_tensor_data"],
            }
        )

    async def metadata(self, request: Request) -> Response:
        name, version = _named(request)
        model = await self._model(name, version)
        return JSONResponse(model.metadata(await self._upstream.versions(name)))

    async def config(self, request: Request) -> Response:
        """The configuration with the releases' facts, always asked of Triton: a client chooses its
        release by it.
        """
        name, version = _named(request)
        return JSONResponse((await self._model(name, version, fresh=0)).config())

    async def indexes(self, request: Request) -> Response:
        """The names of the indexes that `retrieve` searches."""
        return JSONResponse(await asyncio.to_thread(list_indexes, self._settings.indexes))

    async def model_ready(self, request: Request) -> Response:
        name, version = _named(request)
        if not await self._upstream.ready(name, version):
            raise Refused(400, SERVER_UNAVAILABLE, f"{name} is not ready")
        return JSONResponse({"ready": True})

    async def infer(self, request: Request) -> Response:
        """An inference, checked here, cancelled in Triton where its caller leaves or its time is
        over.
        """
        start = time.monotonic()
        name, version = _named(request)
        limit = self._settings.timeout
        with self.memory.lease() as acquire:
            body = await self.body(request, acquire)
            model = await self._model(name, version)
            length = request.headers.get(requests.HEADER_LENGTH)
            end = requests.json_length(length, len(body))
            read = partial(requests.read, body, length, model, version)
            asked = await self._read(request, body, end, limit - (time.monotonic() - start), read)
            del body, read
            self._count_images(request, asked.images)
            entry: Entry = request.state.entry
            left = min(limit, asked.timeout or limit) - (time.monotonic() - start)
            work = self._run(asked, left, entry)
            reply = await run_until_disconnect(request, work, left)
            entry.release = str(reply.version)
            self.health.answered(name)
            content, headers = answers.write(reply, asked)
            return Response(content, headers=headers)

    async def releases(self, request: Request) -> Response:
        """The releases as OpenAI's list of models, or one of them."""
        name = request.path_params.get("model")
        return JSONResponse(
            await (self._openai.models() if name is None else self._openai.model(name))
        )

    async def embeddings(self, request: Request) -> Response:
        """OpenAI's embeddings, of texts and images."""
        start = time.monotonic()
        with self.memory.lease() as acquire:
            body = await self.body(request, acquire)
            limit = self._settings.timeout
            read = partial(embeddings.read, body, self._settings.max_inputs)
            left = limit - (time.monotonic() - start)
            asked = await self._read(request, body, len(body), left, read)
            del body, read
            self._count_images(request, len(asked.images))
            left = limit - (time.monotonic() - start)
            work = self._openai.embed(asked, left, request.state.entry)
            answer = await run_until_disconnect(request, work, left)
            return Response(answer, media_type="application/json")

    async def body(self, request: Request, acquire: Callable[[int], None]) -> bytes:
        """The body of a request, within its time."""
        limit = self._settings.timeout
        # `asyncio.wait_for` would leave a cycle of references with every refusal, which keeps the
        # body, and with it the connection, until Python looks for cycles.
        with anyio.move_on_after(limit):
            body = await _body(request, int(self._settings.max_body * MIB), acquire)
            request.state.entry.bytes_in = len(body)
            return body
        raise timeout_error(408, f"the body did not come within {limit:g} s")

    async def _read(
        self, request: Request, body: bytes, end: int, seconds: float, read: Callable[[], T]
    ) -> T:
        """What a body says.

        Args:
            request: that the caller may give up.
            body: of it.
            end: of the JSON in it.
            seconds: that this may take.
            read: reads the body.
        """
        if end <= SMALL_JSON and len(body) <= SMALL_BODY:
            return read()
        aside = self._small_bodies if len(body) <= SMALL_BODY else self._large_bodies

        async def reading() -> T:
            async with aside.turn() as call:
                json = body[:end]
                size = await call(requests.json_memory, json)
                with self.memory.lease() as acquire:
                    # A request that has all memory to itself is never refused for what it takes.
                    acquire(min(size, self.memory.max_bytes - len(body)))
                    found: T = await call(read)
                    return found

        found: T = await run_until_disconnect(request, reading(), seconds)
        return found

    async def _run(self, asked: requests.Inference, seconds: float, entry: Entry) -> Reply:
        """The model's answer, as soon as the request may run; its deadline goes on to
        Triton.
        """
        end = time.monotonic() + seconds
        async with timed_slot(self._concurrency, entry):
            left = max(end - time.monotonic(), 1e-3)
            return await self._upstream.infer(asked, left, entry.followed)

    def _count_images(self, request: Request, count: int) -> None:
        quota: Quota | None = request.state.quota
        if quota is not None:
            quota.images(count)
            self.metrics.count_images(quota.key.name, count)

    async def _model(self, name: str, version: str = "", fresh: float = FRESH) -> Model:
        """A model by its configuration, which is asked for again after some seconds: a new release
        may change it.
        """
        now = time.monotonic()
        when, model = self._models.get((name, version), (now, None))
        if model is None or now - when >= fresh:
            model = await self._upstream.config(name, version)
            # What nobody asks for any more goes: versions come and go.
            known = self._models.items()
            self._models = {key: one for key, one in known if now - one[0] < FRESH}
            self._models[name, version] = now, model
        return model

    # What holds for all requests

    def _guarded(self, handler: Handler, path: str) -> Handler:
        """A handler that needs a key, whose every failure becomes an answer, a count and a line.

        Args:
            handler: of a path.
            path: with names in place of what callers write.
        """
        public = handler.__name__ in ("live", "ready")
        counted = handler.__name__ in _COUNTED

        async def guarded(request: Request) -> Response:
            start = time.monotonic()
            request.state.entry = entry = Entry(request.state.request_id)
            request.state.quota = None
            span = None
            refused = False
            try:
                if self.keys is not None and not public:
                    key = self.keys.check(request.headers.get("Authorization"))
                    entry.key = key.name
                    request.state.quota = self._quotas.of(key)
                # After the key: whoever has none is not to say what is sent to the collector.
                if counted and self._spans is not None:
                    span = self._spans.begin(request.headers, request.method, path)
                    entry.followed.traceparent = span.traceparent
                limited = counted and request.state.quota is not None
                with request.state.quota.request() if limited else contextlib.nullcontext():
                    response = await handler(request)
            except Refused as error:
                refused = True
                response = refusal(error, request)
                entry.code = error.code
                let_go(error)
            except (ClientDisconnected, ClientDisconnect):
                response = Response(status_code=499)
                entry.code = GONE
            except Exception as error:
                LOG.exception("the gateway failed on the request %s", entry.id)
                let_go(error)
                failed = Refused(
                    500, INTERNAL_ERROR, "the gateway failed on this request; its log says why"
                )
                response = refusal(failed, request)
                entry.code = failed.code
            seconds = time.monotonic() - start
            if counted:
                name = request.path_params.get("model", EMBEDDINGS)
                known = name in TASKS or handler.__name__ == EMBEDDINGS
                entry.task = name if known else None
                self.metrics.count(entry.task or "none", entry.code, seconds)
                if entry.key is not None:
                    self.metrics.count_key(entry.key, entry.code)
            if entry.followed.steps:
                entry.encoder_ms = round(encoder_ms(entry.followed.steps), 3)
            if not public:
                entry.status = response.status_code
                entry.bytes_out = len(response.body)
                entry.ms = round(1e3 * seconds, 3)
                entry.write(self._settings.log)
            if span is not None:
                span.end(entry)
            # Last: the time of a refusal is not that of a body that nobody wants.
            return await self._read_out(response, request) if refused else response

        guarded.__name__ = handler.__name__
        return guarded

    async def _closed(self, request: Request, error: Exception) -> Response:
        open_ = (
            "POST /v2/models/MODEL/infer; GET /v2/models/MODEL, its config and ready, /v2,"
            " /health/live and /ready"
        )
        if _of_openai(request):
            open_ = "POST /v1/embeddings; GET /v1/models and /v1/models/MODEL"
        status = getattr(error, "status_code", 404)
        message = f"{request.method} of this path is not open here; open are {open_}"
        return await self._read_out(refusal(Refused(status, NOT_FOUND, message), request), request)

    async def _refuse(self, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await self._read_out(refusal(error, request), request)
        await response(scope, receive, send)

    async def _read_out(self, response: Response, request: Request) -> Response:
        """The refusal of a request whose body is read and thrown away first; where that is not to
        be done, the connection ends with the answer.
        """
        if request.method == "POST" and not await _discard_body(request, self._timeouts.discard):
            response.headers["Connection"] = "close"
        return response


def _of_openai(request: Request) -> bool:
    # Not of `request.url`: that needs a Host, which may be anything.
    return str(request.scope["path"]).startswith(openai.PREFIX)


def refusal(error: Refused, request: Request) -> Response:
    """The answer that says why a request is refused, in the form of what was asked."""
    headers = {"Retry-After": str(error.retry_after)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = openai.refusal(error) if _of_openai(request) else {"error": str(error)}
    return JSONResponse(content, error.status, headers)


def _named(request: Request) -> tuple[str, str]:
    """Model and version of a request's path. Encoders, and whatever else a repository holds, are
    not reached through the gateway.
    """
    name = request.path_params["model"]
    version = request.path_params.get("version", "")
    if name not in TASKS:
        raise Refused(
            404, UNKNOWN_MODEL, f"no model {escape(name)} here; there are {', '.join(TASKS)}"
        )
    if not re.fullmatch(r"(?:[1-9][0-9]{0,17})?", version):
        raise Refused(
            404,
            UNKNOWN_MODEL,
            f"{name} has no version {escape(version)}; versions are whole numbers from 1",
        )
    return name, version


async def _body(request: Request, max_bytes: int, acquire: Callable[[int], None]) -> bytes:
    """The body of a request; `acquire` is called with the size of each part as it comes."""
    headers = request.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(
            415, UNSUPPORTED_TYPE, "compressed bodies are not taken; send the body as it is"
        )
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind not in _TYPES:
        raise Refused(
            415, UNSUPPORTED_TYPE, f"Content-Type is {escape(kind)}; send {' or '.join(_TYPES[1:])}"
        )
    too_large = f"the body has more than {max_bytes / MIB:g} MiB, the most that is taken"
    if _is_longer(request, max_bytes):
        raise Refused(413, TOO_LARGE, too_large)
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise Refused(413, TOO_LARGE, too_large)
        acquire(len(part))
        parts.append(part)
    if not size:
        raise bad_request("the body is empty")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_longer(request: Request, most: int) -> bool:
    """Whether a request says that its body has more bytes."""
    length = request.headers.get("Content-Length", "")
    return length.isdigit() and int(length[:18]) > most


async def _discard_body(request: Request, seconds: float) -> bool:
    """Throw away what is left of a body; whether that was all of it."""
    # The second asks whether to send a body at all.
    if _is_longer(request, MAX_DISCARDED) or "Expect" in request.headers:
        return False
    try:
        with anyio.move_on_after(seconds):
            return await _discard(request)
    except ClientDisconnect:
        return False
    except RuntimeError:  # starlette's, where all has been read
        return True
    return False


async def _discard(request: Request) -> bool:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_DISCARDED:
            return False
    return True


async def run_until_disconnect(
    request: Request, work: Coroutine[Any, Any, Any], seconds: float
) -> Any:
    """The result of work that is cancelled if the caller disconnects; all of the request must have
    been read.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(request.receive())
    try:
        # Triton, which has the same deadline, has the first word.
        await asyncio.wait(
            {task, left}, timeout=max(seconds, 0) + 1, return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            return task.result()
        if left.done():
            raise ClientDisconnected
        raise timeout_error(504, "the request took longer than it may")
    finally:
        left.cancel()
        if not task.done():  # its place is free again before anybody hears of this
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        del task  # else its exception holds this frame, and this frame holds it
