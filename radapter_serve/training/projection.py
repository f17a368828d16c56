"""Training of an adapter on a projection, with embeddings that were made once. As a run takes a
second, cross-validation chooses what the recipe leaves open, and the run itself has all images.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from radapter_serve.adapter import Adapter, base_digest, find_sites, save_adapter
from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.adapter.tuned import towers_of
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import logit_scale_and_bias, to_device
from radapter_serve.contract.labels import prompts_of, split_label
from radapter_serve.data.captions import Captioned
from radapter_serve.data.labelled import Labelled
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation import alpha_choice
from radapter_serve.evaluation.alpha_choice import Choice, CurvePoint, ValidationSet
from radapter_serve.evaluation.image_sets import NOUN_TEMPLATES, common_nouns
from radapter_serve.evaluation.metrics import fit_confidence
from radapter_serve.evaluation.rows import hardly_known
from radapter_serve.files import write_text
from radapter_serve.sources import ADAPTER, RATES, RECIPE
from radapter_serve.training.batches import NO_LABEL
from radapter_serve.training.data import Embedded, RunData
from radapter_serve.training.embedding import Floats, check_embeddings, embed_images, embed_texts
from radapter_serve.training.loop import WORDS, vocabulary
from radapter_serve.training.loss import distance_to_base, divergence_from_base, positives_of
from radapter_serve.training.recipe import Recipe, Run
from radapter_serve.training.setup import (
    flatten_projections,
    loss_of,
    metadata_of,
    with_precision,
)

RATES_TRIED = (1e-4, 3e-4, 1e-3, 3e-3)  # by learning_rate auto
WEIGHTS_TRIED = (1.0, 3.0, 10.0)  # by preserve_words auto
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDS = 3
WITHOUT_FOLDS = 0.5  # the α of a run whose images form no folds
LEAST_IN_FOLDS = 0.5  # fraction of the images that must have a fold
ACCURACY = "acc1"
SET = "cross-validation"  # the name of its validation set
_FEW = 300  # classes, of whose products a step's time is as long with one thread
_CLASSES = 1000  # of a step; of more, those that no image of the batch has are drawn
HELD_OUT = "validation"  # images of calibrated scores, if a run has any
_CALIBRATED = 2000  # images at most, with which scores are calibrated
_KEPT_IMAGES = 2000  # on which the base's answers are compared
_SEARCHED = 1000  # images among which a caption of a fold is to find its own
RULE = (
    "cross-validation over all training images in folds of equal classes. A setting is a learning"
    " rate with preserve_words. Among the settings and alphas within one standard error of the best"
    " (of the paired difference over images; Breiman et al., 1984), the setting is that which keeps"
    " most of the base's answers among common nouns; among equal ones, that with the smallest"
    " alpha. Its alpha follows the rule of radapter-eval --alpha auto, with one standard error"
    f" instead of the 95 % interval: {alpha_choice.RULE}"
)


@dataclass(frozen=True)
class Vectors:
    """Embeddings of the base, of unit length, and what belongs together.

    An owner is a class with its prompts, or an image with its captions.
    """

    images: Tensor  # [N, D]
    owners: Tensor  # of each image, integer [N, K], padded with NO_LABEL
    texts: Tensor  # of all prompts or captions [T, D]
    texts_of: list[list[int]]  # the texts of each owner that a step draws from
    names: list[list[int]]  # the texts that find each owner: of all names of a class
    words: Tensor  # of the vocabulary [W, D], for which the base's answers are kept
    nouns: Tensor  # with which it is measured how many answers are kept [M, D]
    of_classes: bool

    @property
    def metric(self) -> str:
        """The metric of `judge`."""
        return ACCURACY if self.of_classes else "image_retrieval_recall@1"


Maps = Mapping[str, LinearAdapter]  # by tower


def moved(maps: Maps, tower: str, vectors: Tensor, alpha: float = 1.0) -> Tensor:
    """Unit vectors of a tower [..., D] as its adapter, if any, moves them: `v + α·v·A`."""
    if tower not in maps or alpha == 0:
        return vectors
    adapter = maps[tower]
    return F.normalize(vectors + alpha * adapter.gate * adapter.change(vectors), dim=-1)


def fit_projection(recipe: Recipe, opened: RunData, out: Path, *, show: bool = True) -> Run:
    """Train adapters on projections with a recipe on its opened data, and write them, the choice of
    α and the table of what was tried.
    """
    say = partial(Console(quiet=not show).print, highlight=False, soft_wrap=True, markup=False)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RAdapterError(
            f"adapt {recipe.adapt} trains in one process; start radapter-train without a launcher"
        )
    recipe = with_precision(recipe)
    # With embeddings and an adapter of the texts alone, nothing needs the image tower.
    embedded = opened.embedded
    images = embedded is None or recipe.adapt != "text-projection"
    base = load_base(recipe.architecture, recipe.pretrained, images=images)
    sites = find_sites(base.model, adapt=recipe.adapt, partial=recipe.partial)
    keys = {"image" if site.key.startswith("visual.") else "text": site.key for site in sites}
    digest = base_digest(base.model.state_dict(), keys.values())
    towers = {name: tower.base for name, tower in towers_of(base.model, {}).items()}
    data, val = opened.ready(recipe, base)
    assert isinstance(data, Labelled | Captioned)  # Recipe.check refuses masks
    width = int(base.config["embed_dim"])
    if recipe.rank is not None and recipe.rank >= width:
        raise RAdapterError(
            f"rank is {recipe.rank}; allowed: less than the width {width}, or null for full rank"
        )
    to_device(base.model)
    if recipe.precision == "bf16":
        flatten_projections(base.model)
    of_embeddings = [] if embedded is None else check_embeddings(embedded, base)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))

    # Embed all that the run needs, once.
    began = time.monotonic()
    notes: list[str] = []

    def note(*lines: str) -> None:
        notes.extend(lines)
        for line in lines:
            say(line)

    note(*opened.notes, *of_embeddings)
    if embedded is None:
        count = len(data.image_rows)
        say(f"embedding {count:,} images and their texts once, kept in {out / 'embeddings'}")
    vectors, lines = _vectors(data, base, towers, recipe, out, show, embedded)
    note(*lines)
    held = None
    if val is not None:
        assert isinstance(val, Labelled | Captioned)
        held, lines = _vectors(val, base, towers, recipe, out, show)
        note(*lines)
    say(f"embeddings are ready after {time.monotonic() - began:.1f} s")

    # Choose with cross-validation.
    scale, bias = logit_scale_and_bias(base.model.state_dict())
    loss = loss_of(base, recipe)
    threads = torch.get_num_threads()

    def train(vectors: Vectors, rows: NDArray[np.int64], setting: Recipe) -> Maps:
        # The products of few classes are too small to share: threads that wait for each other
        # beside other work took 70 times as long.
        if len(vectors.texts_of) <= _FEW:
            torch.set_num_threads(1)
        try:
            return learn(vectors, rows, setting, sides=tuple(keys), scale=scale, loss=loss)
        finally:
            torch.set_num_threads(threads)

    began = time.monotonic()
    say("cross-validation: each third of the images judges runs without it")
    validated = cross_validate(vectors, recipe, train)
    chosen = validated.recipe
    if validated.trials:
        say(f"{validated.summary} ({time.monotonic() - began:.1f} s)")
        write_text(out / RATES, json.dumps(validated.table, indent=2))
        alone = len(vectors.images) - sum(len(rows) for rows, _ in validated.parts)
        if alone:
            note(
                f"note: {alone:,} images, such as the only one of a class, are in no third: each"
                " run is trained with them, and none is judged with them"
            )
    else:
        note(
            "note: too few images share their class with another one, so none are held out:"
            f" learning rate {chosen.peak_rate:g}, preserve_words {chosen.words_weight:g} and alpha"
            f" {chosen.alpha:g} were not chosen on these images"
        )

    # Train with all images, and measure with images that the run did not have.
    plan = chosen.resolved(len(vectors.images))
    maps = train(vectors, np.arange(len(vectors.images)), chosen)
    notes += plan.notes
    metrics = validated.metrics
    judges = [(vectors, rows, without) for rows, without in validated.parts]
    if held is not None:
        rows = np.arange(len(held.images))
        judges = [(held, rows, maps)]
        metrics = {}
        for alpha in sorted({chosen.alpha, 1.0}):
            right, _ = judge(held, rows, maps, alpha)
            metrics[f"{held.metric}@alpha={alpha:g}"] = round(float(right.mean()), 4)
    # Calibrate scores for a server that has the adapter beside a release.
    confidence: dict[str, Any] | None = None
    of_one_class = vectors.of_classes and vectors.owners.shape[1] == 1
    if judges and of_one_class and list(keys) == ["text"]:
        cosines, owners = class_cosines(judges, chosen.alpha)
        try:
            images_of = SET if held is None else HELD_OUT
            fitted = fit_confidence(cosines, owners, scale, bias, images_of)
            confidence = dataclasses.asdict(fitted)
        except RAdapterError as error:
            note(f"note: the run has no calibrated scores: {error}")

    # Write.
    tensors = {
        keys[tower] if name == "full" else f"{keys[tower]}.{name}": tensor.detach()
        for tower, adapter in maps.items()
        for name, tensor in adapter.named_parameters()
    }
    metadata = metadata_of(
        chosen,
        base,
        digest,
        data,
        metrics,
        held_out=held_out_digest(val) if val is not None and recipe.val_fraction else None,
        text_tower=towers["text_tower"] if "text" in keys else None,
        confidence=confidence,
    )
    adapter = Adapter(tensors, metadata)
    save_adapter(adapter, out / ADAPTER)
    write_text(out / RECIPE, yaml.safe_dump(chosen.to_dict(), sort_keys=False))
    if validated.trials:
        choice = validated.choice(recipe.alpha, adapter.digest, held_out_digest(data))
        alpha_choice.save_choice(choice, out)
        for line in choice.notes:
            say(line)
        if vectors.of_classes:
            scores = {point.alpha: point.score for point in choice.curve}
            for line in hardly_known(scores, len(vectors.names)):
                say(line)
    following = f"radapter-export --adapter {shlex.quote(str(out))} --alpha {chosen.alpha:g}"
    say(f"wrote {out / ADAPTER}; next: {following}")
    return Run(out, plan.recipe, metrics, tuple(notes))


def folds_of(vectors: Vectors, seed: int) -> NDArray[np.int64]:
    """The fold of each image, [N]: of each class about the same share in each fold; -1 for the only
    image of a class, with which every run is trained.
    """
    draw = np.random.default_rng(seed)
    count = len(vectors.images)
    if not vectors.of_classes:
        return draw.permutation(count) % FOLDS
    # An image of several classes counts for the rarest.
    owners = vectors.owners.numpy()
    images_of = np.bincount(owners[owners != NO_LABEL], minlength=len(vectors.names))
    sizes = np.where(owners == NO_LABEL, count + 1, images_of[owners])
    rarest = owners[np.arange(count), sizes.argmin(axis=1)]
    folds = np.full(count, -1)
    for owner in np.unique(rarest):
        images = draw.permutation(np.flatnonzero(rarest == owner))
        if len(images) > 1:
            folds[images] = (np.arange(len(images)) + draw.integers(FOLDS)) % FOLDS
    return folds


@dataclass(frozen=True)
class Trial:
    """A setting at an α, judged with images or captions that its runs were not trained with."""

    setting: Recipe
    alpha: float
    right: NDArray[np.bool_]  # of each image or caption
    kept: float  # fraction of the base's answers

    @property
    def score(self) -> float:
        """The fraction that is right, rounded so that equal trials are equal."""
        return round(float(self.right.mean()), 9)


@dataclass(frozen=True)
class Validated:
    """What cross-validation chose, and the figures of the choice: none if too few images have a
    fold.
    """

    recipe: Recipe  # the chosen setting, at the chosen α
    metric: str
    trials: list[Trial]
    curve: list[CurvePoint]  # of the chosen setting
    parts: list[tuple[NDArray[np.int64], Maps]]  # of each fold, its images and the run without them

    @property
    def metrics(self) -> dict[str, float]:
        """The score at each α of the chosen setting."""
        return {f"{self.metric}@alpha={p.alpha:g}": round(p.score, 4) for p in self.curve}

    @property
    def summary(self) -> str:
        """One line about the choice."""
        point = self.curve[ALPHAS.index(self.recipe.alpha)]
        items = "images" if self.metric == ACCURACY else "captions"
        assert point.kept is not None
        return (
            f"chose learning rate {self.recipe.peak_rate:g}, preserve_words"
            f" {self.recipe.words_weight:g} and alpha {point.alpha:g}: {100 * point.score:.1f} % of"
            f" {len(self.trials[0].right):,} held-out {items} right,"
            f" {100 * self.curve[0].score:.1f} % with the base; {100 * point.kept:.1f} % of the"
            " base's answers among other nouns kept"
        )

    @property
    def table(self) -> dict[str, Any]:
        """All that was tried, for the file."""
        rows = [
            {
                "learning_rate": trial.setting.peak_rate,
                "preserve_words": trial.setting.words_weight,
                "alpha": trial.alpha,
                self.metric: round(100 * trial.score, 2),
                "base_answers_kept": round(100 * trial.kept, 2),
            }
            for trial in self.trials
        ]
        names = ("learning_rate", "preserve_words", "alpha")
        chosen = {name: getattr(self.recipe, name) for name in names}
        return {"rule": RULE, "chosen": chosen, "tried": rows}

    def choice(self, own_alpha: float, adapter_digest: str, images_digest: str) -> Choice:
        """The choice of α, as `radapter-eval --alpha auto` writes it."""
        best = max(self.curve, key=lambda point: (point.score, -point.alpha)).alpha
        sets = {SET: ValidationSet("id", self.metric, len(self.trials[0].right), images_digest)}
        return Choice(self.recipe.alpha, best, own_alpha, RULE, self.curve, sets, adapter_digest)


def cross_validate(
    vectors: Vectors, recipe: Recipe, train: Callable[[Vectors, NDArray[np.int64], Recipe], Maps]
) -> Validated:
    """Train each setting of a recipe without each fold, judge it there at `ALPHAS`, and choose with
    `RULE`.
    """
    rates = RATES_TRIED if recipe.learning_rate == "auto" else (recipe.peak_rate,)
    weights = WEIGHTS_TRIED if recipe.preserve_words == "auto" else (recipe.words_weight,)
    settings = [
        dataclasses.replace(
            recipe,
            learning_rate=rate,
            min_learning_rate=min(recipe.min_learning_rate, rate),
            preserve_words=weight,
        )
        for rate, weight in itertools.product(rates, weights)
    ]
    folds = folds_of(vectors, recipe.seed)
    if np.mean(folds >= 0) < LEAST_IN_FOLDS:
        middle = dataclasses.replace(settings[len(settings) // 2], alpha=WITHOUT_FOLDS)
        return Validated(middle, vectors.metric, [], [], [])

    trials: list[Trial] = []
    parts_of: list[list[tuple[NDArray[np.int64], Maps]]] = []
    for setting in settings:
        parts: list[tuple[NDArray[np.int64], Maps]] = []
        for fold in range(FOLDS):
            held_out = np.flatnonzero(folds == fold)
            if len(held_out):
                parts.append((held_out, train(vectors, np.flatnonzero(folds != fold), setting)))
        parts_of.append(parts)
        for alpha in ALPHAS:
            judged = [judge(vectors, rows, maps, alpha) for rows, maps in parts]
            right, same = (np.concatenate(each) for each in zip(*judged, strict=True))
            trials.append(Trial(setting, alpha, right, float(same.mean())))

    best = max(trials, key=lambda trial: (trial.score, trial.kept))

    def point(trial: Trial) -> CurvePoint:
        differences = best.right.astype(np.float64) - trial.right
        error = float(differences.std() / len(differences) ** 0.5)
        of_set = {SET: trial.score}
        behind = float(differences.mean())
        return CurvePoint(trial.alpha, trial.score, behind, error, trial.kept, of_set)

    as_good = [trial for trial in trials if trial.alpha and point(trial).as_good]
    most = max(as_good or [best], key=lambda trial: (trial.kept, -trial.alpha, trial.score))
    curve = [point(trial) for trial in trials if trial.setting is most.setting]
    alpha = alpha_choice.pick(curve, most.setting.alpha)
    recipe = dataclasses.replace(most.setting, alpha=alpha)
    parts = parts_of[settings.index(most.setting)]
    return Validated(recipe, vectors.metric, trials, curve, parts)


def learn(
    vectors: Vectors,
    rows: NDArray[np.int64],
    recipe: Recipe,
    *,
    sides: Sequence[str],
    scale: float,
    loss: partial[Tensor],
) -> dict[str, LinearAdapter]:
    """Train an adapter for each tower in `sides` with some of the images; returns the averages."""
    plan = recipe.resolved(len(rows))
    recipe = plan.recipe
    torch.manual_seed(recipe.seed)  # for the first values at low rank
    generator = torch.Generator().manual_seed(recipe.seed)
    maps = {side: LinearAdapter(vectors.texts.shape[1], recipe.rank) for side in sides}
    parameters = [p for adapter in maps.values() for p in adapter.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=recipe.weight_decay)

    count_of = torch.tensor([len(each) for each in vectors.texts_of])
    texts_of = pad_sequence([torch.tensor(each) for each in vectors.texts_of], batch_first=True)
    images = torch.from_numpy(rows)
    order = images[:0]
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        for adapter in maps.values():  # adapter dropping
            switched_on = torch.rand((), generator=generator).item() >= recipe.drop
            adapter.gate = switched_on / (1 - recipe.drop)

        # Draw images, the owners to tell apart, and a text of each owner.
        if len(order) < plan.part:
            order = images[torch.randperm(len(images), generator=generator)]
        batch = order[: plan.part]
        order = order[plan.part :]
        of_images = vectors.owners[batch]
        drawn = torch.unique(of_images[of_images != NO_LABEL])
        if vectors.of_classes:
            absent = torch.randperm(len(count_of), generator=generator)
            absent = absent[~torch.isin(absent, drawn)]
            drawn = torch.cat([drawn, absent[: max(0, _CLASSES - len(drawn))]])
        drawn = drawn.repeat_interleave(recipe.captions_per_image)
        pick = (torch.rand(len(drawn), generator=generator) * count_of[drawn]).long()
        base_images = vectors.images[batch]
        base_texts = vectors.texts[texts_of[drawn, pick]]

        embeds = moved(maps, "image", base_images)
        value = loss(embeds, moved(maps, "text", base_texts), positives_of(of_images, drawn))
        if recipe.words_weight or recipe.preserve:
            some = torch.randperm(len(vectors.words), generator=generator)[:WORDS]
            base_words = vectors.words[some]
            words = moved(maps, "text", base_words)
            divergence = divergence_from_base(embeds, words, base_images, base_words, scale)
            value = value + recipe.words_weight * divergence
            if "image" in maps:
                value = value + recipe.preserve * distance_to_base(embeds, base_images)
            if "text" in maps:
                value = value + recipe.preserve * distance_to_base(words, base_words)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
        optimizer.step()
        m = plan.momentum
        if recipe.bias_correction:
            m = m * (1 - m**step) / (1 - m ** (step + 1))
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter, 1 - m)
    if not math.isfinite(value.item()):
        raise RAdapterError(f"the loss is {value.item()}; lower --learning-rate")
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    for adapter in maps.values():
        adapter.gate = 1.0
    return maps


@torch.no_grad()
def class_cosines(
    judges: Sequence[tuple[Vectors, NDArray[np.int64], Maps]], alpha: float
) -> tuple[Floats, NDArray[np.int64]]:
    """The cosines of images to all classes, [N, C], as a server sees them, and the class of each:
    of some rows of each judge, with maps that were not trained with them.
    """
    most = max(1, _CALIBRATED // len(judges))
    cosines = []
    owners = []
    for vectors, rows, maps in judges:
        some = torch.from_numpy(rows[:: max(1, -(-len(rows) // most))])
        embeds = moved(maps, "image", vectors.images[some], alpha)
        cosines.append(embeds @ classes_at(vectors, maps, alpha).T)
        owners.append(vectors.owners[some, 0])
    return torch.cat(cosines).numpy(), torch.cat(owners).numpy()


def classes_at(vectors: Vectors, maps: Maps, alpha: float) -> Tensor:
    """Unit vectors of the classes [C, D], each the mean over all prompts of its names."""
    texts = moved(maps, "text", vectors.texts, alpha)
    means = torch.stack([texts[each].mean(dim=0) for each in vectors.names])
    return F.normalize(means, dim=-1)


@torch.no_grad()
def judge(
    vectors: Vectors, rows: NDArray[np.int64], maps: Maps, alpha: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each of some images, as a server sees it, is of the owner that it is nearest to, or,
    for captions, whether each caption of these images is nearest to its own image; and whether
    images have the same nearest noun as with the base.
    """
    places = torch.from_numpy(rows if vectors.of_classes else rows[:_SEARCHED])
    base_images = vectors.images[places]
    images = moved(maps, "image", base_images, alpha)
    owners = vectors.owners[places]
    if vectors.of_classes:
        best = (images @ classes_at(vectors, maps, alpha).T).argmax(dim=1)
        right = (owners == best[:, None]).any(dim=1)
    else:
        captions = [vectors.names[owner] for owner in owners[:, 0].tolist()]
        image_of = torch.repeat_interleave(torch.tensor([len(each) for each in captions]))
        flat = torch.tensor(list(itertools.chain.from_iterable(captions)))
        texts = moved(maps, "text", vectors.texts[flat], alpha)
        right = (texts @ images.T).argmax(dim=1) == image_of
    some = slice(0, None, max(1, len(places) // _KEPT_IMAGES))
    nouns = moved(maps, "text", vectors.nouns, alpha)
    answers = (images[some] @ nouns.T).argmax(dim=1)
    same = answers == (base_images[some] @ vectors.nouns.T).argmax(dim=1)
    return right.numpy(), same.numpy()


def _vectors(
    data: Labelled | Captioned,
    base: Base,
    towers: Mapping[str, str],
    recipe: Recipe,
    out: Path,
    show: bool,
    embedded: Embedded | None = None,
) -> tuple[Vectors, list[str]]:
    """Embed texts and their images, if these are not `embedded`; returns notes for the user, too.
    Images that can't be read are left out.
    """
    notes: list[str] = []
    if embedded is not None:
        images = embedded.vectors
    else:
        tower = towers["image_tower"]
        images, broken = embed_images(data, base, tower, recipe, out, show=show)
        notes = [f"left out {len(broken)} broken images, such as: {broken[0]}"] if broken else []
    names: list[str] = []
    if isinstance(data, Labelled):
        lines = [split_label(line) for line in data.classes]
        names = [name for line in lines for name in line]
        trained = [prompts_of(line[:1], data.templates) for line in lines]
        prompts = [prompts_of(line, data.templates) for line in lines]
        owners = data.label_sets()
    else:
        trained = prompts = [list(image.captions) for image in data.images]
        owners = [(number,) for number in range(len(data.images))]
    words = list(vocabulary(tuple(data.classes) if isinstance(data, Labelled) else ()))
    nouns = [
        prompt for noun in common_nouns(names) for prompt in prompts_of([noun], NOUN_TEMPLATES)
    ]
    texts = list(dict.fromkeys([*itertools.chain(*trained, *prompts), *words, *nouns]))
    number_of = {text: number for number, text in enumerate(texts)}
    embeds = torch.from_numpy(embed_texts(base, towers["text_tower"], texts, recipe, out))

    def numbers(texts: Sequence[str]) -> list[int]:
        return [number_of[text] for text in texts]

    readable = ~np.isnan(images[:, 0])
    padded = pad_sequence(
        [torch.tensor(owners[row]) for row in np.flatnonzero(readable)],
        batch_first=True,
        padding_value=NO_LABEL,
    )
    vectors = Vectors(
        images=torch.from_numpy(images if readable.all() else images[readable]),  # without a copy
        owners=padded,
        texts=embeds,
        texts_of=[numbers(each) for each in trained],
        names=[numbers(each) for each in prompts],
        words=embeds[numbers(words)],
        nouns=embeds[numbers(nouns)],
        of_classes=isinstance(data, Labelled),
    )
    return vectors, notes
