"""radapter-query: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radapter_client.query import main


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
    lines = run("classify", image, image, "--labels", "a cat", "ein Hündchen", "--json").splitlines()
    first, second = map(json.loads, lines)
    assert first == second
    assert (first["image"], first["release"], sorted(first["labels"])) == (image, 2, ["a cat", "ein Hündchen"])
    (tmp_path / "labels.txt").write_text("\ufeffa cat\n\n  ein Hündchen \n", encoding="utf-8")
    assert run("classify", image, image, "--labels-file", str(tmp_path / "labels.txt"), "--json").splitlines() == lines
    templates = run("classify", image, "--labels", "a cat", "b", "--templates", "one {}", "two {}", "--json")
    assert json.loads(templates)["scores"] != first["scores"]
    pinned = run("classify", image, "--label-set", "letters", "--release", "1", "--json")
    assert json.loads(pinned)["release"] == 1


@pytest.mark.triton
def test_segment(run, image: str, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    table = run("segment", image, "--labels", "a [bold]cat", "ein Hündchen", "nothing", "--save", str(out / "a.png"))
    assert all(word in table for word in ("a [bold]cat", "ein Hündchen", "nothing", "34.4 %", str(out / "a.png")))
    with Image.open(out / "a.png") as picture:
        assert picture.width == 512 and picture.height > 512
    options = ["--threshold", "0.5", "--short-side", "300", "--stride", "20", "--refine", "2", "--templates", "a {}"]
    saved = ["--save", str(out / "b.JPG"), "--save-mask", str(out / "mask.png")]
    found = json.loads(run("segment", image, "--label-set", "letters", *options, *saved, "--json"))
    assert (found["labels"], found["size"], found["release"]) == (["a", "b", "c", "background"], [8, 8], 2)
    assert found["shares"] == [0.25] * 4
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
def test_search(run, image: str, tmp_path: Path):
    table = run("search", "a red [b]bicycle", "--index", "photos")
    assert "ordner/bild ü 0.jpg" in table and "0.7500" in table and "[b]bicycle" in table
    where = ["--index", "photos", "--top-k", "2", "--where", "year > 2020"]
    first, second = map(json.loads, run("search", "x", *where, "--json").splitlines())
    assert (first["id"], first["score"], second["metadata"]["where"]) == ("ordner/bild ü 0.jpg", 1.0, "year > 2020")
    page = tmp_path / "results.html"
    assert str(page) in run("search", "--image", image, *where, "--save", str(page))
    text = page.read_text(encoding="utf-8")
    assert "cat.png" in text and "index: photos · where: year &gt; 2020 · hits: 2 · release: 2" in text
    assert text.count("data:image/jpeg;base64,") == 3
    assert "no thumbnail" in run("search", "x", "--index", "photos", "--save", str(page)) + page.read_text("utf-8")


@pytest.mark.triton
def test_search_of_an_unknown_index(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["search", "x", "--index", "none", "--save", str(tmp_path / "page.html"), "--url", url]) == 2
    assert capsys.readouterr().err == "error: no index 'none'; there are: photos\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.triton
def test_embed(run, image: str, tmp_path: Path):
    out = tmp_path / "out" / "embeds.npy"
    out.parent.mkdir()
    assert "float32 [2, 4]" in run("embed-image", image, image, "--out", str(out))
    assert np.load(out).shape == (2, 4)
    assert json.loads(run("embed-text", "a", "b", "c", "--out", str(out), "--json"))["shape"] == [3, 4]
    assert np.load(out).shape == (3, 4)
    assert [path.name for path in out.parent.iterdir()] == ["embeds.npy"]


@pytest.mark.triton
def test_release_and_profile(run):
    table = run("release")
    assert all(word in table for word in ("ViT-B-32", "a photo of a {}.", "letters", "1 (α = 0.5), 2 (α = 1)"))
    assert json.loads(run("release", "--release", "1", "--json"))["release"]["alpha"] == 0.5
    assert "encoder" in run("profile", "--requests", "2")


@pytest.mark.triton
def test_failed_query_leaves_the_old_file(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "embeds.npy"
    out.write_bytes(b"old")
    broken = tmp_path / "broken.png"
    broken.write_text('{"error": "[invalid_image] not an image"}')
    assert main(["embed-image", str(broken), "--out", str(out), "--url", url]) == 2
    assert capsys.readouterr().err == "error: not an image\n"
    assert out.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["classify", "no.png", "--labels", "a"], "cannot read the image no.png: No such file"),
        (["classify", "no.png", "--labels-file", "no.txt"], "cannot read no.txt: No such file"),
        (["classify", "no.png", "--labels-file", "{tmp}/empty.txt"], "empty.txt is empty: it needs a label a line"),
        (["classify", "no.png", "--labels-file", "{tmp}/latin.txt"], "cannot read .*latin.txt: .*utf-8"),
        (["classify", "no.png", "--labels", "a", "--top-k", "0"], "top_k is 0; allowed are"),
        (["embed-text", "a", "--url", "localhost:8001"], "allowed are grpc://"),
        (["embed-text", "a", "--timeout", "-1"], "timeout is -1"),
        (["embed-text", "a", "--out", "x.txt"], "x.txt does not end in .npy"),
        (["embed-text", "a", "--out", "no/such/x.npy"], "no/such is no folder"),
        (["segment", "no.png", "--labels", "a", "--save", "x.txt"], "--save x.txt does not end in .png or .jpg"),
        (["segment", "no.png", "--labels", "a", "--save", "no/such/x.png"], "no/such is no folder"),
        (["segment", "no.png", "--labels", "a", "--save-mask", "x.jpg"], "--save-mask x.jpg does not end in .png"),
        (["segment", "no.png", "--labels", "a", "--save", "x.png", "--save-mask", "x.png"], "are both x.png"),
        (["segment", "no.png", "--labels", "a", "--save", "x.png"], "cannot read the image no.png"),
        (["segment", "no.png", "--labels", "a", "--threshold", "2"], "threshold is 2.0; allowed are"),
        (["segment", "no.png", "--labels-file", "no.txt"], "cannot read no.txt"),
        (
            ["segment", "{tmp}/latin.txt", "--labels", "a", "--font", "no.ttf", "--save", "x.png"],
            "cannot read the font no.ttf",
        ),
        (["search", "a", "--index", "i", "--save", "x.txt"], "--save x.txt does not end in .html"),
        (["search", "--image", "no.png", "--index", "i"], "cannot read the image no.png"),
        (["search", "a", "--index", "i", "--top-k", "0"], "top_k is 0"),
        (["embed-text", "a", "--url", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9.*radapter-serve"),
    ],
)
def test_bad_input_is_one_line(arguments, why: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    before = set(tmp_path.iterdir())
    assert main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert re.search(why, captured.err)
    assert set(tmp_path.iterdir()) == before


COMMANDS = [
    [],
    *([name] for name in ["classify", "segment", "search", "embed-image", "embed-text", "release", "profile"]),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: radapter-query" in text
    assert not command or "default: grpc://localhost:8001" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["classify", "a.png"],
        ["classify", "a.png", "--labels", "a", "--label-set", "b"],
        ["segment", "a.png"],
        ["segment", "a.png", "b.png", "--labels", "a"],
        ["search", "--index", "photos"],
        ["search", "a", "--image", "a.png", "--index", "photos"],
        ["search", "a"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "radapter-query" in capsys.readouterr().err
