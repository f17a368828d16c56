"""What is said about a library that is not installed."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import distribution
from pathlib import Path

import pytest

from radapter_serve.extras import command, install_command

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
            if path != ROOT / "radapter_serve" / "extras.py":
                assert not name.search(path.read_text(encoding="utf-8")), path
