"""From photos to an answer: whole processes of the recipe quick."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from common import CLASS_NAMES, RESULTS, Report, picture, random_clip, say

WHAT = """Seconds of each command as a whole process, with {architecture} of random weights and
photos of 640 x 480 in {classes} classes: `radapter-train`, `radapter-export` and the first answer
of `radapter-query classify`; the last two do not depend on the number of photos, and were measured
once. Random weights learn nothing, but take the time of real ones. The peak is that of training."""
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
    embeddings: int = 100_000,
    precision: tuple[str, ...] = ("auto", "no"),
    classes: int = 10,
    results: Path = RESULTS,
) -> None:
    """Measure the way from photos to an answer.

    Args:
        architecture: name in open_clip.
        images: numbers of photos.
        embeddings: number of embeddings with labels that a run without photos has; 0 for none.
        precision: of the embeddings: auto takes bf16 where the machine has it.
        classes: of the photos.
        results: folder of the report.
    """
    what = WHAT.format(architecture=architecture, classes=classes)
    report = Report("quick", "From photos to an answer", what, timed=False)
    columns = ["recipe, photos, precision", "train s", "to an answer s", "peak MB"]
    rows = []
    rest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base, _, _ = random_clip(architecture, folder / "base")
        recipe = ("--recipe", "quick", "--architecture", base, "--pretrained", "None")

        def add(name: str, out: str, *data: str) -> None:
            say(name)
            train, peak = run("radapter-train", *recipe, *data, "--out", out, cwd=folder)
            if not rest:
                places = ("--model-repository", "models", "--merged", "merged")
                run_of = ("--adapter", out, "--alpha", "1")
                rest["export"], _ = run("radapter-export", *run_of, *places, cwd=folder)
                photo = str(next(folder.rglob("*.jpg")))
                asked = (photo, "--label-set", "classes", "--model", "models")
                rest["first answer"], _ = run("radapter-query", "classify", *asked, cwd=folder)
            total = train + sum(rest.values())
            rows.append([name, f"{train:.1f}", f"{total:.1f}", f"{peak / 1e6:.0f}"])
            report.table(ANSWER, columns, rows)

        for count in images:
            photos = folder / f"photos-{count}"
            for number in range(count):
                place = photos / CLASS_NAMES[number % classes]
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.jpg").write_bytes(picture(seed=number))
            for kind in precision:
                out = f"runs-{count}-{kind}/quick"
                shown = ("--data", str(photos), "--precision", kind)
                add(f"quick, {count:,}, {kind}", out, *shown)
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
            add(f"quick, {embeddings:,} embeddings", "runs-embeddings/quick", *data)
    report.note("; ".join(f"{name} {seconds:.1f} s" for name, seconds in rest.items()) + ".")
    report.write(results)


if __name__ == "__main__":
    tyro.cli(measure)
