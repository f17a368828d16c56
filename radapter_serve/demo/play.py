"""The end of `radapter-demo --open`: a release that takes any α, an index of scenes, and the page
to ask both.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from radapter_export import ExportSettings, export_release
from radapter_serve.demo.data import prepare
from radapter_serve.demo.scenes import prepare_scenes
from radapter_serve.encoders.loaded import load_release
from radapter_serve.gateway.in_process import answering
from radapter_serve.gateway.settings import Settings as GatewaySettings
from radapter_serve.index.build import build
from radapter_serve.playground.run import Settings, serving
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports

# It has learned from scenes and captions; every task of the page works with its encoders.
RUN = "retrieval"


def play(out: Path) -> None:
    """Serve the playground on what a demo has made, open it in a browser, and stay until Ctrl-C.

    Args:
        out: folder of the demo; everything for the page comes to its folder `playground`.

    Raises:
        RAdapterError: there is no demo in it, or something is missing.
    """
    own = out / "playground"
    repository = own / "model_repository"
    indexes = own / "indexes"
    data = prepare(out / "data")
    scenes = prepare_scenes(out / "data" / "scenes")
    shutil.rmtree(own, ignore_errors=True)  # of an earlier call
    print("\nThe playground: export with any α, index the scenes, serve", flush=True)
    settings = ExportSettings(
        model_repository=repository,
        merged=own / "merged",
        label_sets={"drawings": data.classes},
        templates=data.templates,
        dense="naclip",
    )
    export_release(out / "runs" / RUN, "dynamic", settings)
    build(f"csv:{scenes.gallery}", indexes / "scenes", load_release(repository))
    print(
        f"drawings to drop on the page: {out / 'data' / 'test'} and {scenes.gallery.parent}",
        flush=True,
    )
    port, *_ = free_ports()
    with served(repository, indexes) as server, serving(Settings(server, port=port)) as url:
        print(f"playground  {url}\nCtrl-C stops it.", flush=True)
        webbrowser.open(url)
        threading.Event().wait()


@contextlib.contextmanager
def served(repository: Path, indexes: Path) -> Iterator[str]:
    """The URL of a server of its own, of the engine in this process: it lists its indexes."""
    config = ServerConfig(repository, Endpoints.on_free_ports(), indexes=indexes)
    settings = GatewaySettings(port=config.endpoints.http_port, indexes=config.indexes)
    with answering(config, settings):
        yield config.endpoints.http_url
