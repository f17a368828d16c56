"""radapter-query: what it prints and writes, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radapter_client import Client
from radapter_serve.cli import query
from radapter_serve.cli.query import main
from tests.helpers.stand_ins import Recorder


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return str(path)


@pytest.fixture
def run(url: str, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> str:
        assert main([*arguments, "--url", url]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


@pytest.mark.triton
def test_classify(run, image: str, tmp_path: Path):
    table = run("classify", image, "--labels", "a [bold]cat", "ein Hündchen", "--top-k", "1")
    assert ("a [bold]cat" in table) != ("ein Hündchen" in table)
    lines = run("classify", image, image, "--labels", "a cat", "ein Hündchen", "--json")
    first, second = map(json.loads, lines.splitlines())
    assert first == second and (first["image"], first["release"]) == (image, 2)
    assert sorted(first["labels"]) == ["a cat", "ein Hündchen"]
    file = tmp_path / "labels.txt"
    file.write_text("\ufeffa cat\n\n  ein Hündchen \n", encoding="utf-8")
    assert run("classify", image, image, "--labels-file", str(file), "--json") == lines
    templates = ["--templates", "one {}", "two {}"]
    other = run("classify", image, "--labels", "a cat", "b", *templates, "--json")
    assert json.loads(other)["scores"] != first["scores"]
    pinned = run("classify", image, "--label-set", "letters", "--release", "1", "--json")
    assert json.loads(pinned)["release"] == 1


@pytest.mark.triton
def test_segment(run, image: str, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    labels = ["a [bold]cat", "ein Hündchen", "nothing"]
    table = run("segment", image, "--labels", *labels, "--save", str(out / "a.png"))
    assert all(word in table for word in (*labels, "34.4 %", str(out / "a.png")))
    with Image.open(out / "a.png") as picture:
        assert picture.width == 512 and picture.height > 512
    options = shlex.split("--threshold 0.5 --short-side 300 --stride 20 --refine 2")
    options += ["--templates", "a {}"]
    saved = ["--save", str(out / "b.JPG"), "--save-mask", str(out / "mask.png")]
    found = json.loads(run("segment", image, "--label-set", "letters", *options, *saved, "--json"))
    assert found["labels"] == ["a", "b", "c", "background"]
    assert (found["size"], found["release"], found["shares"]) == ([8, 8], 2, [0.25] * 4)
    with Image.open(out / "mask.png") as mask:
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), np.add.outer(np.arange(8), np.arange(8)) % 4)
    many = [f"label {index}" for index in range(300)]
    run("segment", image, "--labels", *many, "--save-mask", str(out / "mask.png"))
    with Image.open(out / "mask.png") as mask:
        assert mask.mode == "I;16"
        assert np.array_equal(np.asarray(mask), np.add.outer(np.arange(8), np.arange(8)))
    assert {path.name for path in out.iterdir()} == {"a.png", "b.JPG", "mask.png"}


@pytest.mark.triton
def test_folders(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "photos"
    pictures = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/a.webp"):
        Image.new("RGB", (8, 6), "red").save(folder / name)
    (folder / "broken.png").write_text('{"error": "[invalid_image] no image"}')
    (folder / "empty.jpg").touch()
    for name in ("notes.txt", "c.gif", "d.gif"):
        (folder / name).write_text("x")
    wanted = [str(folder / name) for name in ("a.jpg", "b.PNG", "deep/a.webp")]
    labels = ["--labels", "a, b", "ü", "--url", url]
    assert main(["classify", str(folder), *labels, "--json"]) == 1  # not all could be read
    out, err = capsys.readouterr()
    assert [json.loads(line)["image"] for line in out.splitlines()] == wanted
    assert "left out: 2 .gif, 1 .txt" in err
    assert f"left out: {folder / 'broken.png'}: no image" in err
    assert f"{folder / 'empty.jpg'} is an empty file" in err

    # A table of classes, and one of masks with their pictures.
    table = tmp_path / "found.csv"
    assert main(["classify", str(folder), *labels, "--top-k", "2", "--out", str(table)]) == 1
    assert "found.csv: 3 images" in capsys.readouterr().out
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[::2]] == [row["image"] for row in rows[1::2]] == wanted
    assert {row["label"] for row in rows} == {"a, b", "ü"}
    scores = [float(row["score"]) for row in rows]
    assert all(first >= second for first, second in zip(scores[::2], scores[1::2], strict=True))
    lines = tmp_path / "found.jsonl"
    saved = ["--out", str(lines), "--save", str(pictures)]
    assert main(["segment", str(folder), *labels, *saved]) == 1
    found = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    assert [line["image"] for line in found] == wanted
    assert all((line["size"], line["labels"]) == ([8, 6], ["a, b", "ü"]) for line in found)
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


def test_closed_pipe(tmp_path: Path):
    """As `radapter-query classify photos/ … | head -1` does it."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import sys\nfrom tests.helpers.stand_ins import Recorder\n"
        "from radapter_client import Client\nfrom radapter_serve.cli import query\n"
        "query.Client = lambda *_, **__: Client(transport=Recorder(), release=1)\n"
        "sys.exit(query.main())\n"
    )
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, str(script), "classify", *[str(image)] * 3000, "--labels", "a"]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


