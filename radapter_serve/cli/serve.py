"""radapter-serve: serve a model repository, with tritonserver or in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.gateway.settings import GatewayOptions, Settings
from radapter_serve.process import STOPPING, handled, memory_limit
from radapter_serve.release.repository import Served
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.launch import find_tritonserver
from radapter_serve.server.models import expected_memory
from radapter_serve.server.releases import ReleaseServer, admin_socket
from radapter_serve.sources import HUB

if TYPE_CHECKING:
    from radapter_serve.gateway.run import GatewayServer
    from radapter_serve.server.triton_server import TritonServer

PROG = "radapter-serve"
# Options that --help shows
FIRST = (
    *("engine", "model_repository", "host", "http_port", "grpc_port", "indexes", "runtime"),
    *("precision", "instances", "trust_network", "gateway_port", "api_keys"),
)


DEFAULTS = ServerConfig()
FEW_RELEASES = 2  # with more, each task of a release has one process by default, not two


def _changed(values: Any, defaults: Any, *names: str) -> list[str]:
    """The flags of fields that differ from their defaults."""
    changed = [name for name in names if getattr(values, name) != getattr(defaults, name)]
    return [f"--{name.replace('_', '-')}" for name in changed]


@dataclass(frozen=True)
class GatewayFlags(GatewayOptions):
    """A gateway in front of the server; radapter-gateway has all its settings.

    Attributes:
        gateway_port: port of a gateway, the entry for untrusted callers; no gateway if not given.
        gateway_host: address or name that the gateway listens on.
    """

    gateway_port: int | None = None
    gateway_host: str = "127.0.0.1"

    def settings(self, host: str, port: int, config: ServerConfig, triton: str = "") -> Settings:
        """Settings of a gateway at a host and a port."""
        same = {name: value for name, value in vars(self).items() if "gateway" not in name}
        return Settings(
            host=host,
            port=port,
            indexes=config.indexes,
            model_repository=config.model_repository,
            server=triton,
            **same,
        )

    def server(self, config: ServerConfig) -> GatewayServer | None:
        """Open a gateway in front of Triton, listening at once; None without --gateway-port."""
        if self.gateway_port is None:
            if flags := _changed(self, GatewayFlags(), *vars(self)):
                raise RAdapterError(f"{flags[0]} needs a gateway: --gateway-port PORT")
            return None
        from radapter_serve.gateway.run import GatewayServer

        triton = config.endpoints.grpc_url.removeprefix("grpc://")
        settings = self.settings(self.gateway_host, self.gateway_port, config, triton)
        if note := settings.note():
            _say(note)
        return GatewayServer(settings)


def serve(
    config: Annotated[
        tyro.conf.OmitArgPrefixes[ServerConfig], tyro.conf.arg(name="server")
    ] = DEFAULTS,
    engine: Literal["auto", "triton", "process"] = "auto",
    gateway: tyro.conf.OmitArgPrefixes[GatewayFlags] = GatewayFlags(),
) -> None:
    """Serve a model repository, made by radapter-export, until Ctrl-C. `radapter-release` switches
    to another release.

    If tritonserver or the process of a model ends, it is started again.

    Args:
        config: repository, addresses and settings of the server.
        engine: triton starts tritonserver, with HTTP and gRPC; process answers over HTTP in this
            process, on any machine, with keys, limits and /v1/embeddings as radapter-gateway has
            them; auto takes Triton if it is installed.
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

    # Fetch a release from the hub.
    name = config.model_repository.as_posix()
    if name.startswith(HUB):
        from radapter_export.hub import download_release

        folder = download_release(name)
        if folder is None:
            raise RAdapterError(
                f"{name} holds no release; export one from it with radapter-export --checkpoint"
                f" {name}, or push one with radapter-export --push"
            )
        config = replace(config, model_repository=folder)

    # Say what many releases take.
    served: Sequence[int] = ()
    with contextlib.suppress(RAdapterError, OSError):  # the server says what is wrong
        served = Served.load(config.model_repository).releases
    if chosen == "triton" and not config.instances:
        config = replace(config, instances=("1" if len(served) > FEW_RELEASES else "2",))
    if len(served) > 1:
        _say(_memory_of(config, served, chosen))

    # Serve with tritonserver, or in this process.
    if chosen == "triton":
        from radapter_serve.server.triton_server import TritonServer

        server = TritonServer(config)
        with gateway.server(server.config) or contextlib.nullcontext() as front:
            keep_serving(server, front)
    else:
        answer_in_process(config, gateway)


