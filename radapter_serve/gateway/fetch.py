"""Images that a caller names by URL: only of hosts that are allowed and public; size, time and hops are bounded."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httptools

from radapter_serve.gateway.errors import shown
from radapter_serve.gateway.settings import HOST
from radapter_serve.inputs.preprocess import MAX_BYTES

PATIENCE = 10.0  # seconds for one image, its redirects included
REDIRECTS = 3
AT_ONCE = 16  # images of all requests
MAX_HEADERS = 32 * 1024  # bytes
_PORTS = {"http": 80, "https": 443}
_MOVED = (301, 302, 303, 307, 308)
_PUBLIC = ipaddress.IPv6Network("2000::/3")  # all that is given to the public network; Python calls more of it global

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class Unfetched(Exception):
    """An image that cannot be had; `str()` says why, and nothing of this machine's network."""


@dataclass(frozen=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str


class Fetcher:
    """Fetches images.

    Args:
        hosts: that are allowed, as HOST (on the usual port) or HOST:PORT.
        resolve: from a host and a port to addresses.

    Attributes:
        allows: whether there is any host to fetch from.
    """

    def __init__(self, hosts: Sequence[str], resolve: Resolve | None = None) -> None:
        found = [HOST.fullmatch(host) for host in hosts]
        self._hosts = {(one[1].lower(), int(one[2]) if one[2] else None) for one in found if one}
        self.allows = bool(self._hosts)
        self._resolve = resolve or _resolve
        self._places = asyncio.Semaphore(AT_ONCE)
        self._context: ssl.SSLContext | None = None

    async def __call__(self, url: str, take: Callable[[int], None]) -> bytes:
        """The file behind a URL.

        Args:
            url: of http or https.
            take: called with the size of each part as it comes; may raise.

        Raises:
            Unfetched: it cannot be had, or may not.
        """
        async with self._places:
            try:
                return await asyncio.wait_for(self._follow(url, take), PATIENCE)
            except (asyncio.TimeoutError, TimeoutError):
                raise Unfetched(f"does not come within {PATIENCE:g} s") from None
            except (OSError, httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
                raise Unfetched("cannot be had from its host") from None

    async def _follow(self, url: str, take: Callable[[int], None]) -> bytes:
        secure = False
        for _ in range(REDIRECTS + 1):
            target = self._target(url, secure)
            secure = target.scheme == "https"
            answer = await self._get(target, await self._address(target), take)
            if answer.status not in _MOVED:
                break
            url = urljoin(url, answer.headers.get("location", ""))
        else:
            raise Unfetched(f"is behind more than {REDIRECTS} redirects")
        if answer.status != 200:
            raise Unfetched(f"is answered with HTTP status {answer.status}")
        return b"".join(answer.parts)

    def _target(self, url: str, secure: bool) -> _Target:
        """What a URL means, where it is allowed; after https, only https is."""
        try:
            split = urlsplit(url)
            scheme, host, port = split.scheme.lower(), (split.hostname or "").lower(), split.port
        except ValueError:
            raise Unfetched("is no URL") from None
        if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url or "@" in split.netloc:
            raise Unfetched("is a URL with signs that are not allowed; send ASCII, percent-encoded, without a user")
        if scheme not in _PORTS or (secure and scheme != "https"):
            raise Unfetched("leads to another protocol than https" if secure else "is no URL of http or https")
        usual = _PORTS[scheme]
        if (host, port or usual) not in self._hosts and ((host, None) not in self._hosts or port not in (None, usual)):
            where = host if port is None else f"{host}:{port}"
            known = ", ".join(sorted(name if at is None else f"{name}:{at}" for name, at in self._hosts))
            raise Unfetched(f"is on {shown(where)}; images are fetched from {known}, others are sent as data URLs")
        path = split.path or "/"
        return _Target(scheme, host, port or usual, f"{path}?{split.query}" if split.query else path)

    async def _address(self, target: _Target) -> str:
        """An address of the host, checked and then connected to: a moment later, the name may mean another one."""
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise Unfetched("is on a host that is not in the public network")
        return addresses[0]

    async def _get(self, target: _Target, address: str, take: Callable[[int], None]) -> _Answer:
        secure = target.scheme == "https"
        if secure and self._context is None:
            self._context = ssl.create_default_context()
        reader, writer = await asyncio.open_connection(
            address,
            target.port,
            ssl=self._context if secure else None,
            server_hostname=target.host if secure else None,
        )
        try:
            named = target.host if target.port == _PORTS[target.scheme] else f"{target.host}:{target.port}"
            lines = (f"GET {target.path} HTTP/1.1", f"Host: {named}", "User-Agent: radapter-gateway", "Accept: image/*")
            writer.write("\r\n".join([*lines, "Accept-Encoding: identity", "Connection: close", "", ""]).encode())
            answer = _Answer(take)
            parser, size = httptools.HttpResponseParser(answer), 0
            answer.parser = parser
            while not answer.complete and (data := await reader.read(2**16)):
                size += len(data)
                try:
                    parser.feed_data(data)
                except httptools.HttpParserCallbackError as error:
                    raise error.__context__ or error from None
                if not answer.in_body and size > MAX_HEADERS:
                    raise Unfetched("is answered with headers that are too large")
                if size > 2 * MAX_BYTES + MAX_HEADERS:  # chunks, too, have heads, which are no part of the body
                    raise Unfetched("is answered with far more bytes than the image has")
            answer.end()
            return answer
        finally:
            writer.transport.abort()


class _Answer:
    """What httptools calls while it reads an answer."""

    parser: Any

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take, self._size = take, 0
        self.status, self.headers, self.parts = 0, dict[str, str](), list[bytes]()
        self.in_body = self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_body:
            raise Unfetched("is answered with trailers")
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status, self.in_body = self.parser.get_status_code(), True
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise Unfetched("is answered in a compressed form")
        # What needs no body is not waited for.
        self.complete = self.status != 200

    def on_body(self, body: bytes) -> None:
        if self.complete:
            return
        self._size += len(body)
        if self._size > MAX_BYTES:
            raise Unfetched(f"has more than {MAX_BYTES} bytes")
        self._take(len(body))
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.complete = True

    def end(self) -> None:
        """The connection has ended, which is the end of the body where nothing else is said of it."""
        if not self.in_body or not (self.complete or {"content-length", "transfer-encoding"}.isdisjoint(self.headers)):
            raise Unfetched("is cut off by its host")


def is_public(address: str) -> bool:
    """Whether an address is one of the public network, and no way into a private one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and (found not in _PUBLIC or found.sixtofour or found.teredo):
        return False
    return found.is_global and not found.is_multicast


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in found]
