"""radapter-gateway: the entry for untrusted callers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from radapter_serve.gateway.settings import Settings
from radapter_serve.process import STOPPING, handled

PROG = "radapter-gateway"
FIRST = (
    *("host", "port", "server", "api_keys", "no_api_keys", "tls_certificate", "tls_key"),
    "new_key",
)


def gateway(
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),  # noqa: B008  # frozen
    new_key: str | None = None,
) -> None:
    """Open a server that radapter-serve started to untrusted callers, with keys, TLS and limits,
    until Ctrl-C.

    Args:
        settings: address of the gateway, its server, and its limits.
        new_key: name of a key to make: it is printed once, its digest goes to --api-keys, and
            nothing is started.
    """
    if new_key is not None:
        if settings.api_keys is None:
            raise RAdapterError("--new-key needs the file that keeps its digest: --api-keys FILE")
        from radapter_serve.gateway import access  # imported here, as starting a gateway needs less

        key = access.new_key(settings.api_keys, new_key)
        print(key)
        print(
            f"Keep it: {settings.api_keys} has only its digest. A caller uses it like this:\n"
            f"RADAPTER_API_KEY={key} radapter-query release --url http://HOST:{settings.port}",
            file=sys.stderr,
        )
        return
    from radapter_serve.gateway.run import GatewayServer
    from radapter_serve.gateway.upstream import LOG

    if note := settings.note():
        Console(stderr=True).print(f"[bold yellow]Note:[/] {note}")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{PROG}: %(message)s")
    LOG.setLevel(logging.INFO)
    with handled(lambda *_: sys.exit(0), *STOPPING), GatewayServer(settings) as server:
        print(f"gateway  {server.url}\nCtrl-C stops it.", flush=True)
        server.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run(gateway, argv, prog=PROG, first={"": FIRST})


if __name__ == "__main__":
    sys.exit(main())
