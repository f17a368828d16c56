"""What was tried against a server, its files, disks and network: every fault test, its promise and
its result.
"""

from __future__ import annotations

import ast
import datetime
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The tests by what they harm. A test's promise is its docstring, or its name where that says it
# all.
SUITE = {
    "Processes": ["tests/server/test_supervisor_served.py", "tests/faults/test_calls.py"],
    "Releases and their files": [
        "tests/release/test_integrity.py",
        "tests/server/test_releases_served.py",
    ],
    "Disks": ["tests/faults/test_disks.py"],
    "Memory that processes share": ["tests/faults/test_shared_memory.py"],
    "Network and callers": ["tests/faults/test_network.py", "tests/gateway/test_gateway.py"],
    "Clocks and what is installed": ["tests/faults/test_clock.py", "tests/server/test_server.py"],
}


@dataclass(frozen=True)
class Case:
    """One test, or one of its parameters: its file, its name, what it came to, and the seconds that
    it took.
    """

    file: str
    name: str
    result: str
    seconds: float

    @property
    def test(self) -> str:
        return self.name.partition("[")[0]


def promises(path: Path) -> dict[str, str]:
    """The promise of each test of a file."""
    functions = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    return {
        one.name: ast.get_docstring(one) or as_sentence(one.name)
        for one in functions
        if one.name[:5] == "test_"
    }


def as_sentence(name: str) -> str:
    words = name.removeprefix("test_").replace("_", " ")
    return f"{words[:1].upper()}{words[1:]}."


def run(files: list[str], slow: bool) -> list[Case]:
    """Run tests, and read what came of them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        chosen = "not gpu" if slow else "not gpu and not slow"
        command = [
            "pytest",
            "-q",
            "-m",
            chosen,
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
            *files,
        ]
        subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if not report.exists():
            raise SystemExit("pytest did not run; its messages above say why")
        found = xml.parse(report).getroot().iter("testcase")
        return [
            Case(
                one.get("classname", "").replace(".", "/") + ".py",
                one.get("name", ""),
                result(one),
                seconds(one),
            )
            for one in found
        ]


def seconds(case: xml.Element) -> float:
    return float(case.get("time", 0))


def result(case: xml.Element) -> str:
    if (skipped := case.find("skipped")) is not None:
        return f"skipped: {skipped.get('message', '')}"
    return (
        "failed" if case.find("failure") is not None or case.find("error") is not None else "kept"
    )


def together(cases: list[Case]) -> str:
    """The results of one test's parameters in a few words."""
    results = sorted({case.result for case in cases}, reverse=True)
    counts = [
        f"{sum(case.result == one for case in cases)} {one}" if len(cases) > 1 else one
        for one in results
    ]
    return ", ".join(counts)


def main(only: tuple[str, ...] = (), slow: bool = True, out: Path = RESULTS) -> int:
    """Run the tests, and write the table.

    Args:
        only: headings, such as Processes, of the parts to run; the others keep what is written of
            them.
        slow: also the tests that take long.
        out: folder of the results.
    """
    if wrong := set(only) - set(SUITE):
        raise SystemExit(
            f"no part is called {', '.join(sorted(wrong))}; there are {', '.join(SUITE)}"
        )
    failed = 0
    for title in only or SUITE:
        began = time.monotonic()
        found = run(SUITE[title], slow)
        failed += (bad := sum(case.result == "failed" for case in found))
        kept = sum(case.result == "kept" for case in found)
        skipped = f", {len(found) - kept - bad} were skipped" if kept + bad < len(found) else ""
        head = (
            f"{kept} of {len(found)} cases kept their promise{skipped}, in"
            f" {(time.monotonic() - began) / 60:.0f} minutes; {datetime.date.today().isoformat()}."
        )
        write(out / "reliability.md", title, f"{head}\n\n{table(SUITE[title], found)}")
    print(f"wrote {out / 'reliability.md'}")
    return int(failed > 0)


def table(files: list[str], cases: list[Case]) -> str:
    """The cases of some files, in the files' order."""
    rows = ["| case | promise | result |", "| --- | --- | --- |"]
    for file in files:
        for test, promise in promises(ROOT / file).items():
            if mine := [case for case in cases if case.file == file and case.test == test]:
                words = " ".join(promise.split()).replace("|", "\\|")
                rows.append(
                    f"| `{Path(file).stem}::{test.removeprefix('test_')}` | {words} |"
                    f" {together(mine)} |"
                )
    return "\n".join(rows)


def write(file: Path, title: str, text: str) -> None:
    """Write one part in its place among the others that the file has."""
    parts = dict(part.split("\n\n", 1) for part in old_parts(file))
    parts[title] = text
    head = (
        "# Reliability: what was tried\n\n`python benchmarks/reliability.py`. A real tritonserver,"
        " gateway, disk and network are harmed wherever that can be done, and each case checks by"
        " itself what callers see and what is left. See also [soak.md](soak.md) and"
        " [hostile.md](hostile.md)."
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        [head, *(f"## {one}\n\n{parts[one].strip()}" for one in SUITE if one in parts)]
    )
    file.write_text(f"{text}\n", encoding="utf-8")


def old_parts(file: Path) -> list[str]:
    """Each part of a file from its heading on, without the marks of the heading."""
    return file.read_text(encoding="utf-8").split("\n## ")[1:] if file.exists() else []


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
