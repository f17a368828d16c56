"""radapter-serve: serve a model repository, with tritonserver or in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.hub import HUB
from radapter_serve.release.release import Release
from radapter_serve.server.admin_socket import AdminSocket
from radapter_serve.server.backlog import MAX_WAITING
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.installation import find_tritonserver
from radapter_serve.server.probe import Probe
from radapter_serve.server.releases import Releases
from radapter_serve.server.runtime_choice import BATCHES, Measured, fastest
from radapter_serve.server.supervisor import Supervisor
from radapter_serve.server.triton_server import TritonServer
from radapter_serve.server.weaknesses import weaknesses_of
from radapter_serve.signals import STOPPING, handled

if TYPE_CHECKING:
    from radapter_serve.gateway.run import Child
    from radapter_serve.server.engine_server import EngineServer

PROG = "radapter-serve"
FIRST = (
    *(
        "engine",
        "model_repository",
        "host",
        "http_port",
        "grpc_port",
        "indexes",
        "runtime",
        "instances",
    ),
    *("trust_network", "gateway_port", "api_keys"),
)


@dataclass(frozen=True)
class GatewayFlags:
    """A gateway in front of the server; radapter-gateway has all its settings.

    Args:
        gateway_port: of a gateway, the way in for callers that are not trusted; none is started if
            not given.
        gateway_host: address or name that it listens on.
        api_keys: file of the keys that let callers into the gateway; radapter-gateway --new-key
            makes one.
        no_api_keys: let everybody in who reaches the gateway, also beyond this machine.
        tls_certificate: PEM file of the gateway's certificate and its chain, to be reached by
            https.
        tls_key: PEM file of its key.
        log: what the gateway says of each request on stderr: nothing, a line of words, or one of
            JSON. Traces go to where the variable OTEL_EXPORTER_OTLP_ENDPOINT says.
    """

    gateway_port: int | None = None
    gateway_host: str = "127.0.0.1"
    api_keys: Path | None = None
    no_api_keys: tyro.conf.FlagCreatePairsOff[bool] = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    log: Literal["off", "line", "json"] = "off"

    @property
    def lets_in(self) -> bool:
        """Whether callers beyond this machine are let in, with keys or all of them."""
        return self.no_api_keys or self.api_keys is not None

    def child(self, endpoints: Endpoints, indexes: Path) -> Child | None:
        """The gateway of a server that listens there, or None if none is wanted.

        Raises:
            RAdapterError: a gateway that could not start, or flags of one that is not wanted.
        """
        if self.gateway_port is None:
            for field in fields(self):
                if getattr(self, field.name) != field.default:
                    raise RAdapterError(
                        f"--{field.name.replace('_', '-')} needs a gateway: --gateway-port PORT"
                    )
            return None
        from radapter_serve.gateway.run import Child, listen
        from radapter_serve.gateway.settings import Settings

        settings = Settings(
            host=self.gateway_host,
            port=self.gateway_port,
            server=endpoints.grpc_url.removeprefix("grpc://"),
            indexes=indexes,
            api_keys=self.api_keys,
            no_api_keys=self.no_api_keys,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            log=self.log,
        )
        listen(settings, "--gateway-").close()
        return Child(settings)


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
    """Serve a model repository, made by radapter-export, until Ctrl-C. `radapter-release` puts
    another release in its place.

    What dies meanwhile, tritonserver or the process of a model, is started again.

    Args:
        model_repository: folder to serve, or hf-hub:NAME, a release that radapter-export --push
            sent to the hub; --model-repository PATH says the same.
        engine: triton starts tritonserver, with HTTP and gRPC; process answers over HTTP in this
            process, on any machine, with keys, limits and /v1/embeddings as radapter-gateway has
            them; auto takes Triton where it is installed.
        host: address or name to listen on; anything but loopback needs --trust-network.
        http_port: port of the HTTP endpoint.
        grpc_port: port of the gRPC endpoint.
        metrics_port: port of the Prometheus metrics.
        indexes: folder of the indexes that radapter-index makes; a new or replaced one is served at
            once.
        runtime: what runs the encoders, once it is checked against torch's embeddings; auto takes
            the fastest on this machine; as exported if none is given.
        threads: how many threads compute in an encoder, shared by its instances; one a core if none
            is given.
        instances: processes of each task, so that a slow request does not hold up the others: a
            number for all, and TASK=NUMBER for one, such as: 2 segment=4.
        max_waiting: requests that may wait for a model; where more do, those that have waited
            longest are refused.
        timeout: seconds to wait until all models answer.
        drain_seconds: how long calls under way may take when the server is stopped.
        trust_network: let anyone who can reach --host use the server, for Triton asks for no
            password.
        verbose: show Triton's own messages.
        gateway: a gateway in front of the server.
    """
    chosen, why = (engine, "") if engine != "auto" else choose_engine()
    in_process = chosen == "process"
    let_in = trust_network or (in_process and gateway.lets_in)
    tls = in_process and gateway.tls_certificate is not None
    endpoints = Endpoints(host, http_port, grpc_port, metrics_port, let_in, tls)
    config = ServerConfig(
        _from_hub(model_repository),
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
    if not in_process:
        keep_serving(TritonServer(config), gateway.child(endpoints, config.indexes))
        return
    if why:
        _say(f"engine: process, because {why}")
    given = {
        "--grpc-port": grpc_port != 8001,
        "--metrics-port": metrics_port != 8002,
        "--instances": instances != ("2",),
        "--timeout": timeout != 120.0,
        "--drain-seconds": drain_seconds != 10,
        "--verbose": verbose,
        "--gateway-port": gateway.gateway_port is not None,
        "--gateway-host": gateway.gateway_host != GatewayFlags.gateway_host,
    }
    if wrong := ", ".join(flag for flag, is_given in given.items() if is_given):
        raise RAdapterError(
            f"{wrong} has no effect with --engine process, which answers at --http-port alone;"
            " leave it out"
        )
    answer_in_process(config, gateway, trust_network)


def _from_hub(repository: Path) -> Path:
    """The folder of a model repository, fetched where it is a name of the hub."""
    name = repository.as_posix()
    if not name.startswith(HUB):
        return repository
    from radapter_export.hub import taken

    return taken(name)


def choose_engine() -> tuple[Literal["triton", "process"], str]:
    """What `--engine auto` takes, and why it is not Triton."""
    try:
        find_tritonserver()
    except RAdapterError as error:
        return "process", str(error)
    return "triton", ""


def answer_in_process(config: ServerConfig, flags: GatewayFlags, trust_network: bool) -> None:
    """Answer over HTTP in this process, until a signal ends it.

    Args:
        config: what to serve.
        flags: keys and TLS.
        trust_network: let everybody in who reaches the port.

    Raises:
        RAdapterError: a release that can't be served, or a port that is taken.
    """
    check_installed("uvicorn", "server")
    from radapter_serve.gateway.in_process import InProcess
    from radapter_serve.gateway.middleware import what_spans_lack
    from radapter_serve.gateway.run import GatewayServer, allow_files, listen
    from radapter_serve.gateway.settings import Settings
    from radapter_serve.server.engine_server import EngineServer

    endpoints = config.endpoints
    settings = Settings(
        host=endpoints.host,
        port=endpoints.http_port,
        indexes=config.indexes,
        api_keys=flags.api_keys,
        no_api_keys=flags.no_api_keys or (trust_network and flags.api_keys is None),
        tls_certificate=flags.tls_certificate,
        tls_key=flags.tls_key,
        log=flags.log,
    )
    if missing := what_spans_lack():
        _say(f"warning: {missing}")
    with contextlib.closing(listen(settings, "--http-")) as listener:
        allow_files(settings.max_connections)
        server = EngineServer(config)
        gateway = GatewayServer(
            settings, listener, lambda: InProcess(server.engine, settings.max_concurrent)
        )
        with (
            handled(lambda *_: sys.exit(0), *STOPPING),
            Console(stderr=True).status("starting") as status,
        ):
            server.start(lambda line: status.update(f"{escape(line)} ..."))
        if server.measured:
            _show_measured(server.measured, server.config.encoder_threads)
        try:
            _show_releases(server)
            with AdminSocket(server.folder, server):
                gateway.run()
        except KeyboardInterrupt:
            print("stopping ...", file=sys.stderr)
        finally:
            server.stop()


def keep_serving(server: TritonServer, gateway: Child | None = None) -> None:
    """Serve until a signal ends it.

    Args:
        server: not started yet.
        gateway: to be kept up next to it, if any.

    Raises:
        RAdapterError: the server does not start, or a part of it never becomes ready again.
    """
    # kill, systemd, Kubernetes and a closed terminal stop it in order, as Ctrl-C does.
    with handled(lambda *_: sys.exit(0), *STOPPING):
        try:
            _start(server)
            with (
                AdminSocket(server.folder, Releases(server)),
                gateway or contextlib.nullcontext(),
            ):
                Supervisor(
                    server,
                    _say,
                    [gateway] if gateway else [],
                    probe=Probe(server.control, server.ticks),
                ).run()
        except KeyboardInterrupt:
            print("stopping ...", file=sys.stderr)
        finally:
            server.stop()


def _start(server: TritonServer) -> None:
    console = Console(stderr=True)
    if server.config.verbose:
        server.start()
    else:
        with console.status("starting") as status:
            server.start(lambda line: status.update(f"{escape(line)} ..."))
    checks = server.checks
    if checks.measured:
        _show_measured(checks.measured, server.config.encoder_threads)
    if checks.warning:
        _say(f"warning: {checks.warning}")
    _show(server)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `radapter-serve`."""
    given = list(sys.argv[1:] if argv is None else argv)
    # Other commands name the repository by a flag, and so may who starts a server.
    given = [
        one.removeprefix("--model-repository=") for one in given if one != "--model-repository"
    ]
    return run(serve, given, prog=PROG, first=FIRST)


