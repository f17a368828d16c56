"""Flags of `radapter-serve`: `Endpoints`, the addresses of a server, and `ServerConfig`."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from radapter_serve.encoders.precision import Precision
from radapter_serve.errors import RAdapterError
from radapter_serve.process import total
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import AUTO, RUNTIMES

MAX_INSTANCES = 64
MAX_WAITING = 128


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
        """True if only this machine can reach the server."""
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
                " address with a Triton whose published weaknesses docs/security.md lists"
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


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a `TritonServer`: flags of radapter-serve.

    Args:
        model_repository: folder to serve, or hf-hub:NAME, a release that radapter-export --push
            sent to the hub; can also be given as --model-repository PATH.
        endpoints: where the server listens.
        indexes: folder of the indexes that radapter-index makes; a new or replaced one is served at
            once.
        runtime: runtime of the encoders, which are first checked against torch's embeddings; auto
            takes the one that is usually fastest on such a machine; as exported if not given.
        precision: in which fp32 releases are computed: bf16 takes OpenVINO on a processor that has
            bf16, if cosines with torch stay within 2e-4; auto takes what encodes the stored samples
            fastest; as exported if not given.
        threads: number of threads that compute in an encoder, shared by its instances; one a core
            if not given.
        instances: processes of each task, so that a slow request does not hold up the others: a
            number for all, and TASK=NUMBER for one, such as: 2 segment=4. By default 2 in
            radapter-serve, and 1 where it serves more than two releases.
        max_waiting: requests that may wait for a model; others are refused.
        timeout: seconds to wait until all models answer; by default 3 for each of their processes,
            and at least 120.
        drain_seconds: seconds that calls under way may take when the server is stopped.
        verbose: show Triton's own messages.

    Raises:
        RAdapterError: an unknown runtime or task, or a number that is not allowed.
    """

    model_repository: tyro.conf.Positional[Path] = Path("model_repository")
    endpoints: Annotated[
        tyro.conf.OmitArgPrefixes[Endpoints], tyro.conf.arg(name="addresses", prefix_name=False)
    ] = field(default_factory=Endpoints)
    indexes: Path = Path("indexes")
    runtime: Literal["onnxruntime", "openvino", "tensorrt", "auto"] | None = None
    precision: Precision | None = None
    threads: int | None = None
    instances: tuple[str, ...] = ()
    max_waiting: int = MAX_WAITING
    timeout: float | None = None
    drain_seconds: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise RAdapterError(f"--timeout is {self.timeout:g}; allowed are seconds above 0")
        if self.drain_seconds < 1:
            raise RAdapterError(
                f"--drain-seconds is {self.drain_seconds}; allowed are whole seconds from 1"
            )
        if self.runtime not in (None, AUTO, *RUNTIMES):
            raise RAdapterError(
                f"--runtime is {self.runtime}; allowed are {', '.join((*RUNTIMES, AUTO))}"
            )
        for name in ("threads", "max_waiting"):
            number = getattr(self, name)
            if number is not None and number < 1:
                flag = name.replace("_", "-")
                raise RAdapterError(f"--{flag} is {number}; allowed are 1 and more")
        self.instance_counts()

    @property
    def encoder_threads(self) -> int:
        """Threads that compute in an encoder: `threads`, or the default for this machine."""
        return self.threads or total()

    def instance_counts(self) -> dict[str, int]:
        """Number of processes of each task in `instances`; TASK=NUMBER overrides a number for
        all.
        """
        counts: dict[str, int] = {}
        for setting in sorted(self.instances, key=lambda setting: "=" in setting):
            task, _, number = setting.rpartition("=")
            if task and task not in TASKS:
                raise RAdapterError(
                    f"--instances {setting}: there is no task {task}; there are {', '.join(TASKS)}"
                )
            if not number.isdecimal() or not 1 <= int(number) <= MAX_INSTANCES:
                raise RAdapterError(
                    f"--instances {setting}: allowed are 1 to {MAX_INSTANCES}, for all tasks (2) or"
                    " for one (segment=2)"
                )
            counts.update(dict.fromkeys([task] if task else TASKS, int(number)))
        return counts


def free_ports() -> tuple[int, int, int]:
    """Return three free ports, below those that Linux gives to programs that ask for any."""
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
