"""Ctrl-C and SIGTERM: a run that is told to end does so behind a whole step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator


class Interruption:
    """Within the block the first Ctrl-C or SIGTERM is only noted; a second one works as ever.

    Args:
        say: takes a line for the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._signal, self._before = say, 0, dict[int, Any]()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others can't receive signals
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to end; every process calls it, and all hear the same."""
        if accelerator.num_processes > 1:
            told = torch.tensor(self._signal, device=accelerator.device)
            self._signal = int(accelerator.gather(told).max())
        return self._signal > 0

    def end(self) -> None:
        """End as the signal would have: by KeyboardInterrupt, or with the exit status of SIGTERM."""
        raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + self._signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()
        with contextlib.suppress(RuntimeError):  # the line that was just being printed can't be broken into
            self._say("ending behind this step, with a checkpoint; once more ends at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def ignore_interruptions(worker: int) -> None:
    """For processes that read images: the terminal sends Ctrl-C to them, too, and the run still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
