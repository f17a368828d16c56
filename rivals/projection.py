"""`python -m rivals.projection`: adapters on the projections, trained with embeddings, beside
classifiers on the same embeddings and beside the stored cells of methods that train towers.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from radapter_serve.cli import run as run_command
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, encode_texts, logit_scale_and_bias
from radapter_serve.contract.images import decode
from radapter_serve.contract.labels import prompts_of, split_label
from radapter_serve.demo.data import BASE
from radapter_serve.evaluation.image_sets import NOUN_TEMPLATES, common_nouns
from radapter_serve.process import limit_threads
from radapter_serve.sources import LOCAL
from radapter_serve.training.embedding import Vectors
from radapter_serve.training.loop import vocabulary
from radapter_serve.training.projection import (
    WITHOUT_FOLDS,
    Maps,
    choose,
    cross_validate,
    folds_of,
    learn,
    moved,
)
from radapter_serve.training.recipe import Recipe, load_recipe
from radapter_serve.training.setup import loss_of
from rivals.benchmark import check_seeds
from rivals.cells import keep_cell, read_cells
from rivals.layout import markdown, origin, publish, say
from rivals.others import OTHER_DATA, Collection, Judged, collection, judge, judged_rows, names_of
from rivals.others import Images as TestSet
from rivals.pacs import PARTS
from rivals.statistics import Lead, corrected, lead_of

SIDES = {
    "text's projection": ("text",),
    "image's projection": ("image",),
    "both projections": ("text", "image"),
}
FIXED = (0.5, 1.0)  # α beside the one chosen with cross-validation
LEAST = 10  # images or texts of a set that a figure has, for an interval that tells something
EXAMPLES = "labels by example"
HEADS = ("ridge", "linear probe")  # know what they were trained with, and no other class
PHOTOS = "Flickr8k"
CAPTIONS = 5  # of each of its photos
FLICKR = f"{PHOTOS}, text to image, R@5"
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # of ridge and linear probe
THINGS = 90  # the last number of a thing in COCO; what follows is stuff, such as sky
OBJECT = 0.02  # least share of a photo that an object of COCO covers
MARGIN = 1.2  # side of its crop, in sides of its box
BATCH = 64
Embeds = NDArray[np.float32]
Test = Literal["halves", "shots", "captions", "objects"]


@dataclass
class Embedder:
    """A base, and the files that keep its embeddings of images; texts are embedded once a run."""

    base: Base
    folder: Path

    def __post_init__(self) -> None:
        self.known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def images(self, name: str, images: Sequence[Path | Image.Image]) -> Tensor:
        """Embed images at unit length, [N, D], or read the file of that name."""
        file = self.folder / f"{name}.npy"
        if file.is_file():
            return torch.from_numpy(np.load(file))
        say(f"embedding {len(images):,} images: {name}")
        transform = image_transform_v2(PreprocessCfg(**self.base.preprocess), is_train=False)
        parts = []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            opened = [decode(i.read_bytes()) if isinstance(i, Path) else i for i in batch]
            parts.append(encode_image(self.base.model, torch.stack([*map(transform, opened)])))
        embeds = torch.cat(parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, embeds.numpy())
        return embeds.clone()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts at unit length, [N, D]."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            embeds = encode_texts(self.base.model, self.base.tokenizer(new))
            self.known |= dict(zip(new, embeds.clone(), strict=True))
        return torch.stack([self.known[text] for text in texts])


@dataclass(frozen=True)
class Moved:
    """A base whose finished embeddings are moved by adapters at an α, as `others.judge` takes it:
    its images are embeddings by the base.
    """

    embedder: Embedder
    maps: Maps
    alpha: float

    def embed_images(self, embeds: Tensor) -> Tensor:
        with torch.no_grad():
            return moved(self.maps, "image", embeds, self.alpha)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return moved(self.maps, "text", self.embedder.texts(texts), self.alpha)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        prompts = [prompts_of(split_label(line), templates) for line in classes]
        means = [self.embed_texts(each).mean(dim=0) for each in prompts]
        return F.normalize(torch.stack(means), dim=-1)


@dataclass(frozen=True)
class Classifier(Moved):
    """The base with its own embedding for some classes; zeros are classes that it can't name."""

    rows: Mapping[str, Tensor]
    keeps_others: bool

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        embeds = super().embed_classes(classes, templates)
        if not self.keeps_others:
            embeds = torch.zeros_like(embeds)
        for place, line in enumerate(classes):
            if line in self.rows:
                embeds[place] = self.rows[line]
        return embeds


