"""The server's URL: the scheme chooses the protocol."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from ._exceptions import InvalidURL, shown

PORTS = {"grpc": 8001, "grpcs": 443, "http": 8000, "https": 443}
ALLOWED = "http://HOST:8000, https://HOST, grpc://HOST:8001 or grpcs://HOST"
# Where a client looks that is given no URL. Both engines of radapter-serve answer HTTP.
DEFAULT_URLS = "http://localhost:8000", "grpc://localhost:8001"


@dataclass(frozen=True)
class ServerURL:
    """The parts of a server's URL."""

    scheme: str  # grpc, grpcs, http or https
    host: str  # IPv6 in brackets
    port: int  # the scheme's own where the URL has none
    path: str = ""  # empty, or with a slash at its start and none at its end

    @property
    def protocol(self) -> str:
        return "grpc" if self.scheme.startswith("grpc") else "http"

    @property
    def secure(self) -> bool:
        return self.scheme in ("grpcs", "https")

    @property
    def loopback(self) -> bool:
        """Whether it is this machine."""
        try:
            return self.host == "localhost" or ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}{self.path}"


def find_server() -> str:
    """The first of `DEFAULT_URLS` at which something listens, or else the first of them."""
    for url in DEFAULT_URLS:
        parts = parse_url(url)
        try:
            socket.create_connection((parts.host, parts.port), timeout=1).close()
        except ConnectionRefusedError:
            continue
        except OSError:
            break  # it does not refuse: the first request says what is wrong
        return url
    return DEFAULT_URLS[0]


def parse_url(url: str) -> ServerURL:
    """The parts of a server's URL; the error of another names the allowed forms."""

    def refuse(why: str) -> InvalidURL:
        return InvalidURL(f"not a server's URL: {shown(url)} {why}; allowed are {ALLOWED}")

    if not isinstance(url, str):
        raise refuse("is not a text")
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() not in PORTS:
        raise refuse("has no scheme" if not separator else f"has the scheme {shown(scheme)}")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise refuse("has white space in it")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise refuse(f"({error})") from None
    if not parts.hostname:
        raise refuse("names no host")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise refuse("has more than a host, a port and a path")
    path = parts.path.rstrip("/")
    if path and parts.scheme.startswith("grpc"):
        raise refuse("has a path, which gRPC has not")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return ServerURL(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path)
