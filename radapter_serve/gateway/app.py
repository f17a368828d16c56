"""The gateway as an ASGI app: KServe v2 over HTTP, and OpenAI's embeddings, in front of an
`Upstream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from radapter_client import Reply
from radapter_serve import __version__
from radapter_serve.gateway import answers, embeddings, openai, requests
from radapter_serve.gateway.errors import (
    NOT_FOUND,
    SERVER_UNAVAILABLE,
    TOO_LARGE,
    UNKNOWN_MODEL,
    UNSUPPORTED_TYPE,
    Refused,
    bad_request,
    escape,
    timeout_error,
)
from radapter_serve.gateway.health import Health
from radapter_serve.gateway.journal import Entry, timed_slot
from radapter_serve.gateway.keys import Keys
from radapter_serve.gateway.limits import Aside, ConcurrencyLimit, MemoryBudget
from radapter_serve.gateway.metrics import Metrics
from radapter_serve.gateway.middleware import (
    BrowserRule,
    Count,
    DiscardBody,
    Errors,
    HeaderLimit,
    Journal,
    LimitKey,
    Pieces,
    RequestId,
    RequireKey,
    Trace,
    is_longer,
    open_spans,
)
from radapter_serve.gateway.models import Model, list_indexes
from radapter_serve.gateway.quotas import Quota, Quotas
from radapter_serve.gateway.settings import MIB, TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import Upstream
from radapter_serve.release.release import TASKS

# A body with more JSON, or one that is larger, is read in a thread; small ones don't wait behind
# large ones there.
SMALL_JSON = 2**16  # bytes
SMALL_BODY = 2**22
FRESH = 5.0  # seconds after which a model's configuration is asked for again
_TYPES = ("", "application/json", "application/octet-stream")
T = TypeVar("T")


class Gateway:
    """What the gateway answers: its `app` can be asked while it is `opened`, in the event loop in
    which `connect` then makes the way to Triton.
    """

    def __init__(
        self,
        settings: Settings,
        connect: Callable[[], Upstream],
        timeouts: Timeouts = TIMEOUTS,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._timeouts = timeouts
        self._models: dict[tuple[str, str], tuple[float, Model]] = {}
        self._outdated: Mapping[str, bool] = {}
        self._concurrency = ConcurrencyLimit(settings.max_concurrent, settings.max_queue)
        self._memory = MemoryBudget(int(settings.max_memory * MIB))
        self._small_bodies = Aside("small-bodies")
        self._large_bodies = Aside("large-bodies")
        self._metrics = Metrics(self._concurrency, self._memory)
        self._spans = open_spans()

        # What requests pass depends on the settings.
        trace = [] if self._spans is None else [Middleware(Trace, self._spans)]
        journal = [] if settings.log == "off" else [Middleware(Journal, settings.log)]
        browsers = []
        key = []
        limit = []
        if settings.api_keys is None:
            browsers = [Middleware(BrowserRule, None if settings.no_api_keys else settings.host)]
        else:
            key = [Middleware(RequireKey, Keys(settings.api_keys), Quotas())]
            limit = [Middleware(LimitKey)]
        # Each passes these from the first to the last,
        every = [
            Middleware(RequestId),
            Middleware(Pieces),
            Middleware(DiscardBody, timeouts.discard),
            Middleware(Errors),
            Middleware(HeaderLimit),
            *browsers,
        ]
        # and those of its path after them.
        facts = [*journal, Middleware(Errors), *key]
        count = Middleware(Count, self._metrics)
        inference = [*trace, *journal, count, Middleware(Errors), *key, *limit]
        model = "/v2/models/{model}"
        version = f"{model}/versions/{{version}}"
        # The first path that fits is taken, so what is asked for most often comes first.
        ways: list[tuple[str, list[Middleware], Callable[[Request], Any], list[str]]] = [
            ("POST", inference, self.infer, [f"{model}/infer", f"{version}/infer"]),
            ("POST", inference, self.embeddings, ["/v1/embeddings"]),
            ("GET", [], self.live, ["/health/live", "/v2/health/live"]),
            ("GET", [], self.ready, ["/health/ready", "/v2/health/ready"]),
            ("GET", facts, self.config, [f"{model}/config", f"{version}/config"]),
            ("GET", facts, self.model_ready, [f"{model}/ready", f"{version}/ready"]),
            ("GET", facts, self.statistics, [f"{model}/stats", f"{version}/stats"]),
            ("GET", facts, self.statistics, ["/v2/models/stats"]),
            ("GET", facts, self.indexes, ["/v2/models/retrieve/indexes"]),
            ("GET", facts, self.metadata, [model, version]),
            ("GET", facts, self.prometheus, ["/metrics"]),
            ("GET", facts, self.server, ["/v2"]),
            ("GET", facts, self.releases, ["/v1/models", "/v1/models/{model}"]),
        ]
        routes = [
            Route(path, handler, methods=[method], middleware=way)
            for method, way, handler, paths in ways
            for path in paths
        ]
        closed: Any = _closed
        self.app = Starlette(
            routes=routes, middleware=every, exception_handlers={404: closed, 405: closed}
        )
        self.app.router.redirect_slashes = False

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Where `app` can be asked."""
        self._upstream = self._connect()
        self._health = Health(self._upstream)
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
        why = await self._health.trouble()
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
        text = self._metrics.text(self._outdated)
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
        limit = self._settings.timeout
        name, version = _named(request)
        entry: Entry = request.state.entry
        with self._memory.lease() as acquire:
            body = await self._body(request, acquire)
            model = await self._model(name, version)
            length = request.headers.get(requests.HEADER_LENGTH)
            json_size = requests.json_length(length, len(body))
            read = partial(requests.read, body, length, model, version)
            asked = await self._read(request, body, json_size, start + limit, read)
            # Many short texts, or a text with an emoji, take more than they did as they came.
            more = max(asked.size - len(body), 0)
            acquire(min(more, self._memory.max_bytes - len(body)))
            del body, read
            self._count_images(request, asked.images)
            end = start + min(limit, asked.timeout or limit)
            work = self._run(asked, end, entry)
            reply = await _run_until_disconnect(request, work, end)
            entry.release = str(reply.version)
            self._health.answered(name)
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
        end = time.monotonic() + self._settings.timeout
        with self._memory.lease() as acquire:
            body = await self._body(request, acquire)
            read = partial(embeddings.read, body, self._settings.max_inputs)
            asked = await self._read(request, body, len(body), end, read)
            del body, read
            self._count_images(request, len(asked.images))
            work = self._openai.embed(asked, end - time.monotonic(), request.state.entry)
            answer = await _run_until_disconnect(request, work, end)
            return Response(answer, media_type="application/json")

    # What its answers share

    async def _body(self, request: Request, acquire: Callable[[int], None]) -> bytes:
        """The body of a request; `acquire` is called with the size of each part as it comes."""
        headers = request.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Refused(
                415, UNSUPPORTED_TYPE, "compressed bodies are not taken; send the body as it is"
            )
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in _TYPES:
            allowed = " or ".join(_TYPES[1:])
            raise Refused(415, UNSUPPORTED_TYPE, f"Content-Type is {escape(kind)}; send {allowed}")
        most = int(self._settings.max_body * MIB)
        too_large = f"the body has more than {most / MIB:g} MiB, the most that is taken"
        if is_longer(headers, most):
            raise Refused(413, TOO_LARGE, too_large)
        parts = []
        size = 0
        # `asyncio.wait_for` would leave a cycle of references with every refusal, which keeps the
        # body, and with it the connection, until Python looks for cycles.
        with anyio.move_on_after(self._settings.timeout) as limit:
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise Refused(413, TOO_LARGE, too_large)
                acquire(len(part))
                parts.append(part)
        if limit.cancelled_caught:
            raise timeout_error(408, f"the body did not come within {self._settings.timeout:g} s")
        if not size:
            raise bad_request("the body is empty")
        request.state.entry.bytes_in = size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read(
        self, request: Request, body: bytes, json_size: int, end: float, read: Callable[[], T]
    ) -> T:
        """What `read` makes of a body, by the time `end`; so many bytes of it are JSON."""
        if json_size <= SMALL_JSON and len(body) <= SMALL_BODY:
            return read()
        aside = self._small_bodies if len(body) <= SMALL_BODY else self._large_bodies

        async def reading() -> T:
            async with aside.turn() as call:
                size = await call(requests.json_memory, body[:json_size])
                with self._memory.lease() as acquire:
                    # A request that has all memory to itself is never refused for what it takes.
                    acquire(min(size, self._memory.max_bytes - len(body)))
                    result: T = await call(read)
                    return result

        result: T = await _run_until_disconnect(request, reading(), end)
        return result

    async def _run(self, asked: requests.Inference, end: float, entry: Entry) -> Reply:
        """The model's answer, as soon as the request may run; its deadline goes on."""
        async with timed_slot(self._concurrency, entry):
            left = max(end - time.monotonic(), 1e-3)
            return await self._upstream.infer(asked, left, entry.followed)

    def _count_images(self, request: Request, count: int) -> None:
        quota: Quota | None = request.scope["state"].get("quota")
        if quota is not None:
            quota.images(count)
            self._metrics.count_images(quota.key.name, count)

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


