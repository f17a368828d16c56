"""Shared code of the benchmarks: alternating rounds, fresh processes, inputs, and the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from radapter_serve.adapter import Metadata, attach, base_digest, save_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.files import write_text

T = TypeVar("T")
# Else open_clip warns of random weights, which are meant here.
logging.getLogger().addHandler(logging.NullHandler())
RESULTS = Path(__file__).parent / "results"
_TIMES = (
    "Times are medians over alternating rounds; ratios are medians of the ratios within a round."
)
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
)
_PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx",
    "open_clip_torch",
    "numpy",
)

# CIFAR-100's: short, common, and a hundred.
CLASS_NAMES = """apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl,
boy, bridge, bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock,
cloud, cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox,
girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man,
maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree,
pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road,
rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel,
streetcar, sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train,
trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm""".replace("\n", " ").split(
    ", "
)


def say(line: str) -> None:
    """One line of progress, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def alternate(
    candidates: Mapping[str, Callable[[], float]], repeats: int, *, pause: float = 0.05
) -> dict[str, list[float]]:
    """Run candidates in alternating rounds, after a warm-up each; each returns its seconds.

    A pause before each run lets the threads of the previous candidate stop spinning.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for name in names:
        candidates[name]()
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            times[name].append(candidates[name]())
    return times


def clocked(function: Callable[[], object], at_least: float = 0.3) -> Callable[[], float]:
    """Return a candidate that calls a function for `at_least` seconds; it returns the mean."""
    calls = 0

    def run() -> float:
        nonlocal calls
        if not calls:  # the first run is the warm-up
            function()
            start = time.perf_counter()
            function()
            calls = max(1, math.ceil(at_least / (time.perf_counter() - start)))
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    return run


def ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Compute the median over the rounds of the ratio of times within a round."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))


def memory(field: str = "VmHWM", pid: int | str = "self") -> int:
    """Read the memory of a process in bytes, with mapped files: the peak, or now (`VmRSS`)."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended


class Process:
    """A spawned process for calls of the script's functions, with a separate peak of memory."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        #: bytes after the imports
        self.start = self.call(memory, "VmRSS")

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of a module's top level in the process."""
        return self._pool.submit(function, *arguments).result()

    def peak(self) -> int:
        """Read the peak memory in bytes."""
        return self.call(memory)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def write_adapter(name: str, path: Path, std: float) -> None:
    """Save an adapter of full rank for a base, of zeros or of random weights."""
    base = load_base(name)
    adapters = attach(base.model)
    with torch.no_grad():
        for tensor in adapters.parameters():
            tensor.normal_(std=std)
    digest = base_digest(base.model.state_dict(), [site.key for site in adapters.sites])
    save_adapter(adapters.adapter(Metadata(architecture=name, base_digest=digest)), path)


def random_clip(architecture: str, folder: Path) -> tuple[str, Path, int]:
    """Save a CLIP and an adapter of full rank, of random weights; return the `local-dir:` name,
    the adapter's path, and the size of the checkpoint in bytes.
    """
    torch.manual_seed(0)
    model = open_clip.create_model(architecture)
    path = folder / "open_clip_model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    config = {
        "model_cfg": open_clip.get_model_config(architecture),
        "preprocess_cfg": model.visual.preprocess_cfg,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = f"local-dir:{folder}"
    write_adapter(name, folder / "adapter.safetensors", std=0.01)
    return name, folder / "adapter.safetensors", path.stat().st_size


LABEL_SET = "names"  # of the releases of these benchmarks


def export(
    architecture: str,
    precision: str,
    folder: Path,
    labels: Sequence[str] = CLASS_NAMES,
    dense: str = "none",
    calibration: Path | None = None,
    runtime: str = "onnxruntime",
) -> None:
    """Export a random CLIP with a label set."""
    from radapter_export import ExportSettings, export_release  # only in the process that exports

    _, adapter, _ = random_clip(architecture, folder)
    names = folder / "names.txt"
    names.write_text("\n".join(labels), encoding="utf-8")
    fields: dict[str, Any] = {
        "merged": folder / "merged",
        "model_repository": folder / "repository",
        "label_sets": {LABEL_SET: names},
        "precision": precision,
        "dense": dense,
        "calibration": calibration,
        "runtime": runtime,
        "validation": "none",  # random weights know no image
    }
    export_release(adapter, [0.5], ExportSettings(**fields))


def picture(width: int = 640, height: int = 480, seed: int = 0) -> bytes:
    """Make a smooth random JPEG, about as large as a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def machine() -> str:
    """Describe processor, matrix instructions, cores, memory, load, and versions of packages."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = next(
        (line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line),
        "unknown CPU",
    )
    flags = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    cpu += f" ({', '.join(name.upper() for name in _INSTRUCTIONS if name in flags)})"
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = []
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            versions.append(f"{name.removesuffix('_torch')} {version}")
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {size / 1e9:.0f} GB of memory; load"
        f" {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()},"
        f" {', '.join(versions)}; {torch.get_num_threads()} threads"
    )


@dataclass
class Report:
    """The results of a script; tables are printed, and `write` saves all as Markdown.

    `what` describes the measurement, `timed` adds a sentence on times; the file is called as the
    script by default.
    """

    name: str
    title: str
    what: str
    timed: bool = True
    file: str | None = None

    def __post_init__(self) -> None:
        self._machine = machine()  # the load is that of the start
        self._parts: dict[str, str] = {}
        self._console = Console(width=120)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        shown: bool = True,
    ) -> None:
        """Add a table, or replace that of the same title; cells that a row lacks are empty."""
        rows = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
        if shown:
            table = Table(title=title)
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number else "left")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
        rule = ["---", *["---:"] * (len(columns) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
        self._parts[title] = "\n".join([f"**{title}**", "", *lines])

    def note(self, text: str) -> None:
        """Add a sentence."""
        self._console.print(text, markup=False, highlight=False)
        self._parts[text] = text

    def write(self, folder: Path, complete: bool = True) -> None:
        """Write FOLDER/FILE.md; a report that is not complete says so."""
        command = " ".join(["python", f"benchmarks/{self.name}.py", *sys.argv[1:]])
        head = [
            f"# {self.title}",
            f"`{command}`, {datetime.date.today().isoformat()}. {self._machine}.",
            f"{self.what} {_TIMES}" if self.timed else self.what,
        ]
        if not complete:
            head.append("**Not complete: the run had not ended when this was written.**")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.file or self.name}.md"
        write_text(path, "\n\n".join([*head, *self._parts.values()]) + "\n")
        if complete:
            say(f"wrote {path}")
