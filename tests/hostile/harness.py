"""The harness: a tiny release behind the gateway, by Triton or in one process; requests sent as
bytes, a judge of the answers, and a good client that nothing may disturb.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import TypeVar

import numpy as np
import psutil

from radapter_client._http import decode
from radapter_serve.encoders.loaded import load_release
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import CODES
from radapter_serve.index.build import build
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.fake_upstream import until
from tests.helpers.gateway import start
from tests.helpers.small_release import photos_in, write_release
from tests.hostile.asks import INDEX, KEY, good
from tests.hostile.cases import BROKEN, REFUSED, Case

LONG = 40.0  # seconds after which a request counts as hanging
TIMEOUT = 20.0  # seconds that the gateway gives a request
_CODE = re.compile(r"\[([a-z_]+)\] \S")
_LEAK = re.compile(
    rb"Traceback|\w\.py\b|site-packages|/tmp|/work|/home|/root|/usr|/proc|/dev/shm|0x[0-9a-f]{8}"
    rb"|radapter_serve[._]"
)


# Sending


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Outcome:
    """What came back on a connection, and how it ended: answered, closed, reset, refused or
    hung.
    """

    answers: list[Answer] = field(default_factory=list)
    rest: bytearray = field(default_factory=bytearray)  # an answer that is not complete
    how: str = "answered"

    def take_answers(self, is_head: bool) -> None:
        """Move complete answers from `rest` to `answers`."""
        while (end := self.rest.find(b"\r\n\r\n") + 4) >= 4:
            status, *lines = bytes(self.rest[: end - 4]).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
            number = int(status.split()[1])
            size = 0 if is_head or number < 200 else int(headers.get("content-length", 0))
            if len(self.rest) < end + size:
                return
            if number >= 200:
                self.answers.append(Answer(number, headers, bytes(self.rest[end : end + size])))
            del self.rest[: end + size]


def exchange(address: tuple[str, int], case: Case) -> Outcome:
    """Send a case, and gather what comes back until it is complete, the connection ends, or the
    time is over.
    """
    outcome = Outcome()
    parts = case.parts
    is_head = isinstance(parts[0], bytes) and parts[0].startswith(b"HEAD")
    deadline = time.monotonic() + LONG
    is_over = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):  # of a connection that the server ended
            for part in parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                elif is_over.wait(part):
                    return
            if case.hang_up is not None and not is_over.wait(case.hang_up):
                connection.shutdown(socket.SHUT_WR)

    try:
        connection = socket.create_connection(address, timeout=LONG)
    except ConnectionRefusedError:
        return Outcome(how="refused")
    sender = threading.Thread(target=send)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender.start()
        try:
            while part := connection.recv(2**18):
                outcome.rest += part
                outcome.take_answers(is_head)
                if len(outcome.answers) >= case.answers:
                    # Answers that nobody asked for would follow at once.
                    deadline = time.monotonic() + (0.15 if case.promise == BROKEN else 0.01)
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
            outcome.how = "answered" if outcome.answers else "closed"
        except TimeoutError:
            if len(outcome.answers) < case.answers:
                outcome.how = "hung"
        except OSError:
            outcome.how = "answered" if outcome.answers else "reset"
        is_over.set()
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    sender.join()
    return outcome


# Judging


def trouble(case: Case, outcome: Outcome) -> str | None:
    """Why an outcome breaks the promise of its case, or None."""
    answers = outcome.answers
    if outcome.how in ("hung", "refused"):
        return outcome.how
    if not answers:
        closed = case.promise == BROKEN and not outcome.rest
        return None if closed else f"{outcome.how} without a whole answer"
    if case.promise == BROKEN and len(answers) == case.answers + 1:
        last = answers[-1]
        if last.headers.get("connection") == "close" and b"no request of HTTP/1.1" in last.body:
            answers = answers[:-1]  # of bytes behind the body that was announced
    if outcome.rest or len(answers) > case.answers:
        return "more than was asked for"
    if len(answers) < case.answers and case.promise != BROKEN:
        return f"{len(answers)} answers of {case.answers}"
    # A caller may wish for a deadline that is too short, or for work that outlasts the gateway's.
    sent = b"".join(part for part in case.parts if isinstance(part, bytes))
    long = ("much work", "images: large", "images: many")
    may_be_late = b'"timeout"' in sent or case.kind.startswith(long)
    for answer in answers:
        why = None
        if answer.status == 200:
            why = "answered as if it were right" if case.promise == REFUSED else wrong(answer)
        elif (400 <= answer.status < 500 and answer.status != 429) or (
            answer.status == 504 and may_be_late
        ):
            if not sent.startswith(b"HEAD") or answer.body:
                why = _wrong_refusal(answer)
        else:
            why = f"status {answer.status}: {answer.body[:200]!r}"
        if why is not None:
            return why
    return None


def _wrong_refusal(answer: Answer) -> str | None:
    """What is wrong with the body of a refusal, or None."""
    try:
        error = json.loads(answer.body)["error"]
        if isinstance(error, dict):  # OpenAI's form
            error = f"[{error['code']}] {error['message']}"
        code = _CODE.match(error)
    except (ValueError, KeyError, TypeError):
        code = None
    if not code or code[1] not in CODES:
        return f"a refusal without a code: {answer.body[:100]!r}"
    if _LEAK.search(answer.body) or len(answer.body) > 4000 or "\n" in error:
        return f"a refusal that says too much: {error[:200]}"
    return None


def wrong(answer: Answer) -> str | None:
    """What is wrong with an answer of status 200, or None."""
    if answer.body.startswith(b"# HELP"):
        return None
    try:
        size = int(answer.headers.get("inference-header-content-length", len(answer.body)))
        head = json.loads(answer.body[:size])
        if "object" in head:
            rows = [one["embedding"] for one in head["data"] if "embedding" in one]
            outputs = {"image_embeds": np.array(rows)} if rows else {}
        elif "outputs" in head:
            outputs = dict(decode(answer.body, str(size)).outputs)
        else:
            return None if {"live", "ready", "name"} & set(head) else "an answer without outputs"
        for name, values in outputs.items():
            if name.endswith("_embeds") and np.any(abs(np.linalg.norm(values, axis=-1) - 1) > 1e-3):
                return "an embedding that is not of unit length"
            if name == "score" and np.any(np.abs(values) > 1.001):
                return "a score that is none"
            if name == "mask" and np.max(values, initial=0) >= 65_535:
                return "a mask that points to no label"
    except (ValueError, KeyError, TypeError) as error:
        return f"an answer that cannot be read ({error!r})"
    return None


# What runs


@dataclass
class World:
    """A gateway that listens at `address`, the process of it, and Triton behind it."""

    address: tuple[str, int]
    process: Popen[bytes]
    server: TritonServer | None = None

    def processes(self) -> set[int]:
        """All processes that answer."""
        parents = [psutil.Process(self.process.pid)]
        if self.server is not None:
            parents.append(psutil.Process(self.server.pid))
        every = [*parents, *(child for one in parents for child in one.children(recursive=True))]
        return {one.pid for one in every if one.status() != psutil.STATUS_ZOMBIE}


@contextlib.contextmanager
def world(folder: Path, engine: str) -> Iterator[World]:
    """A tiny release with an index and keys in an empty folder, served by "triton" behind a
    gateway or in one "process".
    """
    models = folder / "models"
    write_release(models, 1, seed=1)
    indexes = folder / "indexes"
    build(photos_in(folder / "photos"), indexes / INDEX, load_release(models))
    keys = folder / "keys"
    keys.write_text(f"suite: {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    address = ("127.0.0.1", free_ports()[0])
    with contextlib.ExitStack() as stack:
        server = None
        if engine == "triton":
            config = ServerConfig(models, Endpoints.on_free_ports(), indexes=indexes)
            server = stack.enter_context(TritonServer(config))
            url = server.grpc_url.removeprefix("grpc://")
            process = start(Settings(port=address[1], server=url, api_keys=keys, timeout=TIMEOUT))
        else:
            arguments = [models, indexes, keys, address[1], TIMEOUT]
            command = [sys.executable, "-m", "tests.helpers.engine_process", *map(str, arguments)]
            process = Popen(command, cwd=Path(__file__).parents[2])

        def is_ready() -> bool:
            answers = good_answers(address).values()
            return all(one and one.status == 200 and not wrong(one) for one in answers)

        try:
            until(is_ready, 120)  # the first search loads its libraries
            yield World(address, process, server)
        finally:
            process.terminate()
            process.wait(60)


def memory(pid: int) -> int:
    """MiB of a process."""
    return int(psutil.Process(pid).memory_info().rss) // 2**20


C = TypeVar("C", bound="Caller")


class Caller:
    """A caller who asks again and again in a thread, until the end of the block."""

    def __enter__(self: C) -> C:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def ask(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        self.ask()
        while not self._stop.wait(0.05):
            self.ask()


class Good(Caller):
    """Asks every task the same; its answers must be the first ones, during an attack and after."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._first = good_answers(address)
        self.asked = 0
        self.troubles: list[str] = []

    def ask(self) -> None:
        for task, answer in good_answers(self._address).items():
            self.asked += 1
            first = self._first[task]
            if not (answer and first and (answer.status, answer.body) == (200, first.body)):
                self.troubles.append(f"{task}: {answer and (answer.status, answer.body[:300])}")

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.ask()
        assert not self.troubles, self.troubles[:5]
        assert self.asked >= 10


def good_answers(address: tuple[str, int]) -> dict[str, Answer | None]:
    """The answers to a right request of each task."""
    answers: dict[str, Answer | None] = {}
    for task, request in good().items():
        came = exchange(address, Case("good", request.raw())).answers
        answers[task] = came[0] if came else None
    return answers


def attack(address: tuple[str, int], cases: Mapping[str, Case], workers: int = 6) -> None:
    """Send hostile requests, several at once; each must keep its promise. A name says how to make
    the request again.
    """

    def failure(name: str, hostile: Case) -> str | None:
        why = trouble(hostile, exchange(address, hostile))
        return why and f"{name} ({hostile.kind}): {why}; {str(hostile.parts[0])[:200]}"

    with ThreadPoolExecutor(6) as patient, ThreadPoolExecutor(workers) as pool:
        futures = [
            (patient if hostile.kind.startswith("slow") else pool).submit(failure, name, hostile)
            for name, hostile in cases.items()
        ]
        failures = [why for future in futures if (why := future.result())]
    assert not failures, "\n".join(failures[:20])
