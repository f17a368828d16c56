"""`retrieve` in a real server, with indexes that come and change while it runs. Its answers are
those of the engine, as tests/engine/test_as_served.py shows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
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
from radapter_serve.index.qdrant import link, publish
from radapter_serve.server.config import ServerConfig
from radapter_serve.server.endpoints import Endpoints, free_ports
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import connect, tensors
from tests.helpers.indexes import generation, point_again
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
    hits = ask(server, image=png(7, 20, 20), index="many é", top_k=1, where="path > '100.png'")
    assert hits["id"][0].decode() > "100.png"
    (generation(out) / "codes.faiss").write_bytes(b"broken")
    point_again(out)
    message = r"\[unknown_index\].*can't be opened; the server's log says why"
    refused(server, message, text="a cat", index="many é")
    build(str(tmp_path / "many"), out, release)  # makes it again
    assert ask(server, image=png(7, 20, 20), index="many é", top_k=1)["id"][0] == b"007.png"


def test_an_index_in_qdrant(served: tuple[TritonServer, Path], exported_tiny_clip: Path) -> None:
    from tests.helpers.fake_qdrant import fake_qdrant  # here: it takes a second to load

    server, folder = served
    release = load_release(exported_tiny_clip / "model_repository")
    linked = folder / "Büro" / "indexes" / "far"
    build(str(folder / "photos"), folder / "kept", release)
    with fake_qdrant() as store:
        publish(folder / "kept", f"{store.url}/photos")
        link(f"{store.url}/photos", linked)
        hits = ask(server, ("id", "thumbnail"), image=png(3, 50, 40), index="far", top_k=1)
        assert hits["id"][0].decode() == "3é.png"
        assert hits["thumbnail"][0].startswith(b"\xff\xd8")
    message = r"\[unknown_index\].*can't be searched in Qdrant"
    refused(server, message, text="a cat", index="far")
    shutil.rmtree(linked)


def test_the_printed_commands_serve_and_search(
    exported_tiny_clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my photos").mkdir()
    for number in range(3):
        (tmp_path / "my photos" / f"{number}.png").write_bytes(png(number, 50, 40))
    (tmp_path / "my models").symlink_to(exported_tiny_clip / "model_repository")
    monkeypatch.chdir(tmp_path)
    build_command = ["build", "my photos", "--out", "my indexes/Büro"]
    assert main([*build_command, "--model-repository", "my models@1"]) == 0
    printed = capsys.readouterr().out
    [serve] = re.findall("serve it: +(.*)", printed)
    [search] = re.findall("search it: +(.*)", printed)
    http, grpc_port, metrics = free_ports()
    ports = f"--http-port {http} --grpc-port {grpc_port} --metrics-port {metrics}"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with subprocess.Popen(
        f"exec {serve} {ports}", shell=True, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            # Which it prints when it is ready.
            assert any(line.startswith("indexes") for line in server.stdout)
            command = f"{search} --json --url grpc://127.0.0.1:{grpc_port}"
            done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
            hits = {json.loads(line)["id"] for line in done.stdout.splitlines()}
            assert hits == {"0.png", "1.png", "2.png"}
        finally:
            server.terminate()
            server.communicate()
