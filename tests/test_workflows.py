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

builtin_schemas = pytest.importorskip(
    "check_jsonschema.builtin_schemas", reason="pip install -e '.[integrations]'"
)
pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
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
    schema = builtin_schemas.get_builtin_schema("vendor.github-workflows")
    jsonschema.validate(yaml.safe_load(text.replace("\non:", "\n'on':")), schema)
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
    assert made == {"check", "docs", "install", "test", "test-integrations"}
    assert made <= set(targets)
    scripts = {name for run in runs for name in re.findall(r"(\.ci/\w+)", run)}
    assert scripts == {".ci/build", ".ci/sbom", ".ci/try"}
    for name in scripts:
        assert (ROOT / name).stat().st_mode & 0o111


def test_an_image_has_a_name_in_lower_case(tmp_path: Path) -> None:
    job = jobs("release.yml")["image"]
    assert job["env"]["DOCKER_BUILD_RECORD_UPLOAD"] == "false"
    variables = tmp_path / "env"
    names = {"OWNER": "Some-One", "TARGET": "server", "GITHUB_ENV": str(variables)}
    subprocess.run(["bash", "-ec", job["steps"][0]["run"]], env=names, check=True, timeout=60)
    assert variables.read_text() == "IMAGE=ghcr.io/some-one/radapter-server\n"


def test_a_wheel_is_tried_by_a_python_beside_the_caller(tmp_path: Path) -> None:
    python = tmp_path / "own"
    python.write_text('#!/bin/sh\necho "own $1"\n[ $1 = --version ]\n')
    python.chmod(0o755)

    def tried(python: str, *extras: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [str(ROOT / ".ci" / "try"), "some.whl", *extras],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": python},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    assert tried("./own", "export", "server")[:2] == (1, "export on own --version\nown -m\n")
    assert "no ./none here; name another by PYTHON" in tried("./none")[2]
    assert "name export before it" in tried("./own", "gateway", "server", "export")[2]


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