def _memory_of(config: ServerConfig, releases: Sequence[int], engine: str) -> str:
    """What memory releases will take, in one line."""
    import psutil

    by_triton, processes, by_engine = expected_memory(
        config.model_repository, releases, config.instance_counts()
    )
    takes = by_triton if engine == "triton" else by_engine
    free = min(psutil.virtual_memory().available, memory_limit())
    line = f"{len(releases)} releases take about {takes / 2**30:.1f} GiB of memory"
    if engine == "triton":
        line += f" in {processes} processes; --engine process takes {by_engine / 2**30:.1f} GiB"
    more = ", which is less" if free < takes else ""
    return f"{line}; {free / 2**30:.1f} GiB are free{more}"


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
            if server.note:
                _say(server.note)
            if server.warning:
                _say(f"warning: {server.warning}")
            version = server.control.version()
            if not server.config.endpoints.loopback:
                _say(
                    f"warning: --trust-network: whoever reaches {server.config.endpoints.host} can"
                    f" try the published weaknesses of Triton {version}; docs/security.md says"
                    " what closes each, and radapter-gateway and --engine process have none of them"
                )
            urls = {
                "Triton": version,
                "HTTP": server.http_url,
                "gRPC": server.grpc_url,
                "metrics": server.metrics_url,
                "gateway": None if gateway is None else gateway.url,
            }
            _show(server, urls, server.grpc_url)
            with (
                admin_socket(server.folder, server),
                contextlib.nullcontext() if gateway is None else gateway.in_thread(),
            ):
                Supervisor(server, _say).run()
        except KeyboardInterrupt:
            print("stopping ...", file=sys.stderr)
        finally:
            server.stop()


def answer_in_process(config: ServerConfig, flags: GatewayFlags) -> None:
    """Answer over HTTP in this process until a signal ends it."""
    wrong = [
        *_changed(config.endpoints, DEFAULTS.endpoints, "grpc_port", "metrics_port"),
        *_changed(config, DEFAULTS, "instances", "timeout", "drain_seconds", "verbose"),
        *_changed(flags, GatewayFlags(), "gateway_port", "gateway_host"),
    ]
    if wrong:
        raise RAdapterError(
            f"{', '.join(wrong)} has no effect with --engine process, which answers only at"
            " --http-port; leave it out"
        )
    check_installed("uvicorn", "server")
    from threadpoolctl import threadpool_limits

    from radapter_serve.gateway.in_process import EngineServer, in_front_of

    # Each request has a thread; more of BLAS would keep the cores from the encoders.
    threadpool_limits(1, "blas")

    endpoints = replace(config.endpoints, tls=flags.tls_certificate is not None)
    if endpoints.trust_network and flags.api_keys is None:
        flags = replace(flags, no_api_keys=True)
    server = EngineServer(replace(config, endpoints=endpoints))
    config = server.config
    settings = flags.settings(endpoints.host, endpoints.http_port, config)
    with in_front_of(server, settings) as gateway:
        with (
            handled(lambda *_: sys.exit(0), *STOPPING),
            Console(stderr=True).status("starting") as status,
        ):
            server.start(lambda line: status.update(f"{escape(line)} ..."))
        if server.note:
            _say(server.note)
        try:
            url = endpoints.http_url
            urls = {"HTTP": url, "metrics": f"{url}/metrics"}
            _show(server, urls, url)
            with admin_socket(server.folder, server):
                gateway.run()
        except KeyboardInterrupt:
            print("stopping ...", file=sys.stderr)
        finally:
            server.stop()


def _show(server: ReleaseServer, urls: Mapping[str, str | None], url: str) -> None:
    """Print the served releases, the settings, and the addresses."""
    config = server.config
    releases = server.served.releases
    print(config.model_repository)
    for version in releases:
        release = server.facts[version]
        alpha = f"{release.alpha:g}{' or any' if release.dynamic_alpha else ''}"
        line = f"release  {version}: {release.architecture} at alpha {alpha}, {release.precision}"
        if release.image_distance is not None:
            line += f" with {release.runtime}, 1 - cosine of images {release.image_distance:.0e}"
        print(line)
    for name, value in {**urls, "indexes": config.indexes}.items():
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
    # Accept --model-repository, as in other commands, instead of the positional argument.
    arguments = [
        argument.removeprefix("--model-repository=")
        for argument in arguments
        if argument != "--model-repository"
    ]
    return run(serve, arguments, prog=PROG, first={"": FIRST})


if __name__ == "__main__":
    sys.exit(main())
