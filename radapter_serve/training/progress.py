"""What a run tells: a bar with images/s and time left, metrics.jsonl, and the tracker."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from radapter_serve.runs import METRICS


class Progress:
    """Reports from the main process: on the console unless `show` is False, to the trackers of the
    accelerator, and to `metrics.jsonl` in the folder `out`, from which it removes what a resumed
    run reported after its `done` steps. `notes` are lines for the user that the end brings.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        out: Path,
        steps: int,
        batch_size: int,
        done: int = 0,
        *,
        show: bool = True,
    ) -> None:
        self.accelerator = accelerator
        self.out = out
        self.steps = steps
        self.batch_size = batch_size
        self.notes: list[str] = []
        self.speed = 0.0
        self.first: list[float] = []  # seconds of the first two steps
        self.printed = time.monotonic()
        self.broken_images: set[str] = set()
        self.console = Console(quiet=not (show and accelerator.is_main_process))
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.1f} images/s"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(
            *columns,
            console=self.console,
            disable=not (show and self.console.is_terminal),
            transient=True,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, loss=0.0, speed=0.0)
        self.path = out / METRICS
        if accelerator.is_main_process and self.path.exists():
            rows = [
                line
                for line in self.path.read_text(encoding="utf-8").splitlines()
                if line.endswith("}")
            ]
            kept = [row for row in rows if json.loads(row)["step"] <= done]
            self.path.write_text("".join(f"{row}\n" for row in kept), encoding="utf-8")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        """Report an optimizer step."""
        if len(self.first) < 2:
            self.first.append(seconds)
            if len(self.first) == 2 and step < self.steps:  # the first one also warms up
                duration = in_words((self.steps - step) * min(self.first))
                self.say(f"the first two steps say: the rest of training takes {duration}")
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
                f"step {step}/{self.steps}  loss {loss:.3f}  {self.speed:.1f} images/s  {left:.0f}"
                " s left"
            )

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Report a validation."""
        self._write({"step": step, **metrics})
        self.say(
            f"validation at step {step}: "
            + ", ".join(f"{name} {100 * value:.2f} %" for name, value in metrics.items())
        )

    def broken(self, names: list[str]) -> None:
        """Remember images that could not be read."""
        self.broken_images.update(names)

    def end(self) -> None:
        """Name the images of all processes that could not be read, in broken.txt; every process
        calls it.
        """
        names = sorted(set(gather_object(sorted(self.broken_images))))
        if names and self.accelerator.is_main_process:
            path = self.out / "broken.txt"
            path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            self.notes.append(
                f"left out {len(names)} broken image{'s' if len(names) > 1 else ''}; {path} names"
                " them"
            )
            self.say(self.notes[-1])

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def in_words(seconds: float) -> str:
    """A duration for a person, such as `about 7 minutes`."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"
