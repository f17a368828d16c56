"""The end of `radapter-demo --open`: a release that takes any α, an index of scenes, and the page
to ask both.
"""

from __future__ import annotations

import shutil
import threading
import webbrowser
from pathlib import Path

from radapter_export import ExportSettings, export_release
from radapter_serve.demo.ask import LABEL_SET, served
from radapter_serve.demo.data import FINE_TUNED, prepare
from radapter_serve.demo.scenes import prepare_scenes
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.playground import Settings, serving
from radapter_serve.server.endpoints import free_ports


def play(out: Path) -> None:
    """Serve the playground on what a demo has made, open it in a browser, and stay until Ctrl-C.

    Everything for the page comes to the folder `playground` of the demo's folder.
    """
    folder = out / "playground"
    repository = folder / "model_repository"
    indexes = folder / "indexes"
    data = prepare(out / "data", styles=(FINE_TUNED,))
    scenes = prepare_scenes(out / "data" / "scenes", train=0)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    print("\nThe playground: export with any α, index the scenes, serve", flush=True)
    settings = ExportSettings(
        model_repository=repository,
        merged=folder / "merged",
        label_sets={LABEL_SET: data.classes},
        templates=data.templates,
        dense="naclip",
    )
    export_release(out / "runs" / "classification", "dynamic", settings)
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
