"""Progress reports of a run, and its interruption between steps by Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from radapter_serve.errors import in_words
from radapter_serve.process import handled
from radapter_serve.sources import METRICS
from radapter_serve.training.recipe import Plan


class Progress:
    """Reports from the main process to the console, to accelerate's trackers, and to
    `metrics.jsonl`, whose lines after the `done` steps of a resumed run are removed.
    """

    def __init__(
        self, accelerator: Accelerator, plan: Plan, out: Path, done: int, *, show: bool
    ) -> None:
        self.accelerator = accelerator
        self.out = out
        self.steps = plan.steps
        self.batch_size = plan.recipe.batch_size
        self.broken: set[str] = set()  # lines about images that could not be read
        self.to_embed: float | None = None  # seconds to embed all images once, if they are known
        self.speed = 0.0
        self.first: list[float] = []  # seconds of the first two steps
        self.printed = time.monotonic()
        self.console = Console(quiet=not (show and accelerator.is_main_process))
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.1f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (show and self.console.is_terminal),
            transient=True,
        )
        self.task = self.bar.add_task(
            "training", total=self.steps, completed=done, loss=0.0, speed=0.0
        )
        self.path = out / METRICS
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            whole = [line for line in lines if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= done]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        """Report an optimizer step."""
        if len(self.first) < 2:
            self.first.append(seconds)
            if len(self.first) == 2 and step < self.steps:  # the first step also warms up
                rest = in_words((self.steps - step) * min(self.first))
                line = f"the first two steps say: the rest of training takes about {rest}"
                if self.to_embed is not None:
                    line += (
                        "; the projection (--recipe quick) would take about"
                        f" {in_words(self.to_embed)} to embed the images, and a few seconds to"
                        " train"
                    )
                self.say(line)
        speed = self.batch_size / seconds
        self.speed = speed if not self.speed else 0.9 * self.speed + 0.1 * speed
        self.bar.update(self.task, completed=step, loss=loss, speed=self.speed)
        self._write(
            {
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "images_per_second": round(speed, 2),
            }
        )
        late = time.monotonic() - self.printed > 10
        if not self.console.is_terminal and (step == 1 or late or step == self.steps):
            self.printed = time.monotonic()
            left = (self.steps - step) * self.batch_size / self.speed
            self.say(
                f"step {step}/{self.steps}  loss {loss:.3f}  {self.speed:.1f} images/s "
                f" {in_words(left)} left"
            )

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Report a validation, if there was any."""
        if not metrics:
            return
        self._write({"step": step, **metrics})
        self.say(
            f"validation at step {step}: "
            + ", ".join(f"{name} {100 * value:.2f} %" for name, value in metrics.items())
        )

    def end(self) -> list[str]:
        """Write the names of images that any process could not read; returns a note about them."""
        names = sorted(set(gather_object(sorted(self.broken))))
        if not names or not self.accelerator.is_main_process:
            return []
        path = self.out / "broken.txt"
        path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        images = "image" if len(names) == 1 else "images"
        note = f"left out {len(names)} broken {images}; {path} names them"
        self.say(note)
        return [note]

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


class Interruption(contextlib.ExitStack):
    """Notes the first Ctrl-C or SIGTERM inside the block; a second signal works as usual."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say
        self._signal = 0
        self.enter_context(handled(self._note, signal.SIGINT, signal.SIGTERM))

    def asked(self, accelerator: Accelerator) -> bool:
        """True if any process got a signal; every process calls it, and gets the same answer."""
        if accelerator.num_processes > 1:
            number = torch.tensor(self._signal, device=accelerator.device)
            self._signal = int(accelerator.gather(number).max())
        return self._signal > 0

    def end(self) -> None:
        """End as the signal would have, with KeyboardInterrupt or the exit status of SIGTERM."""
        raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + self._signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self.close()
        # Printing fails if the signal has interrupted another print.
        with contextlib.suppress(RuntimeError):
            self._say("finishing this step and saving a checkpoint; press Ctrl-C again to quit now")
