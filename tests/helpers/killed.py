"""Kills a call at one of its steps on the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

_STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def killed_at(step: int, folder: Path, call: partial[object]) -> bool:
    """Run a call in another process that is killed, by SIGKILL, before it makes, writes, renames or
    removes something in a folder for the nth time; False if the call ended before that.

    The process is forked from one without threads: a copy of this one, whose other tests have
    threads, could wait for ever for a lock that one of them had.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([call.func.__module__])
    child = context.Process(target=_run, args=(step, str(folder), call))
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def _run(step: int, folder: str, call: partial[object]) -> NoReturn:
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
