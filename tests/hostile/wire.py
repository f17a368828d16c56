"""Sending bytes as they are, and reading what comes back meanwhile."""

from __future__ import annotations

import http.client
import io
import re
import select
import socket
import time
from dataclasses import dataclass, field

from tests.hostile.case import Case

LONG = 40.0  # seconds after which a request counts as hanging
_PIECE = 2**18
_LENGTH = re.compile(rb"\r\ncontent-length: (\d{1,12})\r\n", re.IGNORECASE)
_AFTER = 0.15  # seconds to wait for answers that nobody asked for


@dataclass
class Answer:
    """One answer of HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Outcome:
    """What came back on a connection.

    Attributes:
        answers: those that were complete.
        rest: bytes of an answer that was not.
        needed: how many that answer will have at least; 0 where that is unknown.
        how: "answered", "closed", "reset", "refused" (no connection) or "hung".
        seconds: all of it took.
    """

    answers: list[Answer] = field(default_factory=list)
    rest: bytearray = field(default_factory=bytearray)
    needed: int = 0
    how: str = "answered"
    seconds: float = 0.0


class _Source(io.BytesIO):
    """Stays open when http.client is done with it."""

    def makefile(self, *args: object, **kwargs: object) -> io.BytesIO:
        return self

    def close(self) -> None:
        pass


def parse(data: bytes, method: str, *, ended: bool) -> tuple[Answer, bytes] | None:
    """The first answer in some bytes and what stands behind it; None where it is not complete.

    Args:
        data: that came.
        method: of the request; an answer to HEAD has no body.
        ended: whether no more will come.
    """
    if b"\r\n\r\n" not in data:
        return None
    source = _Source(data)
    response = http.client.HTTPResponse(source, method=method)  # type: ignore[arg-type]
    try:
        response.begin()
        if response.length is None and not response.chunked and not ended:
            return None
        body = response.read()
        end = source.tell()
    except (http.client.HTTPException, ValueError):
        return None
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, body), data[end:]


def exchange(address: tuple[str, int], case: Case, limit: float = LONG) -> Outcome:
    """Send a case, and gather what comes back until it is complete, the connection ends, or the
    time is over.
    """
    start = time.monotonic()
    outcome = Outcome()
    try:
        with socket.create_connection(address, timeout=limit) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            _converse(connection, case, outcome, start + limit)
    except TimeoutError:
        outcome.how = "hung"
    except ConnectionRefusedError:
        outcome.how = "refused"
    except (ConnectionError, OSError):
        outcome.how = "answered" if outcome.answers else "reset"
    outcome.seconds = time.monotonic() - start
    return outcome


def _converse(connection: socket.socket, case: Case, outcome: Outcome, deadline: float) -> None:
    parts = list(case.parts)
    sending = memoryview(b"")
    wake = 0.0
    all_sent = 0.0
    ended_own = False
    watch = select.poll()
    while True:
        now = time.monotonic()
        while not sending and now >= wake and parts:
            part = parts.pop(0)
            sending, wake = (
                (memoryview(part), wake) if isinstance(part, bytes) else (sending, now + part)
            )
        if not sending and not parts and not all_sent:
            all_sent = now
        done = len(outcome.answers) >= case.answers
        if done and (outcome.rest or not case.parts or now >= wake):
            return
        if now >= deadline:
            outcome.how = "hung"
            return
        if (
            all_sent
            and not ended_own
            and case.hang_up is not None
            and now >= all_sent + case.hang_up
        ):
            connection.shutdown(socket.SHUT_WR)
            ended_own = True
        watch.register(connection, select.POLLIN | (select.POLLOUT if sending and not done else 0))
        events = watch.poll(20 if parts or case.hang_up is not None or done else 200)
        for _, event in events:
            if event & select.POLLOUT and sending and not event & (select.POLLERR | select.POLLHUP):
                try:
                    sending = sending[connection.send(sending[:_PIECE]) :]
                except BlockingIOError:
                    pass
                except ConnectionError:  # refused meanwhile: what it said is read below
                    sending = memoryview(b"")
                    parts = []
                    all_sent = now
            if event & (select.POLLIN | select.POLLERR | select.POLLHUP) and not _receive(
                connection, case, outcome
            ):
                return
        if len(outcome.answers) >= case.answers and not done:
            wake = time.monotonic() + (
                _AFTER if case.answers > 1 or case.kind.startswith("HTTP") else 0
            )
            sending = memoryview(b"")
            parts = []


def _receive(connection: socket.socket, case: Case, outcome: Outcome) -> bool:
    """Read once; False where no more will come."""
    try:
        data = connection.recv(_PIECE)
    except BlockingIOError:
        return True
    except ConnectionError:
        outcome.how = "answered" if outcome.answers else "reset"
        return False
    outcome.rest += data
    while (len(outcome.rest) >= outcome.needed or not data) and (
        found := parse(bytes(outcome.rest), case.method, ended=not data)
    ):
        answer = found[0]
        outcome.rest = bytearray(found[1])
        outcome.needed = 0
        if answer.status >= 200:
            outcome.answers.append(answer)
    if not outcome.needed and (
        told := _LENGTH.search(outcome.rest, 0, 4096)
    ):  # a long body is parsed once
        outcome.needed = told.end() + int(told[1])
    if not data:
        outcome.how = "answered" if outcome.answers else "closed"
    return bool(data)
