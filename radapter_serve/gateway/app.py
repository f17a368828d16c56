"""`Gateway`: KServe v2 over HTTP and OpenAI's embeddings as an ASGI app, in front of an
`Upstream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
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
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    INTERNAL_ERROR,
    RESTARTING,
    SERVER_STOPPING,
    TIMED_OUT,
    UNKNOWN_MODEL,
)
from radapter_serve.gateway import kserve, openai, openapi
from radapter_serve.gateway.access import ConcurrencyLimit, Keys, MemoryBudget, Quota
from radapter_serve.gateway.middleware import (
    BrowserRule,
    Errors,
    Metrics,
    Pieces,
    Record,
    RequestId,
    RequireKey,
    open_spans,
)
from radapter_serve.gateway.settings import MIB, TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import (
    NOT_FOUND,
    SERVER_UNAVAILABLE,
    SHORT_TIMEOUT,
    TOO_LARGE,
    UNSUPPORTED_TYPE,
    Entry,
    Inference,
    Model,
    Refused,
    Upstream,
    bad_request,
)
from radapter_serve.index.facts import index_names
from radapter_serve.release.release import TASKS
from radapter_serve.tasks.table import PROBES

# Larger JSON or bodies are parsed in threads: one for bodies up to `SMALL_BODY`, one for larger
# ones.
SMALL_JSON = 2**16  # bytes
SMALL_BODY = 2**22
# Seconds for which a task's configuration is cached, and an answer shows that the task works
FRESH = 5.0
# Seconds beyond its deadline that a request gets: the upstream has the same deadline, and a better
# error message.
GRACE = 1.0
# Codes of a task that does not work. Any other refusal shows that the task works.
_FAILED = {
    *(ENCODER_FAILED, INTERNAL_ERROR, RESTARTING, SERVER_STOPPING),
    *(SERVER_UNAVAILABLE, TIMED_OUT, UNKNOWN_MODEL),
}
_TYPES = ("", "application/json", "application/octet-stream")
T = TypeVar("T")


class Gateway:
    """The gateway's ASGI app, `app`, which answers inside `opened`; `connect` creates the upstream
    in that event loop.
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
        self._concurrency = ConcurrencyLimit(settings.max_concurrent, settings.max_queue)
        self._memory = MemoryBudget(int(settings.max_memory * MIB))
        self._parsers = {
            size: (asyncio.Lock(), ThreadPoolExecutor(1, thread_name_prefix=f"{size}-bodies"))
            for size in ("small", "large")
        }
        self._metrics = Metrics(self._concurrency, self._memory)
        self._spans = open_spans()

        # A request passes these middlewares from first to last,
        every = [
            Middleware(RequestId),
            Middleware(Pieces),
            Middleware(Errors),
        ]
        # and then those of its path.
        log = settings.log == "json"
        facts = [Middleware(Record, log), Middleware(Errors)]
        inference = [Middleware(Record, log, self._metrics, self._spans), Middleware(Errors)]
        if settings.api_keys is None:
            every.append(Middleware(BrowserRule, None if settings.no_api_keys else settings.host))
        else:
            keys = Keys(settings.api_keys)
            facts.append(Middleware(RequireKey, keys))
            inference.append(Middleware(RequireKey, keys, {}))
        model = "/v2/models/{model}"
        version = f"{model}/versions/{{version}}"
        # The first path that fits is taken, so the most frequent come first.
        table: list[tuple[str, list[Middleware], Callable[[Request], Any], list[str]]] = [
            ("POST", inference, self.infer, [f"{model}/infer", f"{version}/infer"]),
            ("POST", inference, self.embeddings, ["/v1/embeddings"]),
            ("GET", [], self.live, ["/health/live", "/v2/health/live"]),
            ("GET", [], self.ready, ["/health/ready", "/v2/health/ready"]),
            ("GET", facts, self.config, [f"{model}/config", f"{version}/config"]),
            ("GET", facts, self.model_ready, [f"{model}/ready", f"{version}/ready"]),
            ("GET", facts, self.indexes, ["/v2/models/retrieve/indexes"]),
            ("GET", facts, self.metadata, [model, version]),
            ("GET", facts, self.prometheus, ["/metrics"]),
            ("GET", facts, self.server, ["/v2"]),
            ("GET", facts, self.openapi, ["/openapi.json"]),
            ("GET", facts, self.releases, ["/v1/models", "/v1/models/{model}"]),
        ]
        routes = [
            Route(path, handler, methods=[method], middleware=middlewares)
            for method, middlewares, handler, paths in table
            for path in paths
        ]
        closed: Any = _closed
        self.app = Starlette(
            routes=routes, middleware=every, exception_handlers={404: closed, 405: closed}
        )
        self.app.router.redirect_slashes = False

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Connect to the upstream for the block, during which `app` answers."""
        self._upstream = self._connect()
        self._health = Health(self._upstream)
        self._openai = openai.OpenAI(self._upstream, self._model, self._concurrency)
        try:
            yield
        finally:
            await self._upstream.close()
            for _, thread in self._parsers.values():
                thread.shutdown(wait=False, cancel_futures=True)
            if self._spans is not None:
                await asyncio.to_thread(self._spans.close, self._timeouts.spans)

    # Health and facts

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        if (why := await self._health.trouble()) is not None:
            raise Refused(503, SERVER_UNAVAILABLE, why)
        return JSONResponse({"ready": True})

    async def prometheus(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def server(self, request: Request) -> Response:
        return JSONResponse(
            {
                "name": "radapter-gateway",
                "version": __version__,
                "extensions": ["binary_tensor_data"],
            }
        )

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.document())

    async def metadata(self, request: Request) -> Response:
        name, version = _named(request)
        model = await self._model(name, version)
        return JSONResponse(model.metadata())

    async def config(self, request: Request) -> Response:
        """The configuration of a task, never cached: clients choose their release by it."""
        name, version = _named(request)
        return JSONResponse((await self._model(name, version, fresh=0)).config())

    async def indexes(self, request: Request) -> Response:
        folder = self._settings.indexes
        if folder is None:
            raise Refused(
                404,
                NOT_FOUND,
                "the indexes are not listed here: radapter-gateway --indexes DIR does it",
            )
        return JSONResponse({"indexes": await asyncio.to_thread(index_names, folder)})

    async def model_ready(self, request: Request) -> Response:
        name, version = _named(request)
        if not await self._upstream.ready(name, version):
            raise Refused(400, SERVER_UNAVAILABLE, f"{name} is not ready")
        return JSONResponse({"ready": True})

    async def releases(self, request: Request) -> Response:
        """The releases as OpenAI's list of models, or one of them."""
        name = request.path_params.get("model")
        if name is None:
            return JSONResponse(await self._openai.models())
        return JSONResponse(await self._openai.model(name))

    # Inferences

    async def infer(self, request: Request) -> Response:
        """Answer an inference; cancelled if the caller disconnects or its time is over."""
        start = time.monotonic()
        limit = self._settings.timeout
        name, version = _named(request)
        entry: Entry = request.state.entry
        with self._memory.lease() as acquire:
            # Read and check
            body = await self._body(request, acquire)
            model = await self._model(name, version)
            json_size = kserve.json_length(request.headers.get(kserve.HEADER_LENGTH), len(body))
            read = partial(kserve.read, body, json_size, model, version)
            inference = await self._read(request, body, json_size, start + limit, read)
            # Many short texts, or a text with an emoji, take more memory than in the body.
            more = max(inference.size - len(body), 0)
            acquire(min(more, self._memory.max_bytes - len(body)))
            del body, read
            self._count_images(request, inference.images)

            # Ask the upstream, once a slot is free
            end = start + min(limit, inference.timeout or limit)

            async def ask() -> Reply:
                async with self._concurrency.slot(entry):
                    left = max(end - time.monotonic(), 1e-3)
                    return await self._upstream.infer(inference, left, entry)

            reply = await _run_until_disconnect(request, ask(), end)
            entry.release = str(reply.version)
            self._health.answered(name)
            content, headers = kserve.write(reply, inference)
            return Response(content, headers=headers)

    async def embeddings(self, request: Request) -> Response:
        """Answer a request for OpenAI's embeddings."""
        end = time.monotonic() + self._settings.timeout
        with self._memory.lease() as acquire:
            body = await self._body(request, acquire)
            read = partial(openai.read, body)
            asked = await self._read(request, body, len(body), end, read)
            del body, read
            self._count_images(request, len(asked.images))
            work = self._openai.embed(asked, end - time.monotonic(), request.state.entry)
            answer = await _run_until_disconnect(request, work, end)
            return Response(answer, media_type="application/json")

    async def _body(self, request: Request, acquire: Callable[[int], None]) -> bytes:
        """Read the body of a request; `acquire` is called with the size of each part."""
        headers = request.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Refused(
                415, UNSUPPORTED_TYPE, "compressed bodies are not taken; send the body as it is"
            )
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in _TYPES:
            allowed = " or ".join(_TYPES[1:])
            raise Refused(415, UNSUPPORTED_TYPE, f"Content-Type is {kind!a:.80}; send {allowed}")
        limit = int(self._settings.max_body * MIB)
        too_large = f"the body has more than {limit / MIB:g} MiB, the most that is taken"
        if int(headers.get("Content-Length", "0")[:18]) > limit:
            raise Refused(413, TOO_LARGE, too_large)
        parts = []
        size = 0
        # Not `asyncio.wait_for`: its exceptions form reference cycles, which keep the body and the
        # connection until the garbage collector runs.
        with anyio.move_on_after(self._settings.timeout) as scope:
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise Refused(413, TOO_LARGE, too_large)
                acquire(len(part))
                parts.append(part)
        if scope.cancelled_caught:
            why = f"the body did not come within {self._settings.timeout:g} s"
            raise Refused(408, TIMED_OUT, why)
        if not size:
            raise bad_request("the body is empty")
        request.state.entry.bytes_in = size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read(
        self, request: Request, body: bytes, json_size: int, end: float, read: Callable[[], T]
    ) -> T:
        """Parse a body with `read` by the time `end`; its first `json_size` bytes are JSON."""
        if json_size <= SMALL_JSON and len(body) <= SMALL_BODY:
            return read()
        lock, thread = self._parsers["small" if len(body) <= SMALL_BODY else "large"]
        call = partial(asyncio.get_running_loop().run_in_executor, thread)

        async def reading() -> T:
            # Wait for the lock, not in the thread's queue: a cancelled request then leaves nothing
            # behind.
            async with lock:
                size = await call(kserve.json_memory, body[:json_size])
                with self._memory.lease() as acquire:
                    # The limit lets a request that has all memory to itself run, whatever its size.
                    acquire(min(size, self._memory.max_bytes - len(body)))
                    return await call(read)

        return await _run_until_disconnect(request, reading(), end)

    def _count_images(self, request: Request, count: int) -> None:
        quota: Quota | None = request.scope["state"].get("quota")
        if quota is not None:
            quota.images(count)
            self._metrics.count_images(quota.key.name, count)

    async def _model(self, name: str, version: str = "", fresh: float = FRESH) -> Model:
        """The description of a task; a cached one if it is younger than `fresh` seconds."""
        now = time.monotonic()
        when, model = self._models.get((name, version), (now, None))
        if model is None or now - when >= fresh:
            model = await self._upstream.config(name, version)
            self._models[name, version] = now, model
        return model


