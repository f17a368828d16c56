"""The files of a wheel, the libraries of each extra, and the message about a missing one."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from radapter_serve.cli import EXTRAS, guard
from radapter_serve.errors import install_command
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import MODELS

ROOT = Path(__file__).parents[1]
HIDING = """
import sys
def without(find):
    def hiding(name, *of):
        return None if name.partition(".")[0] in {hidden!r} else find(name, *of)
    return staticmethod(hiding)
for finder in sys.meta_path:
    finder.find_spec = without(finder.find_spec)
import {modules}
"""


@pytest.mark.slow
def test_a_wheel_carries_the_task_models_and_nothing_that_was_exported(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".[!g]*", "runs", "merged", "demo-output", "__pycache__", "tests"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    for model in MODELS:
        stray = tree / "model_repository" / model / "1" / "model.onnx"
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"weights")
        (stray.parents[1] / "config.pbtxt").write_text("name: 'x'")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(tree)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name.partition("/")[0] for name in names if "dist-info" not in name}
    assert packed == {"radapter_client", "radapter_export", "radapter_serve"}
    assert wheel.stat().st_size < 15e6
    held = {
        name.removeprefix("radapter_export/model_repository/")
        for name in names
        if "/model_repository/" in name
    }
    templates = {f"{model}/config.template.pbtxt" for model in MODELS}
    assert len(templates) == 8 and held == templates | {f"{task}/model.py" for task in TASKS}
    carried = ["triton/backend/model.py"]
    carried += ["demo/recipes/retrieval.yaml", "recipes/small.yaml", "recipes/suites/pacs.yaml"]
    carried += ["demo/base/open_clip_config.json", "demo/drawings/drawings.json.xz"]
    assert {f"radapter_serve/{name}" for name in carried} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extras", "modules"),
    [
        ((), "radapter_serve.cli.query radapter_serve.tasks.classify radapter_serve.tasks.segment"),
        (
            ("train",),
            "radapter_serve.training.loop radapter_serve.evaluation.run radapter_serve.cli.eval",
        ),
        (("export",), "radapter_export.release radapter_serve.cli.export"),
        (
            ("server",),
            (
                "radapter_serve.model radapter_serve.cli.serve radapter_serve.gateway.in_process"
                " radapter_serve.index.build radapter_serve.tasks.retrieve radapter_export.hub"
            ),
        ),
        (("triton",), "radapter_serve.server.supervisor"),
        (("gateway",), "radapter_serve.gateway.app"),
        (("gateway", "otel"), "radapter_serve.gateway.spans"),
        (("playground",), "radapter_serve.playground.page radapter_serve.cli.playground"),
        (("server", "qdrant"), "radapter_serve.index.build"),
    ],
)
def test_an_extra_has_what_its_commands_import(extras: tuple[str, ...], modules: str) -> None:
    """It is imported in a process to which the packages of other extras are not there."""
    installed = {
        canonicalize_name(of.metadata["Name"]) for of in importlib.metadata.distributions()
    }
    named = [("radapter-serve", extras)]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while named:
        name, extras = named.pop()
        for needed in map(Requirement, importlib.metadata.requires(name) or []):
            key = canonicalize_name(needed.name), tuple(sorted(needed.extras))
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras or ("",)
            )
            if wanted and key not in seen and key[0] in installed:
                named.append(key)
                seen.add(key)
    there = {"radapter-serve", *(name for name, _ in seen)}
    tops = importlib.metadata.packages_distributions()
    hidden = {
        top
        for top, names in tops.items()
        if not there & {canonicalize_name(name) for name in names}
    }
    code = HIDING.format(hidden=hidden, modules=", ".join(modules.split()))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_commands_of_a_base_installation_can_say_what_is_missing() -> None:
    """Nothing that an extra brings is imported before a command's errors are one line."""
    scripts = importlib.metadata.distribution("radapter-serve").entry_points
    modules = [script.module for script in scripts if script.group == "console_scripts"]
    assert "radapter_serve.cli.serve" in modules
    hidden = {"pydantic", "pyarrow", "torch", "starlette", "faiss"}
    code = HIDING.format(hidden=hidden, modules=", ".join(modules))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


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
    command = install_command("server,demo")
    assert command == said or re.match(said, command)


def test_only_one_place_says_how_to_install_this_package() -> None:
    name = re.compile(r"pip install[^\n]*radapter.serve|radapter-serve\[")
    for folder in ("radapter_serve", "export", "clients", "model_repository", "rivals"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "radapter_serve" / "errors.py":
                assert not name.search(path.read_text(encoding="utf-8")), path


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """The packages that each extra of pyproject.toml brings, with those of the extras in it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    written = project["optional-dependencies"]

    def packages(extra: str) -> Iterator[str]:
        for requirement in map(Requirement, written[extra]):
            if requirement.name == "radapter-serve":
                for other in requirement.extras:
                    yield from packages(other)
            else:
                yield canonicalize_name(requirement.name)

    return {extra: set(packages(extra)) for extra in written}


def test_where_a_library_is_looked_for_an_extra_that_brings_it_is_named(
    brought: dict[str, set[str]],
) -> None:
    text = ""
    for folder in ("radapter_serve", "export", "clients"):
        for path in (ROOT / folder).rglob("*.py"):
            text += path.read_text(encoding="utf-8")
    calls = re.findall(r'check_installed\("(\w+)", "([\w,]+)"\)', text)
    assert len(calls) == text.count("check_installed(") - 1 > 10  # without its definition
    # Parsing what all packages hold takes seconds; the text of their lists will do.
    records = {
        canonicalize_name(package.name): str(package.read_text("RECORD"))
        for package in importlib.metadata.distributions()
    }
    for module, extras in set(calls):
        top = re.compile(rf"^{module}/", re.MULTILINE)
        packages = {name for name, record in records.items() if top.search(record)}
        names = set().union(*(brought[extra] for extra in extras.split(",")))
        assert not packages or packages & names, (module, extras)
    assert set(EXTRAS.values()) <= set(brought)


def test_the_gpu_extra_has_all_that_all_has(brought: dict[str, set[str]]) -> None:
    assert brought["all"] - brought["gpu"] == {"onnxruntime"}
    assert brought["gpu"] - brought["all"] == {"onnxruntime-gpu"}


def test_a_missing_library_is_named_with_the_extra_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for prog, extra in (("radapter-train", "train"), ("radapter-query", "all")):
        assert guard(lambda: importlib.import_module("pydantic"), [], prog=prog) == 2
        line = f"{prog}: error: pydantic is not installed; {install_command(extra)}\n"
        assert capsys.readouterr().err == line
