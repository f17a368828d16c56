"""The playground joins a gateway."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any

from starlette.applications import Starlette
from starlette.responses import RedirectResponse
from starlette.routing import Route

from radapter_serve.gateway.app import Gateway
from radapter_serve.gateway.settings import MIB, Settings


def add_playground(gateway: Gateway, settings: Settings) -> None:
    """Serve the page, too.

    Args:
        gateway: that has not started.
        settings: of it.
    """
    # Gradio reads these when it is imported. It is given no file to keep, but makes a folder for them.
    os.environ |= {"GRADIO_TEMP_DIR": _folder(), "GRADIO_ANALYTICS_ENABLED": "False"}
    from radapter_serve.gateway.playground import ask, door, inside, page

    most = max(1, int(settings.max_body * MIB * 3 / 4) - 2**16)  # bytes of a picture, which travels as base64
    before = gateway.app.router.lifespan_context

    async def home(request: Any) -> RedirectResponse:
        return RedirectResponse(f"{door.PATH}/")

    @contextlib.asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[Any]:
        # Gradio takes the event loop that runs, or else makes one that nobody closes.
        blocks = page.build(ask.Ask(lambda key: inside.client(gateway.app, key, settings.timeout)), most)
        app = page.mount(blocks, most)
        entry: Any = door.Door(app, page.kinds(blocks), gateway, settings)
        outer.router.routes += [
            Route("/", home, methods=["GET"]),
            Route(door.PATH, home, methods=["GET"]),
            Route(door.PATH + "/{path:path}", entry),
        ]
        async with before(outer) as state, app.router.lifespan_context(app):
            yield state

    gateway.app.router.lifespan_context = lifespan


@lru_cache(maxsize=1)
def _folder() -> str:
    """A folder that is gone when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="radapter-playground-")
    atexit.register(folder.cleanup)
    return folder.name
