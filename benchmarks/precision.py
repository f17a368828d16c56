"""The precisions of serving side by side, in one process: answers per second, and the distance from
fp32.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from common import CLASS_NAMES, RESULTS, Process, Report, export, picture, say
from engines import ask, served

from radapter_client import Client

WHAT = """`radapter-serve --engine process` on ViT-B-32 with random weights, asked over HTTP by our
own client on the same machine. Images are JPEG files of 640 x 480 pixels, against a label set of
100 labels; every text is another one. A cell has the answers per second of each of {passes} passes,
in which the servers take turns, one at a time: {seconds:g} s a cell, and {longer:g} s with 64
callers, after {warmup:g} s that do not count. 1 - cosine is the largest of {images} other pictures
and 100 texts, against fp32 with ONNX Runtime."""
TASKS = ("embed_image", "classify", "embed_text")
IMAGES = 32
FOLDER = Path(tempfile.gettempdir(), "precision")
# By name: the release, and the flags of radapter-serve
WAYS = {
    "fp32 with ONNX Runtime, the default": ("fp32", ()),
    "--precision bf16": ("fp32", ("--precision", "bf16")),
    "--precision auto": ("fp32", ("--precision", "auto")),
    "int8 with ONNX Runtime": ("int8", ()),
    "int8 with OpenVINO, static": ("static", ()),
}


def main(
    folder: Path = FOLDER,
    callers: tuple[int, ...] = (1, 8, 64),
    seconds: float = 1.5,
    longer: float = 4.0,
    warmup: float = 0.5,
    passes: int = 2,
    prepare: bool = False,
    out: Path = RESULTS,
) -> None:
    """Measure the precisions.

    Args:
        folder: of the releases, which are exported if they are missing.
        callers: at once.
        seconds: of each cell.
        longer: seconds of a cell with 64 callers, of which each waits for seconds.
        warmup: seconds before each cell.
        passes: over all cells.
        prepare: only export.
        out: folder of the table.
    """
    for name in ("fp32", "int8", "static"):
        place = folder / name
        if (place / "repository" / "classify").is_dir():
            continue
        say(f"exporting {name}")
        (place / "photos").mkdir(parents=True, exist_ok=True)
        for seed in range(64):
            (place / "photos" / f"{seed}.jpg").write_bytes(picture(640, 480, seed=1000 + seed))
        how: tuple[str, Path | None, str] = (name, None, "onnxruntime")
        if name == "static":
            how = ("int8", place / "photos", "openvino")
        precision, calibration, runtime = how
        with Process() as process:
            process.call(
                export, "ViT-B-32", precision, place, CLASS_NAMES, "none", calibration, runtime
            )
    if prepare:
        return

    what = WHAT.replace("\n", " ").format(
        passes=passes, seconds=seconds, longer=longer, warmup=warmup, images=IMAGES
    )
    report = Report("precision", "Precisions of serving", what, timed=False)
    image = picture(640, 480, seed=1)
    pictures = [picture(640, 480, seed=2 + number) for number in range(IMAGES)]
    texts = [f"a photo of the {name}" for name in CLASS_NAMES[:100]]
    rates: dict[tuple[str, str, int], list[float]] = {}
    starts: dict[str, float] = {}
    embeds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    begun = time.perf_counter()
    for _ in range(passes):
        for way, (name, flags) in WAYS.items():
            with served("process", folder / name / "repository", flags) as (url, _, start):
                starts[way] = start
                if way not in embeds:
                    with Client(url) as client:
                        embeds[way] = client.embed_images(pictures), client.embed_texts(texts)
                for task in TASKS:
                    for count in callers:
                        length = longer if count >= 64 else seconds
                        measured = asyncio.run(ask(url, task, image, count, length, warmup))
                        rates.setdefault((way, task, count), []).append(measured.throughput)
            say(f"{way}: {time.perf_counter() - begun:.0f} s")

    for task in TASKS:
        rows = []
        for way in WAYS:
            cells = [rates[way, task, count] for count in callers]
            each = [" / ".join(f"{rate:.0f}" for rate in cell) for cell in cells]
            exact = next(iter(embeds.values()))
            part = int(task == "embed_text")
            distance = 1 - (exact[part] * embeds[way][part]).sum(axis=1).min()
            rows.append([way, *each, f"{max(distance, 0):.0e}", f"{starts[way]:.1f}"])
        columns = ["served", *(f"{count} callers" for count in callers), "1 - cosine", "start s"]
        report.table(f"{task}, answers per second", columns, rows)
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
