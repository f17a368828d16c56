"""The workflows on GitHub: valid by its schema, with the commands of this house, and as few rights
as they need. `actionlint`, where there is one, reads them too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# What a job may do beyond reading the source.
RIGHTS = {
    "attest": {"attestations", "contents", "id-token"},
    "image": {"attestations", "contents", "id-token", "packages"},
    "publish": {"id-token"},
    "announce": {"contents"},
}


def jobs(name: str) -> dict[str, Any]:
    # BaseLoader: "on" stays a word.
    text = (FOLDER / name).read_text(encoding="utf-8")
    return dict(yaml.load(text, yaml.BaseLoader)["jobs"])


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_a_workflow_is_valid_and_may_do_little(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    workflow = yaml.load(text, yaml.BaseLoader)
    jsonschema.validate(yaml.safe_load(text.replace("\non:", "\n'on':")), _schema())
    assert workflow["permissions"] == {"contents": "read"}
    for job, what in workflow["jobs"].items():
        assert set(what.get("permissions", {})) == RIGHTS.get(job, set()), job
        assert int(what["timeout-minutes"]) <= 180
        for step in what["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"
            # What somebody outside chose, such as the name of a branch, is no part of a script.
            assert "${{" not in step.get("run", "")


def test_what_workflows_run_is_there() -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    runs = [
        step["run"]
        for name in ("ci.yml", "release.yml")
        for job in jobs(name).values()
        for step in job["steps"]
        if "run" in step
    ]
    made = {target for run in runs for target in re.findall(r"^make ([\w-]+)", run)}
    assert made == {"check", "docs", "install", "test"} and made <= set(targets)
    scripts = {name for run in runs for name in re.findall(r"(\.ci/\w+)", run)}
    assert scripts == {".ci/build", ".ci/sbom", ".ci/try"}
    for name in scripts:
        assert (ROOT / name).stat().st_mode & 0o111
    uploads = {
        step["with"]["name"]: step["with"]["path"]
        for step in jobs("release.yml")["build"]["steps"]
        if step.get("uses", "").startswith("actions/upload-artifact@")
    }
    assert uploads == {"dist": "dist", "sbom": "sbom"}


def test_every_python_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project) == PYTHONS
    assert jobs("ci.yml")["fast"]["strategy"]["matrix"]["python"] == PYTHONS
    assert jobs("release.yml")["test"]["strategy"]["matrix"]["python"] == PYTHONS


def test_a_release_is_tested_where_a_change_is() -> None:
    installed = {
        name: [step["run"] for step in jobs(name)[job]["steps"] if "apt-get" in step.get("run", "")]
        for name, job in (("ci.yml", "fast"), ("release.yml", "test"))
    }
    assert len(installed["ci.yml"]) == 1 and installed["ci.yml"] == installed["release.yml"]


def test_an_image_has_a_name_in_lower_case(tmp_path: Path) -> None:
    job = jobs("release.yml")["image"]
    assert job["env"]["DOCKER_BUILD_RECORD_UPLOAD"] == "false"
    variables = tmp_path / "env"
    names = {"OWNER": "Some-One", "TARGET": "server", "GITHUB_ENV": str(variables)}
    subprocess.run(["bash", "-ec", job["steps"][0]["run"]], env=names, check=True, timeout=60)
    assert variables.read_text() == "IMAGE=ghcr.io/some-one/radapter-server\n"


def test_only_a_pull_request_is_cancelled_by_the_next_push() -> None:
    workflow = yaml.safe_load((FOLDER / "ci.yml").read_text(encoding="utf-8"))
    expected = "${{ github.event_name == 'pull_request' }}"
    assert workflow["concurrency"]["cancel-in-progress"] == expected


def tried(folder: Path, python: str, *extras: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    words = [str(ROOT / ".ci" / "try"), "some.whl", *extras]
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("extras", [["server"], ["gateway", "server", "export"]])
def test_what_has_no_release_to_be_asked_about_is_not_tried(
    extras: list[str], tmp_path: Path
) -> None:
    done = tried(tmp_path, "python3", *extras)
    assert done.returncode == 1 and done.stdout == ""
    assert "is asked about a release that export makes; name export before it" in done.stderr


def test_a_wheel_is_tried_by_a_python_beside_the_caller(tmp_path: Path) -> None:
    python = tmp_path / "own"
    python.write_text('#!/bin/sh\necho "own $1"\n[ $1 = --version ]\n')
    python.chmod(0o755)
    done = tried(tmp_path, "./own", "export", "server")
    assert (done.returncode, done.stdout) == (1, "export on own --version\nown -m\n")
    done = tried(tmp_path, "./none")
    assert done.returncode == 1 and "no ./none here; name another by PYTHON" in done.stderr


def test_nothing_is_published_before_it_is_tested_and_attested() -> None:
    needs = {name: job.get("needs", []) for name, job in jobs("release.yml").items()}
    assert needs == {
        "build": [],
        "test": "build",
        "attest": "test",
        "image": "test",
        "publish": ["attest", "image"],
        "announce": "publish",
    }


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint; ci.yml has it")
def test_actionlint_finds_nothing() -> None:
    files = [str(path) for path in sorted(FOLDER.glob("*.yml"))]
    done = subprocess.run(["actionlint", *files], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def _schema() -> Any:
    return get_builtin_schema("vendor.github-workflows")
