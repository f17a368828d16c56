"""`python -m rivals.stacking`: calibrated stacking (Chao et al., ECCV 2016) on PACS: a constant γ,
chosen on held-out photos of all classes, is taken off the similarities to the trained labels.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import harmonic_mean

import numpy as np
import torch
from numpy.typing import NDArray

from radapter_serve.cli import run as run_command
from radapter_serve.clip.base import load_base
from radapter_serve.demo.data import BASE
from radapter_serve.process import limit_threads
from radapter_serve.sources import LOCAL
from rivals.layout import markdown, origin, publish, say
from rivals.method import Run, System, learned
from rivals.others import BATCH, Collection, Images, collection, methods, read_tests
from rivals.small import table_of

GAMMAS = np.linspace(0, 0.3, 121)  # off the cosine similarities
ROWS = ("R-Adapter", "preserve", "preserve, words")


def similarities(system: System, images: Collection, test: Images) -> NDArray[np.float64]:
    """Compute the similarities of images to all classes, [N, K]."""
    with torch.inference_mode():
        classes = system.embed_classes(images.classes, images.templates).double().cpu().numpy()
        parts = [system.embed_images(part).double().cpu() for part in torch.split(test.pixels, 256)]
    scores: NDArray[np.float64] = torch.cat(parts).numpy() @ classes.T
    return scores


def accuracies(
    scores: NDArray[np.float64], test: Images, trained: NDArray[np.bool_], gamma: float
) -> tuple[float, float]:
    """Compute the accuracies among all labels of trained and of other classes."""
    right = (scores - gamma * trained).argmax(axis=1) == test.labels
    own = trained[test.labels]
    return float(right[own].mean()), float(right[~own].mean())


def stacking(
    data_root: Path, out: Path, seeds: tuple[int, ...] = (0,), steps: int = 105, threads: int = 1
) -> None:
    """Train on half of the classes, choose γ on held-out photos, and judge with it and without.

    Args:
        data_root: folder with pacs/.
        out: folder of stacking.md.
        seeds: each method learns once for each, on each half.
        steps: of a run.
        threads: to compute with.
    """
    limit_threads(threads)
    images = collection("pacs", data_root)
    base = load_base(f"{LOCAL}{BASE}")
    tests = read_tests(images, base)
    held_out = {label: paths[::5] for label, paths in images.train.items()}
    fitted = {
        label: [path for path in paths if path not in held_out[label]]
        for label, paths in images.train.items()
    }
    validation = read_tests(
        Collection(images.classes, images.templates, {}, {"photo": held_out}, {}), base
    )["photo"]
    lines = []
    for name in ROWS:
        for seed in seeds:
            for split, labels in images.splits.items():
                say(f"{name}, {split}, seed {seed}")
                trained = np.array([label in labels for label in images.classes])
                with tempfile.TemporaryDirectory() as place:
                    files = Path(place)
                    (files / "classes.txt").write_text("\n".join(labels), encoding="utf-8")
                    (files / "templates.txt").write_text("a photo of a {}.", encoding="utf-8")
                    run = Run(
                        {
                            "architecture": f"{LOCAL}{BASE}",
                            "data": table_of({label: fitted[label] for label in labels}, files),
                            "classes": files / "classes.txt",
                            "templates": str(files / "templates.txt"),
                            "seed": seed,
                            "batch_size": BATCH,
                            "steps": steps,
                            "workers": 0,
                            "threads": threads,
                            **images.fields,
                        },
                        out / "learned",
                    )
                    result = learned(methods()[name], run)
                    for alpha in (0.5, 1.0):
                        system = result.at(alpha)
                        scores = similarities(system, images, validation)
                        pairs = [accuracies(scores, validation, trained, g) for g in GAMMAS]
                        # The smallest of the best.
                        gamma = GAMMAS[int(np.argmax([harmonic_mean(pair) for pair in pairs]))]
                        row = [name, f"{alpha:g}", split, f"{gamma:.4f}"]
                        for style in ("photo", "art_painting", "cartoon", "sketch"):
                            scores = similarities(system, images, tests[style])
                            for g in (0.0, gamma):
                                pair = accuracies(scores, tests[style], trained, g)
                                row.append(" / ".join(f"{100 * value:.1f}" for value in pair))
                        lines.append(row)
                        say(" | ".join(row))
    head = ["method", "α", "split", "γ"]
    for style in ("photo", "art", "cartoon", "sketch"):
        head += [style, f"{style}, calibrated"]
    publish(
        ["# Calibrated stacking", origin("rivals.stacking"), markdown(head, lines)],
        out / "stacking.md",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(stacking, argv, prog="python -m rivals.stacking")


if __name__ == "__main__":
    sys.exit(main())
