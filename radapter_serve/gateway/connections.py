"""Connections of callers: limits on their number, and on the time and the bytes that each takes
before the app sees its request. uvicorn speaks HTTP/1.1 on them.

A connection waits for a request (in its handshake, before the end of a request's headers, or after
an answer), has a request under way, or has ended. A waiting connection has a time limit; when all
places are taken, the connection that has waited longest is closed. So idle connections keep nobody
else out.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import itertools
import json
import logging
import re
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import anyio
import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from radapter_serve.gateway.settings import Settings, Timeouts
from radapter_serve.gateway.upstream import LOG, TOO_LARGE, Refused, bad_request

MAX_HEADERS = 32 * 1024  # bytes of the headers of a request, and of the trailers of its chunks
MAX_DISCARDED = 2**20  # bytes of a refused request's body that are read and discarded
TICK_SECONDS = 0.25  # between checks for connections past their time limit
WARN_SECONDS = 60.0  # between warnings that an address has reached its limit
_HEAD_END = b"\r\n\r\n"
_NO_REQUEST = bad_request(
    "these bytes are not a request of HTTP/1.1: its lines end with CRLF, and its path has only"
    " ASCII characters, with all others as %XX"
)
_TOO_LARGE = Refused(431, TOO_LARGE, f"the headers have more than {MAX_HEADERS} bytes")
# A request may follow an empty line, which some callers send after a body.
_BEGINNING = re.compile(rb"(\r\n)?([A-Z]|\Z)|\r\Z")
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_MIN_CHUNKED_PIECE = 512  # bytes of a chunked body that are parsed at once
# Errors of callers are answered, not logged.
_SILENT = logging.Logger("connections", logging.CRITICAL + 1)


class Connections:
    """Accepts the connections of a listener and answers on them."""

    _listener: socket.socket

    def __init__(self, app: Callable[..., Any], settings: Settings, timeouts: Timeouts) -> None:
        self._max = settings.max_connections
        # A limit not below the total is no limit: the address waits for a place, as all others do.
        per_address = settings.max_connections_per_address or max(1, self._max // 4)
        self._max_of_address = per_address if per_address < self._max else sys.maxsize
        self._timeouts = timeouts
        self._tls = None
        if settings.tls_certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self._tls.options |= ssl.OP_NO_RENEGOTIATION
            self._tls.set_alpn_protocols(["http/1.1"])
            # The empty password refuses an encrypted key, which would ask at the terminal.
            self._tls.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
        self.config = uvicorn.Config(
            app,
            http=HttpToolsProtocol,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            proxy_headers=False,
        )
        self.state = ServerState()
        self.open: set[_Connection] = set()
        self._of_address: Counter[str] = Counter()
        # Start times of waiting for a request, and for the caller to read; oldest first
        self.waiting: dict[_Connection, float] = {}
        self.unread: dict[_Connection, float] = {}
        # Connections with an unfinished body; the one that has sent nothing for longest comes first
        self.receiving: dict[_Connection, None] = {}
        self.place_is_free = asyncio.Event()  # set when a place may have become free
        self._warned = -WARN_SECONDS

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Answer until `stop` is set; running requests then have `timeouts.drain` s to end."""
        self.loop = asyncio.get_running_loop()
        self._listener = listener
        self._listener.setblocking(False)
        try:
            async with anyio.create_task_group() as ticking:
                ticking.start_soon(self._tick)
                async with anyio.create_task_group() as accepting:
                    accepting.start_soon(self._accept)
                    await stop.wait()
                    accepting.cancel_scope.cancel()
                self._listener.close()
                for connection in list(self.open):
                    connection.finish()
                with anyio.move_on_after(self._timeouts.drain):
                    while self.open:
                        self.place_is_free.clear()
                        await self.place_is_free.wait()
                ticking.cancel_scope.cancel()
        finally:
            self._listener.close()
            # Cancel the requests that still run, so that their callers do not wait on.
            for request in list(self.state.tasks):
                request.cancel()
            if self.state.tasks:
                await asyncio.wait(set(self.state.tasks), timeout=TICK_SECONDS)
            for connection in list(self.open):
                connection.end()

    def leave(self, connection: _Connection) -> None:
        """Remove a connection, and free its place."""
        if connection in self.open:
            self.open.remove(connection)
            self.waiting.pop(connection, None)
            self.unread.pop(connection, None)
            self.receiving.pop(connection, None)
            self._of_address[connection.address] -= 1
            if not self._of_address[connection.address]:
                del self._of_address[connection.address]
            self.place_is_free.set()

    async def _accept(self) -> None:
        while True:
            try:
                accepted, peer = await self.loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):  # too many open files
                    self._end_oldest()
                    await asyncio.sleep(TICK_SECONDS)
                continue
            address = network_of(peer[0])
            try:
                if not self._may_have_another(address):
                    accepted.close()
                    continue
                while len(self.open) >= self._max and not self._end_oldest():
                    self.place_is_free.clear()
                    await self.place_is_free.wait()
            except asyncio.CancelledError:
                accepted.close()
                raise
            self._open_connection(address, accepted)

    def _open_connection(self, address: str, accepted: socket.socket) -> None:
        connection = _Connection(self, address)
        self.open.add(connection)
        self._of_address[address] += 1
        connection.wait_for_request()

        def opened(opening: asyncio.Future[Any]) -> None:
            # Its result or error refers to the connection: a circle would keep both for long.
            connection.opening = None
            if opening.cancelled() or opening.exception() is not None:  # the handshake failed
                accepted.close()
                self.leave(connection)

        connection.opening = asyncio.ensure_future(
            self.loop.connect_accepted_socket(lambda: connection, accepted, ssl=self._tls)
        )
        connection.opening.add_done_callback(opened)

    def _may_have_another(self, address: str) -> bool:
        """True if an address may have one more connection; at its limit, closes a waiting one."""
        if self._of_address[address] < self._max_of_address or self._end_oldest(address):
            return True
        if self.loop.time() - self._warned >= WARN_SECONDS:
            self._warned = self.loop.time()
            LOG.warning(
                "%s has %d requests under way, and gets no more connections; if that is a proxy,"
                " set --max-connections-per-address to what --max-connections is",
                address,
                self._max_of_address,
            )
        return False

    def _end_oldest(self, address: str | None = None) -> bool:
        """Close the connection that waited longest, of an address or of all, or else one with an
        unfinished body; False if there is none.
        """
        idle = (connection for connection in self.waiting if connection.is_idle)
        for connection in itertools.chain(idle, self.receiving):
            if address in (None, connection.address):
                connection.end()
                return True
        return False

    async def _tick(self) -> None:
        """Close connections past their time limit, and update the date of answers, for ever."""
        while True:
            self.state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            for since, seconds in (
                (self.waiting, self._timeouts.idle),
                (self.unread, self._timeouts.piece),
            ):
                last = self.loop.time() - seconds
                while since and next(iter(since.values())) < last:
                    next(iter(since)).end()
            await asyncio.sleep(TICK_SECONDS)


