"""`python -m rivals.others`: what fine-tuning on half of the classes gains there, and what it does
to the other half: their labels among themselves and among all, and searches for them.
"""

from __future__ import annotations

import base64
import datetime
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import decode
from radapter_serve.demo.data import BASE, prepare
from radapter_serve.evaluation.metrics import average_precisions
from radapter_serve.evaluation.rows import packed, unpacked
from radapter_serve.hub import LOCAL
from radapter_serve.threads import limit_threads
from rivals.coop import CoOp
from rivals.flags import check_seeds
from rivals.layout import corrected, lead_of, markdown
from rivals.make import command_line, machine, publish, say
from rivals.maple import MaPLe
from rivals.method import Method, learned, with_rate
from rivals.methods import METHODS
from rivals.radapter import r_adapter
from rivals.run import Run
from rivals.small import table_of
from rivals.system import System

ALPHAS = (0.25, 0.5, 0.75, 1.0)
BATCH = 64  # images a step, or all where there are fewer
WORDS = 64  # of the vocabulary, drawn anew for each step
KINDS = {
    "trained": "trained classes",
    "trained, all labels": "trained, among all labels",
    "others": "others, among themselves",
    "others, all labels": "others, among all labels",
    "searches": "searches for others, mAP",
}


@dataclass(frozen=True)
class Collection:
    """Images of all classes, of which a split trains half.

    Attributes:
        classes: label of each class, synonyms after commas.
        templates: of prompts.
        train: images to learn from, by the first name of their class.
        tests: by style, the own one first, the images to judge by, by class.
        fields: of the recipe.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Mapping[str, Sequence[Path]]
    tests: Mapping[str, Mapping[str, Sequence[Path]]]
    fields: Mapping[str, Any]

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """The classes that are trained, by the name of the split: the first half, and the last."""
        half = (len(self.classes) + 1) // 2
        return {"first half": self.classes[:half], "last half": self.classes[-half:]}


def collection(name: str, data_root: Path) -> Collection:
    """The collection of a name.

    Args:
        name: drawings, which are made below `data_root` where they are missing, or pacs.
        data_root: folder of `drawings/`, or of `pacs/`.
    """
    if name == "pacs":
        root = data_root / "pacs"
        styles = ("photo", "art_painting", "cartoon", "sketch")
        found = {style: _by_class(root / style) for style in styles}
        # Of every two photos of a class one is for the test.
        photos = found["photo"]
        tests = {**found, "photo": {label: paths[::2] for label, paths in photos.items()}}
        return Collection(
            classes=tuple(sorted(photos)),
            templates=("a photo of a {}.",),
            train={label: paths[1::2] for label, paths in photos.items()},
            tests=tests,
            fields={"crop_scale": 0.7, "flip": True},
        )
    data = prepare(data_root / "drawings")
    return Collection(
        classes=tuple(data.classes.read_text(encoding="utf-8").splitlines()),
        templates=tuple(data.templates.read_text(encoding="utf-8").splitlines()),
        train=_by_class(data.train),
        tests={style: _by_class(folder) for style, folder in data.test.items()},
        fields={"crop_scale": 0.9, "flip": False},
    )


def _by_class(folder: Path) -> dict[str, list[Path]]:
    return {
        place.name: sorted(path for path in place.iterdir() if path.is_file())
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }


# What learns


def methods() -> dict[str, Method]:
    """The rows of the table, each at a rate that was fixed before: the paper's, that which `auto`
    took on photos, and of rivals what validation chose for the main table of the drawings.
    """
    kept: dict[str, Any] = {"preserve": 10.0, "drop": 0.0}
    closed: dict[str, Any] = {"negative_classes": 1000}
    words: dict[str, Any] = {"preserve_words": 3.0}

    return {
        "R-Adapter": r_adapter("imagenet"),
        "rank 4": r_adapter("imagenet", rank=4),
        "rank 4 at 5e-3": r_adapter("imagenet", rank=4, learning_rate=5e-3),
        "preserve": r_adapter("imagenet", **kept),
        "preserve, all classes": r_adapter("imagenet", **kept, **closed),
        "preserve, words": r_adapter("imagenet", **kept, **words),
        "preserve, all classes, words": r_adapter("imagenet", **kept, **words, **closed),
        "WiSE-FLYP": with_rate(METHODS["wise-flyp"], 1e-3),
        "LoRA": with_rate(METHODS["lora"], 6e-4),
        "CoOp, no full stop": CoOp(words="{}"),
        "MaPLe, no full stop": MaPLe(words="a photo of a {}"),
        "CLIPood": METHODS["clipood"],
    }


# What is judged


@dataclass(frozen=True)
class Judged:
    """What a model gives on one test set, in one kind of judgement.

    Attributes:
        method, settings, split, seed, alpha: of the model; `settings` is the method in words.
        style: of the test set.
        kind: of KINDS.
        n: images; of searches, texts.
        values: of each image, whether it is right, a bit each; of searches, float16, the average
            precision of each text. In base64.
    """

    method: str
    settings: str
    split: str
    seed: int
    alpha: float
    style: str
    kind: str
    n: int
    values: str

    @property
    def each(self) -> NDArray[np.float64]:
        """The value of each image or text, in [0, 1]."""
        if self.kind == "searches":
            return np.frombuffer(base64.b64decode(self.values), np.float16).astype(np.float64)
        return unpacked(self.values, self.n, None)


@dataclass(frozen=True)
class Images:
    """The images of a test set, ready for the model: float32 [N, 3, S, S], and their classes."""

    pixels: Tensor
    labels: NDArray[np.int64]


def judge(
    system: System, of: Collection, split: str, tests: Mapping[str, Images]
) -> dict[tuple[str, str], NDArray[Any]]:
    """The values of each kind and style: bool [N], or float16 of searches."""
    trained = np.array([label in of.splits[split] for label in of.classes])
    with torch.inference_mode():
        classes = system.embed_classes(of.classes, of.templates).float().cpu().numpy()
    found: dict[tuple[str, str], NDArray[Any]] = {}
    for style, images in tests.items():
        with torch.inference_mode():
            parts = [
                system.embed_images(some).float().cpu() for some in torch.split(images.pixels, 256)
            ]
        scores = torch.cat(parts).numpy() @ classes.T
        right_of_all = scores.argmax(axis=1) == images.labels
        for name, own in (("trained", trained), ("others", ~trained)):
            places = np.flatnonzero(own)
            rows = np.flatnonzero(own[images.labels])
            best = places[scores[np.ix_(rows, places)].argmax(axis=1)]
            found[name, style] = best == images.labels[rows]
            found[f"{name}, all labels", style] = right_of_all[rows]
        truth = images.labels[:, None] == np.flatnonzero(~trained)
        precisions = average_precisions(scores[:, ~trained], truth)
        found["searches", style] = precisions[~np.isnan(precisions)].astype(np.float16)
    return found


def opened(of: Collection, base: Base) -> dict[str, Images]:
    """The test sets, of the classes that the collection has."""
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    names = [split_label(label)[0] for label in of.classes]
    tests = {}
    for style, images in of.tests.items():
        pairs = [(path, names.index(name)) for name, paths in images.items() for path in paths]
        pixels = [transform(decode(path.read_bytes())) for path, _ in pairs]
        tests[style] = Images(torch.stack(pixels), np.array([label for _, label in pairs]))
    return tests


def measured(
    of: Collection,
    name: str,
    method: Method,
    split: str,
    seed: int,
    tests: Mapping[str, Images],
    given: Mapping[str, Any],
    folder: Path,
) -> list[Judged]:
    """Learn from the trained classes alone, and judge at every α.

    Args:
        of: the collection.
        name: of the method.
        method: that learns.
        split: of the classes.
        seed: of training.
        tests: of `opened`.
        given: further fields of the recipe.
        folder: of what was learned before.
    """
    with tempfile.TemporaryDirectory() as place:
        files = Path(place)
        trained = of.splits[split]
        (files / "classes.txt").write_text("\n".join(trained), encoding="utf-8")
        (files / "templates.txt").write_text("\n".join(of.templates), encoding="utf-8")
        images = {name: of.train[name] for name in (split_label(label)[0] for label in trained)}
        run = Run(
            {
                "architecture": f"{LOCAL}{BASE}",
                "data": table_of(images, files),
                "classes": files / "classes.txt",
                "templates": str(files / "templates.txt"),
                "seed": seed,
                "batch_size": min(BATCH, sum(map(len, images.values()))),
                **of.fields,
                **given,
            },
            folder,
        )
        result = learned(method, run)
        rows = []
        # Only plain CLIPs have a line to their base.
        for alpha in ALPHAS if result.system.clip() is not None else ALPHAS[-1:]:
            system = result.at(alpha)
            for (kind, style), values in judge(system, of, split, tests).items():
                rows.append(
                    Judged(
                        *(name, repr(method), split, seed, alpha, style, kind, len(values)),
                        _packed(values),
                    )
                )
    return rows


def _packed(values: NDArray[Any]) -> str:
    return packed(values) if values.dtype == bool else base64.b64encode(values.tobytes()).decode()


# The table


def table(rows: Sequence[Judged], base: Sequence[Judged], own: str) -> str:
    """Methods at each α down; what they lead the base by, across.

    Args:
        rows: of all methods.
        base: of the base.
        own: the style that is trained.
    """
    before = {(one.split, one.style, one.kind): one.each for one in base}
    grouped: dict[tuple[str, float], list[Judged]] = defaultdict(list)
    for one in rows:
        grouped[one.method, one.alpha].append(one)
    columns = [(kind, where) for kind in KINDS for where in ("own", "others")]
    figures = {}
    for key, of in grouped.items():
        for kind, where in columns:
            sets: dict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
            for one in of:
                if one.kind == kind and (one.style == own) == (where == "own"):
                    place = (one.split, one.style)
                    sets[place].append(one.each - before[one.split, one.style, kind])
            figures[key, kind, where] = lead_of([np.stack(each) for each in sets.values()])
    shown = corrected(figures)
    head = ["method", "α"]
    head += [
        f"{KINDS[kind]}, {'own style' if w == 'own' else 'other styles'}" for kind, w in columns
    ]
    level = ["base", "0"]
    for kind, where in columns:
        values = [
            one.each.mean()
            for one in base
            if one.kind == kind and (one.style == own) == (where == "own")
        ]
        level.append(f"{100 * float(np.mean(values)):.1f}")
    lines = [
        [method, f"{alpha:g}", *(shown[(method, alpha), kind, where] for kind, where in columns)]
        for method, alpha in grouped
    ]
    return markdown(head, [level, *lines])


def base_to_novel(rows: Sequence[Judged], own: str) -> str:
    """Accuracies in the trained style of trained and of other classes, in %, and their harmonic
    mean H, among themselves and among all labels; means over halves and seeds.
    """
    accuracies: dict[tuple[str, float], dict[str, list[float]]] = {}
    for one in rows:
        if one.style == own:
            kinds = accuracies.setdefault((one.method, one.alpha), defaultdict(list))
            kinds[one.kind].append(100 * float(one.each.mean()))
    lines = []
    for (method, alpha), kinds in accuracies.items():
        line = [method, f"{alpha:g}"]
        for among in ("", ", all labels"):
            pair = [mean(kinds[f"{classes}{among}"]) for classes in ("trained", "others")]
            line += [f"{value:.1f}" for value in (*pair, harmonic_mean(pair))]
        lines.append(line)
    head = [
        f"{name}{among}" for among in ("", ", all labels") for name in ("trained", "others", "H")
    ]
    return markdown(["method", "α", *head], lines)


def others(
    set_name: Literal["drawings", "pacs"],
    data_root: Path,
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 105,
    only: tuple[str, ...] = (),
    threads: int | None = None,
) -> None:
    """Train on one half of the classes and judge both, at every α; print it, write Markdown.

    Args:
        set_name: what to learn from.
        data_root: folder with drawings/ or pacs/.
        out: folder of others.md, and of others.jsonl, whose finished runs are not made again.
        seeds: each method learns once for each, on each half.
        steps: of a run.
        only: rows to make; all if none is given.
        threads: to compute with; one a core if none is given.
    """
    check_seeds(seeds)
    limit_threads(threads)
    of = collection(set_name, data_root)
    base = load_base(f"{LOCAL}{BASE}")
    tests = opened(of, base)
    system = System(base).eval()
    own = next(iter(of.tests))
    before = [
        Judged("base", "", split, 0, 0.0, style, kind, len(values), _packed(values))
        for split in of.splits
        for (kind, style), values in judge(system, of, split, tests).items()
    ]
    known = methods()
    path = out / "others.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [Judged(*cell["run"], *row) for cell in map(json.loads, lines) for row in cell["rows"]]
    given = {"steps": steps, "workers": 0, "threads": threads}
    have = {(one.method, one.settings, one.split, one.seed) for one in rows}
    for seed in seeds:
        for split in of.splits:
            for name, method in known.items():
                done = (name, repr(method), split, seed)
                if done in have or (only and name not in only):
                    continue
                say(f"{name}, {split}, seed {seed}")
                found = measured(of, name, method, split, seed, tests, given, out / "learned")
                rows += found
                cell = {"run": done, "rows": [astuple(one)[4:] for one in found]}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cell, separators=(",", ":")) + "\n")
    wanted = only or known
    shown = [one for one in rows if one.method in wanted and one.seed in seeds]
    parts = [
        "# What happens to the other classes",
        f"`{command_line('rivals.others')}`, {datetime.date.today()}, {machine()}.\n"
        f"The demo's base; {len(of.classes)} classes, of which one half is trained in its own style"
        f" ({own}) and the other half is judged too, then the other way round; seeds"
        f" {', '.join(map(str, seeds))}, {steps} steps of {BATCH} images. The base has accuracies"
        " in %, the others what they lead it by, in points. Splits and styles count alike.",
        "± is the half of a 95 % interval over images and seeds. **Bold** survives"
        " Holm's correction over the whole table. Nothing was chosen here: the rates were fixed"
        " before, and every α is shown.",
        table(shown, before, own),
        "**From base to novel classes**: accuracies in the trained style in %, H is their harmonic"
        " mean.",
        base_to_novel([*before, *shown], own),
    ]
    publish(parts, out / "others.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(others, argv, prog="python -m rivals.others")


if __name__ == "__main__":
    sys.exit(main())
