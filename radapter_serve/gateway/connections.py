"""Connections of callers: how many there may be, and what each may take before the gateway looks
at its request. uvicorn speaks HTTP/1.1 on them.

Every connection has one of three states. It waits for a request: in its handshake, before the end
of a request's headers, or after an answer. It has a request under way. Or it has ended. One that
waits has its time, and where places run out the one that has waited longest ends first. So whoever
keeps connections open without asking on them keeps nobody else out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import re
import socket
import ssl
import sys
from collections import Counter
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from radapter_serve.gateway.errors import Refused, bad_request
from radapter_serve.gateway.middleware import MAX_DISCARDED, MAX_HEADERS, headers_too_large
from radapter_serve.gateway.settings import Settings, Timeouts
from radapter_serve.gateway.upstream import LOG

if TYPE_CHECKING:
    from starlette.types import ASGIApp

TICK_SECONDS = 0.25  # from one look at what has had its time to the next
WARN_SECONDS = 60.0  # from one warning that an address has all its places to the next
_HEAD_END = b"\r\n\r\n"
_NO_REQUEST = (
    "these bytes are no request of HTTP/1.1; its lines end with CRLF, and a path has ASCII"
    " characters alone, all others as %XX"
)
# Of a request: some callers end the one before with an empty line.
_BEGINNING = re.compile(rb"(\r\n)?([A-Z]|\Z)|\r\Z")
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_JOINED = 16 * 1024  # bytes of an answer above which nothing is joined
_CHUNKED_PIECE = 512  # bytes of a chunked body that are parsed at once, at least
# What callers do wrong is answered, not logged.
_SILENT = logging.Logger("connections", logging.CRITICAL + 1)


class Connections:
    """Takes the connections of a listener, and answers on them.

    Args:
        app: that answers.
        listener: that listens already; closed by `serve`.
        settings: of the gateway.
        timeouts: of the gateway.

    Raises:
        OSError, ssl.SSLError: a certificate or a key that cannot be read.
    """

    def __init__(
        self, app: ASGIApp, listener: socket.socket, settings: Settings, timeouts: Timeouts
    ) -> None:
        self._listener = listener
        self._most = settings.max_connections
        # Where one address may have all places, its callers wait for one as all others do.
        limited = settings.most_of_address < settings.max_connections
        self._most_of_address = settings.most_of_address if limited else sys.maxsize
        self._timeouts = timeouts
        self._tls = _tls(settings)
        app_of_uvicorn: Any = app
        self.config = uvicorn.Config(
            app_of_uvicorn,
            http=HttpToolsProtocol,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            proxy_headers=False,
        )
        self.state = ServerState()
        self._open: set[_Connection] = set()
        self._of_address: Counter[str] = Counter()
        # Since when each waits for a request, or for its caller to read; the longest first.
        self._waiting: dict[_Connection, float] = {}
        self._unread: dict[_Connection, float] = {}
        # Set where a place may have become free.
        self._changed = asyncio.Event()
        self._warned = -WARN_SECONDS

    async def serve(self, stop: asyncio.Event) -> None:
        """Answer until `stop` is set; running requests then have `timeouts.drain` to end."""
        self._loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._look()
        stopping = asyncio.ensure_future(stop.wait())
        accepting = asyncio.ensure_future(self._accept())
        ticking = asyncio.ensure_future(self._tick())
        try:
            await asyncio.wait({stopping, accepting, ticking}, return_when=asyncio.FIRST_COMPLETED)
            for task in (accepting, ticking):
                if task.done():  # neither ends but by an error
                    task.result()
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            self._listener.close()
            for one in list(self._open):
                one.finish()
            end = self._loop.time() + self._timeouts.drain
            while self._open and self._loop.time() < end:
                self._changed.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), end - self._loop.time())
        finally:
            for waiting in (stopping, accepting, ticking):
                waiting.cancel()
            self._listener.close()
            # Who still waits for an answer is told that there is none.
            for running in list(self.state.tasks):
                running.cancel()
            if self.state.tasks:
                await asyncio.wait(set(self.state.tasks), timeout=TICK_SECONDS)
            for one in list(self._open):
                one.end()
            await asyncio.gather(stopping, accepting, ticking, return_exceptions=True)

    # What connections say

    def wait_for_request(self, one: _Connection) -> None:
        """From now on this connection waits for a request."""
        if one in self._open:
            self._waiting.pop(one, None)
            self._waiting[one] = self._loop.time()
            self._changed.set()

    def has_request(self, one: _Connection) -> None:
        """A connection has a request under way."""
        self._waiting.pop(one, None)

    def wait_for_reader(self, one: _Connection) -> None:
        """The caller does not take what is sent, for the moment."""
        if one in self._open:
            self._unread[one] = self._loop.time()

    def is_read(self, one: _Connection) -> None:
        """The caller has taken what was sent."""
        self._unread.pop(one, None)

    def leave(self, one: _Connection) -> None:
        """A connection has ended."""
        if one in self._open:
            self._open.remove(one)
            self._waiting.pop(one, None)
            self._unread.pop(one, None)
            self._of_address[one.address] -= 1
            if not self._of_address[one.address]:
                del self._of_address[one.address]
            self._changed.set()

    # What it does meanwhile

    async def _accept(self) -> None:
        while True:
            try:
                accepted, peer = await self._loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):  # no more files may be open
                    self._end_oldest()
                    await asyncio.sleep(TICK_SECONDS)
                continue
            address = address_of(peer[0])
            try:
                if not self._has_place(address):
                    accepted.close()
                    continue
                while not self._has_room():
                    self._changed.clear()
                    await self._changed.wait()
            except asyncio.CancelledError:
                accepted.close()
                raise
            self._join(address, accepted)

    def _join(self, address: str, accepted: socket.socket) -> None:
        one = _Connection(self, address)
        self._open.add(one)
        self._of_address[address] += 1
        self.wait_for_request(one)

        def opened(opening: asyncio.Future[Any]) -> None:
            if opening.cancelled() or opening.exception() is not None:  # of its handshake
                accepted.close()
                self.leave(one)

        one.opening = asyncio.ensure_future(
            self._loop.connect_accepted_socket(lambda: one, accepted, ssl=self._tls)
        )
        one.opening.add_done_callback(opened)

    def _has_place(self, address: str) -> bool:
        """Whether an address may have one connection more, in the place of its own that has waited
        longest where it has all its places.
        """
        if self._of_address[address] < self._most_of_address:
            return True
        if self._end_oldest(address):
            return True
        if self._loop.time() - self._warned >= WARN_SECONDS:
            self._warned = self._loop.time()
            LOG.warning(
                "%s has %d requests under way, and gets no more connections; if that is a proxy,"
                " set --max-connections-per-address to what --max-connections is",
                address,
                self._most_of_address,
            )
        return False

    def _has_room(self) -> bool:
        return len(self._open) < self._most or self._end_oldest()

    def _end_oldest(self, address: str | None = None) -> bool:
        """End the connection, of an address or of all, that has waited longest for a request;
        whether there is one.
        """
        for one in self._waiting:
            if address in (None, one.address) and one.is_idle:
                one.end()
                return True
        return False

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._look()

    def _look(self) -> None:
        """End what has had its time, and tell the time in answers."""
        self.state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        for since, seconds in (
            (self._waiting, self._timeouts.idle),
            (self._unread, self._timeouts.piece),
        ):
            last = self._loop.time() - seconds
            while since and next(iter(since.values())) < last:
                next(iter(since)).end()


class _Joined:
    """The way of answers to a transport: headers go out with the body that comes right after them,
    for uvicorn writes the two one by one, and each would be a packet.

    Args:
        transport: to the caller.

    Attributes:
        held: what has not been written yet.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.held = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self.held:
            self._loop.call_soon(self._write)
        self.held += data
        if len(self.held) > _JOINED:
            self._write()

    def close(self) -> None:
        self._write()
        self._transport.close()

    def _write(self) -> None:
        if self.held:
            self._transport.write(self.held)
            self.held = b""


