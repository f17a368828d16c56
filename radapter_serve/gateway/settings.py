"""Settings of a gateway: the flags of `radapter-gateway`."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from radapter_serve.errors import RAdapterError
from radapter_serve.server.config import address_of

MIB = 2**20


@dataclass(frozen=True)
class GatewayOptions:
    """Options of every gateway, also of one that radapter-serve opens.

    Attributes:
        api_keys: file of the API keys that callers need; radapter-gateway --new-key makes a key.
        no_api_keys: accept callers without a key, also from other machines.
        tls_certificate: PEM file of the certificate and its chain, to serve HTTPS.
        tls_key: PEM file of the certificate's private key.
        recheck_seconds: seconds between checks that an encoder still embeds stored samples as it
            did at its start; 0 for no checks.
        log: json writes a line of JSON for each request to stderr. Traces go to the endpoint in the
            variable OTEL_EXPORTER_OTLP_ENDPOINT.
    """

    api_keys: Path | None = None
    no_api_keys: tyro.conf.FlagCreatePairsOff[bool] = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    recheck_seconds: float = 15.0
    log: Literal["off", "json"] = "off"


@dataclass(frozen=True)
class Settings(GatewayOptions):
    """Address, upstream and limits of a gateway.

    Args:
        host: address or name to listen on.
        port: port to listen on; 0 takes a free port.
        server: HOST:PORT of Triton's gRPC endpoint, which must not be open to untrusted callers.
        indexes: folder of the server's indexes, to list their names; if not given, they are not
            listed.
        model_repository: folder of the served releases, to list the adapters beside them and take
            their names as models of OpenAI's API, and to ask the encoders for stored samples again.
        max_body: largest body of a request, in MiB; JSON may have a quarter of it.
        max_memory: memory for the bodies and answers of all requests under way, and for parsing
            large bodies, in MiB. The process may take half as much again, besides its models.
        max_concurrent: requests that run at once.
        max_queue: requests that wait to run; further requests are answered 429.
        max_connections: connections at once; above that, the connection that has waited longest for
            a request is closed.
        max_connections_per_address: the largest number of these from one IPv4 address or one
            64-bit IPv6 network; a quarter of --max-connections if not given. Behind a proxy, where
            all callers have one address, set it to the number of --max-connections.
        timeout: seconds that a request may take, including the upload of its body.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    server: str = "127.0.0.1:8001"
    indexes: Path | None = None
    model_repository: Path | None = None
    max_body: float = 64.0
    max_memory: float = 1024.0
    max_concurrent: int = 64
    max_queue: int = 64
    max_connections: int = 2048
    max_connections_per_address: int | None = None
    timeout: float = 60.0

    def check(self) -> str:
        """Check the values; returns the address to listen on. Others than this machine get in only
        with keys, or with `no_api_keys`.
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
        if not 0 <= self.recheck_seconds < math.inf:
            raise RAdapterError(
                f"--recheck-seconds is {self.recheck_seconds:g}; allowed are numbers from 0, which"
                " is none"
            )
        if self.max_memory < self.max_body:
            raise RAdapterError(
                f"--max-memory is {self.max_memory:g} MiB; allowed are {self.max_body:g} MiB, which"
                " is --max-body, and more"
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
        """A security warning for the operator; may be empty."""
        if self.no_api_keys:
            return "without keys, anyone who reaches the gateway may use the models"
        if self.api_keys is not None and self.tls_certificate is None:
            return "without --tls-certificate, keys travel in the clear"
        return ""


@dataclass(frozen=True)
class Timeouts:
    """Time limits of a gateway, in seconds; no flag changes them."""

    idle: float = 10.0  # for a handshake, the headers of a request, and between two requests
    piece: float = 8.0  # for a caller to take a piece of an answer: 64 KiB a second at least
    drain: float = 20.0  # for running requests, when the gateway stops
    spans: float = 2.0  # for the last spans to be exported, after the drain


TIMEOUTS = Timeouts()
