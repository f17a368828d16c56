"""Kills a call at one of its steps on the disk."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def killed_at(step: int, folder: Path, call: Callable[[], object]) -> bool:
    """Run a call in a child process that is killed, by SIGKILL, before it makes, writes, renames or
    removes something in a folder for the nth time; False if the call ended before that.
    """
    with warnings.catch_warnings():  # of Python 3.12, that other threads are not in the child
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(step, str(folder), call)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _run(step: int, folder: str, call: Callable[[], object]) -> NoReturn:
    steps = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in _STEPS and str(arguments[0]).startswith(folder):
            steps += event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        call()
    finally:  # without what pytest does at its end
        os._exit(1 if sys.exc_info()[0] else 0)
