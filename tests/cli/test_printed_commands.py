"""Every command that a command prints as the next one works as it is printed, whatever the folders
are called.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from radapter_serve.cli import serve
from radapter_serve.server.endpoints import free_ports
from tests.helpers.commands import COMMANDS

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def printed(text: str) -> list[list[str]]:
    """The commands that stand at the end of a line, or of a clause, of what a command prints."""
    return [shlex.split(line) for line in re.findall(r"(radapter-[a-z-]+ [^;\n]+)", text)]


def run(command: list[str]) -> None:
    assert COMMANDS[command[0]].load()(command[1:]) == 0, shlex.join(command)


@pytest.fixture
def place(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with photos of three classes, and with one called as in the printed
    command.
    """
    for name, colour in COLOURS.items():
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for number in range(8):
            shade = tuple(min(255, value + 5 * number) for value in colour)
            Image.new("RGB", (40, 36), shade).save(tmp_path / "my photos" / name / f"{number}.png")
    Image.new("RGB", (40, 36), COLOURS["red"]).save(tmp_path / "PHOTO.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """A server started by a printed command, on a free port; gives its URL."""
    port = str(free_ports()[0])
    options = [*command[1:], "--engine", "process", "--http-port", port]
    started = [sys.executable, "-m", serve.__name__, *options]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = ""
            while "Ctrl-C stops the server" not in said:
                line = server.stdout.readline()
                assert line, f"the server ended: {said}"
                said += line
            (tried,) = [words for words in printed(said) if words[0] == "radapter-query"]
            run(tried)
            yield f"http://localhost:{port}"
        finally:
            server.terminate()


def test_from_training_to_answers(
    place: Path, tiny_clip_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # Train, choose alpha, export.
    photos = "imagefolder:my photos"
    data = ["--data", photos, "--val-data", photos, "--out", "my runs/first run"]
    short = "--steps 4 --batch-size 8 --warmup-steps 1 --workers 0 --tracker none"
    run(["radapter-train", "--architecture", tiny_clip_dir, *data, *short.split()])
    (command,) = [words for words in printed(capfd.readouterr().out) if words[0] == "radapter-eval"]
    run([*command, "--device", "cpu"])
    command, *other = printed(capfd.readouterr().out)
    assert command[-1] == "auto" and other in ([], [[*command[:-1], "best"]])
    run([*command, "--model-repository", "my models", "--merged", "my merged"])
    *_, served, asked = printed(capfd.readouterr().out)
    assert served == ["radapter-serve", "my models"]
    assert asked == ["radapter-query", "classify", "PHOTO.jpg", "--label-set", "classes"]

    # Index, serve and ask.
    build = ["radapter-index", "build", "my photos", "--out", "my indexes/Büro"]
    run([*build, "--model-repository", "my models"])
    served, searched = printed(capfd.readouterr().out)
    assert served == ["radapter-serve", "my models", "--indexes", "my indexes"]
    with serving(served) as url:
        for command in (asked, searched):
            run([*command, "--url", url])
    answer = capfd.readouterr().out
    assert any(name in answer for name in COLOURS) and "0.png" in answer
