"""The tutorial's commands run as they stand there, and print what it shows."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
# A block of code, and the block of what it prints.
STEP = r"```(sh|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?"
# Lines of progress depend on the time, and only a processor with bf16 is offered it.
PASSING = r"step \d|[a-z]+ing |.*: \d+ of \d+ images|.*--precision auto"
READY = "Ctrl-C stops the server.\n"
CUT = " ..."  # ends a line that is longer than the page shows


def normalised(text: str, labels: Sequence[str]) -> set[str]:
    """The lines of a text without what differs from one machine to another: figures, times,
    precision, and in tables files, labels and the width of columns.
    """
    lines = set()
    for line in text.splitlines():
        if re.match(PASSING, line):
            continue
        if "│" in line:
            line = re.sub(r"[\w-]+( [\w-]+)*\.png", "FILE", line)
            line = re.sub(rf"\b({'|'.join(labels)})\b", "LABEL", line)
        line = line.replace("bf16", "fp32")
        line = re.sub(r"[━─]+", "━", re.sub(r"\d+(\.\d+)?(e-\d+)?", "N", line))
        line = re.sub(r"\bN (seconds?|minutes?)\b", "TIME", line)
        lines.add(" ".join(line.split()))
    return lines - {""}


def differences(shown: str, printed: str, labels: Sequence[str]) -> list[str]:
    """What only the page has, behind `-`, and what only the command prints, behind `+`."""
    lines = normalised(printed, labels)
    wrong = []
    for line in sorted(normalised(shown, labels)):
        start = line.removesuffix(CUT)
        same = {line}
        if start != line:
            same = {each for each in lines if each.startswith(start)}
        if not same & lines:
            wrong.append(f"- {line}")
        lines -= same
    return wrong + [f"+ {line}" for line in sorted(lines)]


def test_lines_are_compared_without_what_machines_change() -> None:
    shown = "│ 0.5   │ bell-3.png │ bell │\nstep 1/20\nwrote a.png in bf16, 1 minute\nnote: a ..."
    printed = "│ 1 │ big key-12.png │ key │\nwrote a.png in fp32, 20 seconds\nnote: a b c"
    assert not differences(shown, printed, ["bell", "key"])
    assert differences(shown, printed, ["cup"]) == ["- │ N │ FILE │ bell │", "+ │ N │ FILE │ key │"]
    assert differences("wrote a.png\nb", "b\nc", ["cup"]) == ["- wrote a.png", "+ c"]
    assert differences("note: a ...", "note: b", ["cup"]) == ["- note: a ...", "+ note: b"]


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("port 8000, which the page uses, is taken on this machine")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "default",
    }
    steps = re.findall(STEP, PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(steps) > 8
    printed = {}
    server = None
    try:
        for language, code, _ in steps:
            program = ["bash", "-euc"] if language == "sh" else [sys.executable, "-c"]
            process = subprocess.Popen(
                [*program, code],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            if code.startswith("radapter-serve"):
                # The server stays in its terminal.
                server = process
                printed[code] = ""
                for line in iter(process.stdout.readline, ""):
                    printed[code] += line
                    if line == READY:
                        break
            else:
                printed[code], _ = process.communicate(timeout=600)
                assert process.returncode == 0, printed[code]
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGTERM)
            server.communicate(timeout=60)

    labels = sorted(path.name for path in (tmp_path / "photos").iterdir())
    folder = str(tmp_path.resolve())
    wrong = []
    for _, code, shown in steps:
        if shown:
            output = printed[code].replace(folder, "FOLDER")
            wrong += [f"{code}{line}" for line in differences(shown, output, labels)]
    assert not wrong, "\n".join(wrong)
    for name in ("results/photos/validation/validation.png", "found.html", "merged", "indexes"):
        assert (tmp_path / name).exists(), name
