"""Help, bad flags, and one line for people, which all commands share."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
import tyro
from rich.console import Console

import radapter_serve
from radapter_serve.cli import guard
from radapter_serve.errors import RAdapterError
from radapter_serve.training.recipe import Recipe, load_recipe
from tests.helpers.commands import COMMANDS

# These have more options than most people set.
LONG = {f"radapter-{name}" for name in ("eval", "export", "train", "serve", "gateway")}
LONG_PARTS = {"radapter-index build", "radapter-index add"}


@pytest.mark.parametrize("command", sorted({*COMMANDS, *LONG_PARTS}))
def test_help_and_unknown_flags(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--help` shows what most people set, and `--help-all` the rest."""
    monkeypatch.setenv("COLUMNS", "100")  # in a wider terminal, tyro sets the groups side by side
    name, *subcommand = command.split()
    main = COMMANDS[name].load()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{name} {radapter_serve.__version__}\n"
    with pytest.raises(SystemExit) as exit_status:
        main([*subcommand, "--no-such-flag", "1"])
    assert exit_status.value.code == 2
    assert "Traceback" not in capsys.readouterr().err

    def shown(flag: str) -> list[str]:
        with pytest.raises(SystemExit) as exit_status:
            main([*subcommand, flag])
        assert not exit_status.value.code
        text = capsys.readouterr().out
        assert name in text
        assert (f"{command} --help-all" in text) == (is_long and flag != "--help-all")
        return re.findall(r"^[│ ] {1,2}(--[a-z][a-z-]*)", text, re.MULTILINE)

    is_long = command in LONG | LONG_PARTS
    first = shown("-h")
    if is_long:
        whole = shown("--help-all")
        assert 3 <= len(first) <= 16 and len(set(whole)) == len(whole)
        assert set(first) < set(whole)


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


def test_guard_turns_errors_into_a_line_and_a_status_that_is_stable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "stability.md").read_text(encoding="utf-8")

    def fails(error: BaseException) -> int:
        def call() -> None:
            raise error

        return guard(call, prog="radapter-x")

    for error, status in (
        (RAdapterError("alpha is 2; allowed: 0 to 1"), 2),
        (KeyboardInterrupt(), 130),
    ):
        assert fails(error) == status and f"\n| {status} | " in page
    assert guard(lambda: 3, prog="radapter-x") == 3
    lines = ["radapter-x: error: alpha is 2; allowed: 0 to 1", "radapter-x: interrupted"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_reader_that_ends_early_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """An example is `radapter-query classify photos/ … | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert guard(lambda: print("a line"), [], prog="radapter-x") == 1
    assert capsys.readouterr().err == ""


def test_a_base_that_has_to_be_named_is_asked_for_before_torch_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading takes many seconds, after which nothing but this sentence would come."""
    monkeypatch.chdir(tmp_path)
    Path("tuned.pt").touch()
    Path("folder").mkdir()
    tyro.cli(int, args=["1"])  # at its first use tyro imports torch if it is in sys.modules
    for module in ("torch", "radapter_export.release", "radapter_serve.evaluation.run"):
        monkeypatch.setitem(sys.modules, module, None)
    lacks = "alpha is 0.5, which needs the weights that {} was tuned from; give them with --base"
    for arguments, message in (
        (["tuned.pt"], "tuned.pt holds only weights; name what was tuned with --base"),
        (["folder", "--alpha", "0.5"], lacks.format("folder")),
        (["tuned.pt", "--base", "ViT-B-32", "--alpha", "0.5"], lacks.format("tuned.pt")),
        (["none.pt"], "there is no checkpoint"),
    ):
        for name, data in (("radapter-export", []), ("radapter-eval", ["--data", "photos"])):
            assert COMMANDS[name].load()([*data, "--checkpoint", *arguments]) == 2
            assert capsys.readouterr().err.startswith(f"{name}: error: {message}")