def _say(line: str) -> None:
    print(f"{PROG}: {line}", file=sys.stderr, flush=True)


def _show(server: TritonServer) -> None:
    """Print what is served where, and by which Triton."""
    version = server.control.version()
    if not server.endpoints.loopback:
        _say(
            f"warning: --trust-network: whoever reaches {server.endpoints.host} can try the"
            f" published weaknesses that Triton {version} has or may have:"
            f" {', '.join(weaknesses_of(version))}; SECURITY.md says what closes each, and"
            " radapter-gateway and --engine process have none of them"
        )
    table = Table(title=escape(str(server.config.model_repository)), title_justify="left")
    for column in ("model", "versions", "release"):
        table.add_column(column)
    for name, versions in server.models.items():
        described = _describe(server.config.model_repository / name, versions)
        table.add_row(escape(name), ", ".join(map(str, versions)), escape(described))
    console = Console()
    console.print(table)
    print(f"Triton   {version}")
    print(f"HTTP     {server.http_url}\ngRPC     {server.grpc_url}\nmetrics  {server.metrics_url}")
    print(f"indexes  {server.config.indexes}")
    if "classify" in server.models:
        print(
            '\ntry:     radapter-query classify PHOTO.jpg --labels "a cat" "a dog" --url'
            f" {server.grpc_url}\n"
        )
    print("radapter-release load N serves another release. Ctrl-C stops the server.", flush=True)