@dataclass(frozen=True)
class Task:
    """What is learned: embeddings of images, the number of each image's class, and the classes."""

    images: Tensor
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def vectors(self, embedder: Embedder) -> Vectors:
        """Join all that training takes."""
        lines = [split_label(line) for line in self.classes]
        trained = [prompts_of(line[:1], self.templates) for line in lines]
        prompts = [prompts_of(line, self.templates) for line in lines]
        words = vocabulary(self.classes)
        nouns = [
            prompts_of([noun], NOUN_TEMPLATES)[0]
            for noun in common_nouns([name for line in lines for name in line])
        ]
        texts = list(dict.fromkeys(itertools.chain(*trained, *prompts)))
        number_of = {text: number for number, text in enumerate(texts)}
        return Vectors(
            images=self.images,
            owners=torch.from_numpy(self.labels)[:, None],
            texts=embedder.texts(texts),
            texts_of=[[number_of[text] for text in each] for each in trained],
            names=[[number_of[text] for text in each] for each in prompts],
            words=embedder.texts(words),
            nouns=embedder.texts(nouns),
            of_classes=True,
        )


def learned(
    vectors: Vectors, sides: tuple[str, ...], base: Base, recipe: Recipe
) -> tuple[Maps, float]:
    """Train with the product's functions as `radapter-train` does; returns the adapters and the α
    chosen with cross-validation.
    """
    scale, _ = logit_scale_and_bias(base.model.state_dict())
    train = partial(learn, sides=sides, scale=scale, loss=loss_of(base, recipe))
    choice = choose(vectors, cross_validate(vectors, recipe, train), recipe.alpha, "")
    [maps] = train(vectors, [np.arange(len(vectors.images))], recipe)
    return maps, choice.alpha if choice else WITHOUT_FOLDS


