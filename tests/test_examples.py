"""The examples run, and print what the models answer."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import onnxruntime
import pytest

from radapter_client import Client
from radapter_serve import Model
from radapter_serve.clip.base import load_base
from radapter_serve.clip.tokenizer import write_tokenizer
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.release.release import TASKS, Release
from radapter_serve.server.triton_server import TritonServer
from tests.helpers.asking import needs_triton
from tests.helpers.graphs import quick_exports
from tests.helpers.small_models import make_base
from tests.helpers.small_release import png, seal, write_release
from tests.helpers.ways import in_process

SHOPS = 3  # ten take a minute
EXAMPLES = Path(__file__).parents[1] / "examples"


def function(example: str, name: str = "main") -> Callable[..., Any]:
    function: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{example}.py"))[name]
    return function


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos that lie on their side, two of the same name."""
    folder = tmp_path / "photos"
    for number, place in enumerate(("a.png", "b.png", "c.png", "old/a.png", "old/d.png")):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(png(number, 40, 30, turn=6))
    return folder


def test_every_example_fits_a_screen() -> None:
    files = list(EXAMPLES.glob("*.py"))
    assert len(files) == 5
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, path.name


def test_photos_are_sorted_by_label(
    repository: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository").symlink_to(repository)
    function("classify_folder")(photos, Path("sorted"), "red", "green")
    expected = set()
    with Model(repository) as model:
        for path in photos.rglob("*.png"):
            answer = model.classify(path, ["red", "green"])
            label = answer.top if answer.scores[0] >= 0.8 else "unsure"
            expected.add(f"{label}/{'-'.join(path.relative_to(photos).parts)}")
    written = Path("sorted").rglob("*.png")
    assert {path.relative_to("sorted").as_posix() for path in written} == expected
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_search_page_shows_what_a_search_finds(
    repository: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository").symlink_to(repository)
    build(str(photos), Path("indexes/photos"), load_release(repository))
    server = function("search_page", "page_server")("photos", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        with urlopen(address) as answer:
            empty = answer.read().decode()
        query = '"> <b>red</b>'
        with urlopen(f"{address}/?q={quote(query)}") as answer:
            page = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "<form>" in empty and "<img" not in empty
    with Model(repository) as model:
        hits = model.search(query, index="photos")
    places = [page.index(f"{hit.id} {hit.score:.3f}") for hit in hits]
    assert len(places) == 5 and places == sorted(places)
    assert page.count('src="data:image/jpeg;base64,/9j/') == 5
    assert "<b>" not in page


class Encoders:
    """Stands in for Triton's client: computes a release's graphs in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def infer(self, model: str, inputs: list[Any]) -> Any:
        [tensor] = inputs
        kind = {"INT32": np.int32, "UINT8": np.uint8}[tensor.datatype()]
        values = np.frombuffer(tensor._get_content(), kind).reshape(tensor.shape())
        session = onnxruntime.InferenceSession(self.folder / model / "1" / "model.onnx")
        [result] = session.run(None, {tensor.name(): values})
        return SimpleNamespace(as_numpy=lambda name: result)


@pytest.mark.parametrize(
    "texts", [["red", "A_cat!", "猫!"], ["azure " * 100]], ids=["short", "long"]
)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_encoders_alone_answer_as_the_release_does(
    family: str,
    texts: list[str],
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The small text encoder adds up what stands for each token, those of padding of SigLIP too, so
    each must be there.
    """
    import tritonclient.grpc as triton

    write_release(tmp_path, 1, seed=1, dense=False)
    if family == "siglip":
        base = load_base(make_base("siglip", tmp_path / "base"))
        for task in TASKS:
            folder = tmp_path / task / "1"
            facts = Release.load(folder)
            rules = replace(facts.preprocess, interpolation="bilinear", resize_mode="squash")
            spec = write_tokenizer(base.tokenizer, folder / "tokenizer.json")
            replace(facts, tokenizer=spec, preprocess=rules).save(folder)
        seal(tmp_path, 1)
    arguments = ["", tmp_path / "classify/1", photos / "a.png", *texts]
    monkeypatch.setattr("sys.argv", ["triton_encoders.py", *map(str, arguments)])
    monkeypatch.setattr(triton, "InferenceServerClient", lambda address: Encoders(tmp_path))
    runpy.run_path(str(EXAMPLES / "triton_encoders.py"))
    with Model(tmp_path) as model:
        cosines = model.embed_texts(texts) @ model.embed_images(photos / "a.png")
    expected = [f"{text}: {cosine:.4f}" for text, cosine in zip(texts, cosines, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected
    assert len(set(np.round(cosines, 4))) == len(texts)


@pytest.mark.triton
@needs_triton
def test_the_encoders_alone_answer_a_client_that_makes_pixels_and_tokens(
    server: TritonServer,
    repository: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["red", "a Striped thing, isn't it?", "azure " * 100]
    photo = photos / "a.png"
    arguments = [server.grpc_url.removeprefix("grpc://"), repository / "classify/2", photo, *texts]
    monkeypatch.setattr("sys.argv", ["triton_encoders.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "triton_encoders.py"))
    with Client(server.http_url) as client:
        cosines = client.embed_texts(texts) @ client.embed_images(photo)
    expected = [f"{text}: {cosine:.4f}" for text, cosine in zip(texts, cosines, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.integration
def test_the_client_of_openai_finds_the_photo_of_a_text(
    repository: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["red", "a striped thing"]
    with in_process(repository, Path("indexes")) as running:
        function("openai_embeddings")(f"{running.url}/v1", photos, *texts)
    paths = sorted(photos.rglob("*.png"))
    with Model(repository) as model:
        cosines = model.embed_texts(texts) @ model.embed_images(paths).T
    expected = [
        f"{text}: {paths[int(np.argmax(row))]} ({row.max():.3f})"
        for text, row in zip(texts, cosines, strict=True)
    ]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.slow
def test_the_script_for_photos_prints_its_table(tiny_clip_dir: str, tmp_path: Path) -> None:
    """Photos of its own and a small base; only the download is left out."""
    source = tmp_path / "eurosat"
    for label in ("Highway", "forest"):
        for number in range(25):
            (source / label).mkdir(parents=True, exist_ok=True)
            (source / label / f"{number}.png").write_bytes(png(number + len(label)))
    flags = ["--base", tiny_clip_dir, "--steps", "3", "--batch-size", "8", "--workers", "0"]
    result = subprocess.run(
        ["bash", str(EXAMPLES / "photos.sh"), "eurosat", *flags],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "photos-run"
    for part, count in {"train": 20, "test": 5}.items():
        for label in ("highway or road", "forest"):
            assert len(list((run / part / label).iterdir())) == count
    names = {
        part: {path.name for path in (run / part / "forest").iterdir()}
        for part in ("train", "test")
    }
    assert not names["train"] & names["test"]
    [table] = re.findall(r"imagefolder:test: per cent.*?└", result.stdout, re.DOTALL)
    assert re.findall(r"adapter │ +([\d.]+) │", table) == ["0", "0.5", "1"]
    assert (run / "merged/open_clip_model.safetensors").is_file()
    assert (run / "indexes/photos").is_dir()


@pytest.mark.slow
def test_ten_tenants(
    tiny_clip_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for shop in range(SHOPS):
        for label in ("cat", "dog"):
            folder = tmp_path / "shops" / f"shop-{shop}" / f"{label} of shop {shop}"
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.png").write_bytes(png(100 * shop + number + len(label)))
    (tmp_path / "photo.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    with quick_exports():
        function("ten_tenants")(Path("shops"), Path("photo.png"), tiny_clip_dir)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == SHOPS
    for shop, line in enumerate(lines):
        assert line.startswith(f"shop-{shop}: ")
        assert line.endswith(f"of shop {shop} (release 1, shop-{shop})")
