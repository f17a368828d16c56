"""`make demo` and `make test` on machines that lack something, and after an interruption."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.small_disk import small_disk

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "install.py"
# What the script would see on another machine.
NO_VENV = "sys.modules['ensurepip'] = None"
TOO_OLD = "sys.version_info = (3, 9, 2, 'final', 0)"
TOO_NEW = "sys.version_info = (3, 14, 0, 'final', 0)"
ONE_LINE = re.compile(r"error: [^\n]+\n")


def install(folder: Path, *, before: str = "", **environment: str) -> tuple[int, str]:
    """Run the script; returns its exit status and what it says on stderr."""
    program = (
        f"import runpy, sys; {before}\nsys.argv = ['', {str(folder)!r}, 'test']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.fixture
def uv(tmp_path: Path) -> Path:
    """A program in the place of uv, which a test writes; the folder is first on PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder / "uv"


def write_program(path: Path, script: str) -> dict[str, str]:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"PATH": f"{path.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("before", "advice"),
    [
        (NO_VENV, r"lacks its module venv; type apt install python3\.\d+-venv"),
        (TOO_OLD, r"this is 3\.9; type the same again .* PYTHON=python3\.12"),
        (TOO_NEW, r"this is 3\.14; type the same again .* PYTHON=python3\.12"),
    ],
)
def test_another_python_is_said_in_one_line_and_leaves_nothing(
    before: str, advice: str, tmp_path: Path
) -> None:
    code, said = install(tmp_path / "venv", before=before)
    assert code == 1
    assert ONE_LINE.fullmatch(said) and re.search(advice, said)
    assert not (tmp_path / "venv").exists()


def test_make_says_that_there_is_no_python(tmp_path: Path) -> None:
    command = ["make", "-C", str(ROOT), "demo", "PYTHON=python9", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: there is no python9; Python 3.10 to 3.13 is needed" in done.stderr


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "40m"):
        code, said = install(tmp_path / "disk" / "venv")
        assert code == 1
        assert ONE_LINE.fullmatch(said) and "0.0 GB left" in said and "VENV=" in said
        assert not (tmp_path / "disk" / "venv").exists()


@pytest.mark.slow
def test_without_a_network_the_next_call_goes_on(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    nothing = {"PIP_FIND_LINKS": "", "PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull}
    code, said = install(tmp_path / "venv", **nowhere, **nothing)
    assert code == 1
    assert ONE_LINE.fullmatch(said) and "the packages could not be fetched" in said
    assert not list((tmp_path / "venv").glob("installed-*"))
    assert not (tmp_path / "venv" / "unfinished").exists()


@pytest.mark.slow
def test_a_disk_that_gets_full_leaves_an_installation_that_is_made_anew(
    tmp_path: Path, uv: Path
) -> None:
    full = write_program(uv, "echo 'OSError: [Errno 28] No space left on device'; exit 1")
    folder = tmp_path / "venv"
    code, said = install(folder, **full)
    assert code == 1
    assert ONE_LINE.fullmatch(said) and "make room" in said
    assert (folder / "unfinished").exists()


def heed_ctrl_c() -> None:
    """Take SIGINT even if this shell's background jobs ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_an_interrupted_installation_is_made_anew(tmp_path: Path, uv: Path) -> None:
    folder = tmp_path / "venv"
    half = folder / "half-a-package"
    slow = write_program(uv, f"touch {half}; sleep 60")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), "test"],
        env={**os.environ, **slow},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    until = time.monotonic() + 60
    while not half.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert ONE_LINE.fullmatch(said) and "interrupted" in said
    assert half.exists() and not (folder / "installed-test").exists()

    # The next call takes nothing of it, and a third one would find it whole.
    code, said = install(folder, **write_program(uv, "exit 0"))
    assert (code, said) == (0, "")
    assert not half.exists() and not (folder / "unfinished").exists()
    assert (folder / "installed-test").exists() and (folder / "bin" / "python").exists()


def test_a_second_call_installs_nothing() -> None:
    if not (ROOT / ".venv" / "installed-test").exists():
        pytest.skip("this checkout has no environment of `make test`")
    makefile = (ROOT / "pyproject.toml").stat().st_mtime
    if (ROOT / ".venv" / "installed-test").stat().st_mtime < makefile:
        pytest.skip("pyproject.toml was changed since the environment was made")
    make = shutil.which("make") or "make"
    done = subprocess.run(
        [make, "-n", "-C", str(ROOT), "test", "EXTRAS=test"], capture_output=True, text=True
    )
    assert "install.py" not in done.stdout and "pytest" in done.stdout
