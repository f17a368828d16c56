"""`Gateway`: KServe v2 over HTTP and OpenAI's embeddings as an ASGI app, in front of an
`Upstream`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from radapter_client import Reply
from radapter_serve.contract.errors import (
    ENCODER_FAILED,
    INTERNAL_ERROR,
    RESTARTING,
    SERVER_STOPPING,
    TIMED_OUT,
    UNKNOWN_MODEL,
)
from radapter_serve.gateway import kserve, openai, openapi
from radapter_serve.gateway.access import (
    ConcurrencyLimit,
    Key,
    Keys,
    Lease,
    MemoryBudget,
    Quota,
    Threads,
)
from radapter_serve.gateway.middleware import (
    BrowserRule,
    Errors,
    HoldMemory,
    Metrics,
    Record,
    RequestId,
    RequireKey,
    open_spans,
)
from radapter_serve.gateway.rechecks import Rechecks
from radapter_serve.gateway.settings import MIB, TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import (
    NOT_FOUND,
    SERVER_UNAVAILABLE,
    SHORT_TIMEOUT,
    SMALL,
    TOO_LARGE,
    UNAUTHORIZED,
    UNSUPPORTED_TYPE,
    Entry,
    Inference,
    Refused,
    ServedModel,
    Upstream,
    bad_request,
)
from radapter_serve.index.facts import index_names
from radapter_serve.release.release import TASKS
from radapter_serve.tasks.table import PROBES
from radapter_serve.version import __version__

# Bodies of more than `SMALL` bytes are read in threads, and such answers written: one thread for
# those up to `MIDDLE` bytes, one for larger ones. The event loop reads a few images of up to
# `MIDDLE` bytes in binary itself: that is a copy.
MIDDLE = 2**22
PIECE = 512 * 1024  # bytes of an answer that are sent at a time
FEW = 2**10  # texts and images
# A body of JSON may have this share of `max_body`: its parser holds all other threads up, 0.1 s for
# 16 MiB.
JSON_SHARE = 1 / 4
# Bytes a second at which a body must come, once it has had `timeouts.idle` seconds: less than a
# phone sends over 3G, while 2,048 connections that hold bodies open have to send 32 MiB a second.
MIN_BODY_RATE = 2**14
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
        self._models: dict[tuple[str, str], tuple[float, ServedModel]] = {}
        self._concurrency = ConcurrencyLimit(settings.max_concurrent, settings.max_queue)
        self._max_body = int(settings.max_body * MIB)
        self._max_json = int(settings.max_body * MIB * JSON_SHARE)
        self._memory = MemoryBudget(int(settings.max_memory * MIB), timeouts.piece)
        self._middle = Threads(1, "middle-bodies")
        self._large = Threads(1, "large-bodies")
        self._metrics = Metrics(self._concurrency, self._memory)
        self._spans = open_spans()

        # A request passes these middlewares from first to last, and then those of its path.
        # `Errors` stands twice: here for paths and callers that are refused before `Record`, and
        # behind `Record`, which then sees a refusal as an answer with its status.
        every = [
            Middleware(RequestId),
            Middleware(Errors),
        ]
        log = settings.log == "json"
        facts = [Middleware(Record, log), Middleware(Errors)]
        inference = [Middleware(Record, log, self._metrics, self._spans), Middleware(Errors)]
        if settings.api_keys is None:
            every.append(Middleware(BrowserRule, None if settings.no_api_keys else settings.host))
        else:
            keys = Keys(settings.api_keys)
            facts.append(Middleware(RequireKey, keys))
            most = settings.max_concurrent + settings.max_queue
            inference.append(Middleware(RequireKey, keys, {}, most))
        inference.append(Middleware(HoldMemory, self._memory))
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
            ("GET", facts, self.server, ["/v2", "/v2/"]),
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
        repository = self._settings.model_repository
        interval = self._settings.recheck_seconds
        self._rechecks = None
        asking = None
        if repository is not None and interval:
            count = self._metrics.count_recheck
            self._rechecks = Rechecks(self._upstream, repository, interval, count)
            asking = asyncio.ensure_future(self._rechecks.run())
        trimming = asyncio.ensure_future(self._memory.trim())
        self._health = Health(self._upstream)
        self._openai = openai.OpenAI(self._upstream, self._model, self._asking, repository)
        try:
            yield
        finally:
            trimming.cancel()
            if asking is not None:
                asking.cancel()
            await self._upstream.close()
            if self._spans is not None:
                await asyncio.to_thread(self._spans.close, self._timeouts.spans)

    # Health and facts

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        wrong = None if self._rechecks is None else self._rechecks.trouble
        if (why := wrong or await self._health.trouble()) is not None:
            raise Refused(503, SERVER_UNAVAILABLE, why)
        return JSONResponse({"ready": True})

    async def prometheus(self, request: Request) -> Response:
        if request.state.key.adapters is not None:
            raise Refused(
                401,
                UNAUTHORIZED,
                "this key is for some adapters, and the metrics name all; take another key",
            )
        # Without an answer of the upstream, the metrics name the releases of the time before.
        with contextlib.suppress(Refused), anyio.move_on_after(1.0):
            self._metrics.name_releases((await self._model(TASKS[-1])).facts())
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
        """The configuration of a task, never cached: clients choose their release with it."""
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
        return JSONResponse({"name": name, "ready": True})

    async def releases(self, request: Request) -> Response:
        """The releases as OpenAI's list of models, or one of them."""
        name = request.path_params.get("model")
        if name is None:
            return JSONResponse(await self._openai.models(request.state.key))
        return JSONResponse(await self._openai.model(name, request.state.key))

    # Inferences

    async def infer(self, request: Request) -> Response:
        """Answer an inference; cancelled if the caller disconnects or its time is over."""
        start = time.monotonic()
        seconds = self._settings.timeout
        name, version = _named(request)
        entry: Entry = request.state.entry
        lease: Lease = request.state.lease

        # Read and check
        header_length = request.headers.get(kserve.HEADER_LENGTH)
        limit = self._max_json if header_length is None else self._max_body
        body = await self._body(request, limit)
        model = await self._model(name, version)
        json_size = kserve.json_length(header_length, len(body))
        if json_size > self._max_json:
            raise self._too_large(self._max_json)
        read = partial(kserve.read, body, json_size, model, version)
        # The header of an image, which says how large its mask is, is never read in the loop.
        is_quick = name != "segment" and (
            len(body) <= SMALL
            or (
                len(body) <= MIDDLE
                and json_size <= SMALL
                and kserve.count_texts(body[:json_size]) <= FEW
            )
        )
        if is_quick:
            inference = read()
        else:
            inference = await self._read(request, body, json_size, start + seconds, read)
        # Many short texts, or a text with an emoji, take more memory than in the body.
        lease.hold(max(inference.size, len(body)))
        del body, read
        key: Key = request.state.key
        adapters = inference.adapters
        if adapters != {""}:
            entry.adapter = min(adapters)[:200] if len(adapters) == 1 else "several"
        key.check_adapters(adapters)
        self._count_images(request, inference.images)

        # Ask the upstream, once a slot is free
        end = start + min(seconds, inference.timeout or seconds)

        async def ask() -> Reply:
            async with self._asking(entry, lease, inference.answer_size):
                left = max(end - time.monotonic(), 1e-3)
                with key.hiding_others(adapters):
                    reply = await self._upstream.infer(inference, left, entry)
                lease.hold(kserve.memory_of(reply.outputs))
                return reply

        reply = await _run_until_disconnect(request, ask(), end)
        inference = replace(inference, inputs={})  # their memory is no longer held
        entry.release = str(reply.version)
        self._health.answered(name)

        # Write the answer
        write = partial(kserve.write, reply, inference)
        if lease.size <= SMALL:
            parts, headers = write()
        else:
            writing = self._thread(lease.size).run(write)
            parts, headers = await _run_until_disconnect(request, writing, end)
        return _response(request, parts, headers)

    async def embeddings(self, request: Request) -> Response:
        """Answer a request for OpenAI's embeddings."""
        end = time.monotonic() + self._settings.timeout
        body = await self._body(request, self._max_json)
        read = partial(openai.read, body)
        if len(body) <= SMALL:
            asked = read()
        else:
            asked = await self._read(request, body, len(body), end, read)
        request.state.lease.hold(len(body))
        del body, read
        self._count_images(request, len(asked.images))
        left = end - time.monotonic()
        state = request.state
        work = self._openai.embed(asked, left, state.entry, state.lease, state.key)
        answer, receipt = await _run_until_disconnect(request, work, end)
        headers = {"Content-Type": "application/json"}
        if receipt:
            headers[kserve.RECEIPT_HEADER] = receipt
        return _response(request, [answer], headers)

    @contextlib.asynccontextmanager
    async def _asking(self, entry: Entry, lease: Lease, size: int) -> AsyncIterator[None]:
        """Hold a slot and the memory of an answer of at most `size` bytes, for the upstream to make
        it in the block.
        """
        async with self._concurrency.slot(entry), self._memory.making(lease, size):
            yield

    async def _body(self, request: Request, limit: int) -> bytes:
        """Read the body of a request, of `limit` bytes at most."""
        headers = request.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Refused(
                415, UNSUPPORTED_TYPE, "compressed bodies are not taken; send the body as it is"
            )
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in _TYPES:
            allowed = " or ".join(_TYPES[1:])
            raise Refused(415, UNSUPPORTED_TYPE, f"Content-Type is {kind!a:.80}; send {allowed}")
        if int(headers.get("Content-Length", "0")[:18]) > limit:
            raise self._too_large(limit)
        parts: list[bytes] = []
        size = 0
        # Not `asyncio.wait_for`: its exceptions form reference cycles, which keep the body and the
        # connection until the garbage collector runs.
        with anyio.CancelScope() as scope:
            # Each part puts the deadline off by as long as it may take.
            first = anyio.current_time() + self._timeouts.idle
            last = anyio.current_time() + self._settings.timeout
            scope.deadline = min(first, last)
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise self._too_large(limit)
                request.state.lease.hold(size)
                parts.append(part)
                scope.deadline = min(first + size / MIN_BODY_RATE, last)
        if scope.cancelled_caught:
            raise Refused(
                408,
                TIMED_OUT,
                f"the body did not come within {self._settings.timeout:g} s, or came at less than"
                f" {MIN_BODY_RATE // 1024} KiB per second",
            )
        if not size:
            raise bad_request("the body is empty")
        request.state.entry.bytes_in = size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self, limit: int) -> Refused:
        why = f"the body has more than {limit / MIB:g} MiB, the most that is taken"
        if limit == self._max_json:
            why += " of JSON; send tensors in binary, or fewer inputs at once"
        return Refused(413, TOO_LARGE, why)

    async def _read(
        self, request: Request, body: bytes, json_size: int, end: float, read: Callable[[], T]
    ) -> T:
        """Parse a body with `read` in a thread by the time `end`; its first `json_size` bytes are
        JSON.
        """
        thread = self._thread(len(body))

        async def reading() -> T:
            memory = partial(kserve.json_memory, body[:json_size])
            size = memory() if json_size <= SMALL else await thread.run(memory)
            request.state.lease.hold(len(body) + size)
            return await thread.run(read)

        return await _run_until_disconnect(request, reading(), end)

    def _thread(self, size: int) -> Threads:
        """The thread for so many bytes."""
        return self._middle if size <= MIDDLE else self._large

    def _count_images(self, request: Request, count: int) -> None:
        quota: Quota | None = request.state.quota
        if quota is not None:
            quota.images(count)
            self._metrics.count_images(quota.key.name, count)

    async def _model(self, name: str, version: str = "", fresh: float = FRESH) -> ServedModel:
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
        probe = Inference(task, "", dict(PROBES[task]), is_probe=True)
        with anyio.move_on_after(SHORT_TIMEOUT + GRACE) as scope:
            try:
                if not await self._upstream.ready(task):
                    return f"{task} is not ready"
                await self._upstream.infer(probe, SHORT_TIMEOUT, Entry("probe"))
            except Refused as error:
                if error.code in _FAILED:
                    return f"{task} does not answer"
        if scope.cancelled_caught:
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


class Answer(Response):
    """The answer to an inference. Its parts, such as the array of a mask, are sent without a copy,
    in pieces, each once the caller has taken the piece before.
    """

    def __init__(self, parts: Sequence[bytes | memoryview], headers: Mapping[str, str]) -> None:
        self._parts = parts
        self.size = sum(map(len, parts))
        super().__init__(headers={**headers, "Content-Length": str(self.size)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        last = b"".join(self._parts) if self.size <= PIECE else b""
        if self.size > PIECE:
            for part in self._parts:
                for place in range(0, len(part), PIECE):
                    piece = part[place : place + PIECE]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        # This waits until the last piece is taken, too.
        await send({"type": "http.response.body", "body": last})


def _response(
    request: Request, parts: Sequence[bytes | memoryview], headers: Mapping[str, str]
) -> Answer:
    """Hold the memory of an answer until all is sent, and note the α of its receipt."""
    answer = Answer(parts, headers)
    request.state.lease.hold(answer.size)
    if receipt := headers.get(kserve.RECEIPT_HEADER):
        request.state.entry.alpha = json.loads(receipt)["alpha"]
    return answer


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