class _Connection(HttpToolsProtocol):
    """One connection, on which one request after the other is parsed and answered.

    Args:
        others: that it is one of.
        address: of the caller, as `address_of` says it.

    Attributes:
        opening: makes its handshake.
    """

    opening: asyncio.Future[Any]

    def __init__(self, others: Connections, address: str) -> None:
        super().__init__(others.config, others.state, {})
        self.logger = _SILENT
        self.access_log = False
        self.address = address
        self._others = others
        # What is not parsed yet: headers without their end, or what came behind a request.
        self._left = b""
        # From a request's headers on to its end: that, the bytes of its body that are still to
        # come (None where it has chunks), and the bytes that came since the last piece of it.
        self._in_body = False
        self._body_left: int | None = None
        self._between = 0
        # Whether nothing that comes is parsed any more, and how much of that came.
        self._is_deaf = False
        self._discarded = 0

    @property
    def is_idle(self) -> bool:
        """Whether all that was answered is on its way."""
        if self.transport is None:
            return True
        return not (self._joined.held or self.transport.get_write_buffer_size())

    def end(self) -> None:
        """End it at once; its place is free from now on."""
        self._others.leave(self)
        if self.transport is None:
            self.opening.cancel()
        else:
            self.transport.abort()

    def finish(self) -> None:
        """End it with the answer that is under way."""
        if self._has_request:
            self.cycle.keep_alive = False
        elif self.is_idle:
            self.end()
        else:
            self.transport.close()

    # asyncio's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._joined: Any = _Joined(transport)
        self._others.wait_for_request(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._others.leave(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._others.wait_for_reader(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._others.is_read(self)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        if self._is_deaf:
            self._discard(len(data))
            return
        had_begun = bool(self._left)
        data = self._left + data
        start = 0
        piece: bytes | memoryview
        # One request at a time: what comes behind it waits until it has its answer.
        while start < len(data) and not self._is_answering:
            if not self._in_body:
                # Headers are parsed as a whole.
                if data.startswith(_HTTP2, start):
                    self.end()  # a caller by gRPC, to whom an answer in HTTP/1.1 says nothing
                    return
                if not _BEGINNING.match(data, start):
                    self._refuse(bad_request(_NO_REQUEST))
                    return
                end = data.find(_HEAD_END, start) + len(_HEAD_END)
                if end < len(_HEAD_END):
                    if len(data) - start > MAX_HEADERS:
                        self._refuse(headers_too_large())
                        return
                    if start or not had_begun:
                        self._others.wait_for_request(self)
                    break
                # The parser would leave HTTP with the headers and take a body for a request, where
                # `Upgrade` asks for that; no protocol but this is spoken here.
                piece = _UPGRADE.sub(b"\r\nx-upgrade:", data[start:end])
            elif self._body_left:
                end = min(start + self._body_left, len(data))
                piece = memoryview(data)[start:end]
            else:
                # No farther than some bytes beyond its end, for what is there is another request.
                last = min(start + MAX_HEADERS, len(data))
                end = data.find(_HEAD_END, start + _CHUNKED_PIECE, last) + len(_HEAD_END)
                if end < len(_HEAD_END):
                    end = last
                piece = memoryview(data)[start:end]
                self._between += len(piece)
            try:
                self.parser.feed_data(piece)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._refuse(bad_request(_NO_REQUEST))
                return
            if self._between > MAX_HEADERS:  # of trailers, or of what a chunk says of itself
                self._refuse(headers_too_large())
                return
            start = end
        self._left = data[start:]
        if self._is_answering and self._left:
            self.flow.pause_reading()

    # The parser's calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._has_request:
            raise ValueError("a request behind chunks that are not at their end")
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise ValueError("a protocol that is not spoken here")
        super().on_headers_complete()
        self.cycle.transport = self._joined
        self._in_body = True
        self._body_left = None
        self._between = 0
        for name, value in self.headers:
            if name == b"content-length":
                self._body_left = int(value)
        self._others.has_request(self)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._between = 0
        if self._body_left is not None:
            self._body_left -= len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        self._between = 0

    # The answer's call

    def on_response_complete(self) -> None:
        # A caller who takes the end of it slowly, or goes on to send, has the time of one who
        # waits.
        self._others.wait_for_request(self)
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self._left:
                self.loop.call_soon(self.data_received, b"")

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_answering(self) -> bool:
        """Whether a request has come as a whole, and has no answer yet."""
        return self._has_request and not self.cycle.more_body

    def _refuse(self, error: Refused) -> None:
        """Answer what is no request, and parse nothing that comes after it."""
        self._is_deaf = True
        if self._is_answering:  # the request before has its answer first, and then it ends
            self.cycle.keep_alive = False
            return
        if self._has_request:  # its body is broken: nobody waits for an answer of the app
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.end()
                return
        # It is closed by the caller once he has read this, or when its time is over.
        body = json.dumps({"error": str(error)}).encode()
        head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nconnection: close\r\n"
        kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.transport.write(f"{head}{kind}".encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._others.wait_for_request(self)

    def _discard(self, size: int) -> None:
        if self._is_answering:
            self.flow.pause_reading()
            return
        self._discarded += size
        if self._discarded > MAX_DISCARDED:
            self.end()


def address_of(host: str) -> str:
    """Whose connections count together: an IPv4 address, or the network of 64 bits that a caller by
    IPv6 has to himself.
    """
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    # A key with a password is refused; it would be asked for at the terminal.
    context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
    return context
