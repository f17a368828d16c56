"""The Dockerfile: what goes into the build, what is installed, and what runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.files import ROOT, command, instructions, stages
from tests.helpers.commands import help_of

pytestmark = pytest.mark.integration


def let_in(tree: Path) -> None:
    """Copy what .dockerignore lets into the build, by its rules: the last line that fits a path
    decides.
    """
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines[0] == "*"  # so nothing else than what is named after it can be let in
    rules = []
    for line in lines:
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        pattern = pattern.replace(r"\[0\-9\]", "[0-9]")
        rules.append((re.compile(f"{pattern}(/.*)?"), line.startswith("!")))
    named = [ROOT / line.removeprefix("!") for line in lines if line.startswith("!")]
    for path in [*named, *(inner for folder in named for inner in folder.rglob("*"))]:
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and [inside for rule, inside in rules if rule.fullmatch(name)][-1]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tree / name)


def run(stage: str, place: Path, folder: Path) -> None:
    """Run the commands of a stage in `folder`, its /opt and /wheels below `place`; what needs
    Ubuntu is left out.
    """
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for instruction, rest in stages()[stage]:
        here = rest.replace("/opt/radapter", f"{place}/{stage}")
        here = here.replace("/wheels", f"{place}/wheels")
        if instruction == "ENV" and (path := re.match(r"PATH=(\S+?):", here)):
            variables["PATH"] = f"{path[1]}:{variables['PATH']}"
        elif instruction == "RUN" and "apt-get" not in rest:
            script = re.sub(r"--mount=\S+ ", "", here)
            subprocess.run(["sh", "-ec", script], cwd=folder, env=variables, check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in `wheels`, built by the Dockerfile's command from what
    .dockerignore lets in.
    """
    place = tmp_path_factory.mktemp("image")
    let_in(place / "src")
    run("wheel", place, place / "src")
    return place


def test_all_sources_and_nothing_else_go_into_the_build(tmp_path: Path) -> None:
    let_in(tmp_path)
    tops = {path.name for path in tmp_path.iterdir()}
    readme = {"LICENSE", "README.md", "pyproject.toml"}
    assert tops == readme | {"clients", "export", "model_repository", "radapter_serve", "recipes"}
    names = {path.name for path in (tmp_path / "model_repository").rglob("*") if path.is_file()}
    assert names == {"config.template.pbtxt", "model.py"}
    for package in ("radapter_serve", "export", "clients"):
        sources = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert sources == {
            path.relative_to(tmp_path) for path in (tmp_path / package).rglob("*.py")
        }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["engine", "gateway", "server"])
def test_the_image_installs_and_its_command_starts(stage: str, place: Path) -> None:
    run(stage, place, place)
    programs = place / stage / "bin"
    program, *_ = command(stage)
    subprocess.run([programs / program, "--help"], stdout=subprocess.DEVNULL, check=True)
    installed = {path.name.partition("-")[0] for path in (place / stage).rglob("*.dist-info")}
    assert "radapter_serve" in installed
    assert not installed & {"torch", "nvidia_pytriton", "tritonserver"}
    if stage == "server":
        code = "import faiss, numpy, radapter_serve.tasks.retrieve; assert numpy.__version__ < '2'"
        subprocess.run([programs / "python", "-c", code], check=True)


def test_the_server_has_what_its_extras_ask_for_but_their_tritonserver() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {
        canonicalize_name(requirement.name): requirement.specifier
        for line in [*extras["server"], *extras["triton"], *extras["gateway"]]
        if (requirement := Requirement(line)).name != "radapter-serve"
    }
    installed = {
        canonicalize_name(requirement.name): requirement.specifier
        for line in instructions("server", "RUN")
        for requirement in map(Requirement, re.findall(r"'([^']+)'", line))
    }
    # NVIDIA's image brings the server and ONNX Runtime; the gateway has an image of its own.
    elsewhere = {"nvidia-pytriton", "onnxruntime"}
    elsewhere |= {"anyio", "httptools", "prometheus-client", "starlette", "threadpoolctl"}
    elsewhere |= {"uvicorn", "uvloop"}
    assert installed == {name: needed[name] for name in needed.keys() - elsewhere}


@pytest.mark.parametrize("stage", ["engine", "gateway", "server"])
def test_an_image_runs_a_command_of_ours_as_nobody_and_says_whether_it_is_well(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    program, *words = command(stage)
    flags = {word for word in words if word.startswith("--")}
    assert flags and flags <= set(re.findall(r"--[a-z][a-z-]*", help_of(program)))
    assert instructions(stage, "USER") == ["1000:1000"]
    (check,) = instructions(stage, "HEALTHCHECK")
    (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)/\S+/ready'", check)
    assert port in instructions(stage, "EXPOSE")[0].split()
