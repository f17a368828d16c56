"""The commands of the pages are read as they stand; those that commands print run as printed."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tyro
from PIL import Image

from radapter_serve.gateway.run import GatewayServer
from radapter_serve.server.config import free_ports
from tests.helpers.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = "--steps 3 --batch-size 8 --val-fraction 0.2 --workers 0 --tracker none"
RUN_HERE = ("radapter-train", "radapter-eval", "radapter-export")  # the others need a server


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks that start one of the commands."""
    blocks = re.findall(
        r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("radapter-")]
    return [[word for word in words if word != "&"] for words in commands]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_are_read(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = tyro.cli

    def read(function: Any, **options: Any) -> Any:
        if not isinstance(function, type):  # with its arguments, but idle
            function = functools.wraps(function)(lambda *_, **__: None)
        return real(function, **options)

    def read_one_of(functions: Any, args: list[str], **options: Any) -> Any:
        return read(functions[args[0]], args=args[1:], **options)

    monkeypatch.setattr(tyro, "cli", read)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", read_one_of)
    nothing: Any = SimpleNamespace(train=lambda recipe, **_: None)
    monkeypatch.setitem(sys.modules, "radapter_serve.training.start", nothing)
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        # Of a run that is not here.
        if "--resume" in command or any("/recipe.yaml" in word for word in command):
            continue
        run(command)


def run(command: list[str]) -> None:
    assert COMMANDS[command[0]].load()(command[1:]) == 0, shlex.join(command)


COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture
def place(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `photos` of three classes, under other names too, and `PHOTO.jpg`."""
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            shade = tuple(min(255, value + 5 * number) for value in colour)
            Image.new("RGB", (40, 36), shade).save(tmp_path / "photos" / name / f"{number}.png")
    Image.new("RGB", (40, 36), COLOURS["red"]).save(tmp_path / "PHOTO.jpg")
    (tmp_path / "data" / "pacs").mkdir(parents=True)
    styles = [f"data/pacs/{style}" for style in ("photo", "art_painting", "cartoon", "sketch")]
    for same in ("photos-test", "my photos", *styles):
        (tmp_path / same).symlink_to(tmp_path / "photos")
    monkeypatch.setattr("radapter_serve.evaluation.plots.draw", lambda *_, **__: [])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(command: list[str], architecture: str) -> list[str]:
    """A command of a page for the small model and the small data; the rest stays as it stands."""
    words = ["data" if word == "/data" else word for word in command]
    if words[0] == "radapter-train":
        if "--architecture" in words:
            place = words.index("--architecture")
            del words[place : place + 2]
        words += ["--architecture", architecture, *SHORT.split()]
    return words


@pytest.mark.slow
def test_the_pages_from_photos_to_a_release_run_in_their_order(
    place: Path, tiny_clip_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """README's quick start, and then the page on α: none is refused for what another one wrote."""
    pages = [*commands(ROOT / "README.md"), *commands(ROOT / "docs" / "choose-alpha.md")]
    ran = [small(command, tiny_clip_dir) for command in pages if command[0] in RUN_HERE]
    assert [command[0] for command in ran].count("radapter-eval") >= 2
    for command in ran:
        for folder in re.findall(r"runs/\w+", " ".join(command)):
            if command[0] != "radapter-train" and not Path(folder).exists():
                shutil.copytree("runs/photos", folder)  # several to average
        run(command)
    assert {path.parent.as_posix() for path in Path("results").rglob("results.jsonl")} >= {
        "results/photos/validation",
        "results/photos/pacs",
    }
    sweep = next(command for command in ran if "--suite" in command)
    run(sweep)
    assert "all of this was measured before" in capfd.readouterr().out


def printed(text: str) -> list[list[str]]:
    """The commands that stand at the end of a line, or of a clause, of what a command prints."""
    return [shlex.split(line) for line in re.findall(r"(radapter-[a-z-]+ [^;\n]+)", text)]


def test_from_training_to_answers(
    place: Path,
    tiny_clip_dir: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Train, choose alpha, export.
    monkeypatch.setattr("radapter_serve.evaluation.start.GRID", (0.0, 1.0))
    monkeypatch.setattr("radapter_serve.evaluation.image_sets._NOUN_STEP", 100)
    photos = "imagefolder:my photos"
    data = ["--data", photos, "--val-data", photos, "--out", "my runs/first run"]
    short = "--steps 2 --batch-size 8 --warmup-steps 1 --workers 0 --tracker none"
    run(["radapter-train", "--architecture", tiny_clip_dir, *data, *short.split()])
    (command,) = [words for words in printed(capfd.readouterr().out) if words[0] == "radapter-eval"]
    run([*command, "--device", "cpu"])
    command, *other = printed(capfd.readouterr().out)
    assert command[-1] == "auto" and other in ([], [[*command[:-1], "best"]])
    run([*command, "--model-repository", "my models", "--merged", "my merged"])
    *_, served, asked = printed(capfd.readouterr().out)
    assert served == ["radapter-serve", "my models"]
    assert asked == ["radapter-query", "classify", "PHOTO.jpg", "--label-set", "classes"]

    # Index, serve and ask: in place of waiting for callers, the server is asked in this process.
    build = ["radapter-index", "build", "my photos", "--out", "my indexes/Büro"]
    run([*build, "--model-repository", "my models"])
    served, searched = printed(capfd.readouterr().out)
    assert served == ["radapter-serve", "my models", "--indexes", "my indexes"]
    serve = GatewayServer.run

    def ask(server: GatewayServer) -> None:
        monkeypatch.setattr(GatewayServer, "run", serve)
        (tried,) = [w for w in printed(capfd.readouterr().out) if w[0] == "radapter-query"]
        with server.in_thread():
            for command in (tried, [*asked, "--url", server.url], [*searched, "--url", server.url]):
                run(command)

    monkeypatch.setattr(GatewayServer, "run", ask)
    run([*served, "--engine", "process", "--http-port", str(free_ports()[0])])
    answer = capfd.readouterr().out
    assert any(name in answer for name in COLOURS) and "0.png" in answer
