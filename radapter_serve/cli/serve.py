"""radapter-serve: serve a model repository with tritonserver."""

from __future__ import annotations

import ipaddress
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.serving.server import TritonServer

PROG = "radapter-serve"


def serve(
    model_repository: tyro.conf.Positional[Path] = Path("model_repository"),
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    timeout: float = 120.0,
    verbose: bool = False,
) -> None:
    """Serve a model repository, made by radapter-export, until Ctrl-C.

    Args:
        model_repository: folder to serve.
        host: address to listen on; anything but loopback lets others in, and Triton asks nobody for a password.
        http_port: port of the HTTP endpoint.
        grpc_port: port of the gRPC endpoint.
        metrics_port: port of the Prometheus metrics.
        timeout: seconds to wait until all models are ready.
        verbose: show Triton's own messages.
    """
    console = Console(stderr=True)
    if not _loopback(host):
        console.print(
            f"[bold yellow]Note:[/] listening on {host}, others can reach this server. Triton has no authentication: "
            "whoever reaches it may use, load and unload models. Put a proxy that checks users in front."
        )
    server = TritonServer(model_repository, host, http_port, grpc_port, metrics_port, timeout=timeout, verbose=verbose)
    # kill, systemd and Kubernetes end a service by SIGTERM: stop as in order as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if verbose:
            server.start()
        else:
            with console.status(f"starting tritonserver for {model_repository} ..."):
                server.start()
        _show(server)
        server.wait()
    except KeyboardInterrupt:
        print("stopping ...", file=sys.stderr)
    finally:
        server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `radapter-serve`."""
    return run(serve, argv, prog=PROG)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _show(server: TritonServer) -> None:
    """Print what is served where."""
    table = Table(title=f"{server.model_repository}", title_justify="left")
    for column in ("model", "versions", "release"):
        table.add_column(column)
    for name, versions in server.models.items():
        table.add_row(name, ", ".join(map(str, versions)), _describe(server.model_repository / name, versions))
    console = Console()
    console.print(table)
    print(f"HTTP     {server.http_url}\ngRPC     {server.grpc_url}\nmetrics  {server.metrics_url}")
    if "classify" in server.models:
        print(f"\ntry:\n{curl(server.http_url)}\n")
    print("Ctrl-C stops the server.", flush=True)


def curl(url: str) -> str:
    """A line for the shell that classifies cat.jpg."""
    body = {
        "inputs": [
            {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["IMAGE"]},
            {"name": "labels", "shape": [1, 2], "datatype": "BYTES", "data": ["a cat", "a dog"]},
        ]
    }
    before, after = json.dumps(body).split("IMAGE")
    image = "base64 < cat.jpg | tr -d '\\n'"
    send = f"curl {url}/v2/models/classify/infer --data-binary @-"
    return f"(printf '{before}'; {image}; printf '{after}') | \\\n  {send}"


def _describe(model: Path, versions: Sequence[int]) -> str:
    parts = []
    for version in versions:
        try:
            release: dict[str, Any] = json.loads((model / str(version) / "release.json").read_text(encoding="utf-8"))
            parts.append(f"{version}: {release['architecture']} at alpha {release['alpha']:g}, {release['precision']}")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
