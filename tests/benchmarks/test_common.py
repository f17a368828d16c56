"""The report of a benchmark that is written while it still measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import Report


def test_a_report_keeps_what_is_measured_and_says_that_it_is_not_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("adapters", "Adapters", "What.", timed=False, file="adapters-int8")
    report.table("Requests", ["engine", "plain /s", "named /s"], [["process", "72"]], shown=False)
    report.write(tmp_path, complete=False)
    capsys.readouterr()

    (file,) = tmp_path.iterdir()
    assert file.name == "adapters-int8.md"
    text = file.read_text(encoding="utf-8")
    assert "| process | 72 |  |" in text.splitlines()
    assert "Not complete" in text

    report.table("Requests", ["engine", "plain /s", "named /s"], [["process", "72", "70"]])
    report.write(tmp_path)
    text = file.read_text(encoding="utf-8")
    assert "| process | 72 | 70 |" in text.splitlines()
    assert text.count("**Requests**") == 1
    assert "Not complete" not in text
