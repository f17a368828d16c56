"""The workflows on GitHub: valid by its schema and `actionlint`, with as few rights as needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

builtin_schemas = pytest.importorskip(
    "check_jsonschema.builtin_schemas", reason="pip install -e '.[integrations]'"
)
pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
# The rights of a job beyond reading the source.
RIGHTS = {
    "attest": {"attestations", "contents", "id-token"},
    "image": {"attestations", "contents", "id-token", "packages"},
    "publish": {"id-token"},
    "announce": {"contents"},
}


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
            # No script holds text that somebody outside chose, such as the name of a branch.
            assert "${{" not in step.get("run", "")


def test_there_is_one_pipeline() -> None:
    """`.ci/run` and GitHub call the same targets, which CONTRIBUTING.md names; no test by hand."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (FOLDER / "ci.yml").read_text(encoding="utf-8")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    here = set(re.findall(r"^ *(?:timed )?make ([a-z-]+)", script, re.MULTILINE))
    there = set(re.findall(r"^ *- run: make ([a-z-]+)", workflow, re.MULTILINE))
    assert here - {"install"} == there
    assert set(re.findall(r"^\| `make ([a-z-]+)`", page, re.MULTILINE)) == there | {"test-all"}
    assert "pytest" not in script + workflow


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="needs actionlint; ci.yml has it")
def test_actionlint_finds_nothing() -> None:
    files = [str(path) for path in sorted(FOLDER.glob("*.yml"))]
    done = subprocess.run(["actionlint", *files], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
