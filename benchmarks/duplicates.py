"""How well near-duplicates are found: drawings with copies that are resized, recompressed and
cropped, in an index of a release.

python benchmarks/duplicates.py --model-repository REPO --data DATA/drawings
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import Report, of_drawings, say
from PIL import Image

from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.index.duplicates import Group, find_duplicates, write_picture
from radapter_serve.index.index import Index, open_index

THRESHOLDS = (0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999)
PRECISION = 0.95  # that the threshold is chosen for
PICTURE = "duplicates.png"


def _resized(image: Image.Image) -> Image.Image:
    return image.resize((64, 64), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image) -> Image.Image:
    cut = round(0.03 * image.width)
    return image.crop((cut, cut, image.width - cut, image.height - cut))


# What is done to an image, and how it is written.
VARIANTS: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "original": (lambda image: image, "png"),
    "resized": (_resized, "png"),
    "recompressed": (lambda image: image, "jpg"),
    "cropped": (_cropped, "png"),
}


def render(source: Path, target: Path) -> int:
    """Write each image of a folder in all variants, as TARGET/VARIANT/NUMBER; how many images."""
    files = sorted(source.glob("*/*.png"))
    for name, (change, kind) in VARIANTS.items():
        (target / name).mkdir(parents=True)
        for number, file in enumerate(files):
            image = change(Image.open(file).convert("RGB"))
            image.save(target / name / f"{number:05}.{kind}", quality=50)
    return len(files)


def precision_and_recall(groups: Sequence[Group], images: int) -> tuple[float, float]:
    """The shares of pairs in a group that are of one image, and of pairs of one image that are in
    a group.
    """
    right = pairs = 0
    for group in groups:
        stems = Counter(Path(id).stem for id in group.ids)
        pairs += len(group.ids) * (len(group.ids) - 1) // 2
        right += sum(count * (count - 1) // 2 for count in stems.values())
    true = images * len(list(itertools.combinations(VARIANTS, 2)))
    return right / pairs if pairs else 1.0, right / true


def main() -> None:
    """Render, index, judge each threshold, and draw the groups at the chosen one."""
    arguments = of_drawings(__doc__)
    sets = {"validation": "val", "colour": "test", "emoji-noto": "shifts/emoji-noto"}
    report = Report(
        "duplicates",
        "Near-duplicates",
        "Drawings of 96 pixels, each four times: as it is, 64 pixels wide, as a JPEG of quality 50,"
        " and cropped by 3 % on each side. Precision and recall are of pairs, in %: drawings that"
        " others drew nearly alike count as wrong. The demo's small classifier embeds.",
        timed=False,
    )
    found: dict[str, dict[float, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        indexes: dict[str, Index] = {}
        for title, folder in sets.items():
            place = Path(name, title)
            images = render(arguments.data / folder, place / "images")
            loaded = load_release(arguments.model_repository)
            build(str(place / "images"), place / "index", loaded)
            indexes[title] = open_index(place / "index")
            found[title] = {
                threshold: precision_and_recall(find_duplicates(indexes[title], threshold), images)
                for threshold in THRESHOLDS
            }
            say(f"{title}: {images} drawings, {found[title]}")
        enough = [one for one in THRESHOLDS if found["validation"][one][0] >= PRECISION]
        chosen = min(enough, default=THRESHOLDS[-1])
        rows = []
        for threshold in THRESHOLDS:
            pairs = [found[title][threshold] for title in sets]
            mark = " (chosen)" if threshold == chosen else ""
            cells = [f"{100 * share:.1f}" for pair in pairs for share in pair]
            rows.append([f"{threshold:g}{mark}", *cells])
        kinds = ("precision", "recall")
        columns = ["threshold", *(f"{title}: {kind}" for title in sets for kind in kinds)]
        report.table(
            f"Chosen: the lowest with a precision of {PRECISION:.0%} on validation drawings",
            columns,
            rows,
        )
        groups = find_duplicates(indexes["emoji-noto"], chosen)
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_picture(indexes["emoji-noto"], groups[:6], arguments.out / PICTURE)
    report.note(_speed())
    report.write(arguments.out)


def _speed() -> str:
    """How long a comparison of random embeddings takes, in words."""
    from radapter_serve.index import duplicates

    count = 20_000
    width = 512
    vectors = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    start = time.perf_counter()
    best = np.full(count, -1, np.float32)
    duplicates._joined(vectors, 0.95, best, None)
    seconds = time.perf_counter() - start
    return f"Comparing {count:,} embeddings of width {width} took {seconds:.1f} s."


if __name__ == "__main__":
    main()
