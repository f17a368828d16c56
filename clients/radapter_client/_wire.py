"""The interface between the client and the transports: requests, replies, and server URLs, whose
scheme chooses the transport.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np

from .failures import InvalidURL, shown
from .tensors import Array


class Values(Mapping[str, Array]):
    """Plain values of a request or a reply by name, converted to arrays on access.

    Args:
        plain: texts, numbers, bytes of images, lists of them, or arrays, by name.

    Example: `Reply(1, Values({"label": [["cat"]], "score": np.ones((1, 1), np.float32)}))`
    """

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self.plain = plain

    def __getitem__(self, name: str) -> Array:
        return _array(self.plain[name])

    def __contains__(self, name: object) -> bool:
        return name in self.plain  # without converting to an array

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def __repr__(self) -> str:
        return repr(dict(self))


class Rows(Values):
    """Inputs of a task with a batch; all except `varied` are repeated for every row."""

    def __init__(self, plain: Mapping[str, Any], varied: str) -> None:
        super().__init__(plain)
        self._varied = varied

    def __getitem__(self, name: str) -> Array:
        array = super().__getitem__(name)
        if name == self._varied:
            return array[:, None]
        table = np.tile(array, (len(self.plain[self._varied]), 1))
        if name == "examples":
            table[1:] = b""  # an empty row means the examples of the row before
        return table


def _array(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    items = value if isinstance(value, list) else [value]
    first = items[0] if items else ""
    if isinstance(first, list):
        return np.stack([_array(row) for row in items])
    kinds: dict[type, Any] = {bool: np.bool_, int: np.int32, float: np.float32}
    kind = kinds.get(type(first), np.object_)
    if kind is np.object_:  # numpy's bytes dtype would cut off zeros at the end
        items = [item.encode() if isinstance(item, str) else item for item in items]
    return np.array(items, kind)


@dataclass(frozen=True)
class Request:
    """A request to the server, independent of the protocol.

    Args:
        action: decides the type of the reply: `Reply` for "infer", a dict of JSON for "config" and
            "indexes", a bool for "ready".
        model: name of the model.
        version: of the model; empty for the newest.
        inputs: arrays by name, with the batch first where the model has one; texts and encoded
            images are bytes in arrays of dtype object.
        outputs: names of the outputs to compute and send; empty for all of them.

    Example: `Request("infer", "embed_text", inputs={"text": np.array([[b"a cat"]], object)})`
    """

    action: Literal["infer", "config", "ready", "indexes"]
    model: str
    version: str = ""
    inputs: Mapping[str, Array] = field(default_factory=dict)
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Reply:
    """The answer to an inference.

    Args:
        version: of the model that answered, the same as that of its release.
        outputs: arrays by name, with the batch first where the model has one; `Values` makes the
            arrays on access.

    Example: `Reply(1, {"text_embeds": np.ones((1, 512), np.float32)})`
    """

    version: int
    outputs: Mapping[str, Array]


class Transport(Protocol):
    """Sends a client's requests to a server. Write your own to test code without a server.

    `send` is called from several threads, and may raise only `RAdapterClientError`.

    Example: a server that calls every image a cat.
        ```python
        class Cats:
            def send(self, request: Request, timeout: float) -> Any:
                rows = len(request.inputs["image"])
                scores = np.ones((rows, 1), np.float32)
                return Reply(1, {"label": np.full((rows, 1), b"cat", object), "score": scores})

            def close(self) -> None:
                pass

        with Client(transport=Cats(), release=1) as client:
            assert client.classify("photo.jpg", ["cat", "dog"]).top == "cat"
        ```
    """

    def send(self, request: Request, timeout: float) -> Any:
        """Send a request, and return its reply within `timeout` seconds; the reply's type depends
        on the action.
        """

    def close(self) -> None:
        """Close the connections."""


PORTS = {"grpc": 8001, "grpcs": 443, "http": 8000, "https": 443}
ALLOWED = "http://HOST:8000, https://HOST, grpc://HOST:8001 or grpcs://HOST"
# Tried in this order if a client gets no URL. Both engines of radapter-serve answer HTTP.
DEFAULT_URLS = "http://localhost:8000", "grpc://localhost:8001"


@dataclass(frozen=True)
class ServerURL:
    """The parts of a server's URL."""

    scheme: str  # grpc, grpcs, http or https
    host: str  # IPv6 in brackets
    port: int  # by default that of the scheme
    path: str = ""  # empty, or begins with a slash and does not end with one

    @property
    def protocol(self) -> str:
        return "grpc" if self.scheme.startswith("grpc") else "http"

    @property
    def secure(self) -> bool:
        return self.scheme in ("grpcs", "https")

    @property
    def loopback(self) -> bool:
        """True if the host is this machine."""
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
    """Find the first of `DEFAULT_URLS` where a server listens; the first of all if none does."""
    for url in DEFAULT_URLS:
        parts = parse_url(url)
        try:
            socket.create_connection((parts.host, parts.port), timeout=1).close()
        except ConnectionRefusedError:
            continue
        except OSError:
            break  # not a refused connection: the first request reports the error
        return url
    return DEFAULT_URLS[0]


def parse_url(url: str) -> ServerURL:
    """Split a server's URL; the error for a malformed one names the allowed forms."""
    refused = InvalidURL(f"{shown(url)} is not a server's URL; allowed are {ALLOWED}")
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        raise refused
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refused from None
    path = parts.path.rstrip("/")
    if (
        parts.scheme not in PORTS
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
        or (path and parts.scheme.startswith("grpc"))
    ):
        raise refused
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return ServerURL(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path)
