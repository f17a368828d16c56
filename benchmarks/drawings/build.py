"""Draw the benchmark's image folders.

    python -m benchmarks.drawings.build --package package --pairs pairs --out DATA/drawings

Whatever is nearly the same as a drawing that the base or fine-tuning is trained on is no test.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.drawings.iconify import (
    VERSION,
    Classes,
    Drawing,
    Roles,
    Source,
    Style,
    alike,
    attribution,
    clusters,
    core,
    drawings,
    load_roles,
    render,
    signature,
    sources,
)
from radapter_serve.demo.data import on_paper
from radapter_serve.files import staged_folder

SIDE = 96
MOST_A_CLASS = 10  # test drawings of a class in one style
MOST_VARIANTS = 2  # test drawings that one set has of one name: "camera" and "camera off"
# of the drawings in the style to fine-tune on
SHARE_TESTED = 0.3
SHARE_VALIDATION = 0.15
TEMPLATES = ("{}", "a drawing of {}", "an icon of {}", "a picture of {}")


@dataclass
class Sample:
    """A drawing of a class, drawn."""

    drawing: Drawing  # of which set, under which name
    class_name: str  # what it shows
    pixels: NDArray[np.uint8]  # premultiplied RGBA, uint8 [S, S, 4]
    mark: NDArray[np.float32] = field(init=False)  # what tells near-duplicates
    place: str = ""  # folder of the split; "" while it has none

    def __post_init__(self) -> None:
        self.mark = signature(self.pixels)

    @property
    def group(self) -> str:
        """One drawing in several colourings."""
        return f"{self.drawing.source}:{self.drawing.words}:{self.drawing.number}"


def samples(
    package: Path, style: Style, classes: Classes, *, variants: bool
) -> dict[str, list[Sample]]:
    """A style's drawings of each class, in an order that depends on names alone; classes in their
    order.
    """
    by_class: dict[str, list[Sample]] = {name: [] for name in classes.names}
    for source, wanted in style.sets.items():
        drawn = set()
        variants_of = Counter[tuple[str, str]]()
        of_source = drawings(package, source)
        for drawing in sorted(
            of_source, key=lambda d: (core(d.words) != d.words, _hash(f"{d.source}:{d.name}"))
        ):
            name = classes.of(drawing.words)
            if name is None or (wanted is not None and drawing.style != wanted):
                continue
            plain = (core(drawing.words), drawing.number)
            again = (drawing.words, drawing.number) in drawn or variants_of[plain] == MOST_VARIANTS
            pixels = None if again and not variants else render(drawing.svg, SIDE)
            if pixels is not None:
                drawn.add((drawing.words, drawing.number))
                variants_of[plain] += 1
                by_class[name].append(Sample(drawing, name, pixels))
    return {name: of_class for name, of_class in by_class.items() if of_class}


def split(of_class: list[Sample], seen: NDArray[np.float32]) -> None:
    """Place the drawings of one class in the style to fine-tune on; what is nearly the same has one
    place.
    """
    together = clusters(
        np.stack([sample.mark for sample in of_class]), [sample.group for sample in of_class]
    )
    fresh: list[list[int]] = []
    stale: list[list[int]] = []
    for members in together:
        known = len(seen) and alike(np.stack([of_class[i].mark for i in members]), seen).any()
        (stale if known else fresh).append(members)
    tests = round(SHARE_TESTED * len(together)) or 1
    validations = round(SHARE_VALIDATION * len(together)) or 1
    if len(fresh) + len(stale) <= 2 or not fresh:  # too few to have a validation
        validations = 0
    tests = min(tests, max(len(fresh) - (0 if stale else 1), 0))
    for rank, members in enumerate(fresh + stale):
        place = "test" if rank < tests else "val" if rank < tests + validations else "train"
        if rank == len(together) - 1:
            place = "train"
        for i in members if place == "train" else members[:1]:
            of_class[i].place = place


def shift(candidates: list[Sample], place: str, seen: list[NDArray[np.float32]]) -> None:
    """Place up to MOST_A_CLASS drawings of one class, set by set in turn, none nearly the same as
    one seen or placed.
    """
    hands: dict[str, list[Sample]] = defaultdict(list)
    for sample in candidates:
        hands[sample.drawing.source].append(sample)
    turns = [
        hand[turn]
        for turn in range(max(map(len, hands.values())))
        for hand in hands.values()
        if turn < len(hand)
    ]
    placed = 0
    for sample in turns:
        if placed < MOST_A_CLASS and not (seen and alike(sample.mark[None], np.stack(seen)).any()):
            sample.place = place
            placed += 1
            seen.append(sample.mark)


def known_marks(folder: Path, classes: Classes) -> dict[str, list[NDArray[np.float32]]]:
    """Marks of the drawings that a base is trained on, by class."""
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    marks: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    with (folder / "pairs.csv").open(encoding="utf-8", newline="") as file:
        for index, row in enumerate(csv.DictReader(file)):
            name = classes.of(row["words"])
            if name is not None and row["split"] == "train":
                marks[name].append(signature(np.asarray(pixels[index])))
    return marks


def write(sample: Sample, folder: Path, paper: str) -> str:
    """Write a drawing as PNG; returns its path below the folder."""
    name = f"{sample.drawing.source}--{sample.drawing.name}.png"
    path = Path(sample.place) / sample.class_name / name
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    on_paper(sample.pixels, black=paper == "black").save(folder / path)
    return path.as_posix()


def build(package: Path, pairs: Path, out: Path, roles: Roles, classes: Classes) -> Counter[str]:
    """Draw all folders; returns how many images each has."""
    credited = sources(package)
    seen = known_marks(pairs, classes)
    rows = []
    count = Counter[str]()
    with staged_folder(out, "benchmarks.drawings") as part:
        for style in track((roles.fine_tuned, *roles.shifts), "Drawing the styles"):
            tuned = style is roles.fine_tuned
            for name, of_class in samples(package, style, classes, variants=tuned).items():
                if tuned:
                    split(
                        of_class,
                        np.stack(seen[name]) if seen[name] else np.zeros((0, 400), np.float32),
                    )
                    seen[name] += [sample.mark for sample in of_class if sample.place]
                else:
                    shift(of_class, f"shifts/{style.name}", seen[name])
                for sample in of_class:
                    if sample.place:
                        path = write(sample, part, style.paper)
                        source = sample.drawing.source
                        licence = credited[source].licence
                        rows.append(
                            [
                                path,
                                name,
                                style.name,
                                sample.place,
                                source,
                                sample.drawing.name,
                                licence,
                            ]
                        )
                        count[sample.place] += 1
        _write_lists(part, rows, classes, credited)
    return count


def _write_lists(
    folder: Path, rows: list[list[str]], classes: Classes, credited: dict[str, Source]
) -> None:
    (folder / "classes.txt").write_text("\n".join(classes.prompt_lines) + "\n", encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    with (folder / "index.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["path", "class", "style", "split", "set", "name", "licence"], *sorted(rows)]
        )
    used = Counter(row[4] for row in rows)
    text = attribution(
        f"The images of this folder, drawn from @iconify/json {VERSION}", used, credited
    )
    (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(package: Path, pairs: Path, out: Path) -> None:
    """Draw the benchmark's image folders.

    Args:
        package: the unpacked npm package @iconify/json.
        pairs: folder of benchmarks.drawings.pairs.
        out: folder to make; it must not be there.
    """
    if out.exists():
        raise SystemExit(f"{out} is there already; remove it, or name another folder")
    for place, number in sorted(build(package, pairs, out, load_roles(), Classes()).items()):
        print(f"{number:6,} {place}")


if __name__ == "__main__":
    tyro.cli(main)