async def _closed(request: Request, error: Exception) -> NoReturn:
    open_ = (
        "POST /v2/models/MODEL/infer; GET /v2/models/MODEL, its config and ready, /v2,"
        " /health/live and /ready"
    )
    # Not of `request.url`: that needs a Host, which may be anything.
    if request.scope["path"].startswith(openai.PREFIX):
        open_ = "POST /v1/embeddings; GET /v1/models and /v1/models/MODEL"
    message = f"{request.method} of this path is not open here; open are {open_}"
    raise Refused(getattr(error, "status_code", 404), NOT_FOUND, message)


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


async def _run_until_disconnect(
    request: Request, work: Coroutine[Any, Any, Any], end: float
) -> Any:
    """The result of work that is cancelled if the caller disconnects, or when the time `end` is
    over; all of the request must have been read.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(request.receive())
    try:
        # Triton, which has the same deadline, has the first word.
        await asyncio.wait(
            {task, left},
            timeout=max(end - time.monotonic(), 0) + 1,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if task.done():
            return task.result()
        if left.done():
            raise ClientDisconnect
        raise timeout_error(504, "the request took longer than it may")
    finally:
        left.cancel()
        if not task.done():  # its place is free again before anybody hears of this
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        del task  # else its exception holds this frame, and this frame holds it