class Health:
    """Probes each task, unless it has answered a caller in the last `FRESH` seconds."""

    def __init__(self, upstream: Upstream, now: Callable[[], float] = time.monotonic) -> None:
        self._upstream = upstream
        self._now = now
        self._answered = dict.fromkeys(TASKS, -FRESH)
        self._probing = asyncio.Lock()
        self._failed: tuple[float, str | None] = -FRESH, None

    def answered(self, task: str) -> None:
        """Note that a task has just answered."""
        self._answered[task] = self._now()

    async def trouble(self) -> str | None:
        """The reason why not all tasks work, or None; a failure is cached for `FRESH` seconds."""
        async with self._probing:
            when, why = self._failed
            now = self._now()
            if why is not None and now - when < FRESH:
                return why
            stale = [task for task, last in self._answered.items() if now - last >= FRESH]
            troubles = await asyncio.gather(*map(self._probe, stale))
            why = next((trouble for trouble in troubles if trouble), None)
            self._failed = self._now(), why
            return why

    async def _probe(self, task: str) -> str | None:
        try:
            if not await self._upstream.ready(task):
                return f"{task} is not ready"
            probe = Inference(task, "", dict(PROBES[task]))
            await self._upstream.infer(probe, SHORT_TIMEOUT, Entry("probe"))
        except Refused as error:
            if error.code in _FAILED:
                return f"{task} does not answer"
        self.answered(task)
        return None