def heads(task: Task, name: str, folds: NDArray[np.int64]) -> dict[str, Tensor]:
    """Train a classifier on embeddings from zero; folds choose its strength, the largest of those
    that are equal.
    """
    images = task.images.double()
    labels = torch.from_numpy(task.labels)
    count = len(task.classes)

    def fit(rows: NDArray[np.bool_], strength: float) -> Tensor:
        x = images[rows]
        y = labels[rows]
        if name == "ridge":
            targets = F.one_hot(y, count).double() - 1 / count
            gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
            solved: Tensor = torch.linalg.solve(gram, x.T @ targets)
            return solved.T
        weight = torch.zeros(count, x.shape[1], dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight.T, y) + strength * weight.square().sum() / 100
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return weight.detach()

    right = dict.fromkeys(STRENGTHS, 0)
    for fold in range(folds.max() + 1):
        held_out = folds == fold
        for strength in STRENGTHS:
            scores = images[held_out] @ fit(~held_out, strength).T
            right[strength] += int((scores.argmax(dim=1) == labels[held_out]).sum())
    best = max(STRENGTHS, key=lambda strength: (right[strength], strength))
    if not (folds >= 0).any():
        best = STRENGTHS[len(STRENGTHS) // 2]
    weights = fit(np.ones(len(labels), bool), best).float()
    return dict(zip(task.classes, weights, strict=True))


def systems(task: Task, embedder: Embedder, recipe: Recipe) -> Iterator[tuple[str, float, Moved]]:
    """Train all rows on embeddings; gives names, α and systems."""
    vectors = task.vectors(embedder)
    for name, sides in SIDES.items():
        maps, alpha = learned(vectors, sides, embedder.base, recipe)
        yield f"{name}, α from cross-validation", alpha, Moved(embedder, maps, alpha)
        for fixed in FIXED:
            yield f"{name}, α {fixed:g}", fixed, Moved(embedder, maps, fixed)
    means = {}
    plain = Moved(embedder, {}, 0.0)
    texts = plain.embed_classes(task.classes, task.templates)
    for number, line in enumerate(task.classes):
        shown = F.normalize(task.images[task.labels == number].sum(dim=0), dim=-1)
        means[line] = F.normalize(texts[number] + shown, dim=-1)
    yield EXAMPLES, 0.5, Classifier(embedder, {}, 0.0, means, True)
    folds = folds_of(vectors, recipe.seed)
    for name in HEADS:
        yield name, 1.0, Classifier(embedder, {}, 0.0, heads(task, name, folds), False)


def few(labels: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """Draw a few images of each class as `--shots` does; more shots include those of fewer."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[np.flatnonzero(labels[order] == n)[:shots]] for n in range(labels.max() + 1)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Elsewhere:
    """Other data, with which no row was trained: images of named classes by set, and photos with
    captions, if any.
    """

    sets: Mapping[str, tuple[TestSet, tuple[str, ...]]]
    photos: Tensor | None = None
    captions: tuple[tuple[str, ...], ...] = ()

    def judge(self, system: Moved) -> dict[tuple[str, str], NDArray[Any]]:
        """Evaluate a system by kind and set."""
        values: dict[tuple[str, str], NDArray[Any]] = {}
        for name, (images, classes) in self.sets.items():
            embeds = system.embed_classes(classes, ("a photo of a {}.",))
            best = (system.embed_images(images.pixels) @ embeds.T).argmax(dim=1)
            values[OTHER_DATA, name] = best.numpy() == images.labels
        if self.photos is not None:
            values[OTHER_DATA, FLICKR] = retrieved(system, self.photos, self.captions)
        return values


def retrieved(
    system: Moved, photos: Tensor, captions: Sequence[Sequence[str]], top: int = 5
) -> NDArray[np.bool_]:
    """Whether each caption finds its photo among the `top` nearest."""
    with torch.no_grad():
        texts = system.embed_texts([text for each in captions for text in each])
        scores = (texts @ system.embed_images(photos).T).numpy()
    owners = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    right = scores[np.arange(len(owners)), owners]
    return np.asarray((scores > right[:, None]).sum(axis=1) < top)


def flickr(
    folder: Path, part: str, embedder: Embedder
) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """Open the photos and captions of a part of Flickr8k."""
    captions: dict[Path, list[str]] = defaultdict(list)
    with (folder / "flickr8k" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions[folder / "flickr8k" / row["image"]].append(row["caption"])
    photos = embedder.images(f"flickr-{part}", list(captions))
    return photos, tuple(tuple(each) for each in captions.values())


def coco(folder: Path, part: str, out: Path) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
    """Crop the objects of COCO's photos, a thing's pixels in a photo each, into a folder; returns
    the names of all things, and the crops by name.
    """
    names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    things = tuple(name for number, name in names.items() if 0 < int(number) <= THINGS)
    crops: dict[str, list[Path]] = {}
    for path in sorted((folder / part / "masks").glob("*.png")):
        mask = np.array(Image.open(path))
        image = Image.open(next((folder / part / "images").glob(f"{path.stem}.*"))).convert("RGB")
        for number in np.unique(mask).tolist():
            inside = mask == number
            if not 0 < number <= THINGS or inside.mean() < OBJECT:
                continue
            ys, xs = np.nonzero(inside)
            half = MARGIN * max(np.ptp(ys) + 1, np.ptp(xs) + 1) / 2
            y = (ys.min() + ys.max() + 1) / 2
            x = (xs.min() + xs.max() + 1) / 2
            right = min(image.width, int(x + half))
            bottom = min(image.height, int(y + half))
            file = out / part / names[str(number)] / f"{path.stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.crop((max(0, int(x - half)), max(0, int(y - half)), right, bottom)).save(file)
            crops.setdefault(names[str(number)], []).append(file)
    return things, crops


@dataclass(frozen=True)
class Chosen(Collection):
    """Images of all classes; each split trains the classes that it names."""

    trained: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        return dict(self.trained)


@dataclass
class Study:
    """A base and a collection: the embeddings of all images, and what is judged elsewhere."""

    embedder: Embedder
    name: str
    images: Collection
    elsewhere: Elsewhere | None
    seeds: tuple[int, ...]
    recipe: Recipe

    def __post_init__(self) -> None:
        # Embed each style as a whole, so that a file serves every split.
        self.places: dict[Path, Tensor] = {}
        parts = {
            **{f"test-{s}": t for s, t in self.images.tests.items()},
            "train": self.images.train,
        }
        for part, by_class in parts.items():
            paths = [path for paths in by_class.values() for path in paths]
            rows = self.embedder.images(f"{self.name}-{part}", paths)
            self.places |= dict(zip(paths, rows, strict=True))
        self.names = [split_label(line)[0] for line in self.images.classes]
        self.tests = {style: self.test(by_class) for style, by_class in self.images.tests.items()}

    def test(self, by_class: Mapping[str, Sequence[Path]]) -> TestSet:
        """Join the embeddings of images by class."""
        pairs = [(path, name) for name, paths in by_class.items() for path in paths]
        labels = np.array([self.names.index(name) for _, name in pairs])
        return TestSet(torch.stack([self.places[path] for path, _ in pairs]), labels)

    def task(self, split: str, seed: int, shots: int | None) -> Task:
        """The training images of a split, or some of each class."""
        classes = self.images.splits[split]
        names = [split_label(line)[0] for line in classes]
        pairs = [(path, n) for n, name in enumerate(names) for path in self.images.train[name]]
        labels = np.array([label for _, label in pairs])
        embeds = torch.stack([self.places[path] for path, _ in pairs])
        if shots is not None:
            rows = few(labels, shots, seed)
            labels = labels[rows]
            embeds = embeds[rows]
        return Task(embeds, labels, classes, self.images.templates)

    def judged(self, system: Moved, name: str, split: str, seed: int, alpha: float) -> list[Judged]:
        """Evaluate a system; a classifier of the trained classes on these alone."""
        values: dict[tuple[str, str], NDArray[Any]] = {}
        if self.images.splits[split] == self.images.classes:
            classes = system.embed_classes(self.images.classes, self.images.templates)
            for style, test in self.tests.items():
                best = (system.embed_images(test.pixels) @ classes.T).argmax(dim=1)
                values["trained", style] = best.numpy() == test.labels
        else:
            values = judge(system, self.images, split, self.tests)  # type: ignore[arg-type]
        if name in HEADS:
            values = {key: value for key, value in values.items() if key[0] == "trained"}
        elif self.elsewhere is not None:
            values |= self.elsewhere.judge(system)
        values = {key: value for key, value in values.items() if len(value) >= LEAST}
        return judged_rows(values, name, "", split, seed, alpha)

    def base(self) -> list[Judged]:
        """Evaluate the base."""
        plain = Moved(self.embedder, {}, 0.0)
        return [
            row for split in self.images.splits for row in self.judged(plain, "base", split, 0, 0.0)
        ]

    def rows(self, path: Path, shots: int | None = None) -> list[Judged]:
        """Train and evaluate all rows, except for those that the file of cells has."""
        cells = read_cells(path, lambda cell: [Judged(*row) for row in cell["rows"]])
        rows = [row for cell in cells for row in cell if row.n >= LEAST]
        done = {(row.split, row.seed) for row in rows}
        for seed, split in product(self.seeds, self.images.splits):
            if (split, seed) in done:
                continue
            say(f"{path.stem}: {split}, seed {seed}")
            recipe = dataclasses.replace(self.recipe, seed=seed)
            task = self.task(split, seed, shots)
            new = []
            for name, alpha, system in systems(task, self.embedder, recipe):
                new += self.judged(system, name, split, seed, alpha)
            keep_cell(path, {"rows": [astuple(row) for row in new]})
            rows += new
        return rows


Column = tuple[str, bool]  # kind, and whether in the trained style
LABELS = {
    "trained": "trained classes",
    "trained, all labels": "trained, among all",
    "others": "others, among themselves",
    "others, all labels": "others, among all",
    "searches": "searches for others, mAP",
    OTHER_DATA: OTHER_DATA,
}


def by_set(
    rows: Sequence[Judged], base: Sequence[Judged], column: Column, home: str
) -> dict[tuple[str, str], dict[int, NDArray[np.float64]]]:
    """Each image's difference to the base, by split, style and seed."""
    kind, in_own = column
    before = {(row.split, row.style, row.kind): row.each for row in base}
    sets: dict[tuple[str, str], dict[int, NDArray[np.float64]]] = defaultdict(dict)
    for row in rows:
        if row.kind == kind and (row.style == home) == in_own:
            key = (row.split, row.style, kind)
            difference = row.each - before[key]
            if row.style.startswith(PHOTOS):  # the captions of a photo are one sample
                difference = difference.reshape(-1, CAPTIONS).mean(axis=1)
            sets[row.split, row.style][row.seed] = difference
    return sets


Names = Mapping[tuple[str, str, str], NDArray[Any]]  # by split, kind and style, as of `names_of`


def leads(
    groups: Mapping[str, Sequence[Judged]],
    base: Sequence[Judged],
    columns: Sequence[Column],
    home: str,
    names: Names,
) -> dict[tuple[str, Column], Lead]:
    """Compute the leads of all rows over the base."""
    measured = {}
    for name, column in product(groups, columns):
        if sets := by_set(groups[name], base, column, home):
            measured[name, column] = _lead(sets, column[0], names)
    return measured


def _lead(
    sets: Mapping[tuple[str, str], Mapping[int, NDArray[np.float64]]], kind: str, names: Names
) -> Lead:
    """Compute a lead from differences by split and style, each by seed, or by base."""
    values = [np.stack([*each.values()]) for each in sets.values()]
    named = []
    for (split, style), of_seeds in zip(sets, values, strict=True):
        # Both splits have the same other data, and images of their own otherwise.
        place = style if kind == OTHER_DATA else (split, style)
        numbers = np.array([f"{place}/{number}" for number in range(of_seeds.shape[1])])
        named.append(names.get((split, kind, style), numbers))
    return lead_of(values, named)


def _titled(column: Column) -> str:
    kind, in_own = column
    return f"{LABELS[kind]}, {'own style' if in_own else 'elsewhere'}"


def over_bases(
    studies: Sequence[tuple[Sequence[Judged], Sequence[Judged]]],
    home: str,
    against: tuple[str, str] | None = None,
) -> str:
    """Make the table of leads over several bases from the rows and the base's rows of each. The
    seeds of a base are averaged, so that the interval is over images and bases. `against` names two
    methods, for a row of the first's lead over the second.
    """
    there = {(row.kind, row.style == home) for row in studies[0][1]}
    columns = [column for column in product(LABELS, (True, False)) if column in there]
    names = dict.fromkeys(row.method for row in studies[0][0])

    def joined(name: str, column: Column) -> dict[tuple[str, str], dict[int, NDArray[np.float64]]]:
        sets: dict[tuple[str, str], dict[int, NDArray[np.float64]]] = defaultdict(dict)
        for number, (rows, base) in enumerate(studies):
            of_method = [row for row in rows if row.method == name]
            for key, of_seeds in by_set(of_method, base, column, home).items():
                sets[key][number] = np.mean([*of_seeds.values()], axis=0)
        return sets

    measured = {}
    for name, column in product(names, columns):
        if sets := joined(name, column):
            measured[name, column] = _lead(sets, column[0], {})
    if against:
        title = f"{against[0]}, ahead of {against[1]}"
        names[title] = None
        for column in columns:
            ours, theirs = (joined(name, column) for name in against)
            differences = {
                key: {number: values - theirs[key][number] for number, values in by_base.items()}
                for key, by_base in ours.items()
            }
            if differences:
                measured[title, column] = _lead(differences, column[0], {})
    shown = corrected(measured)
    level = ["bases, in %"]
    for kind, in_own in columns:
        of_bases = [
            np.mean([r.each.mean() for r in base if r.kind == kind and (r.style == home) == in_own])
            for _, base in studies
        ]
        level.append(" ".join(f"{100 * value:.1f}" for value in of_bases))
    lines = [[name, *(shown.get((name, column), "") for column in columns)] for name in names]
    return markdown(["", *map(_titled, columns)], [level, *lines])


def table(
    groups: Mapping[str, Sequence[Judged]], base: Sequence[Judged], home: str, names: Names
) -> str:
    """Make a table of leads over the base, by kind in the trained style and in all others."""
    there = {(row.kind, row.style == home) for row in base}
    columns = [column for column in product(LABELS, (True, False)) if column in there]
    shown = corrected(leads(groups, base, columns, home, names))
    level = ["base, in %"]
    for kind, in_own in columns:
        values = [r.each.mean() for r in base if r.kind == kind and (r.style == home) == in_own]
        level.append(f"{100 * float(np.mean(values)):.1f}")
    lines = [[name, *(shown.get((name, column), "") for column in columns)] for name in groups]
    return markdown(["", *map(_titled, columns)], [level, *lines])


def lead_over(
    rows: Sequence[Judged],
    other: Sequence[Judged],
    base: Sequence[Judged],
    column: Column,
    home: str,
    names: Names,
    share: float = 1.0,
) -> Lead:
    """Compute what is gained beyond a share of another row's gain, in the seeds of both."""
    others = by_set(other, base, column, home)
    sets = {}
    for key, ours in by_set(rows, base, column, home).items():
        theirs = others[key]
        seeds = sorted(ours.keys() & theirs.keys())
        sets[key] = {seed: ours[seed] - share * theirs[seed] for seed in seeds}
    return _lead(sets, column[0], names)


def halves(study: Study, out: Path, stored: Path) -> str:
    """Make the table of what half of the classes gains and the other loses, beside the stored
    cells of methods that trained the same halves of the same base by their images.
    """
    base = study.base()
    home = next(iter(study.images.tests))
    groups: dict[str, list[Judged]] = defaultdict(list)
    for row in study.rows(out / f"halves-{study.name}.jsonl"):
        groups[row.method].append(row)
    rivals: dict[str, list[Judged]] = defaultdict(list)
    for row in _stored_rows(stored):
        if {(r.style, r.n) for r in base if r.kind == row.kind} >= {(row.style, row.n)}:
            rivals[f"{row.method}, α {row.alpha:g}"].append(row)
    groups |= {
        name: of_rival
        for name, of_rival in rivals.items()
        if len({row.seed for row in of_rival}) >= FEWEST
    }
    # A text of a search counts once in all styles.
    all_names = names_of(study.images, study.tests)
    names = {place: each for place, each in all_names.items() if place[1] == "searches"}
    parts = [table(groups, base, home, names)]

    # By half, since a mean hides a half in which the base has nothing to lose.
    for split in study.images.splits:
        of_split = {
            name: [row for row in rows if row.split == split] for name, rows in groups.items()
        }
        here = [row for row in base if row.split == split]
        parts += [f"**{split.capitalize()} trained**", table(of_split, here, home, names)]
    if SMALL not in groups:
        return "\n\n".join(parts)

    # Compare each row with ours.
    over = {
        (name, column): lead_over(of_method, groups[OURS], base, column, home, names)
        for name, of_method in groups.items()
        for column in COMPARED
        if name not in (OURS, *HEADS)
    }
    shown = corrected(over)
    lines = [
        [name, *(shown[name, column] for column in COMPARED)]
        for name in dict.fromkeys(name for name, _ in over)
    ]
    head = ["", *map(_titled, COMPARED)]
    parts += [f"**Ahead of the {OURS}**", markdown(head, lines)]
    lines = []
    for name, column in product(groups, RULED):
        if "projection" in name:
            against = (groups[name], groups[SMALL], base, column, home, names)
            ahead = lead_over(*against)
            beyond = lead_over(*against, share=2 / 3)
            lines.append([name, LABELS[column[0]], str(ahead), str(beyond)])
    head = ["", "own style", "ahead of `small`", "gain beyond two thirds of that of `small`"]
    parts += ["**Against the recipe `small` at α 0.5**", markdown(head, lines)]
    return "\n\n".join(parts)


FEWEST = 3  # seeds of a stored row
BESIDE = (
    " Rows below the linear probe have the stored cells of methods that train towers (three seeds;"
    " `drawings/default`, `drawings/others`): `small`, and rivals at rates chosen with validation"
    " data. FT is full fine-tuning of the image tower with the base's text tower, and its line at"
    " α 0.5 is WiSE-FT. Rows named regularized have the regularizers of `small`. Mask-Fill, and"
    " WiSE-FT as published, learn a head for the trained classes, so they can't name others."
)
OURS = "text's projection, α 0.5"
SMALL = "small, α 0.5"
COMPARED: tuple[Column, ...] = (
    ("trained", True),
    ("trained", False),
    ("others", False),
    ("others, all labels", False),
    ("searches", False),
)
RULED: tuple[Column, ...] = (
    ("trained", True),
    ("trained, all labels", True),
    ("others, all labels", True),
    ("searches", True),
)


def _stored_rows(folder: Path) -> Iterator[Judged]:
    """Read the cells of `rivals.default` and `rivals.others`, if the folder has them, at the α that
    all rows have.
    """
    path = folder / "default" / "default.jsonl"
    for rows in read_cells(path, lambda cell: [Judged(*row) for row in cell["rows"]]):
        yield from (row for row in rows if row.method == "small" and row.alpha in FIXED)
    path = folder / "others" / "others.jsonl"
    for rows in read_cells(path, lambda cell: [Judged(*cell["run"], *row) for row in cell["rows"]]):
        yield from (row for row in rows if row.alpha in FIXED)


def shots(study: Study, out: Path, numbers: Sequence[int]) -> str:
    """Make the table of a few images of each class."""
    base = study.base()
    home = next(iter(study.images.tests))
    measured: dict[tuple[str, str], Lead] = {}
    names: dict[str, None] = {}
    heads = []
    for number, in_own in product(numbers, (True, False)):
        rows = study.rows(out / f"shots-{study.name}-{number}.jsonl", number)
        groups: dict[str, list[Judged]] = defaultdict(list)
        for row in rows:
            groups[row.method].append(row)
        head = f"{number} a class, {home if in_own else 'other styles'}"
        heads.append(head)
        column = ("trained", in_own)
        for (name, _), lead in leads(groups, base, [column], home, {}).items():
            measured[name, head] = lead
            names[name] = None
    shown = corrected(measured)
    level = []
    for in_own in (True, False):
        values = [
            r.each.mean() for r in base if r.kind == "trained" and (r.style == home) == in_own
        ]
        level.append(f"{100 * float(np.mean(values)):.1f}")
    lines = [["base, in %", *level * len(numbers)]]
    lines += [[name, *(shown[name, head] for head in heads)] for name in names]
    return markdown(["", *heads], lines)


def captions(study: Study, folder: Path, out: Path) -> str:
    """Make the table of a search by captions, trained with other photos and their captions."""
    embedder = study.embedder
    photos, texts = flickr(folder, "val", embedder)
    tests = flickr(folder, "test", embedder)
    flat = [text for each in texts for text in each]
    starts = np.cumsum([0, *map(len, texts)])
    numbers = [list(range(a, b)) for a, b in itertools.pairwise(starts.tolist())]
    vectors = Vectors(
        images=photos,
        owners=torch.arange(len(photos))[:, None],
        texts=embedder.texts(flat),
        texts_of=numbers,
        names=numbers,
        words=embedder.texts(vocabulary(())),
        nouns=embedder.texts([prompts_of([n], NOUN_TEMPLATES)[0] for n in common_nouns([])]),
        of_classes=False,
    )

    def judged(system: Moved, name: str, seed: int, alpha: float) -> list[Judged]:
        right = {(f"R@{top}", PHOTOS): retrieved(system, *tests, top) for top in (1, 5)}
        return judged_rows(right, name, "", "all", seed, alpha)

    # Train and evaluate, except for the seeds that the file has.
    path = out / "captions.jsonl"
    cells = read_cells(path, lambda cell: [Judged(*row) for row in cell["rows"]])
    rows = [row for cell in cells for row in cell]
    done = {row.seed for row in rows}
    for seed in study.seeds:
        if seed in done:
            continue
        say(f"captions: seed {seed}")
        new = []
        for name, sides in SIDES.items():
            recipe = dataclasses.replace(study.recipe, seed=seed, task="retrieval")
            maps, alpha = learned(vectors, sides, embedder.base, recipe)
            for label, value in (("from cross-validation", alpha), *((f"{a:g}", a) for a in FIXED)):
                new += judged(Moved(embedder, maps, value), f"{name}, α {label}", seed, value)
        keep_cell(path, {"rows": [astuple(row) for row in new]})
        rows += new

    base = judged(Moved(embedder, {}, 0.0), "base", 0, 0.0)
    groups: dict[str, list[Judged]] = defaultdict(list)
    for row in rows:
        groups[row.method].append(row)
    columns: list[Column] = [(f"R@{top}", True) for top in (1, 5)]
    shown = corrected(leads(groups, base, columns, PHOTOS, {}))
    lines = [["base, in %", *(f"{100 * row.each.mean():.1f}" for row in base)]]
    lines += [[name, *(shown[name, column] for column in columns)] for name in groups]
    return markdown(["", *(f"text to image, {kind}" for kind, _ in columns)], lines)


def photos_of(root: Path) -> Chosen:
    """Open PACS as `rivals.pacs` divides it: photos to train with and to test, and other styles;
    sketches chose, and are no test.
    """
    whole = collection("pacs", root)
    train: dict[str, list[Path]] = {}
    test: dict[str, list[Path]] = {}
    for folder in sorted((root / "pacs" / "photo").iterdir()):
        photos = sorted(folder.iterdir())
        parts = [PARTS[number % len(PARTS)] for number in range(len(photos))]
        train[folder.name] = [p for p, part in zip(photos, parts, strict=True) if part == "train"]
        test[folder.name] = [p for p, part in zip(photos, parts, strict=True) if part == "test"]
    styles = {style: whole.tests[style] for style in ("art_painting", "cartoon")}
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    changed = {"train": train, "tests": {"photo": test, **styles}}
    return Chosen(**{**fields, **changed}, trained={"all": whole.classes})


def projection(
    data_root: Path,
    vectors: tuple[Path, ...],
    out: Path,
    base: tuple[str, ...] = (f"{LOCAL}{BASE}",),
    only: tuple[Test, ...] = ("halves", "shots", "captions", "objects"),
    stored: Path = Path("benchmarks/results"),
    numbers: tuple[int, ...] = (1, 2, 4, 8, 16),
    seeds: tuple[int, ...] = (0, 1, 2),
    threads: int | None = None,
) -> None:
    """Train adapters on the projections of a base with embeddings, evaluate them beside labels by
    example, ridge, a linear probe and the stored cells of other methods; print and write Markdown.

    Args:
        data_root: folder with pacs/ and, for the demo's base, drawings/, which are drawn if
            missing, or for another base flickr8k/ and coco200/.
        vectors: folder that keeps the embeddings of images, one for each base.
        out: folder of the pages and of finished runs, which are not repeated; bases after the first
            have a folder in it.
        base: model; by default the demo's, which learns drawings; another one learns photos.
            With several, halves has a page over all, too, and the other tables are of the first.
        only: tables to make. halves trains half of the classes; shots trains a few images of each
            class; captions and objects, for photos only, train with captions of Flickr8k and with
            objects of COCO.
        stored: folder with the cells of other methods on the demo's base.
        numbers: images of each class, for shots.
        seeds: each row is trained once for each seed.
        threads: to compute with; by default one a core.
    """
    check_seeds(seeds)
    limit_threads(threads)
    judged = []
    for number, (name, folder) in enumerate(zip(base, vectors, strict=True)):
        place = out if number == 0 else out / Path(name).name
        tests: tuple[Test, ...] = only if number == 0 else ("halves",)
        rows, of_base, home = of_one(name, data_root, folder, place, tests, stored, numbers, seeds)
        judged.append((rows, of_base))
    if len(base) > 1 and "halves" in only:
        text = (
            f"{origin('rivals.projection')}\nThe recipe `quick` on {len(base)} bases, each with"
            f" {len(seeds)} seeds, which are averaged: ± is half of a 95 % interval over images and"
            " bases, in points. **Bold** survives Holm's correction over the table."
        )
        content = over_bases(judged, home)
        publish(["# Half of the classes, several bases", text, content], out / "halves-bases.md")


def of_one(
    base: str,
    data_root: Path,
    vectors: Path,
    out: Path,
    only: Sequence[Test],
    stored: Path,
    numbers: Sequence[int],
    seeds: tuple[int, ...],
) -> tuple[list[Judged], list[Judged], str]:
    """Make the tables of one base; returns the rows of `halves`, if it is made, the base's, and the
    trained style.
    """
    loaded = load_base(base)
    embedder = Embedder(loaded, vectors)
    recipe = dataclasses.replace(load_recipe("quick"), architecture=base, pretrained=None)
    of_drawings = base == f"{LOCAL}{BASE}"
    name = "drawings" if of_drawings else "photos"

    result: tuple[list[Judged], list[Judged], str] = ([], [], "")

    # Open what is judged elsewhere.
    sets = {}
    if of_drawings:
        photos = Study(embedder, "pacs", collection("pacs", data_root), None, seeds, recipe)
        other = Elsewhere({style: (s, photos.images.classes) for style, s in photos.tests.items()})
    else:
        things, crops = coco(data_root / "coco200", "val", vectors / "objects")
        _, shown = coco(data_root / "coco200", "train", vectors / "objects")
        learnt = tuple(thing for thing in things if thing in shown)
        templates = ("a photo of a {}.",)
        chosen = Chosen(
            things, templates, shown, {"objects": crops}, {}, {"all with a photo": learnt}
        )
        objects = Study(embedder, "coco", chosen, None, seeds, recipe)
        sets["COCO200's objects"] = (objects.tests["objects"], things)
        other = Elsewhere(sets, *flickr(data_root, "test", embedder))

    def page(title: str, what: str, content: str, path: str) -> None:
        numbers = ", ".join(map(str, seeds))
        text = (
            f"{origin('rivals.projection')}\nThe recipe `quick`; seeds {numbers}. The base has"
            " accuracies in %, the others what they lead it by, in points, ± half of a 95 %"
            f" interval over images and seeds."
            f" **Bold** survives Holm's correction over a table. {what}"
        )
        publish([f"# {title}", text, content], out / f"{path}.md")

    if "halves" in only:
        whole = collection("drawings" if of_drawings else "pacs", data_root)
        study = Study(embedder, name, whole, other, seeds, recipe)
        content = halves(study, out, stored / "drawings" if of_drawings else Path("none"))
        what = (
            f"One half of {len(whole.classes)} classes is trained in one style"
            f" ({next(iter(whole.tests))}), and both are judged; then the other way round."
            f"{BESIDE if of_drawings else ''}"
        )
        page("Half of the classes", what, content, f"halves-{name}")
        home = next(iter(whole.tests))
        result = (study.rows(out / f"halves-{name}.jsonl"), study.base(), home)
    if "shots" in only:
        study = Study(embedder, f"pacs-{name}", photos_of(data_root), None, seeds, recipe)
        what = "Photos of PACS, of all seven classes."
        page("A few images of each class", what, shots(study, out, numbers), f"shots-pacs-{name}")
    if "captions" in only and not of_drawings:
        content = captions(objects, data_root, out)
        page("Search with captions", CAPTIONED, content, "captions")
    if "objects" in only and not of_drawings:
        what = (
            "Objects of COCO200's photos for training, cut out with their masks, among all things."
        )
        page("Objects of photos", what, halves(objects, out, Path("none")), "objects")
    return result


CAPTIONED = (
    "Trained with 1,000 photos of Flickr8k and their captions, which the alignment never saw, and"
    " tested on 1,000 others."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(projection, argv, prog="python -m rivals.projection")


if __name__ == "__main__":
    sys.exit(main())
