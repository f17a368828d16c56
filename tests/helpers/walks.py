"""The walks of docs/how-it-works.md, and what a program really calls."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]


def check_walk(title: str, work: Callable[[], Any]) -> None:
    """Fail where the work does not take the steps that the page names, in their order."""
    calls: list[tuple[str, str]] = []  # of functions of the project: name and file
    files: dict[str, str] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(ROOT)) and "site-packages" not in name:
            file = files.setdefault(name, Path(name).relative_to(ROOT).as_posix())
            calls.append((frame.f_code.co_name, file))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^\| *\d+ \| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    assert len(steps) > 10
    start = 0
    for step in steps:
        assert step in calls[start:], f"{step} is not called after the step before it"
        start = calls.index(step, start) + 1
