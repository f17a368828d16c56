"""Where a server listens, and where clients on this machine reach it."""

from __future__ import annotations

import ipaddress
import os
import socket

from radapter_serve.errors import RAdapterError


class Endpoints:
    """The host and the ports of a server.

    Args:
        host: address or name to listen on.
        http_port, grpc_port, metrics_port: 1 to 65535, all different.
        trust_network: whether other machines may reach the server.

    Raises:
        RAdapterError: an unknown host, or one that other machines can reach though the network is not trusted.
    """

    def __init__(
        self, host: str, http_port: int, grpc_port: int, metrics_port: int, *, trust_network: bool = False
    ) -> None:
        self.host = address_of(host)
        self.http_port, self.grpc_port, self.metrics_port = http_port, grpc_port, metrics_port
        self._v6 = ":" in self.host
        if not (self.loopback or trust_network):
            raise RAdapterError(
                f"--host {host} lets other machines in, and Triton asks nobody for a password: leave --host out and "
                "put radapter-gateway in front, or add --trust-network if you trust all who can reach this address"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def address(self) -> str:
        """Host to reach the server at from this machine."""
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{address}]" if self._v6 else address

    @property
    def http_url(self) -> str:
        """For example `http://127.0.0.1:8000`."""
        return f"http://{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """For example `grpc://127.0.0.1:8001`."""
        return f"grpc://{self.address}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """For example `http://127.0.0.1:8002/metrics`."""
        return f"http://{self.address}:{self.metrics_port}/metrics"

    def check_ports(self) -> None:
        """Raise an `RAdapterError` where the server could not listen."""
        ports = {"--http-port": self.http_port, "--grpc-port": self.grpc_port, "--metrics-port": self.metrics_port}
        if len(set(ports.values())) < len(ports):
            raise RAdapterError(f"the ports must differ: {', '.join(f'{f} {p}' for f, p in ports.items())}")
        for flag, port in ports.items():
            if not 0 < port < 65536:
                raise RAdapterError(f"{flag} is {port}; allowed are 1 to 65535")
            family = socket.AF_INET6 if self._v6 else socket.AF_INET
            try:
                socket.create_server((self.host, port), family=family).close()
            except OSError as error:
                why = f"{os.strerror(error.errno or 0)}; choose another with {flag}"
                raise RAdapterError(f"cannot listen on {self.host} port {port}: {why}") from None

    def flags(self) -> list[str]:
        """What tells tritonserver to listen here."""
        return [
            *(f"--{kind}-address={'ipv6:' if self._v6 else ''}{self.host}" for kind in ("http", "metrics")),
            f"--grpc-address={f'[{self.host}]' if self._v6 else self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
        ]


def address_of(host: str, flag: str = "--host") -> str:
    """The address of a host name, which `flag` gave; IPv4 where it has both."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RAdapterError(
            f"{flag} {host!r}: {why}; give a name or an address of this machine, such as localhost or 0.0.0.0"
        ) from None
    return str(min(found, key=lambda info: info[0] != socket.AF_INET)[4][0])
