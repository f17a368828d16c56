"""The commands that are installed, and what they say of themselves."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from functools import cache

COMMANDS = {
    point.name: point
    for point in importlib.metadata.distribution("radapter-serve").entry_points
    if point.group == "console_scripts"
}


@cache
def help_of(command: str, *subcommand: str) -> str:
    """The help of a command with all its options."""
    short = _output_of(command, *subcommand, "--help")
    return _output_of(command, *subcommand, "--help-all") if "--help-all" in short else short


def _output_of(command: str, *arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        COMMANDS[command].load()(list(arguments))
    return out.getvalue()
