"""The commands of each page in their order: all are read as they stand; those of two pages run on a
small model.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image

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
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("radapter-")]
    return [[word for word in words if word != "&"] for words in found]


def idle(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the same arguments, and does nothing; a class as it is."""
    return (
        function if isinstance(function, type) else functools.wraps(function)(lambda *_, **__: None)
    )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_are_read(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = tyro.cli
    of_dict = tyro.extras.subcommand_cli_from_dict
    monkeypatch.setattr(tyro, "cli", lambda function, **options: real(idle(function), **options))
    monkeypatch.setattr(
        tyro.extras,
        "subcommand_cli_from_dict",
        lambda functions, **options: of_dict(
            {name: idle(of) for name, of in functions.items()}, **options
        ),
    )
    nothing: Any = SimpleNamespace(train=lambda recipe, **_: None)
    monkeypatch.setitem(sys.modules, "radapter_serve.training.start", nothing)
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        # Of a run that is not here.
        if "--resume" in command or any("/recipe.yaml" in word for word in command):
            continue
        assert COMMANDS[command[0]].load()(command[1:]) == 0, shlex.join(command)


@pytest.fixture
def place(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `photos` of three classes, and with a suite's folders that hold the
    same.
    """
    generator = np.random.default_rng(0)
    for number in range(30):
        folder = tmp_path / "photos" / ("cat", "dog", "house")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "photos-test").symlink_to(tmp_path / "photos")
    (tmp_path / "data" / "pacs").mkdir(parents=True)
    for style in ("photo", "art_painting", "cartoon", "sketch"):
        (tmp_path / "data" / "pacs" / style).symlink_to(tmp_path / "photos")
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
    """README's quick start, and then what the page on α has: none is refused for what another one
    wrote.
    """
    pages = [*commands(ROOT / "README.md"), *commands(ROOT / "docs" / "choose-alpha.md")]
    ran = [small(command, tiny_clip_dir) for command in pages if command[0] in RUN_HERE]
    assert [command[0] for command in ran].count("radapter-eval") >= 2
    for command in ran:
        for run in re.findall(r"runs/\w+", " ".join(command)):
            if command[0] != "radapter-train" and not Path(run).exists():
                shutil.copytree("runs/photos", run)  # several to average
        assert COMMANDS[command[0]].load()(command[1:]) == 0, (
            f"{shlex.join(command)}\n{capfd.readouterr().err}"
        )
    assert {path.parent.as_posix() for path in Path("results").rglob("results.jsonl")} >= {
        "results/photos/validation",
        "results/photos/pacs",
    }
    sweep = next(command for command in ran if "--suite" in command)
    assert COMMANDS[sweep[0]].load()(sweep[1:]) == 0
    assert "all of this was measured before" in capfd.readouterr().out
