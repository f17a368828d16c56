"""What all commands share: help, bad flags, one line for people, and the light base install."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

import radapter_serve
from radapter_client import query
from radapter_serve.cli import build_engine, demo, export, gateway, guard, index, serve, train
from radapter_serve.cli import eval as cli_eval
from radapter_serve.errors import RAdapterError
from radapter_serve.extras import install_command

COMMANDS = {
    "build-engine": build_engine.main,
    "demo": demo.main,
    "eval": cli_eval.main,
    "export": export.main,
    "gateway": gateway.main,
    "index": index.main,
    "query": query.main,
    "serve": serve.main,
    "train": train.main,
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_and_unknown_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = COMMANDS[name]
    with pytest.raises(SystemExit) as exit_status:
        main(["--help"])
    assert not exit_status.value.code
    assert f"radapter-{name}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_status:
        main(["--no-such-flag", "1"])
    assert exit_status.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[name](["--version"]) == 0
    assert capsys.readouterr().out == f"radapter-{name} {radapter_serve.__version__}\n"


def test_a_demo_without_the_playground_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("gradio", "radapter_serve.demo.run"):  # the demo itself is not even loaded
        monkeypatch.setitem(sys.modules, module, None)
    assert demo.main(["--open"]) == 2
    install = install_command("demo,playground")
    assert capsys.readouterr().err == f"radapter-demo: error: gradio is not installed; {install}\n"


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
    def bad() -> None:
        raise RAdapterError("alpha is 2; allowed: 0 to 1")

    def stopped() -> None:
        raise KeyboardInterrupt

    assert guard(bad, prog="radapter-x") == 2
    assert guard(stopped, prog="radapter-x") == 130
    assert guard(lambda: None, prog="radapter-x") == 0
    assert guard(lambda: 3, prog="radapter-x") == 3
    assert capsys.readouterr().err == "radapter-x: error: alpha is 2; allowed: 0 to 1\nradapter-x: interrupted\n"


def test_commands_start_without_torch() -> None:
    names = [
        f"radapter_serve.cli.{name}"
        for name in ("serve", "build_engine", "eval", "export", "gateway", "index", "train")
    ]
    names += ["radapter_serve.evaluation.suite", "radapter_serve.training.recipe"]  # and what is checked first
    code = f"import importlib, sys\nfor name in {['radapter_client.query', *names]}:\n  importlib.import_module(name)\n"
    code += "  assert not (heavy := {'torch', 'open_clip', 'onnx'} & {*sys.modules}), f'{name} imports {heavy}'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
