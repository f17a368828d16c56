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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any, TypeVar

import numpy as np

from radapter_client._http import decode
from radapter_serve.encoders.loaded import load_release
from radapter_serve.gateway.errors import CODES
from radapter_serve.gateway.run import start
from radapter_serve.gateway.settings import Settings
from radapter_serve.index.build import build
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.fake_upstream import until
from tests.helpers.small_release import TASKS, png, write_release
from tests.hostile.asks import INDEX, KEY, good
from tests.hostile.cases import BROKEN, REFUSED, Case, by_hand, case

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

    def take_answers(self, method: bytes) -> None:
        """Move complete answers from `rest` to `answers`."""
        while (end := self.rest.find(b"\r\n\r\n") + 4) >= 4:
            status, *lines = bytes(self.rest[: end - 4]).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
            number = int(status.split()[1])
            size = int(headers.get("content-length", 0))
            if method == b"HEAD" or number < 200:
                size = 0
            if len(self.rest) < end + size:
                return
            if number >= 200:
                self.answers.append(Answer(number, headers, bytes(self.rest[end : end + size])))
            del self.rest[: end + size]


def exchange(address: tuple[str, int], case: Case, limit: float = LONG) -> Outcome:
    """Send a case, and gather what comes back until it is complete, the connection ends, or the
    time is over.
    """
    outcome = Outcome()
    deadline = time.monotonic() + limit
    is_over = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):  # of a connection that the server ended
            for part in case.parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                elif is_over.wait(part):
                    return
            if case.hang_up is not None and not is_over.wait(case.hang_up):
                connection.shutdown(socket.SHUT_WR)

    try:
        connection = socket.create_connection(address, timeout=limit)
    except ConnectionRefusedError:
        outcome.how = "refused"
        return outcome
    sender = threading.Thread(target=send)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender.start()
        try:
            while part := connection.recv(2**18):
                outcome.rest += part
                outcome.take_answers(case.raw[:5].strip())
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
        if outcome.rest:
            return "half an answer"
        return None if case.promise == BROKEN else f"{outcome.how} without an answer"
    if case.promise == BROKEN and len(answers) == case.answers + 1:
        last = answers[-1]
        closes = last.headers.get("connection") == "close"
        if last.status == 400 and closes and b"no request of HTTP/1.1" in last.body:
            answers = answers[:-1]  # of bytes behind the body that was announced
    if outcome.rest or len(answers) > case.answers:
        return "more than was asked for"
    if len(answers) < case.answers and case.promise != BROKEN:
        return f"{len(answers)} answers of {case.answers}"
    return next((why for why in (_answer_trouble(case, one) for one in answers) if why), None)


def _answer_trouble(case: Case, answer: Answer) -> str | None:
    if answer.status == 200:
        return "answered as if it were right" if case.promise == REFUSED else wrong(answer)
    late = answer.status == 504 and b'"timeout"' in case.raw  # as its caller wished
    if not (400 <= answer.status < 500 or late) or answer.status == 429:
        return f"status {answer.status}: {answer.body[:200]!r}"
    if not answer.body and case.raw.startswith(b"HEAD"):
        return None
    try:
        error = json.loads(answer.body)["error"]
        if isinstance(error, dict):  # OpenAI's form
            error = f"[{error['code']}] {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"a refusal without JSON: {answer.body[:100]!r}"
    code = _CODE.match(error)
    if not code or code[1] not in CODES:
        return f"a refusal without a code: {error[:100]}"
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
            places = [one.get("index", place) for place, one in enumerate(head["data"])]
            if places != list(range(len(places))):
                return "embeddings out of order"
            return _output_trouble("image_embeds", rows) if rows else None
        if "outputs" not in head:
            return None if {"live", "ready", "name"} & set(head) else "an answer without outputs"
        for name, values in decode(answer.body, str(size)).outputs.items():
            if why := _output_trouble(name, values):
                return why
        for output in head["outputs"]:
            size += output.get("parameters", {}).get("binary_data_size", 0)
        return None if size == len(answer.body) else "bytes behind the outputs"
    except (ValueError, KeyError, TypeError) as error:
        return f"an answer that cannot be read ({error!r})"


