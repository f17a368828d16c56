"""radapter-query: what it asks, prints and writes, and how it fails."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_client import Client, InvalidImage, InvalidRequest, Reply, Request
from radapter_serve.cli import query
from radapter_serve.cli.query import main
from tests.helpers.stand_ins import Recorder, described

Run = Callable[..., str]


class Answers(Recorder):
    """Scores labels by their place, cuts a picture into stripes, and has an index "photos"."""

    def send(self, request: Request, timeout: float) -> Any:
        if request.action == "config":
            return {"parameters": described(1)["parameters"] | described(2)["parameters"]}
        super().send(request, timeout)
        reply = Reply(int(request.version or 2), self._outputs(request))
        self.requests[-1] = request
        return reply

    def _outputs(self, request: Request) -> dict[str, np.ndarray]:
        inputs = request.inputs
        if "image" in inputs and b"broken" in inputs["image"].ravel().tolist():
            raise InvalidImage("no image", code="invalid_image")
        labels = inputs.get("labels", np.array([b"a", b"b", b"c"], object))
        if request.model == "classify":
            names = np.atleast_2d(labels)[:1, : inputs["top_k"][0, 0] if "top_k" in inputs else 5]
            rows = len(inputs["image"])
            scores = np.linspace(0.75, 0.25, names.shape[1], dtype=np.float32)
            return {"label": np.repeat(names, rows, 0), "score": np.tile(scores, (rows, 1))}
        if request.model == "segment":
            width, height = Image.open(io.BytesIO(inputs["image"][0])).size
            mask = np.add.outer(np.zeros(height), np.arange(width)) % len(labels)
            scores = np.full(len(labels), 0.5, np.float32)
            return {"mask": mask.astype(np.uint16), "label": labels, "score": scores}
        if request.model != "retrieve":
            return super()._outputs(request)
        if inputs["index"][0] != b"photos":
            raise InvalidRequest("no index 'none'; there are: photos", code="unknown_index")
        where = inputs["where"][0].decode() if "where" in inputs else ""
        return {
            "id": np.array([b"ordner/bild [b]\xc3\xbc.jpg", b"b.jpg"], object),
            "score": np.array([0.75, -0.5], np.float32),
            "metadata": np.array([json.dumps({"where": where}).encode(), b"{}"], object),
            "thumbnail": np.array([b"JPEG", b""], object),
            "index_version": np.array([b"g-1"], object),
        }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The server that the command asks."""
    answers = Answers()

    def client(*_: Any, release: int | None = None, **__: Any) -> Client:
        return Client(transport=answers, release=release)

    monkeypatch.setattr(query, "Client", client)
    return answers