async def _closed(request: Request, error: Exception) -> NoReturn:
    """Refuse a path or a method that the gateway does not have."""
    message = (
        f"{request.method} of this path is not open here; open are POST /v2/models/MODEL/infer and"
        " /v1/embeddings; GET /v2, /v2/models/MODEL, its config and ready, /v1/models,"
        " /health/live and /ready"
    )
    raise Refused(getattr(error, "status_code", 404), NOT_FOUND, message)


def _named(request: Request) -> tuple[str, str]:
    """Task and version in a request's path; refuses encoders and other models."""
    name = request.path_params["model"]
    version = request.path_params.get("version", "")
    if name not in TASKS:
        why = f"no model {name!a:.80} here; there are {', '.join(TASKS)}"
        raise Refused(404, UNKNOWN_MODEL, why)
    if not re.fullmatch(r"(?:[1-9][0-9]{0,17})?", version):
        why = f"{name} has no version {version!a:.80}; versions are whole numbers from 1"
        raise Refused(404, UNKNOWN_MODEL, why)
    return name, version


async def _run_until_disconnect(request: Request, work: Coroutine[Any, Any, T], end: float) -> T:
    """Return the result of `work`; cancel it if the caller leaves, or soon after the time `end`."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(
            {task, disconnect},
            timeout=max(end - time.monotonic(), 0) + GRACE,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if task.done():
            return task.result()
        if disconnect.done():
            raise ClientDisconnect
        raise Refused(504, TIMED_OUT, "the request took longer than it may")
    finally:
        disconnect.cancel()
        if not task.done():  # its slot is free before the error is raised
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        del task  # breaks the reference cycle of its exception and this frame
