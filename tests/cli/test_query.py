"""radapter-query: what it asks, prints and writes, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_client import Client, Reply, Values
from radapter_serve.cli import query
from radapter_serve.cli.query import main
from tests.helpers.stand_ins import Answers

Run = Callable[..., str]
OLDER = {"release": 2, "receipt": None}  # of a server without receipts


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
    assert first == {"image": image, "labels": labels, "scores": [0.75, 0.25], **OLDER}
    assert first == second
    file = tmp_path / "labels.txt"
    file.write_text(f"\ufeff{labels[0]}\n\n  {labels[1]} \n", encoding="utf-8")
    assert run("classify", image, image, "--labels-file", str(file), "--json") == lines
    run("classify", image, "--labels", "b", "--templates", "one {}", "two {}")
    assert server.inferences[-1].inputs["templates"].tolist() == [[b"one {}", b"two {}"]]
    pinned = run("classify", image, "--label-set", "letters", "--release", "1", "--json")
    assert json.loads(pinned)["release"] == 1


def test_examples_are_a_folder_of_folders(
    run: Run, server: Answers, image: str, tmp_path: Path
) -> None:
    for name in ("mug/1.png", "mug/2.png", "cup/1.png", ".hidden/1.png"):
        path = tmp_path / "shown" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, path)
    shown = ["--examples", str(tmp_path / "shown")]
    run("classify", *shown, "--example-weight", "1", image)
    run("classify", image, "--labels", "mug", "tin", "cup", *shown)
    alone, among = [request.inputs for request in server.inferences]
    assert alone["labels"].tolist() == [[b"cup", b"mug"]]
    assert alone["example_labels"].tolist() == [[0, 1, 1]]
    assert alone["example_weight"].tolist() == [[1.0]]
    assert among["example_labels"].tolist() == [[2, 0, 0]]


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
    facts = {"image": image, "size": [8, 6], **OLDER}
    assert answer == {**facts, "labels": ["a", "b"], "shares": [0.5, 0.5], "scores": [0.5, 0.5]}
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
    table = tmp_path / "found.csv"
    assert main(["classify", str(folder), *labels, "--out", str(table)]) == 1  # one is broken
    out, err = capsys.readouterr()
    assert "left out: 2 .gif, 1 .txt" in err and "found.csv: 3 images" in out
    assert f"left out: {folder / 'broken.png'}: no image" in err
    scores = (("a, b", "0.75"), ("ü", "0.25"))
    with table.open(encoding="utf-8", newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [
            (path, *score) for path in wanted for score in scores
        ]

    # Masks, with a folder of their pictures.
    assert main(["segment", str(folder), *labels, "--json", "--save-mask", str(pictures)]) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in answers] == wanted
    names = {str(path.relative_to(pictures)) for path in pictures.rglob("*.*")}
    assert names == {"a.jpg.png", "b.PNG.png", "deep/a.webp.png"}
    with Image.open(pictures / "deep" / "a.webp.png") as mask:
        assert (mask.mode, mask.size) == ("L", (8, 6))

    # A file that was named is an error, and leaves the old table.
    capsys.readouterr()
    before = table.read_bytes()
    named = ["classify", wanted[0], str(folder / "broken.png"), *labels, "--out", str(table)]
    assert main(named) == 2
    assert capsys.readouterr().err == f"radapter-query: error: {folder / 'broken.png'}: no image\n"
    assert table.read_bytes() == before and set(tmp_path.iterdir()) == {folder, pictures, table}


def test_search(run: Run, server: Answers, image: str, tmp_path: Path) -> None:
    table = run("search", "a red bicycle", "--index", "photos")
    assert "ordner/bild [b]ü.jpg" in table and "-0.5000" in table
    where = ["--index", "photos", "--top-k", "2", "--where", "year > 2020"]
    first, second, _ = map(json.loads, run("search", "x", *where, "--json").splitlines())
    about = {"where": "year > 2020"}
    assert first == {
        "score": 0.75,
        "id": "ordner/bild [b]ü.jpg",
        "metadata": about,
        "receipt": None,
    }
    assert (second["id"], second["metadata"]) == ("b.jpg", {})
    page = tmp_path / "results.html"
    assert str(page) in run("search", "--image", image, *where, "--save", str(page))
    text = page.read_text(encoding="utf-8")
    assert "cat.png" in text and text.count("data:image/jpeg;base64,") == 4
    assert "index: photos · where: year &gt; 2020 · hits: 3 · release: 2" in text


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


def test_an_adapter_is_asked_and_its_receipt_shown(
    run: Run, server: Answers, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = server.send
    expected = {
        "release": 2,
        "adapter": "anna",
        "adapter_digest": "0123456789ab",
        "alpha": 0.5,
    }

    def signed(request: Any, timeout: float) -> Any:
        reply = send(request, timeout)
        if request.action != "infer":
            return reply
        receipt = json.dumps(expected)
        batched = request.model not in ("segment", "retrieve")
        column = [[receipt]] if batched else [receipt]
        return Reply(2, Values({**reply.outputs, "receipt": column}))

    monkeypatch.setattr(server, "send", signed)
    point = ["--adapter", "anna", "--alpha", "0.5", "--json"]
    labels = ["--labels", "a", "b"]
    for command in (
        ["classify", image, *labels],
        ["segment", image, *labels],
        ["search", "x", "--index", "photos"],
    ):
        for line in run(*command, *point).splitlines():
            assert json.loads(line)["receipt"] == {**expected, "mapped": None}
    run("embed-image", image, "--out", str(tmp_path / "a.npy"), *point)
    run("embed-text", "a", "--out", str(tmp_path / "b.npy"), *point)
    assert {request.inputs["adapter"].ravel()[0] for request in server.inferences} == {b"anna"}
    assert main(["classify", image, *labels, "--adapter", "bob"]) == 2


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


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_escape_codes_of_a_server_do_not_reach_the_terminal(
    run: Run, image: str, form: list[str]
) -> None:
    said = run("classify", image, "--labels", "a\x1b[2J\x9b0m", *form)
    assert "a\\u001b[2J\\u009b0m" in said and not {"\x1b", "\x9b"} & set(said)
    assert not form or json.loads(said)["labels"] == ["a\x1b[2J\x9b0m"]


A = ["no.png", "--labels", "a"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["classify", *A], "cannot read the image no.png: No such file"),
        (["classify", "no.png", "--labels-file", "{tmp}/empty.txt"], "empty.txt names no class"),
        (["classify", *A, "--out", "x.txt"], "x.txt does not end in .csv"),
        (["classify", *A, "--out", "no/x.csv"], "no is not a folder"),
        (["classify", "{tmp}", "--labels", "a"], "no JPEG, PNG or WebP files"),
        (["classify", "--labels", "a"], "give files or folders"),
        (["classify", *A, "--label-set", "b"], "give one of --labels"),
        (["classify", "no.png", "--examples", "{tmp}/empty.txt"], "cannot read .*empty.txt"),
        (["classify", "no.png", "--examples", "{tmp}"], "needs a folder with images for each"),
        (["segment", *A, "--save-mask", "x.jpg"], "--save-mask x.jpg does not end in .png"),
        (["segment", *A, "--save", "x.png", "--save-mask", "x.png"], "are both x.png"),
        (["segment", "a.png", *A, "--save", "x.png"], "for several images, name a folder"),
        (["search", "--index", "photos"], "give a text, an image or an id"),
        (["search", "a", "--index", "i", "--save", "x.txt"], "--save x.txt does not end in .html"),
        (["embed-text"], "give texts"),
        (["embed-text", "a", "--model", "hf-hub:a/b", "--release", "2"], "name, as in hf-hub:.*@R"),
        (["embed-text", "a", "--model", "a\x1b[2J\x9b"], r"no a\\u001b\[2J\\u009b"),
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
