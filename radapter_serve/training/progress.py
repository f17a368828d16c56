"""What a run tells: a bar with images/s and time left, metrics.jsonl, and the tracker."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Reports from the main process; the others stay silent.

    Args:
        accelerator: whose trackers are told.
        out: folder of `metrics.jsonl`.
        steps: of the whole run.
        batch_size: images a step.
    """

    def __init__(self, accelerator: Accelerator, out: Path, steps: int, batch_size: int) -> None:
        self.accelerator, self.out, self.steps, self.batch_size = accelerator, out, steps, batch_size
        self.loss, self.broken_images, self.speed = 0.0, 0, 0.0
        self.console = Console(quiet=not accelerator.is_main_process)
        self.every = max(1, steps // 10)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.1f} images/s"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task("training", total=steps, loss=0.0, speed=0.0)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.broken_images:
            self.say(f"skipped {self.broken_images} broken images; {self.out / 'broken.txt'} names them")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        """Report an optimizer step."""
        self.loss = loss
        speed = self.batch_size / seconds
        self.speed = speed if not self.speed else 0.9 * self.speed + 0.1 * speed
        self.bar.update(self.task, completed=step, loss=loss, speed=self.speed)
        self._write({"step": step, "loss": loss, "learning_rate": rate, "images_per_second": round(speed, 2)})
        if not self.console.is_terminal and (step % self.every == 0 or step == self.steps):
            left = (self.steps - step) * self.batch_size / self.speed
            self.say(f"step {step}/{self.steps}  loss {loss:.3f}  {self.speed:.1f} images/s  {left:.0f} s left")

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Report a validation."""
        self._write({"step": step, **metrics})
        self.say(f"validation at step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))

    def broken(self, names: list[str]) -> None:
        """Count images that could not be read, and name them in broken.txt."""
        if names and self.accelerator.is_main_process:
            self.broken_images += len(names)
            with (self.out / "broken.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in names)

    def _write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
