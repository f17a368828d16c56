"""`python -m rivals.others`: fine-tuning on half of the classes, and its effect on both halves, in
classification within the half, in classification among all labels, and in search.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.clip.base import Base, load_base
from radapter_serve.contract.images import decode
from radapter_serve.contract.labels import split_label
from radapter_serve.demo.data import BASE, prepare
from radapter_serve.evaluation.metrics import average_precisions
from radapter_serve.evaluation.rows import packed, unpacked
from radapter_serve.process import limit_threads
from radapter_serve.sources import LOCAL
from rivals.benchmark import check_seeds, table_of
from rivals.cells import keep_cell, read_cells
from rivals.layout import markdown, origin, publish, say
from rivals.method import Learned, Method, Run, System, learned, with_rate
from rivals.preserve import ImageTowerFineTuning, preserving
from rivals.radapter import r_adapter
from rivals.statistics import Lead, corrected, lead_of
from rivals.tables import AT_CHOSEN_RATE, PRESERVE

ALPHAS = (0.25, 0.5, 0.75, 1.0)
BATCH = 64  # images a step
SMALL = ("preserve, words", "0.5")  # the row with the fields of the recipe `small`, and its α
OTHER_DATA = "other data"
OTHER_NAMES = "other names"
OTHER_COLOURS = (
    "tab:blue",
    "tab:green",
    "tab:purple",
    "tab:brown",
    "tab:cyan",
    "tab:olive",
    "black",
)
INTERVALS = (
    "± is half of a 95 % interval over images and seeds; an image that is judged in both splits"
    " counts once, and so does a text of searches in all styles. **Bold** survives Holm's"
    " correction over the page. Where the base has less than twice chance for the other classes of"
    " a split among all labels, no mean of the splits is shown."
)
KINDS = {
    "trained": "trained classes",
    "trained, all labels": "trained, among all labels",
    "others": "others, among themselves",
    "others, all labels": "others, among all labels",
    "searches": "searches for others, mAP",
    OTHER_DATA: OTHER_DATA,
    OTHER_NAMES: "OpenMoji of other names",
}


@dataclass(frozen=True)
class Collection:
    """Images of all classes; a split trains half of the classes."""

    classes: tuple[str, ...]  # labels, synonyms after commas
    templates: tuple[str, ...]
    train: Mapping[str, Sequence[Path]]  # training images, by the first name of their class
    # Test images by style, the trained style first, and by class.
    tests: Mapping[str, Mapping[str, Sequence[Path]]]
    fields: Mapping[str, Any]  # of the recipe, for all methods

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """The trained classes by split: the first half, and the last."""
        half = (len(self.classes) + 1) // 2
        return {"first half": self.classes[:half], "last half": self.classes[-half:]}


def collection(name: str, data_root: Path) -> Collection:
    """Open pacs, drawings, which are drawn if missing, or openmoji, which only tests."""
    if name == "pacs":
        root = data_root / "pacs"
        styles = ("photo", "art_painting", "cartoon", "sketch")
        images = {style: by_class(root / style) for style in styles}
        # Every second photo of a class is for the test, the others for training.
        photos = images["photo"]
        tests = {**images, "photo": {label: paths[::2] for label, paths in photos.items()}}
        return Collection(
            classes=tuple(sorted(photos)),
            templates=("a photo of a {}.",),
            train={label: paths[1::2] for label, paths in photos.items()},
            tests=tests,
            fields={"crop_scale": 0.7, "flip": True},
        )
    data = prepare(data_root / "drawings")
    templates = tuple(data.templates.read_text(encoding="utf-8").splitlines())
    if name == "openmoji":
        emoji = {place.name: by_class(place) for place in sorted((data_root / name).iterdir())}
        return Collection(tuple(next(iter(emoji.values()))), templates, {}, emoji, {})
    return Collection(
        classes=tuple(data.classes.read_text(encoding="utf-8").splitlines()),
        templates=templates,
        train=by_class(data.train),
        tests={style: by_class(folder) for style, folder in data.test.items()},
        fields={"crop_scale": 0.9, "flip": False},
    )


def half_of(images: Collection, split: str, folder: Path) -> dict[str, Any]:
    """Write the trained half in a folder; returns the fields of a recipe that trains it."""
    trained = images.splits[split]
    classes = folder / "classes.txt"
    classes.write_text("\n".join(trained), encoding="utf-8")
    templates = folder / "templates.txt"
    templates.write_text("\n".join(images.templates), encoding="utf-8")
    names = [split_label(label)[0] for label in trained]
    data = table_of({name: images.train[name] for name in names}, folder)
    return {"data": data, "classes": classes, "templates": str(templates), **images.fields}


def by_class(folder: Path) -> dict[str, list[Path]]:
    """List the files of a folder of classes, by class."""
    return {
        place.name: sorted(path for path in place.iterdir() if path.is_file())
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }


def methods() -> dict[str, Method]:
    """List the rows at fixed rates: the recipe's for R-Adapter, and for rivals those chosen
    with validation data. Rows named "regularized" are rivals with the regularizers of `small`.

    Full fine-tuning trains the image tower under the base's text tower here. WiSE-FT and Mask-Fill
    learn a head for the trained classes, so they cannot recognise others.
    """
    rivals = {
        f"FT, image tower, {name}": with_rate(ImageTowerFineTuning(), rate)
        for name, rate in (("2.7e-4", 2.7e-4), ("9e-4", 9e-4))
    }
    rivals |= {
        name: AT_CHOSEN_RATE[name]
        for name in ("WiSE-FLYP", "FLYP, 3e-4", "LoRA", "LoRA, 0.019", "CLIP-SVD")
    }
    return {
        "R-Adapter": r_adapter("imagenet"),
        "preserve": r_adapter("imagenet", **PRESERVE),
        "preserve, words": r_adapter("imagenet", **PRESERVE, preserve_words=3.0),
        **rivals,
        **{f"{name}, regularized": preserving(method) for name, method in rivals.items()},
        **{
            name: method
            for name, method in AT_CHOSEN_RATE.items()
            if name.startswith(("CoOp", "CoCoOp", "MaPLe", "CLIPood"))
        },
    }


@dataclass(frozen=True)
class Judged:
    """Values of a model on a test set, for one of `KINDS`."""

    method: str
    settings: str  # `repr` of the method
    split: str
    seed: int
    alpha: float
    style: str
    kind: str
    n: int  # number of images, or of texts for searches
    # In base64: one bit for each image, set if it is right, or each text's average precision as
    # float16.
    values: str

    @property
    def each(self) -> NDArray[np.float64]:
        """The values of the images or texts, in [0, 1]."""
        if self.kind == "searches":
            return np.frombuffer(base64.b64decode(self.values), np.float16).astype(np.float64)
        return unpacked(self.values, self.n, None)


@dataclass(frozen=True)
class Images:
    """Images of a test set, float32 [N, 3, S, S], and their classes."""

    pixels: Tensor
    labels: NDArray[np.int64]


def judge(
    system: System, images: Collection, split: str, tests: Mapping[str, Images]
) -> dict[tuple[str, str], NDArray[Any]]:
    """Evaluate a system, by kind and style; values are bool [N], or float16 for searches."""
    trained = np.array([label in images.splits[split] for label in images.classes])
    values: dict[tuple[str, str], NDArray[Any]] = {}
    for style, scores in scores_of(system, images, tests).items():
        test = tests[style]
        right_of_all = scores.argmax(axis=1) == test.labels
        for name, half in (("trained", trained), ("others", ~trained)):
            places = np.flatnonzero(half)
            rows = np.flatnonzero(half[test.labels])
            best = places[scores[np.ix_(rows, places)].argmax(axis=1)]
            values[name, style] = best == test.labels[rows]
            values[f"{name}, all labels", style] = right_of_all[rows]
        truth = test.labels[:, None] == np.flatnonzero(~trained)
        precisions = average_precisions(scores[:, ~trained], truth)
        values["searches", style] = precisions[~np.isnan(precisions)].astype(np.float16)
    return values


@torch.inference_mode()
def scores_of(
    system: System, images: Collection, tests: Mapping[str, Images]
) -> dict[str, NDArray[np.float32]]:
    """Score the images of each style with all classes, float32 [N, C]."""
    classes = system.embed_classes(images.classes, images.templates).float().cpu().numpy()
    scores = {}
    for style, test in tests.items():
        parts = [
            system.embed_images(batch).float().cpu() for batch in torch.split(test.pixels, 256)
        ]
        scores[style] = torch.cat(parts).numpy() @ classes.T
    return scores


def judged_rows(
    values: Mapping[tuple[str, str], NDArray[Any]],
    name: str,
    settings: str,
    split: str,
    seed: int,
    alpha: float,
) -> list[Judged]:
    """Make rows of the values by kind and style."""
    return [
        Judged(name, settings, split, seed, alpha, style, kind, len(each), _packed(each))
        for (kind, style), each in values.items()
    ]


def read_tests(images: Collection, base: Base) -> dict[str, Images]:
    """Read the test sets, by style."""
    transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    names = [split_label(label)[0] for label in images.classes]
    tests = {}
    for style, by_class in images.tests.items():
        pairs = [(path, names.index(name)) for name, paths in by_class.items() for path in paths]
        pixels = [transform(decode(path.read_bytes())) for path, _ in pairs]
        tests[style] = Images(torch.stack(pixels), np.array([label for _, label in pairs]))
    return tests


def trained(
    images: Collection,
    method: Method,
    split: str,
    seed: int,
    fields: Mapping[str, Any],
    folder: Path,
) -> tuple[Learned, Sequence[float]]:
    """Train a method on the split's classes, with further fields of the recipe, or load the system
    that `folder` keeps; returns it and the α to evaluate.
    """
    with tempfile.TemporaryDirectory() as place:
        run = Run(
            {
                "architecture": f"{LOCAL}{BASE}",
                "seed": seed,
                "batch_size": BATCH,
                **half_of(images, split, Path(place)),
                **fields,
            },
            folder,
        )
        result = learned(method, run)
    # Other systems than plain CLIPs have no line to the base, so only the end is evaluated.
    return result, ALPHAS if result.system.clip() is not None else ALPHAS[-1:]


def _packed(values: NDArray[Any]) -> str:
    return packed(values) if values.dtype == bool else base64.b64encode(values.tobytes()).decode()


def names_of(
    images: Collection, tests: Mapping[str, Images]
) -> dict[tuple[str, str, str], NDArray[Any]]:
    """Name each of the values of `judge`, by split, kind and style. An image has one name in both
    splits, and the text of a search one in all styles, so that each counts once.
    """
    names: dict[tuple[str, str, str], NDArray[Any]] = {}
    for split, labels in images.splits.items():
        half = np.array([label in labels for label in images.classes])
        for style, test in tests.items():
            of_style = np.array([f"{style} {place}" for place in range(len(test.labels))])
            trained = half[test.labels]
            for kind, rows in (("trained", trained), ("others", ~trained)):
                names[split, kind, style] = of_style[rows]
                names[split, f"{kind}, all labels", style] = of_style[rows]
            texts = np.flatnonzero(~half)
            names[split, "searches", style] = texts[np.isin(texts, test.labels)].astype(str)
    return names


def averaged(images: Collection, base: Sequence[Judged], home: str) -> list[tuple[str, ...]]:
    """Group the splits of which means are taken: all, unless the base has less than twice chance
    for the other classes among all labels of one. That has nothing to lose, and stands apart.
    """
    chance = 1 / len(images.classes)
    for split, where in product(images.splits, (True, False)):
        values = [
            float(row.each.mean())
            for row in base
            if row.split == split
            and row.kind == "others, all labels"
            and (row.style == home) == where
        ]
        if values and mean(values) < 2 * chance:
            return [(name,) for name in images.splits]
    return [tuple(images.splits)]


def selected(
    rows: Sequence[Judged], splits: tuple[str, ...], kind: str, home: str, where: str
) -> list[Judged]:
    """Select rows of a kind in the trained style, or in the others; only of seeds that all splits
    have, in their order.
    """
    seeds = set.intersection(
        *({row.seed for row in rows if row.split == split} for split in splits)
    )
    return sorted(
        (
            row
            for row in rows
            if row.split in splits
            and row.seed in seeds
            and row.kind == kind
            and (row.style == home) == (where == "own")
        ),
        key=lambda row: row.seed,
    )


def lead(
    rows: Sequence[Judged],
    over: Callable[[Judged], NDArray[np.float64]],
    names: Mapping[tuple[str, str, str], NDArray[Any]],
) -> Lead:
    """Compute the mean lead of rows of one kind, over splits and styles of equal weight; `over` has
    the values that a row is compared with.
    """
    sets: dict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
    for row in rows:
        sets[row.split, row.style].append(row.each - over(row))
    return lead_of(
        [np.stack(seeds) for seeds in sets.values()],
        [names[split, rows[0].kind, style] for split, style in sets],
    )


def table(
    grouped: Mapping[tuple[str, str], Sequence[Judged]],
    base: Sequence[Judged],
    home: str,
    names: Mapping[tuple[str, str, str], NDArray[Any]],
    groups: Sequence[tuple[str, ...]],
) -> list[str]:
    """Make a table for each group of splits: the leads over the base, with one row for each method
    and α as shown; `home` is the trained style.
    """
    before = {(row.split, row.style, row.kind): row.each for row in base}
    columns = {
        splits: [
            (kind, where)
            for kind, where in product(KINDS, ("own", "others"))
            if selected(base, splits, kind, home, where)
        ]
        for splits in groups
    }
    leads = {}
    seeds = {}
    for splits, (key, rows) in product(groups, grouped.items()):
        for kind, where in columns[splits]:
            of_kind = selected(rows, splits, kind, home, where)
            if of_kind:
                seeds[splits, key] = len({row.seed for row in of_kind})
                leads[splits, key, kind, where] = lead(
                    of_kind, lambda row: before[row.split, row.style, row.kind], names
                )
    shown = defaultdict(str, corrected(leads))
    tables = []
    for splits in groups:
        level = ["base", "0"]
        for kind, where in columns[splits]:
            values = [row.each.mean() for row in selected(base, splits, kind, home, where)]
            level.append(f"{100 * float(np.mean(values)):.1f}")
        lines = []
        for method, alpha in grouped:
            key = (method, alpha)
            if (splits, key) in seeds:
                line = [_counted(method, seeds[splits, key], max(seeds.values())), alpha]
                lines.append([*line, *(shown[splits, key, kind, w] for kind, w in columns[splits])])
        head = ["method", "α", *map(_titled, columns[splits])]
        text = markdown(head, [level, *lines])
        if len(groups) > 1:
            text = f"**Trained: the {' and the '.join(splits)} of the classes.**\n\n{text}"
        tables.append(text)
    return tables


def _counted(method: str, seeds: int, most: int) -> str:
    """Name a row, with the number of its seeds if other rows have more."""
    return method if seeds == most else f"{method} ({seeds} {'seed' if seeds == 1 else 'seeds'})"


def _titled(column: tuple[str, str]) -> str:
    kind, where = column
    return f"{KINDS[kind]}, {'own style' if where == 'own' else 'other styles'}"


def at_equal_gain(
    grouped: Mapping[tuple[str, str], Sequence[Judged]],
    home: str,
    names: Mapping[tuple[str, str, str], NDArray[Any]],
    splits: tuple[str, ...],
) -> str:
    """Make a table of what each method leads the fields of `small` by, at that of its α, up to that
    of its largest gain, whose gain of trained classes in their own style is nearest; empty without
    a run of `small`.
    """
    of_small = grouped.get(SMALL)
    if not of_small:
        return ""
    small = {(row.split, row.style, row.kind, row.seed): row.each for row in of_small}
    seeds = {row.seed for row in of_small}

    def over_small(rows: Sequence[Judged], kind: str, where: str) -> Lead:
        paired = [row for row in selected(rows, splits, kind, home, where) if row.seed in seeds]
        return lead(paired, lambda row: small[row.split, row.style, row.kind, row.seed], names)

    # Choose each method's α. One above that of the largest gain would only lose more.
    gains: dict[str, dict[str, float]] = defaultdict(dict)
    for (method, alpha), rows in grouped.items():
        if method != SMALL[0] and selected(rows, splits, "trained", home, "own"):
            gains[method][alpha] = over_small(rows, "trained", "own").points
    nearest: dict[str, str] = {}
    for method, of_alphas in gains.items():
        peak = max(of_alphas, key=lambda alpha: (of_alphas[alpha], -float(alpha)))
        rising = [alpha for alpha in of_alphas if float(alpha) <= float(peak)]
        nearest[method] = min(rising, key=lambda alpha: abs(of_alphas[alpha]))
    columns = [
        (kind, where)
        for kind in ("trained", "others, all labels", OTHER_NAMES)
        for where in ("own", "others")
        if selected(of_small, splits, kind, home, where)
    ]
    leads = {
        (method, kind, where): over_small(grouped[method, alpha], kind, where)
        for method, alpha in nearest.items()
        for kind, where in columns
        if selected(grouped[method, alpha], splits, kind, home, where)
    }
    if not leads:
        return ""
    shown = defaultdict(str, corrected(leads))
    lines = []
    for method, alpha in nearest.items():
        rows = selected(grouped[method, alpha], splits, "trained", home, "own")
        line = [_counted(method, len({row.seed for row in rows} & seeds), len(seeds)), alpha]
        lines.append([*line, *(shown[method, kind, where] for kind, where in columns)])
    head = ["method", "α", *map(_titled, columns)]
    return (
        f"**At equal gain, trained: the {' and the '.join(splits)} of the classes.** What each"
        " method leads the fields of `small` (preserve, words; α 0.5) by, each at that of its α, up"
        " to that of its largest gain, whose gain of trained classes in their own style is nearest,"
        " on the test images. **Bold**"
        f" survives Holm's correction over this table.\n\n{markdown(head, lines)}"
    )


def base_to_novel(
    rows: Sequence[Judged], home: str, picture: Path, groups: Sequence[tuple[str, ...]]
) -> str:
    """Make a table of the accuracies in the trained style, of trained and of other classes in %,
    and their harmonic mean H, among themselves and among all labels. Each H is of one split and
    seed; the table has means over the splits of a group and the seeds.

    The picture shows trained classes on the x-axis, and the others, among all labels, on the
    y-axis, along α, for the first group.
    """
    accuracies: dict[tuple[str, float, str, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.style == home:
            place = (row.method, row.alpha, row.split, row.seed)
            accuracies[place][row.kind] = 100 * float(row.each.mean())
    lines = []
    paths: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for splits in groups:
        runs: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
        for (method, alpha, split, _), kinds in accuracies.items():
            if split in splits:
                runs[method, alpha].append(kinds)
        for (method, alpha), of_runs in runs.items():
            line = [method, f"{alpha:g}", *([] if len(groups) == 1 else splits)]
            for among in ("", ", all labels"):
                pairs = [
                    [kinds[f"{classes}{among}"] for classes in ("trained", "others")]
                    for kinds in of_runs
                ]
                line += [f"{mean(column):.1f}" for column in zip(*pairs, strict=True)]
                line.append(f"{mean(harmonic_mean(pair) for pair in pairs):.1f}")
            if splits == groups[0]:
                ends = ("trained", "others, all labels")
                x, y = (mean(kinds[kind] for kinds in of_runs) for kind in ends)
                paths[method].append((x, y))
            lines.append(line)

    # Draw each method from the base to its largest α, ours in red and the others apart by marker.
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    panel = figure.subplots()
    start = paths.pop("base")
    for number, (method, points) in enumerate(paths.items()):
        ours = method.startswith(("preserve", "R-Adapter", "rank"))
        panel.plot(
            *zip(*start, *points, strict=True),
            label=method,
            marker="osD^v<>PX*"[number % 10],
            markevery=slice(1, None),
            color="tab:red" if ours else OTHER_COLOURS[number % len(OTHER_COLOURS)],
            linewidth=2 if ours else 1,
            linestyle="-" if ours else "--",
        )
    panel.plot(*start[0], "k*", markersize=12, label="base")
    panel.axhline(start[0][1], color="grey", linewidth=1)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("trained classes, accuracy in %")
    panel.set_ylabel("other classes, among all labels, in %")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(picture)

    head = [
        f"{name}{among}" for among in ("", ", all labels") for name in ("trained", "others", "H")
    ]
    first = ["method", "α", *([] if len(groups) == 1 else ["trained"])]
    return markdown([*first, *head], lines)


def others(
    set_name: Literal["drawings", "pacs"],
    data_root: Path,
    out: Path,
    base: str = f"{LOCAL}{BASE}",
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 105,
    only: tuple[str, ...] = (),
    training: bool = True,
    threads: int | None = None,
) -> None:
    """Train on one half of the classes, and evaluate both, at every α; print and write Markdown.

    Args:
        set_name: images to learn from.
        data_root: folder with drawings/ or pacs/; if it has openmoji/ too, methods are evaluated on
            these drawings of other names (`benchmarks.drawings.unseen`).
        out: folder of others.md, of its picture, and of others.jsonl, which keeps finished runs, so
            that they are not repeated; each base needs a folder of its own.
        base: model to start from; by default the demo's.
        seeds: each method is trained once for each seed and half.
        steps: of a run.
        only: rows to make; by default all.
        training: make the runs that others.jsonl lacks; without, the page has those that are there.
        threads: to compute with; by default one a core.
    """
    check_seeds(seeds)
    limit_threads(threads)

    # Read the images, and the runs that the file has.
    images = collection(set_name, data_root)
    start = load_base(base)
    tests = read_tests(images, start)
    emoji = collection("openmoji", data_root) if (data_root / "openmoji").is_dir() else None
    emoji_tests = read_tests(emoji, start) if emoji else {}
    home = next(iter(images.tests))
    known = methods()
    path = out / "others.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = read_cells(path, lambda cell: [Judged(*cell["run"], *row) for row in cell["rows"]])
    rows = [row for of_run in done for row in of_run]
    kept = {(row.method, row.settings, row.split, row.seed) for row in rows}

    def judged_at(
        system: System, method: str, settings: str, split: str, seed: int, alpha: float
    ) -> list[Judged]:
        values = judge(system, images, split, tests)
        for style, scores in (scores_of(system, emoji, emoji_tests) if emoji else {}).items():
            right = scores.argmax(axis=1) == emoji_tests[style].labels
            values[OTHER_NAMES, f"openmoji, {style}"] = right
        return judged_rows(values, method, settings, split, seed, alpha)

    # Evaluate the base.
    for split in images.splits:
        key = ("base", "", split, 0)
        if key not in kept:
            judged = judged_at(System(start).eval(), *key, 0.0)
            rows += judged
            keep_cell(path, {"run": key, "rows": [astuple(row)[4:] for row in judged]})
    before = [row for row in rows if row.method == "base"]

    # Train and evaluate the methods.
    fields = {"architecture": base, "steps": steps, "workers": 0, "threads": threads}
    for seed in seeds:
        for split in images.splits:
            for name, method in known.items():
                key = (name, repr(method), split, seed)
                if key in kept or not training or (only and name not in only):
                    continue
                say(f"{name}, {split}, seed {seed}")
                result, alphas = trained(images, method, split, seed, fields, out / "learned")
                judged = []
                for alpha in alphas:
                    judged += judged_at(result.at(alpha), *key, alpha)
                rows += judged
                keep_cell(path, {"run": key, "rows": [astuple(row)[4:] for row in judged]})

    # Write the page.
    wanted = only or known
    shown = [
        row
        for row in rows
        if row.method in wanted
        and row.seed in seeds
        and row.settings == repr(known.get(row.method))  # leaves out runs with other settings
    ]
    grouped: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for row in shown:
        grouped[row.method, f"{row.alpha:g}"].append(row)
    groups = averaged(images, before, home)
    names = names_of(images, tests)
    for row in before:
        if row.kind == OTHER_NAMES:
            names[row.split, row.kind, row.style] = np.arange(row.n)  # alike in both styles
    parts = [
        "# What happens to the other classes",
        f"{origin('rivals.others')}\n"
        f"The demo's base, or that of --base; {len(images.classes)} classes, of which one half is"
        " trained in its own"
        f" style ({home}) and the other half is judged too, then the other way round; seeds"
        f" {', '.join(map(str, seeds))}, {steps} steps of {BATCH} images. The base has accuracies"
        " in %, the others what they lead it by, in points. Splits and styles count alike. OpenMoji"
        " has drawings of names outside the 248 classes of drawings, in colour and as lines, each"
        " judged among all these names; nothing was ever chosen with them.",
        f"{INTERVALS} Nothing was chosen here: the rates were fixed before, those of rivals with"
        " validation on the same data, and every α is shown. Rows named regularized"
        " have the regularizers of `small`, `preserve` and `preserve_words`.",
        *table(grouped, before, home, names, groups),
        *filter(None, (at_equal_gain(grouped, home, names, splits) for splits in groups)),
        "**From base to novel classes**: accuracies in the trained style in %, H is their harmonic"
        " mean.",
        base_to_novel([*before, *shown], home, out / "others.png", groups),
    ]
    publish(parts, out / "others.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(others, argv, prog="python -m rivals.others")


if __name__ == "__main__":
    sys.exit(main())
