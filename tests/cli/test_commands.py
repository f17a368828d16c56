"""What all commands share: help, bad flags, one line for people, and the light base install."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import radapter_serve
from radapter_serve.cli import guard
from radapter_serve.errors import RAdapterError
from radapter_serve.training.recipe import Recipe, load_recipe
from tests.helpers.commands import COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_and_unknown_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = COMMANDS[name].load()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{name} {radapter_serve.__version__}\n"
    with pytest.raises(SystemExit) as exit_status:
        main(["--help"])
    assert not exit_status.value.code
    assert name in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_status:
        main(["--no-such-flag", "1"])
    assert exit_status.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["eval", "export", "train", "serve", "gateway", "index build", "index add"]
)
def test_help_shows_what_most_people_set_and_help_all_the_rest(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *subcommand = command.split()
    monkeypatch.setenv("COLUMNS", "100")  # in a wider terminal, tyro sets the groups side by side

    def shown(flag: str) -> tuple[list[str], list[str]]:
        with pytest.raises(SystemExit) as exit_status:
            COMMANDS[f"radapter-{name}"].load()([*subcommand, flag])
        assert not exit_status.value.code
        text = capsys.readouterr().out
        assert (f"radapter-{command} --help-all" in text) == (flag != "--help-all")
        titles = re.findall(r"^[^\w\n]{1,3}([a-z ]*options)\W*$", text, re.MULTILINE)
        return re.findall(r"^[│ ] {1,2}(--[a-z][a-z-]*)", text, re.MULTILINE), titles

    first, _ = shown("--help")
    whole, titles = shown("--help-all")
    assert shown("-h")[0] == first
    assert 3 <= len(first) <= 16 and len(first) < len(whole)
    assert set(first) < set(whole) and len(set(whole)) == len(whole)
    assert (len(titles) > 1) == (not subcommand)


def test_help_of_training_lists_every_field_with_the_defaults_of_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        COMMANDS["radapter-train"].load()(["--recipe", "small", "--help-all"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    batch = re.search(r"--batch-size .*?\(default: (\d+)\)", text)
    assert batch and int(batch[1]) == load_recipe("small").batch_size
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Recipe)}
    assert {*fields, "--recipe", "--resume"} <= set(re.findall(r"--[a-z-]+", text))


def test_nothing_is_drawn_where_no_terminal_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter does for what its cells start

    def works() -> None:
        console = Console(stderr=True)
        with console.status("working"):
            console.print("done")

    assert guard(works, [], prog="radapter-x") == 0
    assert capsys.readouterr().err.split() == ["done"]


def test_guard_turns_errors_into_a_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        def call() -> None:
            raise error

        return guard(call, prog="radapter-x")

    assert fails(RAdapterError("alpha is 2; allowed: 0 to 1")) == 2
    assert fails(KeyboardInterrupt()) == 130
    assert guard(lambda: None, prog="radapter-x") == 0
    assert guard(lambda: 3, prog="radapter-x") == 3
    lines = ["radapter-x: error: alpha is 2; allowed: 0 to 1", "radapter-x: interrupted"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_base_that_has_to_be_named_is_asked_for_before_torch_is_loaded(tmp_path: Path) -> None:
    """Loading takes many seconds, after which nothing but this sentence would come."""
    (tmp_path / "tuned.pt").touch()
    (tmp_path / "folder").mkdir()
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
from radapter_serve.cli import eval, export
data = ["--data", "imagefolder:photos"]
for arguments in (
    ["--checkpoint", "tuned.pt"],
    ["--checkpoint", "folder", "--alpha", "0.5"],
    ["--checkpoint", "tuned.pt", "--base", "ViT-B-32", "--alpha", "0.5"],
    ["--checkpoint", "none.pt"],
):
    assert export.main(arguments) == 2
    assert eval.main([*data, *arguments]) == 2
print([name for name in ("torch", "open_clip", "datasets", "onnx") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    weights = "tuned.pt holds weights alone; name what was tuned with --base"
    lacks = "alpha is 0.5, which needs the weights that {} was tuned from; give them with --base"
    lines = done.stderr.splitlines()
    said = [weights, lacks.format("folder"), lacks.format("tuned.pt"), "there is no checkpoint"]
    for message, pair in zip(said, zip(lines[::2], lines[1::2], strict=True), strict=True):
        for command, line in zip(("export", "eval"), pair, strict=True):
            assert line.startswith(f"radapter-{command}: error: {message}")
