"""What an evaluation shows while it works, by a clock that the test sets."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from radapter_serve.evaluation.progress import status
from tests.helpers.fake_clock import FakeClock

LONG = "plain: reading [b]imagefolder:photos[/b] " + 20 * "and more "
LAST = "plain: 12 of 12 images of [b]plain"


def shown(console: Console, *, show: bool = True) -> str:
    """What is written of lines that are said 5 seconds apart, from the start on."""
    clock = FakeClock()
    with status(console, show=show, clock=clock) as say:
        for line in ("at 0", "at 5", LONG, "at 15", LAST):
            say(line)
            clock.sleep(5)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_has_a_plain_line_every_ten_seconds() -> None:
    assert shown(Console(file=io.StringIO(), width=40)) == f"{LONG}\n{LAST}\n"


def test_a_terminal_has_one_line_that_changes() -> None:
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=300))
    assert LAST in text and text.count("\n") == 1 and text.endswith("\x1b[2K")  # and is gone


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_where_nothing_was_asked_for(terminal: bool) -> None:
    assert shown(Console(file=io.StringIO(), force_terminal=terminal), show=False) == ""