def _show_releases(server: EngineServer) -> None:
    """Print what is served without Triton, and where."""
    repository = server.config.model_repository
    table = Table(title=escape(str(repository)), title_justify="left")
    for column in ("release", "what it is"):
        table.add_column(column)
    for version in server.served.releases:
        described = _describe(repository / "classify", [version])
        table.add_row(str(version), escape(described.partition(": ")[2]))
    Console().print(table)
    url = server.state()["url"]
    print(f"HTTP     {url}\nmetrics  {url}/metrics\nindexes  {server.config.indexes}")
    print(f'\ntry:     radapter-query classify PHOTO.jpg --labels "a cat" "a dog" --url {url}\n')
    print("radapter-release load N serves another release. Ctrl-C stops the server.", flush=True)


def _show_measured(measured: Sequence[Measured], threads: int) -> None:
    """Print what `--runtime auto` found."""
    title = f"runtimes on this machine, {threads} thread{'s' if threads > 1 else ''}"
    table = Table(title=title, title_justify="left")
    for column in (
        "encoder",
        "runtime",
        *(f"ms at {batch}" for batch in BATCHES),
        "a second",
        "1 - cosine",
    ):
        table.add_column(
            column, no_wrap=True, justify="left" if column in ("encoder", "runtime") else "right"
        )
    for one in measured:
        if one.seconds:
            rate = max(batch / seconds for batch, seconds in one.seconds.items())
            times = (f"{1e3 * seconds:.1f}" for seconds in one.seconds.values())
            table.add_row(
                escape(one.encoder), one.runtime, *times, f"{rate:.0f}", f"{one.distance:.1e}"
            )
    Console().print(table)
    # One reason each: what cannot run an encoder is out for all.
    for runtime, why in {one.runtime: one.why for one in reversed(measured) if one.why}.items():
        print(f"{runtime} is left out: {why}")
    print(f"fastest: {fastest(measured)}\n")


def _describe(model: Path, versions: Sequence[int]) -> str:
    parts = []
    for version in versions:
        try:
            release = Release.load(model / str(version))
            own = f"alpha {release.alpha:g}{' or any' if release.dynamic_alpha else ''}"
            parts.append(f"{version}: {release.architecture} at {own}, {release.precision}")
        except (RAdapterError, ValueError, TypeError):
            continue
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