def _output_trouble(name: str, values: Any) -> str | None:
    if name.endswith("_embeds"):
        is_unit = np.allclose(np.linalg.norm(values, axis=-1), 1, atol=1e-3)
        return None if is_unit else "an embedding that is not of unit length"
    if name == "score":
        return None if np.all(np.abs(values) <= 1.001) else "a score that is none"
    if name == "mask":
        return None if np.max(values, initial=0) < 65_535 else "a mask that points to no label"
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
        server = None if self.server is None else self.server.pid
        waiting = [self.process.pid] + ([] if server is None else [server])
        living = set()
        while waiting:
            folder = Path("/proc", str(waiting.pop()))
            with contextlib.suppress(OSError):  # of a process that has ended
                if "State:\tZ" not in (folder / "status").read_text():
                    living.add(int(folder.name))
                for file in folder.glob("task/*/children"):
                    waiting += map(int, file.read_text().split())
        return living


@contextlib.contextmanager
def world(folder: Path, engine: str) -> Iterator[World]:
    """A tiny release with an index and keys in an empty folder, served by "triton" behind a
    gateway or in one "process".
    """
    write_release(folder / "models", 1, seed=1, tasks=(*TASKS, "retrieve"))
    (folder / "photos").mkdir()
    for number in range(6):
        (folder / "photos" / f"{number}.png").write_bytes(png(number, 50, 40))
    indexes = folder / "indexes"
    build(str(folder / "photos"), indexes / INDEX, load_release(folder / "models"))
    keys = folder / "keys"
    keys.write_text(f"suite: {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    port = free_ports()[0]
    with contextlib.ExitStack() as stack:
        server = None
        if engine == "triton":
            config = ServerConfig(folder / "models", Endpoints.on_free_ports(), indexes=indexes)
            server = stack.enter_context(TritonServer(config))
            url = server.grpc_url.removeprefix("grpc://")
            process = start(Settings(port=port, server=url, api_keys=keys, timeout=TIMEOUT))
        else:
            arguments = [folder / "models", indexes, keys, port, TIMEOUT]
            command = [sys.executable, "-m", "tests.helpers.engine_process", *map(str, arguments)]
            process = Popen(command, cwd=Path(__file__).parents[2])
        try:
            # The first search loads its libraries.
            until(
                lambda: all(
                    answer is not None and answer.status == 200 and not wrong(answer)
                    for answer in good_answers(("127.0.0.1", port)).values()
                ),
                120,
            )
            yield World(("127.0.0.1", port), process, server)
        finally:
            process.terminate()
            process.wait(60)


def memory(pid: int) -> int:
    """MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


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
    """Asks every task the same, and compares the answers with the first."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._first = good_answers(address)
        self.asked = 0
        self.troubles: list[str] = []

    def ask(self) -> None:
        for task, answer in good_answers(self._address).items():
            self.asked += 1
            first = self._first[task]
            if answer is None or first is None or answer.body != first.body or answer.status != 200:
                self.troubles.append(f"{task}: {answer and (answer.status, answer.body[:300])}")

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.ask()


def good_answers(address: tuple[str, int]) -> dict[str, Answer | None]:
    """The answers to a right request of each task."""
    outcomes = {
        task: exchange(address, Case("good", (request.raw(),))) for task, request in good().items()
    }
    return {task: one.answers[0] if one.answers else None for task, one in outcomes.items()}


# Campaigns


@dataclass
class Report:
    """Results by the kind of a request, and what broke a promise, which seed and number make
    again.
    """

    results: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(map(Counter.total, self.results.values()))


def attack(
    address: tuple[str, int], seed: int, numbers: Sequence[int] | range, workers: int = 6
) -> Report:
    """Send the hostile requests of some numbers, several at once."""
    report = Report()
    lock = threading.Lock()

    def send(number: int) -> None:
        hostile = case(seed, number)
        outcome = exchange(address, hostile)
        why = trouble(hostile, outcome)
        result = outcome.how
        if outcome.answers and outcome.how != "hung":
            result = str(outcome.answers[-1].status)
        with lock:
            report.results.setdefault(hostile.kind.partition(":")[0], Counter())[result] += 1
            if why:
                report.failures.append(
                    f"seed {seed}, number {number} ({hostile.kind}): {why}; {hostile.raw[:200]!r}"
                )

    def is_slow(number: int) -> bool:
        return number < len(by_hand()) and by_hand()[number][0].startswith("slow")

    slow: Iterable[int] = [number for number in numbers if is_slow(number)]
    with ThreadPoolExecutor(6) as patient, ThreadPoolExecutor(workers) as pool:
        futures = [patient.submit(send, number) for number in slow]
        futures += [pool.submit(send, number) for number in numbers if not is_slow(number)]
        for future in futures:
            future.result()
    return report
