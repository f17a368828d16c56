"""What is said about a library that is not installed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

from radapter_serve.cli import EXTRAS, guard
from radapter_serve.errors import install_command

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (
            {"url": "file:///home/a%20b/r", "dir_info": {"editable": True}},
            "run: pip install -e '/home/a b/r[server,demo]'",
        ),
        ({"url": "file:///src/r", "dir_info": {}}, "run: pip install '/src/r[server,demo]'"),
        ({"url": "file:///w/r-1-py3-none-any.whl", "archive_info": {}}, "install .* again as you"),
        (None, "install .* again as you did before, with its extra: .*server,demo"),
    ],
    ids=["checkout", "folder", "wheel", "index"],
)
def test_an_extra_is_installed_from_where_the_package_came(
    origin: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = None if origin is None else json.dumps(origin)
    package = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr("radapter_serve.errors.distribution", lambda name: package)
    found = install_command("server,demo")
    assert found == said or re.match(said, found)


def test_only_one_place_says_how_to_install_this_package() -> None:
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


def test_where_a_library_is_looked_for_an_extra_that_brings_it_is_named(
    brought: dict[str, set[str]],
) -> None:
    installed = packages_distributions()
    count = 0
    for folder in ("radapter_serve", "export", "clients"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_installed":
                    module, extras = (ast.literal_eval(argument) for argument in node.args)
                    packages = {normal(name) for name in installed.get(module, ())}
                    names = set().union(*(brought[extra] for extra in extras.split(",")))
                    assert not packages or packages & names, (module, extras)
                    count += 1
    assert count > 10
    assert set(EXTRAS.values()) <= set(brought)


def test_a_missing_library_is_named_with_the_extra_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for prog, extra in (("radapter-train", "train"), ("radapter-query", "all")):
        assert guard(lambda: importlib.import_module("pydantic"), [], prog=prog) == 2
        line = f"{prog}: error: pydantic is not installed; {install_command(extra)}\n"
        assert capsys.readouterr().err == line