@pytest.mark.triton
def test_search(run, image: str, tmp_path: Path):
    table = run("search", "a red [b]bicycle", "--index", "photos")
    assert "ordner/bild ü 0.jpg" in table and "0.7500" in table and "[b]bicycle" in table
    where = ["--index", "photos", "--top-k", "2", "--where", "year > 2020"]
    first, second = map(json.loads, run("search", "x", *where, "--json").splitlines())
    assert (first["id"], first["score"]) == ("ordner/bild ü 0.jpg", 1.0)
    assert second["metadata"]["where"] == "year > 2020"
    page = tmp_path / "results.html"
    assert str(page) in run("search", "--image", image, *where, "--save", str(page))
    text = page.read_text(encoding="utf-8")
    assert "cat.png" in text and text.count("data:image/jpeg;base64,") == 3
    assert "index: photos · where: year &gt; 2020 · hits: 2 · release: 2" in text


@pytest.mark.triton
def test_embed_and_release(run, image: str, tmp_path: Path, url: str, monkeypatch, capsys):
    out = tmp_path / "out" / "embeds.npy"
    out.parent.mkdir()
    assert "float32 [2, 4]" in run("embed-image", image, image, "--out", str(out))
    assert np.load(out).shape == (2, 4)
    said = run("embed-text", "a", "b", "c", "--out", str(out), "--json")
    assert json.loads(said)["shape"] == [3, 4] and np.load(out).shape == (3, 4)
    assert [path.name for path in out.parent.iterdir()] == ["embeds.npy"]
    table = run("release")
    for word in ("ViT-B-32", "a photo of a {}.", "letters", "1 (α = 0.5), 2 (α = 1)"):
        assert word in table
    assert json.loads(run("release", "--release", "1", "--json"))["release"]["alpha"] == 0.5
    monkeypatch.setenv("RADAPTER_SERVER", url)
    assert main(["release", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["served"] == [1, 2]
    assert main(["release", "--url", "http://127.0.0.1:9"]) == 2


@pytest.mark.triton
def test_failed_query_leaves_the_old_file(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "embeds.npy"
    out.write_bytes(b"old")
    page = tmp_path / "page.html"
    broken = tmp_path / "broken.png"
    broken.write_text('{"error": "[invalid_image] not an image"}')
    for arguments, message in (
        (["embed-image", str(broken), "--out", str(out)], "not an image"),
        (
            ["search", "x", "--index", "none", "--save", str(page)],
            "no index 'none'; there are: photos",
        ),
    ):
        assert main([*arguments, "--url", url]) == 2
        assert capsys.readouterr().err == f"radapter-query: error: {message}\n"
    assert out.read_bytes() == b"old" and set(tmp_path.iterdir()) == {out, broken}


A = ["no.png", "--labels", "a"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["classify", *A], "cannot read the image no.png: No such file"),
        (["classify", "no.png", "--labels-file", "{tmp}/empty.txt"], "empty.txt names no class"),
        (["classify", "no.png", "--labels-file", "{tmp}/latin.txt"], "latin.txt.*utf-8"),
        (["classify", *A, "--top-k", "0"], "top_k is 0; allowed are"),
        (["classify", *A, "--out", "x.txt"], "x.txt does not end in .csv or"),
        (["classify", *A, "--out", "no/x.csv"], "no is no folder"),
        (["classify", "{tmp}", "--labels", "a"], "no JPEG, PNG or WebP files"),
        (["classify", "--labels", "a"], "give files or folders"),
        (["classify", *A, "--label-set", "b"], "give one of --labels"),
        (["segment", *A, "--save-mask", "x.jpg"], "--save-mask x.jpg does not end in .png"),
        (["segment", *A, "--save", "x.png", "--save-mask", "x.png"], "are both x.png"),
        (["segment", "a.png", *A, "--save", "x.png"], "of several images, give a folder"),
        (["segment", *A, "--font", "no.ttf", "--save", "x.png"], "cannot read the font no.ttf"),
        (["search", "--index", "photos"], "give a text to search for"),
        (["search", "a", "--index", "i", "--save", "x.txt"], "--save x.txt does not end in .html"),
        (["embed-text"], "give texts"),
        (["embed-text", "a", "--url", "localhost:8001"], "allowed are http://"),
        (["embed-text", "a", "--url", "http://127.0.0.1:9"], "no answer from .*radapter-serve"),
    ],
)
def test_bad_input_is_one_line(
    arguments, why: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
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
    ("arguments", "status"),
    [(["classify", "--help"], 0), (["search", "--help"], 0), ([], 2), (["search", "a"], 2)],
)
def test_help_and_usage_errors(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == status
    said = capsys.readouterr()
    if status:
        assert "radapter-query" in said.err
    else:
        assert "http://localhost:8000" in said.out and "RADAPTER_SERVER" in said.out


def test_examples_are_a_folder_of_folders(tmp_path: Path, monkeypatch, capsys):
    for name in ("mug/1.png", "mug/2.png", "cup/1.png", ".hidden/1.png"):
        path = tmp_path / "shown" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    recorder = Recorder()
    monkeypatch.setattr(query, "Client", lambda *_, **__: Client(transport=recorder, release=1))
    image = str(tmp_path / "shown/mug/1.png")
    shown = ["--examples", str(tmp_path / "shown")]
    assert main(["classify", *shown, "--example-weight", "1", image]) == 0
    assert main(["classify", image, "--labels", "mug", "tin", "cup", *shown]) == 0
    weights = ["--example-weight", "0.25", "--example-weight", "mug=1"]
    assert main(["classify", image, "--labels", "mug", "tin", "cup", *shown, *weights]) == 0
    own, given, weighted = [request.inputs for request in recorder.inferences]
    assert weighted["example_weight"].tolist() == [[1.0, 0.5, 0.25]]
    assert own["labels"].tolist() == [[b"cup", b"mug"]]
    assert own["example_labels"].tolist() == [[0, 1, 1]]
    assert own["example_weight"].tolist() == [[1.0]]
    assert given["example_labels"].tolist() == [[2, 0, 0]]
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for folder, message in (
        (tmp_path / "empty", "has no folders: it needs one for each label"),
        (tmp_path / "shown" / "mug", "has no folders"),
        (tmp_path / "none", "cannot read"),
    ):
        assert main(["classify", image, "--examples", str(folder)]) != 0
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    for weight in (["much"], ["0.5", "0.6"], ["mug=1", "mug=0"], ["tin=1"]):
        flags = [text for one in weight for text in ("--example-weight", one)]
        assert main(["classify", image, *shown, *flags]) != 0
        [line] = capsys.readouterr().err.splitlines()
        assert "example" in line and "weight" in line


def test_names_that_are_not_utf8(tmp_path: Path, monkeypatch, capfdbinary):
    name = os.fsencode(tmp_path) + b"/\xe4.png"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)  # noqa: PTH104
    monkeypatch.setattr(query, "Client", lambda *_, **__: Client(transport=Recorder(), release=1))
    ask = ["classify", os.fsdecode(name), "--labels", "a"]
    with open(1, "w", encoding="utf-8", closefd=False) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main([*ask, "--json"]) == 0
    assert name in capfdbinary.readouterr().out
    assert main([*ask, "--out", str(tmp_path / "found.csv")]) == 0
    assert name in (tmp_path / "found.csv").read_bytes()
