"""Settings of a gateway, which are the flags of `radapter-gateway`."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from radapter_serve.errors import RAdapterError
from radapter_serve.server.endpoints import address_of

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Where the gateway listens, whom it asks, and what it allows.

    Args:
        host: address or name to listen on.
        port: of it.
        server: HOST:PORT of Triton's gRPC endpoint, which strangers must not reach.
        indexes: folder of the indexes that the server searches, to list their names; they are not
            listed if none is given.
        api_keys: file of the keys that let callers in; --new-key makes one.
        no_api_keys: let everybody in who reaches the port, also beyond this machine.
        tls_certificate: PEM file of the certificate and its chain, to be reached by https.
        tls_key: PEM file of its key.
        max_body: MiB of a request's body.
        max_memory: MiB of the bodies of all requests under way, and of reading large ones.
        max_concurrent: requests that run at once.
        max_queue: requests that wait for that; one more is answered 429.
        max_connections: connections at once; where there are more, those end that have waited
            longest for a request.
        max_connections_per_address: of these, connections of one address, or of one network of 64
            bits by IPv6; a quarter of --max-connections if not given. Behind a proxy, where all
            callers come from one address, give it the number of --max-connections.
        timeout: seconds that a request may take, the sending of its body included.
        log: whether to write a line of JSON for each request to stderr. Traces go to where the
            variable OTEL_EXPORTER_OTLP_ENDPOINT says.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    server: str = "127.0.0.1:8001"
    indexes: Path | None = None
    api_keys: Path | None = None
    no_api_keys: tyro.conf.FlagCreatePairsOff[bool] = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    max_body: float = 64.0
    max_memory: float = 1024.0
    max_concurrent: int = 64
    max_queue: int = 64
    max_connections: int = 2048
    max_connections_per_address: int | None = None
    timeout: float = 60.0
    log: Literal["off", "json"] = "off"

    def check(self) -> str:
        """The address to listen on; raises `RAdapterError` for values that are not allowed, and for
        a port that is open to others by mistake.
        """
        if not 0 <= self.port <= 65535:
            raise RAdapterError(
                f"the port is {self.port}; allowed are 1 to 65535, and 0 for any that is free"
            )
        lowest = {
            "max_concurrent": 1,
            "max_queue": 0,
            "max_connections": 1,
            "max_connections_per_address": 1,
        }
        for name in (*lowest, "max_body", "max_memory", "timeout"):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            if name in lowest and value is not None and value < lowest[name]:
                raise RAdapterError(f"{flag} is {value}; allowed are {lowest[name]} and more")
            if name not in lowest and not (value > 0 and math.isfinite(value)):
                raise RAdapterError(f"{flag} is {value:g}; allowed are numbers above 0")
        if self.max_memory < self.max_body:
            raise RAdapterError(
                f"--max-memory {self.max_memory:g} holds no body of --max-body"
                f" {self.max_body:g} MiB"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise RAdapterError("--tls-certificate and --tls-key go together; give both or neither")
        if self.api_keys is not None and self.no_api_keys:
            raise RAdapterError("give --api-keys FILE or --no-api-keys, not both")
        address = address_of(self.host)
        is_local = ipaddress.ip_address(address).is_loopback
        if self.api_keys is None and not self.no_api_keys and not is_local:
            raise RAdapterError(
                f"the host {self.host} lets others in, and there are no keys; make one with:"
                " radapter-gateway --api-keys FILE --new-key NAME, or let everybody in with"
                " --no-api-keys"
            )
        return address

    def note(self) -> str:
        """What whoever starts it should know; empty if nothing."""
        if self.no_api_keys:
            return "without keys, anyone who reaches the gateway may use the models"
        if self.api_keys is not None and self.tls_certificate is None:
            return "without --tls-certificate, keys travel in the clear"
        return ""


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a gateway waits; no flag changes them."""

    idle: float = 10.0  # for a handshake, the headers of a request, and between two requests
    piece: float = 8.0  # for a caller to take a piece of an answer: 64 KiB a second at least
    drain: float = 20.0  # for running requests, when the gateway stops
    spans: float = 2.0  # for the last spans to be sent, after that


TIMEOUTS = Timeouts()
