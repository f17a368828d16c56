"""From photos to an answer: whole processes of the recipe quick."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import training_step
import tyro
from common import CLASS_NAMES, RESULTS, Report, picture, random_clip, say

from radapter_serve.training import load_recipe

WHAT = """Seconds of each command as a whole process, with {architecture} of random weights and
photos of 640 x 480 in {classes} classes: `radapter-train`, `radapter-export` and the first answer
of `radapter-query classify`; the last two do not depend on the number of photos, and were measured
once. Random weights learn nothing, but take the time of real ones. The peak is that of training.
Full fine-tuning is plain open_clip and torch: the steps of `small`, each with the median time of
one, without start, reading and augmenting, export or answer; marked with *."""
ANSWER = "from photos to an answer"


# Runs a command and prints its peak, which the system counts from the process that starts it: a
# process with torch in it would add its own.
LAUNCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def run(*command: str, cwd: Path) -> tuple[float, int]:
    """Seconds of a command, and the peak of its memory in bytes."""
    binary = Path(sys.executable).with_name(command[0])
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(binary), *command[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - start, int(done.stdout)


def measure(
    architecture: str = "ViT-B-32",
    images: tuple[int, ...] = (50, 200, 1000),
    towers: tuple[int, ...] = (50,),
    embeddings: int = 100_000,
    precision: tuple[str, ...] = ("auto", "no"),
    classes: int = 10,
    results: Path = RESULTS,
) -> None:
    """Measure the way from photos to an answer.

    Args:
        architecture: name in open_clip.
        images: numbers of photos with the recipe quick.
        towers: numbers of photos with the recipe small; none leaves out full fine-tuning, too.
        embeddings: number of embeddings with labels that a run without photos has; 0 for none.
        precision: of the embeddings: auto takes bf16 where the machine has it.
        classes: of the photos.
        results: folder of the report.
    """
    what = WHAT.format(architecture=architecture, classes=classes)
    report = Report("quick", "From photos to an answer", what, timed=False)
    columns = ["recipe, photos, precision", "train s", "to an answer s", "peak MB"]
    rows: list[list[str]] = []
    rest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base, _, _ = random_clip(architecture, folder / "base")
        model = ("--architecture", base, "--pretrained", "None")

        def add(recipe: str, what: str, *data: str) -> None:
            name = f"{recipe}, {what}"
            say(name)
            out = f"runs-{len(rows)}/{recipe}"
            command = ("radapter-train", "--recipe", recipe, *model, *data, "--out", out)
            train, peak = run(*command, cwd=folder)
            if not rest:
                places = ("--model-repository", "models", "--merged", "merged")
                run_of = ("--adapter", out, "--alpha", "1")
                rest["export"], _ = run("radapter-export", *run_of, *places, cwd=folder)
                photo = str(next(folder.rglob("*.jpg")))
                asked = (photo, "--label-set", "classes", "--model", "models")
                rest["first answer"], _ = run("radapter-query", "classify", *asked, cwd=folder)
            total = train + sum(rest.values())
            rows.append([name, f"{train:.1f}", f"{total:.1f}", f"{peak / 1e6:.0f}"])

        for count in sorted({*images, *towers}):
            photos = folder / f"photos-{count}"
            for number in range(count):
                place = photos / CLASS_NAMES[number % classes]
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.jpg").write_bytes(picture(seed=number))
            for recipe, counts in (("quick", images), ("small", towers)):
                for kind in precision if count in counts else ():
                    shown = ("--data", str(photos), "--precision", kind)
                    add(recipe, f"{count:,}, {kind}", *shown)
        if embeddings:
            draw = np.random.default_rng(0)
            width = int(open_clip.get_model_config(architecture)["embed_dim"])
            vectors = draw.standard_normal((embeddings, width), dtype=np.float32)
            np.save(folder / "vectors.npy", vectors)
            names = [f"{number}.jpg" for number in range(embeddings)]
            labels = [CLASS_NAMES[number % classes] for number in range(embeddings)]
            table = pa.table({"image": names, "label": labels})
            pq.write_table(table, folder / "rows.parquet")
            data = ("--embeddings", "vectors.npy", "--rows", "rows.parquet")
            add("quick", f"{embeddings:,} embeddings", *data)
    small = load_recipe("small")
    for kind in precision if towers else ():
        dtype = None if kind == "no" else torch.bfloat16
        full = training_step.FULL
        times, peaks = training_step.measure([full], architecture, small.batch_size, 3, dtype)
        for count in images:
            in_training = count - round(small.val_fraction * count)
            steps = small.epochs * max(1, in_training // small.batch_size)
            seconds = steps * statistics.median(times[full])
            name = f"{full}, {count:,}, {kind}: {steps} steps"
            rows.append([name, f"{seconds:.1f}*", "", f"{peaks[full] / 1e6:.0f}"])
    report.table(ANSWER, columns, rows)
    report.note("; ".join(f"{name} {seconds:.1f} s" for name, seconds in rest.items()) + ".")
    report.write(results)


if __name__ == "__main__":
    tyro.cli(measure)