@pytest.fixture
def run(server: Answers, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> str:
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return str(path)


def test_classify(run: Run, server: Answers, image: str, tmp_path: Path) -> None:
    labels = ["a [bold]cat", "ein Hündchen"]
    table = run("classify", image, "--labels", *labels, "--top-k", "1")
    assert labels[0] in table and "0.7500" in table and labels[1] not in table
    lines = run("classify", image, image, "--labels", *labels, "--json")
    first, second = map(json.loads, lines.splitlines())
    assert (
        first
        == second
        == {**{"image": image, "labels": labels, "scores": [0.75, 0.25], "release": 2}}
    )
    file = tmp_path / "labels.txt"
    file.write_text(f"\ufeff{labels[0]}\n\n  {labels[1]} \n", encoding="utf-8")
    assert run("classify", image, image, "--labels-file", str(file), "--json") == lines
    run("classify", image, "--labels", "b", "--templates", "one {}", "two {}")
    assert server.inferences[-1].inputs["templates"].tolist() == [[b"one {}", b"two {}"]]
    pinned = run("classify", image, "--label-set", "letters", "--release", "1", "--json")
    assert json.loads(pinned)["release"] == 1


def test_examples_are_a_folder_of_folders(
    run: Run, server: Answers, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mug/1.png", "mug/2.png", "cup/1.png", ".hidden/1.png"):
        path = tmp_path / "shown" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    shown = ["--examples", str(tmp_path / "shown")]
    run("classify", *shown, "--example-weight", "1", image)
    run("classify", image, "--labels", "mug", "tin", "cup", *shown)
    alone, among = [request.inputs for request in server.inferences]
    assert alone["labels"].tolist() == [[b"cup", b"mug"]]
    assert alone["example_labels"].tolist() == [[0, 1, 1]]
    assert alone["example_weight"].tolist() == [[1.0]]
    assert among["example_labels"].tolist() == [[2, 0, 0]]
    for folder, message in ((tmp_path / "shown/mug", "needs a folder"), ("none", "cannot read")):
        assert main(["classify", image, "--examples", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_segment(run: Run, server: Answers, image: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    labels = ["a [bold]cat", "ein Hündchen", "nothing"]
    table = run("segment", image, "--labels", *labels, "--save", str(out / "a.png"))
    assert all(word in table for word in (*labels, "37.5 %", str(out / "a.png")))
    with Image.open(out / "a.png") as picture:
        assert picture.width >= 512 and picture.height > 384
    options = shlex.split("--threshold 0.5 --short-side 300 --stride 20 --refine 2")
    saved = ["--save", str(out / "b.JPG"), "--save-mask", str(out / "mask.png")]
    answer = json.loads(run("segment", image, "--labels", "a", "b", *options, *saved, "--json"))
    assert answer == {
        **{"image": image, "size": [8, 6], "labels": ["a", "b"], "shares": [0.5, 0.5]},
        **{"scores": [0.5, 0.5], "release": 2},
    }
    sent = server.inferences[-1].inputs
    values = [sent[name][0] for name in ("threshold", "short_side", "stride", "refine")]
    assert values == [0.5, 300, 20, 2]
    with Image.open(out / "mask.png") as mask:
        assert mask.mode == "L" and np.asarray(mask).tolist() == [[0, 1] * 4] * 6
    many = [f"label {index}" for index in range(300)]
    run("segment", image, "--labels", *many, "--save-mask", str(out / "mask.png"))
    with Image.open(out / "mask.png") as mask:
        assert mask.mode == "I;16" and np.asarray(mask).tolist() == [[*range(8)]] * 6
    assert {path.name for path in out.iterdir()} == {"a.png", "b.JPG", "mask.png"}


def test_folders(server: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    pictures = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/a.webp"):
        Image.new("RGB", (8, 6), "red").save(folder / name)
    (folder / "broken.png").write_text("broken")
    for name in ("notes.txt", "c.gif", "d.gif"):
        (folder / name).write_text("x")
    wanted = [str(folder / name) for name in ("a.jpg", "b.PNG", "deep/a.webp")]
    labels = ["--labels", "a, b", "ü"]
    assert main(["classify", str(folder), *labels, "--json"]) == 1  # not all could be read
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == wanted
    assert "left out: 2 .gif, 1 .txt" in err
    assert f"left out: {folder / 'broken.png'}: no image" in err

    # A table of classes, and one of masks with their pictures.
    table = tmp_path / "found.csv"
    assert main(["classify", str(folder), *labels, "--out", str(table)]) == 1
    assert "found.csv: 3 images" in capsys.readouterr().out
    with table.open(encoding="utf-8", newline="") as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        [path, label, score]
        for path in wanted
        for label, score in (("a, b", "0.75"), ("ü", "0.25"))
    ]
    lines = tmp_path / "found.jsonl"
    saved = ["--out", str(lines), "--save", str(pictures)]
    assert main(["segment", str(folder), *labels, *saved]) == 1
    answers = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    assert [line["image"] for line in answers] == wanted
    names = {str(path.relative_to(pictures)) for path in pictures.rglob("*.*")}
    assert names == {"a.jpg.png", "b.PNG.png", "deep/a.webp.png"}
    saved = ["--out", str(table), "--save-mask", str(pictures)]
    assert main(["segment", *wanted, *labels, *saved]) == 0
    with Image.open(pictures / "deep" / "a.webp.png") as mask:
        assert (mask.mode, mask.size) == ("L", (8, 6))
    assert table.read_text("utf-8").startswith("image,label,share,score\n")

    # A file that was named is an error.
    capsys.readouterr()
    assert main(["classify", wanted[0], str(folder / "broken.png"), *labels]) == 2
    assert capsys.readouterr().err == f"radapter-query: error: {folder / 'broken.png'}: no image\n"


def test_search(run: Run, server: Answers, image: str, tmp_path: Path) -> None:
    table = run("search", "a red bicycle", "--index", "photos", "--offset", "0")
    assert "ordner/bild [b]ü.jpg" in table and "-0.5000" in table
    assert table.endswith("index version: g-1\n")
    where = ["--index", "photos", "--top-k", "2", "--where", "year > 2020"]
    first, second = map(json.loads, run("search", "x", *where, "--json").splitlines())
    about = {"where": "year > 2020"}
    assert first == {"score": 0.75, "id": "ordner/bild [b]ü.jpg", "metadata": about}
    assert (second["id"], second["metadata"]) == ("b.jpg", {})
    page = tmp_path / "results.html"
    assert str(page) in run("search", "--image", image, *where, "--save", str(page))
    text = page.read_text(encoding="utf-8")
    assert "cat.png" in text and text.count("data:image/jpeg;base64,") == 2
    assert "index: photos · where: year &gt; 2020 · hits: 2 · release: 2" in text


def test_embed_and_release(run: Run, image: str, tmp_path: Path) -> None:
    out = tmp_path / "out" / "embeds.npy"
    out.parent.mkdir()
    assert "float32 [2, 4]" in run("embed-image", image, image, "--out", str(out))
    assert np.load(out).shape == (2, 4)
    said = run("embed-text", "a", "b", "c", "--out", str(out), "--json")
    assert json.loads(said)["shape"] == [3, 4] and np.load(out).shape == (3, 4)
    assert [path.name for path in out.parent.iterdir()] == ["embeds.npy"]
    table = run("release")
    assert all(word in table for word in ("ViT-B-32", "a photo of a {}.", "1 (α = 0.5), 2 (α"))
    answer = json.loads(run("release", "--release", "1", "--json"))
    assert (answer["release"]["version"], answer["served"]) == (1, [1, 2])


def test_failed_query_leaves_the_old_file(
    server: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "embeds.npy"
    out.write_bytes(b"old")
    page = tmp_path / "page.html"
    broken = tmp_path / "broken.png"
    broken.write_text("broken")
    for arguments, message in (
        (["embed-image", str(broken), "--out", str(out)], "no image"),
        (
            ["search", "x", "--index", "none", "--save", str(page)],
            "no index 'none'; there are: photos",
        ),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"radapter-query: error: {message}\n"
    assert out.read_bytes() == b"old" and set(tmp_path.iterdir()) == {out, broken}


def test_closed_pipe(image: str, tmp_path: Path) -> None:
    """As `radapter-query classify photos/ … | head -1` does it."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys\nfrom tests.helpers.stand_ins import Recorder\n"
        "from radapter_client import Client\nfrom radapter_serve.cli import query\n"
        "query.Client = lambda *_, **__: Client(transport=Recorder(), release=1)\n"
        "sys.exit(query.main())\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, str(script), "classify", *[image] * 3000, "--labels", "a"]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


def test_names_that_are_not_utf8(server: Answers, image: str, tmp_path: Path, capfdbinary) -> None:
    name = os.fsencode(tmp_path) + b"/\xe4.png"
    os.rename(image, name)  # noqa: PTH104
    ask = ["classify", os.fsdecode(name), "--labels", "a"]
    with (
        open(1, "w", encoding="utf-8", closefd=False) as stdout,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stdout)
        assert main([*ask, "--json"]) == 0
    assert name in capfdbinary.readouterr().out
    assert main([*ask, "--out", str(tmp_path / "found.csv")]) == 0
    assert name in (tmp_path / "found.csv").read_bytes()


A = ["no.png", "--labels", "a"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["classify", *A], "cannot read the image no.png: No such file"),
        (["classify", "no.png", "--labels-file", "{tmp}/empty.txt"], "empty.txt names no class"),
        (["classify", *A, "--out", "x.txt"], "x.txt does not end in .csv or"),
        (["classify", *A, "--out", "no/x.csv"], "no is no folder"),
        (["classify", "{tmp}", "--labels", "a"], "no JPEG, PNG or WebP files"),
        (["classify", "--labels", "a"], "give files or folders"),
        (["classify", *A, "--label-set", "b"], "give one of --labels"),
        (["segment", *A, "--save-mask", "x.jpg"], "--save-mask x.jpg does not end in .png"),
        (["segment", *A, "--save", "x.png", "--save-mask", "x.png"], "are both x.png"),
        (["segment", "a.png", *A, "--save", "x.png"], "of several images, give a folder"),
        (["search", "--index", "photos"], "give a text to search for"),
        (["search", "a", "--index", "i", "--save", "x.txt"], "--save x.txt does not end in .html"),
        (["embed-text"], "give texts"),
        (["embed-text", "a", "--url", "localhost:8001"], "allowed are http://"),
        (["embed-text", "a", "--url", "http://127.0.0.1:9"], "no answer from .*radapter-serve"),
    ],
)
def test_bad_input_is_one_line(
    arguments, why: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RADAPTER_SERVER", "http://127.0.0.1:9")
    (tmp_path / "empty.txt").write_text("\n")
    before = set(tmp_path.iterdir())
    assert main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notes, error = captured.err.splitlines()
    assert error.startswith("radapter-query: error: ") and all(
        note.startswith("note: ") for note in notes
    )
    assert re.search(why, error)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "status"), [(["classify", "--help"], 0), ([], 2), (["search", "a"], 2)]
)
def test_help_and_usage_errors(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == status
    said = capsys.readouterr()
    if status:
        assert "radapter-query" in said.err
    else:
        assert "http://localhost:8000" in said.out and "RADAPTER_SERVER" in said.out
