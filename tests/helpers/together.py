"""Tasks run side by side, whose answers and errors a test tells apart."""

from __future__ import annotations

from typing import Any

from radapter_serve.encoders.needs import run_together


def together(tasks: Any, *encode: Any) -> list[Any]:
    """The answer of each task, or its `TaskError`; the arguments are those of `run_together`."""
    return run_together(tasks, *encode)
