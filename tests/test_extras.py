"""What is said about a library that is not installed."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

from radapter_serve.cli import EXTRAS, guard
from radapter_serve.errors import RAdapterError, command, extra_of, install_command, one_line

ROOT = Path(__file__).parents[1]
COMMIT = "0" * 40


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (
            {"url": "file:///home/a%20b/r", "dir_info": {"editable": True}},
            "run: pip install -e '/home/a b/r[server,demo]'",
        ),
        ({"url": "file:///src/r", "dir_info": {}}, "run: pip install '/src/r[server,demo]'"),
        (
            {"url": "file:///w/r-1-py3-none-any.whl", "archive_info": {}},
            "run: pip install 'radapter-serve[server,demo] @ file:///w/r-1-py3-none-any.whl'",
        ),
        (
            {"url": "https://host/r", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            f"run: pip install 'radapter-serve[server,demo] @ git+https://host/r@{COMMIT}'",
        ),
        (
            None,
            (
                "install radapter-serve again as you did before, with its extra:"
                " radapter-serve[server,demo]"
            ),
        ),
    ],
    ids=["checkout", "folder", "wheel", "repository", "index"],
)
def test_an_extra_is_installed_from_where_the_package_came(origin, said):
    assert command(origin, "server,demo") == said


def test_this_installation_names_its_own_folder():
    origin = json.loads(distribution("radapter-serve").read_text("direct_url.json") or "null")
    if origin is None or "dir_info" not in origin:
        pytest.skip("the package under test was not installed from a folder")
    folder = shlex.split(install_command("server"))[-1].removesuffix("[server]")
    assert Path(folder, "pyproject.toml").is_file()


def test_only_one_place_says_how_to_install_this_package():
    name = re.compile(r"pip install[^\n]*radapter.serve|radapter-serve\[")
    for folder in ("radapter_serve", "export", "clients", "model_repository", "rivals"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "radapter_serve" / "errors.py":
                assert not name.search(path.read_text(encoding="utf-8")), path


def normal(name: str) -> str:
    return re.sub(r"[._-]+", "-", name).lower()


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """The packages that each extra of pyproject.toml brings, with those of the extras in it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    written = project["optional-dependencies"]

    def packages(extra: str) -> Iterator[str]:
        for requirement in written[extra]:
            match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
            assert match is not None
            if match[1] != "radapter-serve":
                yield normal(match[1])
                continue
            for other in match[2].split(","):
                yield from packages(other)

    return {extra: set(packages(extra)) for extra in written}


@pytest.fixture(scope="module")
def installed() -> Mapping[str, list[str]]:
    """The packages that bring a module; to read them takes seconds."""
    return packages_distributions()


@functools.cache
def trees() -> list[ast.Module]:
    folders = ("radapter_serve", "export", "clients")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def imported() -> set[str]:
    """The modules that the product imports, without what is in them."""
    found = set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_the_smallest_extra_that_brings_a_library_is_named(
    brought: dict[str, set[str]], installed: Mapping[str, list[str]]
) -> None:
    seen = set()
    for module in imported() & set(installed):
        packages = {normal(name) for name in installed[module]}
        bringing = [extra for extra, names in brought.items() if packages & names]
        if not bringing:
            continue
        found = extra_of(f"{module}.inner")
        assert found in bringing, module
        assert len(brought[found]) == min(len(brought[extra]) for extra in bringing), module
        for first in bringing:
            assert extra_of(module, first) == first
        seen.add(found)
    assert {"train", "export", "server", "gateway", "playground"} <= seen
    assert extra_of("datasets") == extra_of("open_clip.model") == extra_of("torch") == "train"
    assert extra_of("datasets", "server") == "train"
    assert extra_of("no_such_module", "train") == "all"


def test_where_a_library_is_looked_for_an_extra_that_brings_it_is_named(
    brought: dict[str, set[str]], installed: Mapping[str, list[str]]
) -> None:
    count = 0
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_installed":
            module, extras = (ast.literal_eval(argument) for argument in node.args)
            packages = {normal(name) for name in installed.get(module, ())}
            names = set().union(*(brought[extra] for extra in extras.split(",")))
            assert not packages or packages & names, (module, extras)
            count += 1
    assert count > 10


def test_a_missing_library_is_named_with_the_extra_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("datasets", "onnx", "pydantic"):
        monkeypatch.setitem(sys.modules, module, None)

    def said(prog: str, module: str) -> str:
        assert guard(lambda: importlib.import_module(module), [], prog=prog) == 2
        return capsys.readouterr().err

    def expected(prog: str, module: str, extra: str) -> str:
        return f"{prog}: error: {module} is not installed; {install_command(extra)}\n"

    for prog, module, extra in (
        ("radapter-train", "datasets", "train"),
        ("radapter-train", "pydantic", "train"),  # which others bring, too
        ("radapter-eval", "pydantic", "train"),
        ("radapter-export", "onnx", "export"),
        ("radapter-train", "onnx", "export"),
    ):
        assert said(prog, module) == expected(prog, module, extra)
    with pytest.raises(RAdapterError, match=re.escape(install_command("train"))), one_line("train"):
        importlib.import_module("pydantic")


def test_the_extras_of_commands_are_those_of_pyproject(brought: dict[str, set[str]]) -> None:
    assert set(EXTRAS.values()) <= set(brought)
