"""Mutations of the rooms that compute: each of a sample is seen by a test, or listed with a reason.

mutmut makes and runs them. It leaves decorated functions alone, and tries no code that the tests
named here never reach: those without processes and exports, as all others would take hours.
"""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SURVIVORS = ROOT / "tests" / "mutation_survivors.yaml"
COPIED = (
    "radapter_serve",
    "export",
    "clients",
    "docs",
    "tests",
    "model_repository",
    "recipes",
    "pyproject.toml",
    "README.md",
)
CONFIG = """
[tool.mutmut]
source_paths = ["{package}"]
only_mutate = {mutated}
also_copy = {copied}
do_not_mutate = {left_out}
do_not_mutate_patterns = ["raise ", "say\\\\(", "Error\\\\(", "invalid\\\\("]
pytest_add_cli_args = ["-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {tests}
process_isolation = "forkserver"
timeout_constant = 10
debug = true
"""

# A gateway that fails sends SIGTERM, by which mutmut's own handler would end the tests as passed.
NO_HANDLER = """

@pytest.fixture(scope="session", autouse=True)
def no_handler() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
"""


@dataclass(frozen=True)
class Room:
    """Code that is changed, and the tests that must see it."""

    tests: tuple[str, ...]  # files or folders
    mutated: tuple[str, ...]  # folders of the package
    left_out: tuple[str, ...] = ()  # files of these folders
    sample: tuple[str, ...] = ("*__mutmut_13",)  # of the mutations of each function, from 1
    package: str = "radapter_serve"

    @property
    def config(self) -> str:
        """The `pyproject.toml` that mutmut reads."""
        copied = {*COPIED, "radapter_client"} - {self.package, "tests", "pyproject.toml"}
        return CONFIG.format(
            package=self.package,
            copied=json.dumps(sorted(copied)),
            mutated=json.dumps([f"{folder}/*" for folder in self.mutated]),
            left_out=json.dumps(self.left_out),
            tests=json.dumps(self.tests),
        )


# They see mutmut's own code: in names, in docstrings, and in what a process says at its end.
_CLIENT_ALONE = (
    "test_exported_names",
    "test_the_asynchronous_client_has_the_same_methods_and_asks_the_same",
)

ROOMS = {
    "training": Room(
        (
            "tests/adapter",
            *(f"tests/training/test_{name}.py" for name in ("recipe", "reading", "loss", "wiring")),
            *(
                f"tests/evaluation/test_{name}.py"
                for name in ("metrics", "alpha_choice", "results")
            ),
            "tests/data/test_orientation.py",
        ),
        ("radapter_serve/adapter", "radapter_serve/training", "radapter_serve/evaluation"),
        ("radapter_serve/training/progress.py",),
        # Of those that decide the result of a training all or many, of every other function one.
        (
            "*learning_rate__mutmut_*",
            "*sample_drop__mutmut_*",
            "*x_mpm_nce__mutmut_*3",
            "*x_augmentation__mutmut_*3",
            "*x_fit__mutmut_*13",
            "*__mutmut_13",
        ),
    ),
    "tasks": Room(
        tuple(
            f"tests/tasks/test_{name}.py"
            for name in ("classify", "label_embeddings", "request_alpha", "segment", "table")
        ),
        ("radapter_serve/tasks",),
        ("radapter_serve/tasks/retrieve.py",),
    ),
    "release": Room(("tests/release",), ("radapter_serve/release",), sample=("*__mutmut_*3",)),
    "index": Room(
        tuple(
            f"tests/index/test_{name}.py"
            for name in ("index", "from_embeddings", "neighbours", "integrity", "conditions")
        ),
        ("radapter_serve/index",),
    ),
    "gateway": Room(
        (
            "tests/gateway",
            "--deselect=tests/gateway/test_spans.py::test_one_request_followed_through_an_engine",
        ),
        ("radapter_serve/gateway",),
        ("radapter_serve/gateway/run.py", "radapter_serve/gateway/in_process.py"),
    ),
    "client": Room(
        (
            *(
                f"tests/client/test_{name}.py"
                for name in ("client_units", "client_wire", "overlay")
            ),
            *(f"--deselect=tests/client/test_client_units.py::{name}" for name in _CLIENT_ALONE),
        ),
        ("radapter_client",),
        package="radapter_client",
    ),
}
SEEN = ("killed", "timeout", "segfault")


def test_the_rooms_and_the_listed_lines_are_there() -> None:
    for room in ROOMS.values():
        parent = ROOT / "clients" if room.package == "radapter_client" else ROOT
        files = [name for name in room.tests if not name.startswith("--")]
        paths = [ROOT / name for name in files] + [
            parent / name for name in (*room.mutated, *room.left_out)
        ]
        assert [path for path in paths if not path.exists()] == []
    for entry in yaml.safe_load(SURVIVORS.read_text(encoding="utf-8")):
        line = pkgutil.resolve_name(entry["function"])
        source = "".join(inspect.getsource(line).split())
        assert "".join(entry["was"].split()) in source, entry


NOT_TRIED = ("not checked", "no tests")


def mutmut(folder: Path, *arguments: str) -> str:
    path = str(folder / "mutants" / "export")
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def change_of(diff: str) -> dict[str, str]:
    """The lines that a mutation takes out and puts in."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    was, becomes = (
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )
    return {"was": was, "becomes": becomes}


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_every_mutation_of_the_sample_is_seen_or_listed(room: str, tmp_path: Path) -> None:
    pytest.importorskip("mutmut", reason="pip install mutmut")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    # mutmut knows a module by the path of its file, so a package lies where it is imported from.
    (tmp_path / "clients" / "radapter_client").rename(tmp_path / "radapter_client")
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(ROOMS[room].config)
    with (tmp_path / "tests" / "conftest.py").open("a", encoding="utf-8") as file:
        file.write(NO_HANDLER)
    mutmut(tmp_path, "run", "--max-children", "1", *ROOMS[room].sample)
    lines = [
        line.strip().rpartition(": ")
        for line in mutmut(tmp_path, "results", "--all", "True").splitlines()
    ]
    states = {name: state for name, _, state in lines if state not in NOT_TRIED}
    unseen = []
    for name in (name for name, state in states.items() if state not in SEEN):
        module, _, function = name.rpartition("__mutmut_")[0].rpartition(".")
        function = function.removeprefix("xǁ").removeprefix("x_").replace("ǁ", ".")
        unseen.append(
            {"function": f"{module}.{function}", **change_of(mutmut(tmp_path, "show", name))}
        )
    listed = yaml.safe_load(SURVIVORS.read_text(encoding="utf-8"))
    folders = tuple(folder.replace("/", ".") for folder in ROOMS[room].mutated)
    known = [
        {name: entry[name] for name in ("function", "was", "becomes")}
        for entry in listed
        if entry["function"].startswith(folders)
    ]
    print(f"{len(states)} of {len(lines)} mutations tried, {len(unseen)} not seen by a test")
    assert not (new := [entry for entry in unseen if entry not in known]), yaml.safe_dump(
        new, allow_unicode=True
    )
    assert not (old := [entry for entry in known if entry not in unseen]), (
        f"seen by a test now: {old}"
    )
