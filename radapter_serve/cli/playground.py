"""radapter-playground: a web page to query a server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

import tyro
from rich.console import Console

from radapter_serve.cli import run
from radapter_serve.playground import PageSettings, serving
from radapter_serve.process import STOPPING, handled


def playground(
    settings: tyro.conf.OmitArgPrefixes[PageSettings] = PageSettings(),  # noqa: B008
) -> None:
    """Open a web page to query a server, until Ctrl-C: scores that follow α, search, segmentation.

    The environment variable RADAPTER_API_KEY holds the API key that radapter-gateway asks for.

    Args:
        settings: address of the page, its server, and its login.
    """
    settings = replace(settings, api_key=os.environ.get("RADAPTER_API_KEY") or None)
    if settings.user is not None and settings.host not in ("localhost", "127.0.0.1", "::1"):
        Console(stderr=True).print(
            "[bold yellow]Note:[/] the password travels in the clear; put TLS in front."
        )
    with handled(lambda *_: sys.exit(0), *STOPPING), serving(settings) as url:
        print(f"playground  {url}\nCtrl-C stops it.", flush=True)
        threading.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    return run(playground, argv, prog="radapter-playground")
