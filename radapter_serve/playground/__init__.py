"""The playground: a web page to query a server in a browser.

Gradio draws the page, and the Python client queries the server. page.py builds the page; this
module serves it at a port.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from radapter_client import Client
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.server.config import address_of

MAX_PICTURE = 64 * 2**20  # bytes


@dataclass(frozen=True)
class PageSettings:
    """Address of the page, its server, and its login.

    Args:
        url: address of the server or of a gateway, such as https://HOST:8080; if not given,
            http://localhost:8000, or grpc://localhost:8001 if only gRPC answers.
        api_key: the key that the gateway asks for; not a flag, which other users could read.
        host: address or name to listen on; any but this machine's own needs a login.
        port: port to listen on.
        user: name of the login that the page asks for.
        password_file: file whose first line is the password of that login.
    """

    url: str | None = None
    api_key: tyro.conf.Suppress[str | None] = None
    host: str = "127.0.0.1"
    port: int = 7860
    user: str | None = None
    password_file: Path | None = None

    def check(self) -> tuple[str, tuple[str, str] | None]:
        """Check the settings; returns the address to listen on, and the name and password of the
        login, if any. Raises `RAdapterError` for an invalid value, or a page without a login that
        other machines could open.
        """
        check_installed("gradio", "playground")
        if not 0 < self.port < 65536:
            raise RAdapterError(f"--port is {self.port}; allowed are 1 to 65535")
        if (self.user is None) != (self.password_file is None):
            raise RAdapterError("--user and --password-file go together; give both or none")
        address = address_of(self.host)
        login = None
        if self.user is not None and self.password_file is not None:
            try:
                password = self.password_file.read_text(encoding="utf-8").partition("\n")[0].strip()
            except (OSError, UnicodeDecodeError) as error:
                raise RAdapterError(
                    f"--password-file {self.password_file} cannot be read: {error}"
                ) from None
            if not password:
                raise RAdapterError(
                    f"--password-file {self.password_file}: its first line is empty; it is the"
                    " password"
                )
            login = self.user, password
        if login is None and not ipaddress.ip_address(address).is_loopback:
            raise RAdapterError(
                f"--host {self.host} lets others open the page; give --user NAME --password-file"
                " FILE"
            )
        return address, login


@contextlib.contextmanager
def serving(settings: PageSettings) -> Iterator[str]:
    """Serve the page until the end of the block; yields its URL."""
    address, login = settings.check()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(settings.url, api_key=settings.api_key))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="radapter-playground-"))
        # Gradio reads these on import. Uploads go to a folder that is removed at the end.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        logging.getLogger("httpx").setLevel(logging.WARNING)
        import gradio  # takes seconds
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from radapter_serve.playground.page import build

        # Without a login, refuse other host names: scripts of a site whose name resolves to this
        # address could read the page.
        hosts = ["localhost", address] if login is None else ["*"]
        middleware: list[Any] = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
        fonts = ["system-ui", "sans-serif"]  # installed fonts, so that none is downloaded

        async def launched() -> tuple[gradio.Blocks, str]:
            # Gradio uses a running event loop; without one it makes some and never closes them.
            page = build(client)
            _, url, _ = page.launch(
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=False,
                server_name=address,
                server_port=settings.port,
                auth=login,
                max_file_size=MAX_PICTURE,
                footer_links=[],
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                app_kwargs={"middleware": middleware},
                theme=gradio.themes.Default(
                    primary_hue="indigo", font=fonts, font_mono=["monospace"]
                ),
            )
            return page, url

        try:
            page, url = asyncio.run(launched())
        except OSError:
            raise RAdapterError(
                f"port {settings.port} is taken; choose another with --port"
            ) from None
        try:
            yield url
        finally:
            page.close(verbose=False)
