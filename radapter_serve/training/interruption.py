"""Stop a run between steps on Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

from radapter_serve.signals import handled


class Interruption:
    """Within the block the first Ctrl-C or SIGTERM is only noted; a second one works as usual."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._signal = 0
        self._handled = contextlib.ExitStack()

    def __enter__(self) -> Interruption:
        self._handled.enter_context(handled(self._note, signal.SIGINT, signal.SIGTERM))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handled.close()

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal; every process calls it, and gets the same answer."""
        if accelerator.num_processes > 1:
            number = torch.tensor(self._signal, device=accelerator.device)
            self._signal = int(accelerator.gather(number).max())
        return self._signal > 0

    def end(self) -> None:
        """End as the signal would have: by KeyboardInterrupt, or with the exit status of
        SIGTERM.
        """
        raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + self._signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._handled.close()
        with contextlib.suppress(
            RuntimeError
        ):  # the line that was just being printed can't be broken into
            self._say("finishing this step and saving a checkpoint; press Ctrl-C again to quit now")


def ignore_interruptions(worker: int) -> None:
    """For processes that read images: the terminal sends Ctrl-C to them, too, and the run still
    needs them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