class _Connection(HttpToolsProtocol):
    """One connection, whose requests are parsed and answered one after the other."""

    opening: asyncio.Future[Any] | None  # the handshake, until it has ended

    def __init__(self, connections: Connections, address: str) -> None:
        super().__init__(connections.config, connections.state, {})
        self.logger = _SILENT
        self.access_log = False
        self.address = address
        self._connections = connections
        # Bytes that are not parsed yet: incomplete headers, or requests behind the current one
        self._left = b""
        # The body: whether one is being read, its remaining bytes (None if it is chunked), and the
        # bytes since its last data, such as trailers
        self._in_body = False
        self._body_left: int | None = None
        self._between = 0
        self._is_deaf = False  # after invalid bytes were refused, nothing is parsed
        self._discarded = 0  # bytes read after a refusal

    @property
    def is_idle(self) -> bool:
        """True if nothing is left in the write buffer."""
        return self.transport is None or not self.transport.get_write_buffer_size()

    def wait_for_request(self) -> None:
        """Start the time limit for the caller's next request."""
        if self in self._connections.open:
            self._connections.receiving.pop(self, None)
            self._connections.waiting.pop(self, None)
            self._connections.waiting[self] = self._connections.loop.time()
            self._connections.place_is_free.set()

    def end(self) -> None:
        """Close the connection at once, and free its place."""
        self._connections.leave(self)
        if self.transport is not None:
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()

    def finish(self) -> None:
        """Close the connection after the answer under way, or at once when idle."""
        if self._has_request:
            self.cycle.keep_alive = False
        elif self.is_idle:
            self.end()
        else:
            self.transport.close()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.leave(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self in self._connections.open:
            self._connections.unread[self] = self._connections.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._connections.unread.pop(self, None)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        if self._is_deaf:
            if self._is_answering:
                self.flow.pause_reading()
                return
            self._discard(data)
            return
        is_continued = bool(self._left)
        data = self._left + data
        start = 0
        piece: bytes | memoryview
        # Pipelined requests wait until the current one is answered.
        while start < len(data) and not self._is_answering:
            if not self._in_body:
                # Headers: parsed once they are complete
                if data.startswith(_HTTP2, start):
                    self.end()  # a gRPC client, which would not understand an answer
                    return
                if not _BEGINNING.match(data, start):
                    self._refuse(_NO_REQUEST)
                    return
                end = data.find(_HEAD_END, start) + len(_HEAD_END)
                is_whole = end >= len(_HEAD_END)
                if (end if is_whole else len(data)) - start > MAX_HEADERS:
                    self._refuse(_TOO_LARGE)
                    return
                if not is_whole:
                    if start or not is_continued:
                        self.wait_for_request()
                    break
                # With `Upgrade`, the parser would leave HTTP, and the body would be taken for a
                # request.
                piece = _UPGRADE.sub(b"\r\nx-upgrade:", data[start:end])
            elif self._body_left:
                # A body of known length
                end = min(start + self._body_left, len(data))
                piece = memoryview(data)[start:end]
            else:
                # Chunks: parsed not far beyond their end, where another request may begin
                last = min(start + MAX_HEADERS, len(data))
                end = data.find(_HEAD_END, start + _MIN_CHUNKED_PIECE, last) + len(_HEAD_END)
                if end < len(_HEAD_END):
                    end = last
                piece = memoryview(data)[start:end]
                self._between += len(piece)
            if self._in_body and not self._has_request:
                # Discard the rest of a refused request's body: a caller who is cut off while
                # sending never reads the answer.
                self._discard(piece)
                if self.transport.is_closing():
                    return
            try:
                self.parser.feed_data(piece)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._refuse(_NO_REQUEST)
                return
            if self._between > MAX_HEADERS:  # trailers, or extensions of a chunk
                self._refuse(_TOO_LARGE)
                return
            start = end
        self._left = data[start:]
        if self._is_answering and self._left:
            self.flow.pause_reading()

    # Callbacks of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # trailers are ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._has_request:
            raise ValueError("a request within chunks")
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise ValueError("an unknown version of HTTP")
        super().on_headers_complete()
        self._in_body = True
        self._body_left = None
        self._between = 0
        self._discarded = 0
        for name, value in self.headers:
            if name == b"content-length":
                self._body_left = int(value)
        self._connections.waiting.pop(self, None)
        self._connections.receiving[self] = None

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self in self._connections.receiving:
            self._connections.receiving[self] = self._connections.receiving.pop(self)
        self._between = 0
        if self._body_left is not None:
            self._body_left -= len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._connections.receiving.pop(self, None)
        self._in_body = False
        self._between = 0

    # Callback of uvicorn, once an answer is complete

    def on_response_complete(self) -> None:
        # From now on the waiting limit applies, even if the caller still reads or sends.
        self.wait_for_request()
        if self.cycle.more_body and self.expect_100_continue:  # its body may never come
            self.transport.close()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self._left:
                self.loop.call_soon(self.data_received, b"")

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_answering(self) -> bool:
        """True if the request has come in full, and its answer is not complete."""
        return self._has_request and not self.cycle.more_body

    def _discard(self, data: bytes | memoryview) -> None:
        self._discarded += len(data)
        if self._discarded > MAX_DISCARDED:
            self.end()

    def _refuse(self, error: Refused) -> None:
        """Answer invalid bytes with an error, and parse nothing after them."""
        self._is_deaf = True
        if self._is_answering:  # close after the answer under way
            self.cycle.keep_alive = False
            return
        if self._has_request:  # its body is broken: drop the app's answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.end()
                return
        body = json.dumps({"error": str(error)}).encode()
        headers = (
            f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            "\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + headers.encode() + body)
        # The caller closes the connection after reading the answer, or its time limit ends it.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.wait_for_request()


def network_of(host: str) -> str:
    """The IPv4 address of a caller, or the 64-bit network of its IPv6 address."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
