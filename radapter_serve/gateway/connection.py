"""uvicorn's HTTP connection with limits of its own: on headers, on silence, and on how many there are."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from radapter_serve.gateway.errors import RETRY_AFTER, TOO_LARGE
from radapter_serve.inputs.errors import INVALID_ARGUMENT, OVERLOADED

MAX_HEADERS = 32 * 1024  # bytes
PATIENCE = 10.0  # seconds for headers to come, for a refused body to end, for a caller to read on
SLOWEST = 64 * 1024  # bytes of an answer that a caller reads in a second, at least


class Connection(HttpToolsProtocol):
    """One connection of a caller.

    Attributes:
        most: connections of the gateway at once; to be set on a subclass.
    """

    most: int
    _timer: asyncio.TimerHandle | None = None
    _in_headers, _header_bytes = True, 0
    _in_body = False
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.most:
            self._refuse(503, OVERLOADED, "too many connections; try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # what a refused caller still sends
            return
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADERS:
            self._refuse(431, TOO_LARGE, f"the headers have more than {MAX_HEADERS} bytes")

    def on_message_begin(self) -> None:
        self._in_headers = True
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers, self._header_bytes, self._in_body = False, 0, True
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body:  # of a request that is refused: the rest of it is thrown away
            self._wait()

    def pause_writing(self) -> None:
        self._wait_for_reader()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, INVALID_ARGUMENT, "this is not HTTP/1.1")

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": f"[{code}] {message}"}).encode()
        head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head += f"Retry-After: {RETRY_AFTER}\r\n" if status == 503 else ""
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_for_reader(self) -> None:
        self._stop_waiting()
        self._unread = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(PATIENCE, self._reads_on)

    def _reads_on(self) -> None:
        read = self._unread - self.transport.get_write_buffer_size()
        if read < SLOWEST * PATIENCE:
            self._give_up()
        else:
            self._wait_for_reader()

    def _give_up(self) -> None:
        self.transport.abort()


def connection(most: int) -> Any:
    """The kind of connection for a gateway with so many of them."""
    return type("Connection", (Connection,), {"most": most})
