"""From photos to an answer: whole processes of the recipe quick."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from common import CLASS_NAMES, RESULTS, Report, picture, random_clip, say

WHAT = """Seconds of each command as a whole process, with {architecture} of random weights and
photos of 640 x 480 in {classes} classes: `radapter-train`, `radapter-export` and the first answer
of `radapter-query classify`. Random weights learn nothing, but take the time of real ones. The
peak is that of training."""
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
    precision: tuple[str, ...] = ("auto", "no"),
    classes: int = 10,
    results: Path = RESULTS,
) -> None:
    """Measure the way from photos to an answer.

    Args:
        architecture: name in open_clip.
        images: numbers of photos.
        precision: of the embeddings: auto takes bf16 where the machine has it.
        classes: of the photos.
        results: folder of the report.
    """
    what = WHAT.format(architecture=architecture, classes=classes)
    report = Report("quick", "From photos to an answer", what, timed=False)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base, _, _ = random_clip(architecture, folder / "base")
        for count in images:
            photos = folder / f"photos-{count}"
            for number in range(count):
                place = photos / CLASS_NAMES[number % classes]
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{number}.jpg").write_bytes(picture(seed=number))
            for kind in precision:
                say(f"{count} photos, precision {kind}")
                out = f"runs-{count}-{kind}/quick"
                shared = ("--data", str(photos), "--architecture", base, "--precision", kind)
                unnamed = ("--pretrained", "None")
                recipe = ("--recipe", "quick", "--out", out)
                train, peak = run("radapter-train", *recipe, *shared, *unnamed, cwd=folder)
                repository = f"models-{count}-{kind}"
                export, _ = run(
                    "radapter-export",
                    *("--adapter", out, "--alpha", "1", "--model-repository", repository),
                    *("--merged", f"{repository}-merged"),
                    cwd=folder,
                )
                photo = str(next(photos.rglob("*.jpg")))
                asked = ("--label-set", "classes", "--model", repository)
                query, _ = run("radapter-query", "classify", photo, *asked, cwd=folder)
                total = train + export + query
                cells = [f"{value:.1f}" for value in (train, export, query, total)]
                rows.append([f"quick, {count}, {kind}", *cells, f"{peak / 1e6:.0f}"])
                columns = ["recipe, photos, precision", "train s", "export s", "query s"]
                report.table(ANSWER, [*columns, "all s", "peak MB"], rows)
    report.write(results)


if __name__ == "__main__":
    tyro.cli(measure)
