"""Fold and save: seconds and peak memory of what radapter-export does for the merged checkpoint."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from common import RESULTS, Process, Report, random_clip, ratio, say
from safetensors.torch import load_file

from radapter_export import write_merged
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import load_base

BASELINE = "torch.load + torch.save"
FOLD = "load, fold, save"


def copy_checkpoint(source: Path, target: Path) -> list[float]:
    """The baseline: read all weights and write them again; seconds of both."""
    start = time.perf_counter()
    weights = torch.load(source, weights_only=True)
    loaded = time.perf_counter()
    torch.save(weights, target)
    return [loaded - start, 0.0, time.perf_counter() - loaded]


def fold_and_save(name: str, adapter_path: Path, target: Path) -> list[float]:
    """The merged path of radapter-export; seconds to load, fold (the base's digest is checked),
    save.
    """
    start = time.perf_counter()
    base = load_base(name)
    adapter = load_adapter(adapter_path)
    weights = dict(base.model.state_dict())
    loaded = time.perf_counter()
    folded = fold(weights, adapter, 0.5)
    done = time.perf_counter()
    write_merged(target, base, folded, {})
    return [loaded - start, done - loaded, time.perf_counter() - done]


def main(
    architectures: tuple[str, ...] = ("ViT-B-32", "ViT-L-14"), repeats: int = 3, out: Path = RESULTS
) -> None:
    """Measure fold and save.

    Args:
        architectures: open_clip architectures, with random weights.
        repeats: fresh processes for each candidate; a first one of each, to warm up, is not
            counted.
        out: folder of the table.
    """
    report = Report(
        "fold",
        "Fold and save",
        "Each run is a fresh process: loads an fp32 checkpoint with random weights and a full-rank"
        " adapter, folds at α = 0.5, writes the merged checkpoint. Memory is the process's peak"
        " (VmHWM; mapped files count).",
    )
    for architecture in architectures:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            say(f"{architecture}: saving a random checkpoint and an adapter")
            name, adapter, size = random_clip(architecture, folder)
            torch.save(load_file(folder / "open_clip_model.safetensors"), folder / "plain.pt")
            runs: dict[str, tuple[Callable[..., list[float]], tuple[object, ...]]] = {
                BASELINE: (copy_checkpoint, (folder / "plain.pt", folder / "copy.pt")),
                FOLD: (fold_and_save, (name, adapter, folder / "merged")),
            }
            seconds: dict[str, list[list[float]]] = {label: [] for label in runs}
            peaks: dict[str, list[int]] = {label: [] for label in runs}
            starts: dict[str, int] = {}
            for number in range(repeats + 1):
                say(f"{architecture}: round {number} of {repeats}")
                for label, (function, arguments) in list(runs.items())[:: 1 if number % 2 else -1]:
                    os.sync()  # what the run before has written is not to be waited for in this one
                    with Process() as process:
                        parts = process.call(function, *arguments)
                        if number:
                            seconds[label].append(parts)
                            peaks[label].append(process.peak())
                            starts[label] = process.start
        totals = {label: [sum(run) for run in timed] for label, timed in seconds.items()}
        rows = []
        for label, timed in seconds.items():
            middle = (statistics.median(column) for column in zip(*timed, strict=True))
            peak = max(peaks[label])
            rows.append(
                [
                    label,
                    *(f"{value:.2f}" for value in (*middle, statistics.median(totals[label]))),
                    f"{ratio(totals[label], totals[BASELINE]):.2f}",
                    f"{peak / 1e6:.0f}",
                    f"{peak / size:.2f}",
                    f"{(peak - starts[label]) / size:.2f}",
                ]
            )
        columns = [
            "candidate",
            "load s",
            "fold s",
            "save s",
            "total s",
            "ratio",
            "peak MB",
            "/ checkpoint",
        ]
        title = f"{architecture}, checkpoint of {size / 1e6:.0f} MB"
        report.table(title, [*columns, "same, without libraries"], rows)
    report.note(
        f"Ratio: of the total, to {BASELINE} of the same checkpoint. Libraries:"
        f" {starts[FOLD] / 1e6:.0f} MB."
    )
    report.note("Aim: a peak under 2.5 times the checkpoint.")
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
