"""`retrieve` in a real server, with indexes that come and change while it runs. Its answers are
those of the engine, as tests/engine/test_as_served.py shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from radapter_serve.cli.index import main
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index import writer
from radapter_serve.index.build import build
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import connect, tensors
from tests.helpers.small_release import png

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def served(
    exported_tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TritonServer, Path]]:
    """A server of two releases, and the folder with its photos and indexes (there is none yet)."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "photos").mkdir()
    for number in range(6):
        (folder / "photos" / f"{number}é.png").write_bytes(png(number, 50, 40))
    models = exported_tiny_clip / "model_repository"
    with TritonServer(
        ServerConfig(models, Endpoints.on_free_ports(), indexes=folder / "Büro" / "indexes")
    ) as server:
        yield server, folder


def ask(server: TritonServer, outputs: tuple[str, ...] = ("id", "score"), **inputs: Any) -> Any:
    """The outputs of `retrieve` by name, over gRPC."""
    with connect(server) as client:
        wanted = [grpc.InferRequestedOutput(name) for name in outputs]
        result = client.infer("retrieve", tensors(**inputs), outputs=wanted)
        return {name: result.as_numpy(name) for name in outputs}


def refused(server: TritonServer, message: str, **inputs: Any) -> None:
    with pytest.raises(InferenceServerException, match=message):
        ask(server, **inputs)


def test_indexes_come_change_and_go_while_the_server_runs(
    served: tuple[TritonServer, Path], exported_tiny_clip: Path
) -> None:
    server, folder = served
    indexes = folder / "Büro" / "indexes"
    release = load_release(exported_tiny_clip / "model_repository")
    for bad in ("photos", "../photos", "", "a/b", ".photos.building"):
        refused(server, r"\[unknown_index\]", text="a cat", index=bad)
    build(str(folder / "photos"), indexes / "photos", release)
    embeds = release.embed_pixels([release.pixels(png(number, 50, 40)) for number in range(6)])
    (query,) = release.embed_texts(["a cat"])
    best = np.argsort(-(embeds @ query))[:4]
    hits = ask(server, text="a cat", index="photos", top_k=4)
    assert [id.decode() for id in hits["id"]] == [f"{number}é.png" for number in best]
    np.testing.assert_allclose(hits["score"], (embeds @ query)[best], atol=1e-5)

    # The server itself embeds.
    image = png(3, 50, 40)
    out = str(indexes / "by-url")
    assert main(["build", str(folder / "photos"), "--out", out, "--url", server.grpc_url]) == 0
    hits = ask(server, image=image, index="by-url", top_k=1, where="path LIKE '%é.png'")
    assert hits["id"][0].decode() == "3é.png" and hits["score"][0] > 0.9999

    (folder / "photos" / "new.png").write_bytes(png(99, 50, 40))
    build(str(folder / "photos"), indexes / "photos", release)  # replaced
    assert ask(server, image=png(99, 50, 40), index="photos", top_k=1)["id"][0] == b"new.png"
    shutil.rmtree(indexes / "photos")
    refused(server, r"\[unknown_index\]", text="a cat", index="photos")


def test_many_images_are_found_by_faiss(
    served: tuple[TritonServer, Path],
    exported_tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "EXACT", 200)
    server, folder = served
    (tmp_path / "many").mkdir()
    for number in range(260):
        (tmp_path / "many" / f"{number:03}.png").write_bytes(png(number, 20, 20))
    release = load_release(exported_tiny_clip / "model_repository")
    out = folder / "Büro" / "indexes" / "many é"
    build(str(tmp_path / "many"), out, release)
    for number in (0, 259):
        hits = ask(server, image=png(number, 20, 20), index="many é", top_k=3)
        assert hits["id"][0].decode() == f"{number:03}.png" and hits["score"][0] > 0.9999
