"""Flags that the commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from radapter_serve.errors import RAdapterError
from radapter_serve.process import limit_threads

TableName = Literal["main", "1", "2", "3", "4", "5", "hyper", "why", "fig3", "all"]

if TYPE_CHECKING:
    from rivals.benchmark import Benchmark


@dataclass(frozen=True)
class Flags:
    """Settings of every method.

    Args:
        data: benchmark file, such as one of rivals/benchmarks; rivals/README.md says how to write
            one.
        data_root: folder of the benchmark's data; by default the one that it names.
        out: folder of the results and of finished runs, which are not repeated.
        architecture: base; by default the benchmark's.
        pretrained: open_clip tag or checkpoint of the base.
        epochs: passes over the data, for every method.
        steps: optimizer steps, for every method, in place of epochs.
        batch_size: images a step, for every method.
        precision: bf16 computes products in bfloat16 while a method learns, which is faster where
            the machine has it.
        limit: images of a set at most, drawn by a fixed seed.
        threads: threads to compute with; by default one a core.
    """

    data: Path
    data_root: Path | None = None
    out: Path = Path("runs/rivals")
    architecture: str | None = None
    pretrained: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    precision: Literal["no", "bf16"] | None = None
    limit: int | None = None
    threads: int | None = None

    def benchmark(self) -> Benchmark:
        """Load the benchmark, override its fields by flags, and limit the threads."""
        if self.limit is not None and self.limit < 1:
            raise RAdapterError(f"--limit is {self.limit}; allowed: 1 image or more")
        limit_threads(self.threads)
        from rivals.benchmark import load_benchmark  # torch takes seconds to load

        benchmark = load_benchmark(self.data, self.data_root)
        names = (
            "architecture",
            "pretrained",
            "epochs",
            "steps",
            "batch_size",
            "precision",
            "threads",
        )
        flags = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(benchmark, fields={**benchmark.fields, **flags})


def check_seeds(seeds: Sequence[int], flag: str = "--seeds") -> None:
    """Refuse an empty list of seeds, and a seed that is named twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        shown = " ".join(map(str, seeds)) or "empty"
        raise RAdapterError(f"{flag} is {shown}; allowed: one or more, each named once")
