"""Limits of connections: their number for a caller, and the time and bytes that each may take."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from radapter_serve.gateway.connections import MAX_HEADERS, network_of
from radapter_serve.gateway.settings import Timeouts
from tests.gateway.test_gateway import ALIVE, BODY, EMBED, HEAD, heard
from tests.helpers.fake_upstream import Served, serving, until

HOST = b"HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(max_connections=8, max_connections_per_address=8) as gateway:
        yield gateway


def answers(it: socket.socket, request: bytes = ALIVE) -> bool:
    it.sendall(request)
    return heard(it).startswith(b"HTTP/1.1 200")


def has_ended(it: socket.socket, seconds: float = 20) -> bool:
    """True if the gateway ends a connection on which nothing is to come, within so many seconds."""
    it.settimeout(seconds)
    try:
        return it.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    finally:
        it.settimeout(30)


# Places


def test_a_newcomer_gets_the_place_that_has_waited_longest(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(served.connection()) for _ in range(8)]
        # The first has a request under way, the second has asked last, and so the third has waited
        # longest.
        served.hold()
        kept[0].sendall(EMBED)
        until(lambda: served.upstream.asked)
        for it in (*kept[2:], kept[1]):
            assert answers(it)
        for number, gone in enumerate(kept[2:5]):
            newcomer = stack.enter_context(served.connection())
            assert answers(newcomer)
            assert has_ended(gone), number
        assert len(served.connections.open) == 8
        assert all(answers(it) for it in (kept[1], *kept[5:]))
        served.let_go()
        assert heard(kept[0]).startswith(b"HTTP/1.1 200")


def test_where_all_are_at_work_a_newcomer_waits_for_a_place(served: Served) -> None:
    served.hold()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(served.connection()).sendall(EMBED)
        until(lambda: len(served.upstream.asked) == 8)
        newcomer = stack.enter_context(served.connection())
        newcomer.sendall(ALIVE)
        assert not has_ended(newcomer, 0.05)
        assert len(served.connections.open) == 8
        served.let_go()
        assert heard(newcomer).startswith(b"HTTP/1.1 200")


def test_an_address_at_its_limit_gets_no_further_place_and_another_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(max_connections=8) as served, contextlib.ExitStack() as stack:  # 2 of an address
        other = stack.enter_context(served.connection(address="127.0.0.2"))
        kept = [stack.enter_context(served.connection()) for _ in range(2)]
        assert answers(other) and all(map(answers, kept))
        # Its own connection that has waited longest ends.
        assert answers(stack.enter_context(served.connection()))
        assert has_ended(kept[0]) and not any(has_ended(it, 0.05) for it in (other, kept[1]))
        served.hold()
        for _ in range(2):
            stack.enter_context(served.connection()).sendall(EMBED)
        until(lambda: len(served.upstream.asked) == 2)
        for _ in range(3):
            assert has_ended(stack.enter_context(served.connection()))
        assert answers(other)
        assert len(served.connections.open) == 3
        said = [line for line in caplog.messages if "127.0.0.1" in line]
        assert len(said) == 1 and "set --max-connections-per-address" in said[0]
        served.let_go()


def test_a_connection_that_ends_gives_its_place_back() -> None:
    with serving(max_connections=8) as served:
        for begin in (ALIVE, b"GET /he") * 5:
            with served.connection(begin) as it:
                assert begin != ALIVE or heard(it)
        until(lambda: not served.connections.open)
        assert not served.connections._of_address and not served.connections.waiting


def test_the_memory_of_a_connection_is_free_when_it_ends(served: Served) -> None:
    """Not only when the garbage collector comes: a flood would take hundreds of megabytes."""
    gc.collect()
    gc.disable()
    try:
        with served.connection() as it:
            assert answers(it)
            [connection] = map(weakref.ref, served.connections.open)
        until(lambda: connection() is None)
    finally:
        gc.enable()


def test_newcomers_get_the_places_of_unfinished_bodies(served: Served) -> None:
    """First of the one that has sent nothing for longest, but an idle one goes before all."""
    begun = HEAD + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 1) + BODY[:-8]
    with contextlib.ExitStack() as stack:
        served.hold()
        working = stack.enter_context(served.connection(EMBED))
        until(lambda: served.upstream.asked)
        bodies = []
        for count in range(1, 8):
            bodies.append(stack.enter_context(served.connection(begun)))
            until(lambda: len(served.connections.receiving) == count)  # noqa: B023
        bodies.pop().close()
        until(lambda: len(served.connections.receiving) == 6)
        idle = stack.enter_context(served.connection())
        assert answers(idle)
        oldest = next(iter(served.connections.receiving))
        bodies[0].sendall(BODY[-8:-1])
        until(lambda: next(iter(served.connections.receiving)) is not oldest)
        for count, gone in enumerate([idle, *bodies[1:4]], 2):
            stack.enter_context(served.connection()).sendall(EMBED)
            assert has_ended(gone)
            # Until it has asked, the newcomer is the first to give way.
            until(lambda: len(served.upstream.asked) == count)  # noqa: B023
        bodies[0].sendall(BODY[-1:] + b" ")
        until(lambda: len(served.upstream.asked) == 6)
        served.let_go()
        assert heard(working).startswith(b"HTTP/1.1 200")
        assert heard(bodies[0]).startswith(b"HTTP/1.1 200")
        assert len(served.connections.receiving) == 2
    until(lambda: not served.connections.open)
    assert not served.connections.receiving


def test_who_still_reads_an_answer_keeps_the_place(served: Served) -> None:
    served.upstream.outputs = {"text_embeds": np.zeros((1, 2**16), np.float32)}
    asked = served.upstream.asked
    with contextlib.ExitStack() as stack:
        reader, *others = [stack.enter_context(served.connection()) for _ in range(8)]
        # The reader asks until an answer does not fit into the buffers of the system.
        while not served.connections.unread:
            count = len(asked) + 1
            reader.sendall(EMBED)
            until(lambda: len(asked) == count and not served.connections.state.tasks)  # noqa: B023
        for it in others:
            assert answers(it)
        newcomer = stack.enter_context(served.connection())
        assert answers(newcomer) and has_ended(others[0])
        for _ in asked:
            assert len(heard(reader)) > 2**16
        # The time limit for reading ends with the answer.
        until(lambda: not served.connections.unread)
        assert answers(reader)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_who_counts_as_one_caller(host: str, network: str) -> None:
    assert network_of(host) == network


# Time


def test_a_caller_who_does_not_ask_has_a_limited_time() -> None:
    with serving(timeouts=Timeouts(idle=1.2)) as served, contextlib.ExitStack() as stack:
        idle = [
            (first, stack.enter_context(served.connection(first)))
            for first in (b"", b"GET /health/live HT", ALIVE, ALIVE + b"GET ")
        ]
        # The headers of a request have their time from their first byte on.
        slow = stack.enter_context(served.connection())
        time.sleep(0.7)
        assert len(served.connections.open) == 5
        slow.sendall(ALIVE[:9])
        time.sleep(0.7)
        slow.sendall(ALIVE[9:])
        head = heard(slow).split(b"\r\n")
        assert head[0] == b"HTTP/1.1 200 OK"
        # Nothing names the program.
        names = [line.partition(b":")[0] for line in head[1:5]]
        assert names == [b"date", b"content-length", b"content-type", b"x-request-id"]
        for first, it in idle:
            assert ALIVE not in first or heard(it)
            assert it.recv(1) == b""


def test_a_body_has_a_lowest_rate() -> None:
    """It may come in pieces for longer than a silent one has, but not more slowly."""
    begun = HEAD + b"Content-Length: %d\r\n\r\n" % 2**17
    with serving(timeouts=Timeouts(idle=0.4)) as served, served.connection(begun) as silent:
        start = time.monotonic()
        with served.connection(begun) as steady:
            body = BODY.ljust(2**17)
            for place in range(0, 2**17, 2**13):  # each lets it go on for half a second
                steady.sendall(body[place : place + 2**13])
                time.sleep(0.05)
            assert time.monotonic() - start > 0.8
            assert heard(steady).startswith(b"HTTP/1.1 200")
        answer = heard(silent)
        assert b"408" in answer and b"less than 16 KiB per second" in answer
        with served.connection(begun) as slow, contextlib.suppress(ConnectionError):
            slow.settimeout(0.05)
            answer = b""
            start = time.monotonic()
            while not answer and time.monotonic() - start < 20:
                slow.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    answer = slow.recv(2**16)
            assert b"408" in answer


# Parsing


def test_a_request_that_comes_byte_by_byte(served: Served) -> None:
    chunks = CHUNKED + b"%x\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(BODY), BODY)
    for request in (EMBED, chunks, b"\r\n" + ALIVE):  # some callers send an empty line before one
        with served.connection() as it:
            it.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(len(request)):
                it.sendall(request[number : number + 1])
            assert heard(it).startswith(b"HTTP/1.1 200")
            assert answers(it)
    # Our client knows a server of HTTP by this end of a call by gRPC.
    with served.connection(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") as it:
        assert it.recv(1) == b""


def test_a_body_in_chunks_may_be_longer_than_headers(served: Served) -> None:
    piece = b"%x\r\n%s\r\n" % (2**13, b" " * 2**13)
    chunks = b"%x\r\n%s\r\n" % (len(BODY), BODY) + piece * 8
    with served.connection() as it:
        for _ in range(2):
            assert answers(it, CHUNKED + chunks + b"0\r\n\r\n")


def test_an_answer_before_the_body_ends_the_connection(served: Served) -> None:
    """A caller who has asked whether to send a body may never send it."""
    head = b"POST /nowhere " + HOST + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"
    with served.connection(head) as it:
        assert heard(it).startswith(b"HTTP/1.1 404")
        assert has_ended(it, 5)


def test_one_request_at_a_time_and_all_in_their_order(served: Served) -> None:
    served.hold()
    names = [b"embed_text", b"embed_image"] * 5
    image = EMBED.replace(b"/embed_text/", b"/embed_image/").replace(b'"text"', b'"image"')
    size = b"Content-Length: %d"
    image = image.replace(size % len(BODY), size % (len(BODY) + 1))
    with served.connection((EMBED + image) * 5) as it:
        until(lambda: served.upstream.asked)
        time.sleep(0.05)
        assert len(served.upstream.asked) == 1
        served.let_go()
        for name in names:
            assert b'"model_name":"%s"' % name in heard(it)
    assert [request.model.encode() for request in served.upstream.asked] == names


def test_what_comes_behind_a_request_does_not_cost_its_answer(served: Served) -> None:
    chunks = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for request, answered in ((EMBED + b"nonsense\r\n\r\n", 2), (chunks + ALIVE, 1)):
        served.hold()
        asked = len(served.upstream.asked)
        with served.connection(request) as it:
            until(lambda: len(served.upstream.asked) > asked)  # noqa: B023
            served.let_go()
            beginnings = [heard(it)[:12] for _ in range(answered)]
            assert beginnings == [b"HTTP/1.1 200", b"HTTP/1.1 400"][:answered]
            assert has_ended(it, 5)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01",  # a handshake of TLS
        b"\r\n\r\n" + ALIVE,
        b"GET /health/live HTTP/2.0\r\n\r\n",
        b"CONNECT a:1 " + HOST + b"\r\n",
        b"GET /v2/models/\xe7\x8c\xab " + HOST + b"\r\n",
        CHUNKED + b"no size\r\n",
        HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ],
)
def test_what_is_not_this_protocol(served: Served, request_: bytes) -> None:
    with served.connection(request_) as it:
        said = heard(it)
        assert said.startswith(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n")
        error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
        assert error.startswith("[invalid_argument] these bytes are not a request of HTTP/1.1")
        assert it.recv(1) == b""
    until(lambda: not served.connections.open)
    assert not served.upstream.asked


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health/live " + HOST + b"X: ",
        CHUNKED + b"1\r\na\r\n0\r\nX: ",
        CHUNKED + b"1\r\na\r\n0\r\n" + b"X: y\r\n" * 4,
        CHUNKED + b"1;a=",
    ],
)
def test_what_never_ends_is_cut_off(served: Served, head: bytes) -> None:
    """Headers, a trailer, and what a chunk says of itself: none is kept beyond the limit."""
    with served.connection(head + b"a" * MAX_HEADERS) as it:
        it.sendall(b"a" * 2 * MAX_HEADERS)
        assert heard(it).startswith(b"HTTP/1.1 431")
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                it.sendall(b"a" * 2**20)
            raise AssertionError("it is read on and on")
    assert not served.upstream.asked


# The end


def test_it_stops_with_kept_connections_and_with_the_answer_that_is_under_way() -> None:
    with serving() as served, served.connection() as kept, served.connection() as busy:
        assert answers(kept)
        served.hold()
        busy.sendall(EMBED)
        until(lambda: served.upstream.asked)
        served.stop()
        assert kept.recv(1) == b""
        with pytest.raises(ConnectionError):
            until(lambda: served.connection().__enter__().close())
        served.let_go()
        assert b"\r\nconnection: close" in heard(busy)
        assert busy.recv(1) == b""


def test_it_stops_although_a_request_never_ends() -> None:
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serving(timeouts=Timeouts(drain=0.1)))
        served.hold()
        busy = [stack.enter_context(served.connection(EMBED)) for _ in range(8)]
        until(lambda: len(served.upstream.asked) == len(busy))
        unfinished = stack.enter_context(served.connection(EMBED[:-1]))
        until(lambda: served.connections.receiving)
        served.stop()
        for it in (*busy, unfinished):
            answer = heard(it)
            assert answer.startswith(b"HTTP/1.1 503") and b"[server_stopping] the " in answer
            assert it.recv(1) == b""
        assert served.upstream.cancelled == len(busy)


def test_it_stops_although_a_caller_reads_no_answer() -> None:
    with serving(timeouts=Timeouts(drain=0.1)) as served, served.connection() as deaf:
        served.upstream.outputs = {"text_embeds": np.zeros((1, 2**15), np.float32)}
        deaf.sendall(EMBED * 200)
        until(lambda: served.connections.unread and served.connections.state.tasks)
        served.stop()
        until(lambda: not served.connections.open)
