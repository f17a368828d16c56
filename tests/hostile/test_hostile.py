"""Hostile requests keep the promises of `docs/gateway.md`: each is refused with a code, or answered
right, while another client gets the same bytes as before.

By `HOSTILE_SEED` and `HOSTILE_REQUESTS` other requests, and more; by `HOSTILE_NUMBER` one alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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

import numpy as np
import psutil
import pytest

from radapter_client._http import decode
from radapter_serve.encoders.loaded import load_release
from radapter_serve.gateway.settings import Settings
from radapter_serve.gateway.upstream import CODES
from radapter_serve.index.build import build
from radapter_serve.server.config import free_ports
from tests.helpers.asking import meanwhile, tritonserver
from tests.helpers.fake_upstream import until
from tests.helpers.gateway import start
from tests.helpers.small_release import photos_in, write_release
from tests.hostile.asks import BROKEN, INDEX, KEY, REFUSED, Case, good
from tests.hostile.cases import case, refused_bodies

SEED = int(os.environ.get("HOSTILE_SEED", "1"))
LONG = 40.0  # seconds after which a request counts as hanging
TIMEOUT = 20.0  # seconds that the gateway gives a request
HANG_UP = 0.3  # seconds after which the caller of broken HTTP ends its side
_CODE = re.compile(r"\[([a-z_]+)\] \S")
_LEAK = re.compile(
    rb"Traceback|\w\.py\b|site-packages|/tmp|/work|/home|/root|/usr|/proc|/dev/shm|0x[0-9a-f]{8}"
    rb"|radapter_serve[._]"
)
Address = tuple[str, int]


# Sending


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(compare=False)
    body: bytes


def exchange(address: Address, case: Case) -> tuple[list[Answer], bytes]:
    """Send a case, and gather what comes back until it is complete or the connection ends: the
    answers, and what is no complete one. Raises TimeoutError if it hangs.
    """
    answers: list[Answer] = []
    rest = bytearray()
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
            if case.promise == BROKEN and not is_over.wait(HANG_UP):
                connection.shutdown(socket.SHUT_WR)

    def take_answers() -> None:
        """Move complete answers from `rest` to `answers`."""
        while (end := rest.find(b"\r\n\r\n") + 4) >= 4:
            status, *lines = bytes(rest[: end - 4]).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
            number = int(status.split()[1])
            size = 0 if is_head or number < 200 else int(headers.get("content-length", 0))
            if len(rest) < end + size:
                return
            if number >= 200:
                answers.append(Answer(number, headers, bytes(rest[end : end + size])))
            del rest[: end + size]

    sender = threading.Thread(target=send)
    with socket.create_connection(address, timeout=LONG) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender.start()
        try:
            while part := connection.recv(2**18):
                rest += part
                take_answers()
                if len(answers) >= case.answers:
                    # Answers that nobody asked for would follow at once.
                    deadline = time.monotonic() + (0.15 if case.promise == BROKEN else 0.01)
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
        except TimeoutError:
            if len(answers) < case.answers:
                raise
        except OSError:
            pass  # a reset ends the connection, too
        finally:
            is_over.set()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join()
    return answers, bytes(rest)


# Judging


def trouble(case: Case, answers: list[Answer], rest: bytes) -> str | None:
    """The reason why the answers break the promise of their case; None if they keep it."""
    if case.promise == BROKEN and len(answers) == case.answers + 1:
        last = answers[-1]
        if last.headers.get("connection") == "close" and b"not a request of HTTP/1.1" in last.body:
            answers = answers[:-1]  # of bytes behind the body that was announced
    wanted = range(0 if case.promise == BROKEN else case.answers, case.answers + 1)
    if rest or len(answers) not in wanted:
        return f"{len(answers)} answers of {case.answers}, and {len(rest)} bytes"
    # A caller may wish for a deadline that is too short, or for work that outlasts the gateway's.
    sent = b"".join(part for part in case.parts if isinstance(part, bytes))
    long = ("much work", "images: large", "images: many")
    may_be_late = b'"timeout"' in sent or case.kind.startswith(long)
    for answer in answers:
        why: str | None = f"status {answer.status}: {answer.body[:200]!r}"
        if answer.status == 200:
            why = "answered as if it were right" if case.promise == REFUSED else wrong(answer)
        elif answer.status in ({*range(400, 500)} - {429}) | ({504} if may_be_late else set()):
            why = None if sent.startswith(b"HEAD") and not answer.body else _wrong_refusal(answer)
        if why is not None:
            return why
    return None


def _wrong_refusal(answer: Answer) -> str | None:
    """The fault of a refusal's body, or None."""
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
    """The fault of an answer of status 200, or None."""
    try:
        size = int(answer.headers.get("inference-header-content-length", len(answer.body)))
        head = json.loads(answer.body[:size])
        if "object" in head:
            rows = [entry["embedding"] for entry in head["data"] if "embedding" in entry]
            outputs = {"image_embeds": np.array(rows)} if rows else {}
        elif "outputs" in head:
            outputs = dict(decode(answer.body, str(size)).outputs)
        else:  # what the gateway says of itself
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


