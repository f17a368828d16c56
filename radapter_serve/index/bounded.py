"""HTTP whose answers are bounded in size and time: what answers may be broken, or hostile."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx


class BoundedTransport(httpx.HTTPTransport):
    """httpx's own transport with bounds.

    Args:
        most: of an answer's body, in bytes.
        seconds: that a request may take.
    """

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Raises:
            httpx.TransportError: it fails, takes too long, or its answer is too large or compressed.
        """
        until = time.monotonic() + self._seconds
        response = super().handle_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise httpx.RemoteProtocolError("the answer is compressed, which was not asked for")
        assert isinstance(response.stream, httpx.SyncByteStream)
        stream = _Bounded(response.stream, self._most, until)
        return httpx.Response(
            response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
        )


class _Bounded(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, most: int, until: float) -> None:
        self._stream, self._most, self._until = stream, most, until

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > self._most:
                raise httpx.RemoteProtocolError(f"the answer has more than {self._most:,} bytes")
            if time.monotonic() > self._until:
                raise httpx.ReadTimeout("the answer took too long")
            yield part

    def close(self) -> None:
        self._stream.close()
