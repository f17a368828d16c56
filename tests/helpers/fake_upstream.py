"""A gateway in a thread, in front of a stand-in for Triton that computes what is easy to compute
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import urllib3

from radapter_client import Reply
from radapter_serve.gateway.run import GatewayServer
from radapter_serve.gateway.settings import TIMEOUTS, Settings, Timeouts
from radapter_serve.gateway.upstream import Entry, Inference, Refused, ServedModel
from radapter_serve.release.release import TASKS
from tests.helpers.fake_server import release

INFER = "/v2/models/embed_text/infer"
TEXT = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["abc"]}]}


def config(task: str, *releases: dict[str, Any]) -> ServedModel:
    """A task with these releases, the newest last; with one if none are given."""
    known = releases or (release(1),)
    parameters = {f"release.{facts['version']}": json.dumps(facts) for facts in known}
    parameters["release"] = json.dumps(known[-1])
    return ServedModel.of(task, parameters)


def packed(texts: Iterable[bytes]) -> bytes:
    """Texts as the protocol packs them."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def as_bytes(array: np.ndarray) -> list[bytes]:
    """The values of a tensor of type BYTES; texts come as str or as UTF-8."""
    return [value.encode() if isinstance(value, str) else value for value in array.ravel()]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


class FakeUpstream:
    """Embeds a text or an image as its length and its first byte; a test may set what it answers
    or raises, and keeps answers back with `hold`.
    """

    def __init__(self) -> None:
        self.asked: list[Inference] = []
        self.entries: list[Entry] = []  # that came with them
        self.timeouts: list[float] = []  # seconds that they had
        self.error: Exception | None = None  # raised instead of an answer
        self.hold = asyncio.Event()
        self.hold.set()
        self.cancelled = 0  # requests
        self.configs = {name: config(name) for name in TASKS}  # of the newest release
        self.older: dict[tuple[str, str], ServedModel] = {}  # of others, by task and version
        self.outputs: dict[str, np.ndarray] | None = None  # of every answer

    async def infer(self, inference: Inference, timeout: float, entry: Entry) -> Reply:
        self.asked.append(inference)
        self.entries.append(entry)
        self.timeouts.append(timeout)
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return Reply(int(inference.version or 1), self.outputs or self._answer(inference))

    def _answer(self, inference: Inference) -> dict[str, np.ndarray]:
        kind = inference.model.removeprefix("embed_")
        values = as_bytes(inference.inputs.get(kind, next(iter(inference.inputs.values()))))
        embeds = np.array([[len(value), *value[:1]] for value in values], np.float32)
        outputs = {f"{kind}_embeds": embeds}
        if "adapter" in inference.inputs:
            names = inference.inputs["adapter"].ravel().tolist()
            texts = [json.dumps({"release": 1, "adapter": name, "alpha": 0.5}) for name in names]
            outputs["receipt"] = np.array([[text.encode()] for text in texts], object)
        return outputs

    async def config(self, model: str, version: str = "") -> ServedModel:
        if (model, version) in self.older:
            return self.older[model, version]
        if version not in ("", "1"):
            raise Refused(404, "unknown_model", f"{model} has no version {version}")
        return self.configs[model]

    async def ready(self, model: str, version: str = "") -> bool:
        return version in ("", "1")

    async def close(self) -> None:
        pass


class Served:
    """A gateway that runs, in front of `upstream`; `stop` ends it."""

    def __init__(
        self, server: GatewayServer, upstream: FakeUpstream, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.url = server.url
        self.port = int(server.url.rpartition(":")[2])
        self.upstream = upstream
        self.connections = server._connections
        self.stop = server.stop
        self._loop = loop

    def hold(self) -> None:
        """Keep all answers back."""
        self._loop.call_soon_threadsafe(self.upstream.hold.clear)

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self.upstream.hold.set)

    def ask(
        self, path: str = INFER, body: Any = None, method: str = "", **headers: str
    ) -> tuple[int, Any, Any]:
        """Status, JSON or bytes, and headers of an answer; of a name in `headers` each underscore
        is a hyphen.
        """
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        answer = urllib3.request(
            method or ("GET" if body is None else "POST"),
            self.url + path,
            body=data,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            retries=False,
            timeout=20,
        )
        with contextlib.suppress(ValueError):
            return answer.status, json.loads(answer.data), answer.headers
        return answer.status, answer.data, answer.headers

    def refusal(self, *request: Any, **headers: str) -> tuple[int, str]:
        """Status and code of a refusal, which is one line; the arguments are those of `ask`."""
        status, answer, _ = self.ask(*request, **headers)
        assert list(answer) == ["error"] and "\n" not in answer["error"]
        code = re.match(r"\[([a-z_]+)\] .", answer["error"])
        assert code, answer
        return status, code[1]

    def metrics(self, **headers: str) -> str:
        return str(self.ask("/metrics", **headers)[1].decode())

    @contextlib.contextmanager
    def connection(self, data: bytes = b"", address: str = "127.0.0.1") -> Iterator[socket.socket]:
        """A connection from an address of this machine, on which `data` has been sent."""
        place = (address, 0)
        server = ("127.0.0.1", self.port)
        with socket.create_connection(server, 30, source_address=place) as connection:
            connection.sendall(data)
            yield connection


@contextlib.contextmanager
def serving(
    upstream: Callable[[], FakeUpstream] = FakeUpstream,
    timeouts: Timeouts = TIMEOUTS,
    **options: Any,
) -> Iterator[Served]:
    """A gateway with these settings on a free port, until the end of the block, in front of an
    `upstream`.
    """
    settings = Settings(port=0, **options)
    connected: list[tuple[FakeUpstream, asyncio.AbstractEventLoop]] = []

    def connect() -> FakeUpstream:
        connected.append((upstream(), asyncio.get_running_loop()))
        return connected[0][0]

    with GatewayServer(settings, connect, timeouts) as server, server.in_thread():
        until(lambda: connected)
        yield Served(server, *connected[0])


class BigAnswers(FakeUpstream):
    """A stand-in that answers the text "big" with 15 MiB."""

    def _answer(self, inference: Inference) -> dict[str, np.ndarray]:
        if as_bytes(inference.inputs["text"]) == [b"big"]:
            return {"text_embeds": np.ones((1, 15 * 2**18), np.float32)}
        return super()._answer(inference)


def main(
    port: int, patience: float, certificate: Path | None = None, key: Path | None = None
) -> None:
    """A gateway in this process, which gives its callers `patience` seconds where a gateway gives 8
    or 10.
    """
    timeouts = Timeouts(idle=patience, piece=patience)
    settings = Settings(port=port, timeout=2 * patience, tls_certificate=certificate, tls_key=key)
    with GatewayServer(settings, BigAnswers, timeouts) as server:
        server.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), *map(Path, sys.argv[3:]))
