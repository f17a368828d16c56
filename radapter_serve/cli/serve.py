"""radapter-serve: serve a model repository, with tritonserver or in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.process import STOPPING, handled
from radapter_serve.release.release import Release
from radapter_serve.server.config import MAX_WAITING, ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.launch import find_tritonserver
from radapter_serve.server.releases import admin_socket
from radapter_serve.sources import HUB

if TYPE_CHECKING:
    from radapter_serve.gateway.run import GatewayServer
    from radapter_serve.gateway.settings import Settings
    from radapter_serve.server.triton_server import TritonServer

PROG = "radapter-serve"
# Options that --help shows
FIRST = (
    *("engine", "model_repository", "host", "http_port", "grpc_port", "indexes", "runtime"),
    *("instances", "trust_network", "gateway_port", "api_keys"),
)


@dataclass(frozen=True)
class GatewayFlags:
    """A gateway in front of the server; radapter-gateway has all its settings.

    Args:
        gateway_port: port of a gateway, the entry for untrusted callers; no gateway if not given.
        gateway_host: address or name that the gateway listens on.
        api_keys: file of the keys that the gateway accepts; radapter-gateway --new-key makes a key.
        no_api_keys: accept everybody who reaches the gateway, also from other machines.
        tls_certificate: PEM file of the gateway's certificate and its chain, for https.
        tls_key: PEM file of the certificate's key.
        log: json writes a line for each request to the gateway to stderr. Traces go to the address
            in the environment variable OTEL_EXPORTER_OTLP_ENDPOINT.
    """

    gateway_port: int | None = None
    gateway_host: str = "127.0.0.1"
    api_keys: Path | None = None
    no_api_keys: tyro.conf.FlagCreatePairsOff[bool] = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    log: Literal["off", "json"] = "off"

    def settings(self, host: str, port: int, indexes: Path, triton: str = "") -> Settings:
        """Settings of a gateway at a host and a port."""
        from radapter_serve.gateway.settings import Settings  # not for Triton alone

        return Settings(
            host=host,
            port=port,
            indexes=indexes,
            api_keys=self.api_keys,
            no_api_keys=self.no_api_keys,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            log=self.log,
            server=triton,
        )

    def server(self, endpoints: Endpoints, indexes: Path) -> GatewayServer | None:
        """Open a gateway in front of Triton, listening at once; None without --gateway-port."""
        if self.gateway_port is None:
            for field in fields(self):
                if getattr(self, field.name) != field.default:
                    raise RAdapterError(
                        f"--{field.name.replace('_', '-')} needs a gateway: --gateway-port PORT"
                    )
            return None
        from radapter_serve.gateway.run import GatewayServer

        triton = endpoints.grpc_url.removeprefix("grpc://")
        settings = self.settings(self.gateway_host, self.gateway_port, indexes, triton)
        if note := settings.note():
            _say(note)
        return GatewayServer(settings)


def serve(
    model_repository: tyro.conf.Positional[Path] = Path("model_repository"),
    engine: Literal["auto", "triton", "process"] = "auto",
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    indexes: Path = Path("indexes"),
    runtime: Literal["onnxruntime", "openvino", "tensorrt", "auto"] | None = None,
    threads: int | None = None,
    instances: tuple[str, ...] = ("2",),
    max_waiting: int = MAX_WAITING,
    timeout: float = 120.0,
    drain_seconds: int = 10,
    trust_network: bool = False,
    verbose: bool = False,
    gateway: tyro.conf.OmitArgPrefixes[GatewayFlags] = GatewayFlags(),
) -> None:
    """Serve a model repository, made by radapter-export, until Ctrl-C. `radapter-release` switches
    to another release.

    If tritonserver or the process of a model ends, it is started again.

    Args:
        model_repository: folder to serve, or hf-hub:NAME, a release that radapter-export --push
            sent to the hub; can also be given as --model-repository PATH.
        engine: triton starts tritonserver, with HTTP and gRPC; process answers over HTTP in this
            process, on any machine, with keys, limits and /v1/embeddings as radapter-gateway has
            them; auto takes Triton if it is installed.
        host: address or name to listen on; any other than loopback needs --trust-network.
        http_port: port of the HTTP endpoint.
        grpc_port: port of the gRPC endpoint.
        metrics_port: port of the Prometheus metrics.
        indexes: folder of the indexes that radapter-index makes; a new or replaced one is served at
            once.
        runtime: runtime of the encoders, which are first checked against torch's embeddings; auto
            takes the one that is usually fastest on such a machine; as exported if not given.
        threads: number of threads that compute in an encoder, shared by its instances; one a core
            if not given.
        instances: processes of each task, so that a slow request does not hold up the others: a
            number for all, and TASK=NUMBER for one, such as: 2 segment=4.
        max_waiting: requests that may wait for a model; beyond this number, those that have waited
            longest are refused.
        timeout: seconds to wait until all models answer.
        drain_seconds: seconds that calls under way may take when the server is stopped.
        trust_network: let anyone who can reach --host use the server, as Triton asks for no
            password.
        verbose: show Triton's own messages.
        gateway: a gateway in front of the server.
    """
    # Choose the engine.
    chosen = engine
    if engine == "auto":
        chosen = "triton"
        try:
            find_tritonserver()
        except RAdapterError as error:
            chosen = "process"
            _say(f"engine: process, because {error}")

    # Describe the endpoints, the repository and the server.
    in_process = chosen == "process"
    endpoints = Endpoints(
        host,
        http_port,
        grpc_port,
        metrics_port,
        trust_network or (in_process and (gateway.no_api_keys or gateway.api_keys is not None)),
        in_process and gateway.tls_certificate is not None,
    )
    if model_repository.as_posix().startswith(HUB):
        from radapter_export.hub import take

        name = model_repository.as_posix()
        folder = take(name)
        if folder is None:
            raise RAdapterError(
                f"{name} holds no release; export one from it with radapter-export --checkpoint"
                f" {name}, or push one with radapter-export --push"
            )
        model_repository = folder
    config = ServerConfig(
        model_repository,
        endpoints,
        indexes=indexes,
        runtime=runtime,
        threads=threads,
        instances=instances,
        max_waiting=max_waiting,
        timeout=timeout,
        drain_seconds=drain_seconds,
        verbose=verbose,
    )

    # Serve with tritonserver, or in this process.
    if not in_process:
        from radapter_serve.server.triton_server import TritonServer

        with gateway.server(endpoints, config.indexes) or contextlib.nullcontext() as front:
            keep_serving(TritonServer(config), front)
        return
    changed = {
        "--grpc-port": grpc_port != 8001,
        "--metrics-port": metrics_port != 8002,
        "--instances": instances != ("2",),
        "--timeout": timeout != 120.0,
        "--drain-seconds": drain_seconds != 10,
        "--verbose": verbose,
        "--gateway-port": gateway.gateway_port is not None,
        "--gateway-host": gateway.gateway_host != GatewayFlags.gateway_host,
    }
    if wrong := ", ".join(flag for flag, is_changed in changed.items() if is_changed):
        raise RAdapterError(
            f"{wrong} has no effect with --engine process, which answers at --http-port alone;"
            " leave it out"
        )
    answer_in_process(config, gateway, trust_network)


def keep_serving(server: TritonServer, gateway: GatewayServer | None = None) -> None:
    """Run a server, with a gateway in front, until a signal ends this process."""
    from radapter_serve.server.supervisor import Supervisor

    # SIGTERM and SIGHUP stop the server in order, as Ctrl-C does.
    with handled(lambda *_: sys.exit(0), *STOPPING):
        try:
            if server.config.verbose:
                server.start()
            else:
                with Console(stderr=True).status("starting") as status:
                    server.start(lambda line: status.update(f"{escape(line)} ..."))
            if server.warning:
                _say(f"warning: {server.warning}")
            version = server.control.version()
            if not server.config.endpoints.loopback:
                _say(
                    f"warning: --trust-network: whoever reaches {server.config.endpoints.host} can"
                    f" try the published weaknesses of Triton {version}; SECURITY.md says what"
                    " closes each, and radapter-gateway and --engine process have none of them"
                )
            urls = {
                "Triton": version,
                "HTTP": server.http_url,
                "gRPC": server.grpc_url,
                "metrics": server.metrics_url,
                "gateway": None if gateway is None else gateway.url,
            }
            _show(server.config, server.served.releases, server.runtime, urls, server.grpc_url)
            with (
                admin_socket(server.folder, server),
                contextlib.nullcontext() if gateway is None else gateway.in_thread(),
            ):
                Supervisor(server, _say).run()
        except KeyboardInterrupt:
            print("stopping ...", file=sys.stderr)
        finally:
            server.stop()


def answer_in_process(config: ServerConfig, flags: GatewayFlags, trust_network: bool) -> None:
    """Answer over HTTP in this process until a signal ends it; `trust_network` admits everybody who
    reaches the port.
    """
    check_installed("uvicorn", "server")
    from radapter_serve.gateway.in_process import EngineServer, in_front_of

    if trust_network and flags.api_keys is None:
        flags = replace(flags, no_api_keys=True)
    endpoints = config.endpoints
    settings = flags.settings(endpoints.host, endpoints.http_port, config.indexes)
    server = EngineServer(config)
    with in_front_of(server, settings) as gateway:
        with (
            handled(lambda *_: sys.exit(0), *STOPPING),
            Console(stderr=True).status("starting") as status,
        ):
            server.start(lambda line: status.update(f"{escape(line)} ..."))
        try:
            url = config.endpoints.http_url
            urls = {"HTTP": url, "metrics": f"{url}/metrics"}
            _show(config, server.served.releases, server.runtime, urls, url)
            with admin_socket(server.folder, server):
                gateway.run()
        except KeyboardInterrupt:
            print("stopping ...", file=sys.stderr)
        finally:
            server.stop()


def _show(
    config: ServerConfig,
    releases: Sequence[int],
    runtime: str | None,
    urls: Mapping[str, str | None],
    url: str,
) -> None:
    """Print the served releases, the settings, and the addresses."""
    print(config.model_repository)
    for version in releases:
        release = Release.load(config.model_repository / "classify" / str(version))
        alpha = f"{release.alpha:g}{' or any' if release.dynamic_alpha else ''}"
        print(f"release  {version}: {release.architecture} at alpha {alpha}, {release.precision}")
    for name, value in {**urls, "indexes": config.indexes, "runtime": runtime}.items():
        if value is not None:
            print(f"{name:<8} {value}")
    if releases:
        ask = 'radapter-query classify PHOTO.jpg --labels "a cat" "a dog"'
        print(f"\ntry:     {ask} --url {url}\n")
        print("radapter-release load N serves another release.")
    print("Ctrl-C stops the server.", flush=True)


def _say(line: str) -> None:
    print(f"{PROG}: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Accept --model-repository, as in other commands, in place of the positional argument.
    arguments = [
        argument.removeprefix("--model-repository=")
        for argument in arguments
        if argument != "--model-repository"
    ]
    return run(serve, arguments, prog=PROG, first={"": FIRST})


if __name__ == "__main__":
    sys.exit(main())
