"""What a wheel carries."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEMPLATES = (
    "classify",
    "embed_image",
    "embed_text",
    "image_encoder",
    "patch_encoder",
    "retrieve",
    "segment",
    "text_encoder",
)
HIDING = """
import sys
def without(find):
    def found(name, *of):
        return None if name.partition(".")[0] in {hidden!r} else find(name, *of)
    return staticmethod(found)
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
    for model in TEMPLATES:
        stray = tree / "model_repository" / model / "1" / "model.onnx"
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"weights")
        (stray.parents[1] / "config.pbtxt").write_text("name: 'x'")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(tree),
    ]
    subprocess.run(command, check=True, timeout=300)
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
    tasks = {f"{model}/model.py" for model in TEMPLATES if not model.endswith("encoder")}
    assert held == tasks | {f"{model}/config.template.pbtxt" for model in TEMPLATES}
    for name in (
        "triton/backends/onnxruntime/model.py",
        "triton/backends/openvino/model.py",
        "triton/backends/tensorrt/model.py",
        "demo/recipes/retrieval.yaml",
        "recipes/small.yaml",
        "recipes/suites/pacs.yaml",
        "demo/base/open_clip_config.json",
        "demo/drawings/drawings.json.xz",
    ):
        assert f"radapter_serve/{name}" in names
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
    """In a process to which the packages of other extras are not there."""
    installed = {
        canonicalize_name(of.metadata["Name"]) for of in importlib.metadata.distributions()
    }
    named = [("radapter-serve", extras)]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while named:
        name, own = named.pop()
        for needed in map(Requirement, importlib.metadata.requires(name) or []):
            key = canonicalize_name(needed.name), tuple(sorted(needed.extras))
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in own or ("",)
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


def test_the_gpu_extra_has_all_that_all_has() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for line in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"radapter-serve\[(.*)\]", line)
            found |= (
                set().union(*map(packages, own[1].split(",")))
                if own
                else {re.split(r"[\[<>=; ]", line)[0]}
            )
        return found

    assert packages("all") - packages("gpu") == {"onnxruntime"}
    assert packages("gpu") - packages("all") == {"onnxruntime-gpu"}


def test_commands_of_a_base_installation_can_say_what_is_missing() -> None:
    """Nothing that an extra brings is imported before a command's errors are one line."""
    program = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pydantic", "pyarrow", "torch", "starlette", "faiss"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for command in sys.argv[1:]:
    importlib.import_module(command)
"""
    scripts = importlib.metadata.distribution("radapter-serve").entry_points
    modules = [one.module for one in scripts if one.group == "console_scripts"]
    assert "radapter_serve.cli.serve" in modules
    subprocess.run([sys.executable, "-c", program, *modules], check=True, cwd=ROOT)