# Servers under attack


@contextlib.contextmanager
def world(folder: Path, engine: str) -> Iterator[tuple[Address, psutil.Process]]:
    """A tiny release with an index and keys in an empty folder, served by "triton" behind a gateway
    or in one "process": the address, and the process that listens there. No process ends or is
    started in the block.
    """
    models = folder / "models"
    write_release(models, 1, seed=1)
    indexes = folder / "indexes"
    build(photos_in(folder / "photos"), indexes / INDEX, load_release(models))
    keys = folder / "keys"
    keys.write_text(f"suite: {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    address = ("127.0.0.1", free_ports()[0])

    def is_ready() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            return all(
                answer.status == 200 and not wrong(answer) for answer in good_answers(address)
            )
        return False

    def processes() -> set[int]:
        every = psutil.Process().children(recursive=True)
        return {process.pid for process in every if process.status() != psutil.STATUS_ZOMBIE}

    with contextlib.ExitStack() as stack:
        server = None
        if engine == "triton":
            server = stack.enter_context(tritonserver(models, indexes=indexes))
            url = server.grpc_url.removeprefix("grpc://")
            process = start(Settings(port=address[1], server=url, api_keys=keys, timeout=TIMEOUT))
        else:
            arguments = [models, indexes, keys, address[1], TIMEOUT]
            command = [sys.executable, "-m", "tests.helpers.engine_process", *map(str, arguments)]
            process = Popen(command, cwd=Path(__file__).parents[2])
        try:
            until(is_ready, 120)  # the first search loads its libraries
            before = processes()
            yield address, psutil.Process(process.pid)
            if server is not None:
                server.check()  # says what died, and why
            assert processes() == before
        finally:
            process.terminate()
            status = process.wait(60)
    assert status == 0


def memory(pid: int) -> int:
    """MiB of a process."""
    return int(psutil.Process(pid).memory_info().rss) // 2**20


def good_answers(address: Address) -> list[Answer]:
    """The answers to a right request of each task."""
    return [
        answer for request in good() for answer in exchange(address, Case("good", request.raw()))[0]
    ]


@contextlib.contextmanager
def undisturbed(address: Address) -> Iterator[None]:
    """Another client asks every task the same all the time; its answers must be the first ones, to
    the byte.
    """
    first = good_answers(address)

    def ask() -> None:
        for before, now in zip(first, good_answers(address), strict=True):
            assert now == before and now.status == 200

    with meanwhile(ask):
        yield


def attack(address: Address, cases: Mapping[int, Case], workers: int = 6) -> None:
    """Send hostile requests by number, several at once; each must keep its promise."""

    def failure(number: int, case: Case) -> str | None:
        try:
            why = trouble(case, *exchange(address, case))
        except OSError as error:
            why = repr(error)
        return why and f"{number} ({case.kind}): {why}; {str(case.parts[0])[:200]}"

    with ThreadPoolExecutor(6) as patient, ThreadPoolExecutor(workers) as pool:
        futures = [
            (patient if case.kind.startswith("slow") else pool).submit(failure, number, case)
            for number, case in cases.items()
        ]
        failures = [why for future in futures if (why := future.result())]
    assert not failures, "\n".join(failures[:20])


# Tests


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        pytest.param("triton", 2_000, marks=pytest.mark.triton, id="triton"),
        pytest.param(
            "triton", 50_000, marks=[pytest.mark.triton, pytest.mark.slow], id="many-to-triton"
        ),
        pytest.param("process", 2_000, marks=pytest.mark.slow, id="to_an_engine"),
    ],
)
def test_hostile_requests(engine: str, count: int, tmp_path: Path) -> None:
    numbers = range(int(os.environ.get("HOSTILE_REQUESTS", count)))
    if number := os.environ.get("HOSTILE_NUMBER"):
        numbers = range(int(number), int(number) + 1)
    with world(tmp_path, engine) as (address, _), undisturbed(address):
        attack(address, {number: case(SEED, number) for number in numbers})


@pytest.mark.slow
def test_refused_bodies_of_many_callers(tmp_path: Path) -> None:
    """Their bodies are thrown away, and neither connections nor memory stay."""
    cases = [*refused_bodies()]
    with world(tmp_path, "process") as (address, process):
        attack(address, dict(enumerate(cases)))  # what loads first
        files = process.num_fds()
        before = memory(process.pid)
        with undisturbed(address):
            attack(address, dict(enumerate(cases * 20)), workers=100)
        until(lambda: process.num_fds() <= files, 20)
        assert memory(process.pid) - before < 48
