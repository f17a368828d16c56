"""Addresses of a server: to listen on, and for clients on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
from dataclasses import dataclass

import tyro

from radapter_serve.errors import RAdapterError


@dataclass(frozen=True)
class Endpoints:
    """The host and the ports of a server.

    Args:
        host: address or name to listen on; any other than loopback needs --trust-network.
        http_port: port of the HTTP endpoint.
        grpc_port: port of the gRPC endpoint.
        metrics_port: port of the Prometheus metrics.
        trust_network: let anyone who can reach --host use the server, as Triton asks for no
            password.
        tls: whether the HTTP endpoint uses TLS.

    Raises:
        RAdapterError: an unknown host.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    trust_network: bool = False
    tls: tyro.conf.Suppress[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", address_of(self.host))

    @classmethod
    def on_free_ports(cls) -> Endpoints:
        """Endpoints on loopback, with ports that are free now."""
        return cls("127.0.0.1", *free_ports())

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def address(self) -> str:
        """Host at which clients on this machine reach the server."""
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{address}]" if self._is_ipv6 else address

    @property
    def http_url(self) -> str:
        """For example `http://127.0.0.1:8000`."""
        return f"{'https' if self.tls else 'http'}://{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """For example `grpc://127.0.0.1:8001`."""
        return f"grpc://{self.address}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """For example `http://127.0.0.1:8002/metrics`."""
        return f"http://{self.address}:{self.metrics_port}/metrics"

    def check(self) -> None:
        """Check that Triton may and can listen here.

        Raises:
            RAdapterError: a host that other machines can reach although the network is not trusted;
                two ports are the same, or one is not allowed or in use. Names the flag.
        """
        if not (self.loopback or self.trust_network):
            raise RAdapterError(
                f"--host {self.host} lets other machines in, and asks nobody for a password: leave"
                " --host out and put radapter-gateway in front of Triton, or add --api-keys KEYS"
                " to --engine process, or --trust-network if you trust all who can reach this"
                " address with a Triton whose published weaknesses SECURITY.md lists"
            )
        ports = {
            "--http-port": self.http_port,
            "--grpc-port": self.grpc_port,
            "--metrics-port": self.metrics_port,
        }
        if len(set(ports.values())) < len(ports):
            named = ", ".join(f"{flag} {port}" for flag, port in ports.items())
            raise RAdapterError(f"the ports must differ: {named}")
        for flag, port in ports.items():
            if not 0 < port < 65536:
                raise RAdapterError(f"{flag} is {port}; allowed are 1 to 65535")
            family = socket.AF_INET6 if self._is_ipv6 else socket.AF_INET
            try:
                socket.create_server((self.host, port), family=family).close()
            except OSError as error:
                why = f"{os.strerror(error.errno or 0)}; choose another with {flag}"
                raise RAdapterError(f"cannot listen on {self.host} port {port}: {why}") from None

    def flags(self) -> list[str]:
        """Arguments of tritonserver for these endpoints."""
        host = f"ipv6:{self.host}" if self._is_ipv6 else self.host
        return [
            f"--http-address={host}",
            f"--metrics-address={host}",
            f"--grpc-address={f'[{self.host}]' if self._is_ipv6 else self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
        ]

    @property
    def _is_ipv6(self) -> bool:
        return ":" in self.host


def free_ports() -> tuple[int, int, int]:
    """Return three free ports of this machine.

    They are below Linux's ephemeral ports, so that no program that asks for any port takes one
    before the server listens.
    """
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_768), 1_000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            ports.append(port)
        if len(ports) == 3:
            return ports[0], ports[1], ports[2]
    raise RAdapterError("no three ports from 10000 to 32767 are free on this machine")


def address_of(host: str) -> str:
    """The address of the host in --host; IPv4 if it has both."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RAdapterError(
            f"--host {host!r}: {why}; give a name or an address of this machine, such as localhost"
            " or 0.0.0.0"
        ) from None
    return str(min(addresses, key=lambda info: info[0] != socket.AF_INET)[4][0])
