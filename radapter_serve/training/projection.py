"""Training of an adapter on a projection, with embeddings that were made once. As a run takes a
second, cross-validation chooses α, and the run itself has all images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from radapter_serve.adapter.attach import LinearAdapter
from radapter_serve.adapter.file import tower_of
from radapter_serve.clip.towers import logit_scale_and_bias
from radapter_serve.data.runs import held_out_digest
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation import alpha_choice
from radapter_serve.evaluation.alpha_choice import Choice, CurvePoint, ValidationSet
from radapter_serve.evaluation.metrics import fit_confidence
from radapter_serve.evaluation.rows import hardly_known
from radapter_serve.sources import ADAPTER
from radapter_serve.training.batches import NO_LABEL
from radapter_serve.training.data import RunData
from radapter_serve.training.embedding import ACCURACY, Floats, Vectors, embed_run
from radapter_serve.training.loss import distance_to_base, divergence_from_base, positives_of
from radapter_serve.training.recipe import Plan, Recipe, Run
from radapter_serve.training.setup import (
    loss_of,
    prepare,
    with_precision,
    write_adapter,
    write_recipe,
)

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDS = 3
WITHOUT_FOLDS = 0.5  # the α of a run whose images form no folds
LEAST_IN_FOLDS = 0.5  # fraction of the images that must have a fold
SET = "cross-validation"  # the name of its validation set
_FEW = 300  # classes, of whose products a step's time is as long with one thread
WORDS = 32  # drawn from the vocabulary for each step: chosen with cross-validation on eight sets
_CLASSES = 1000  # of a step; of more, those that no image of the batch has are drawn
HELD_OUT = "validation"  # images of calibrated scores, if a run has any
_CALIBRATED = 2000  # images at most, with which scores are calibrated
_KEPT_IMAGES = 2000  # on which the base's answers are compared
_SEARCHED = 1000  # images among which a caption of a fold is to find its own
RULE = (
    "cross-validation over all training images in folds of equal classes, with the rule of"
    " radapter-eval --alpha auto, and one standard error of the paired difference over images"
    f" (Breiman et al., 1984) instead of the 95 % interval: {alpha_choice.RULE}"
)

# The tensors of an adapter by tower and name, as in its file: "full" [D, D], or "up" [D, R] times
# "down" [R, D]. In training they have a leading dimension for the runs.
Maps = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Fold:
    """A part of the images, and the adapters of the run that was trained without it."""

    held_out: NDArray[np.int64]
    maps: Maps


def moved(maps: Maps, tower: str, vectors: Tensor, alpha: float = 1.0) -> Tensor:
    """Unit vectors of a tower [..., D] as its adapter, if any, moves them: `v + α·v·A`."""
    if tower not in maps:
        return vectors
    change = vectors
    for name in ("full", "down", "up"):
        if name in maps[tower]:
            change = change @ maps[tower][name].mT
    return F.normalize(vectors + alpha * change, dim=-1)


def named(maps: Maps, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors by their names in the adapter's file, with the key of each tower's layer."""
    return {
        keys[tower] if name == "full" else f"{keys[tower]}.{name}": tensor
        for tower, tensors in maps.items()
        for name, tensor in tensors.items()
    }


@contextlib.contextmanager
def threads_for(vectors: Vectors) -> Iterator[None]:
    """Compute with one thread if the classes are few: their products are too small to share, and
    threads that wait for each other beside other work took 70 times as long.
    """
    threads = torch.get_num_threads()
    if len(vectors.texts_of) <= _FEW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_projection(recipe: Recipe, opened: RunData, out: Path, *, show: bool = True) -> Run:
    """Train adapters on projections with a recipe on its opened data, and write them and the choice
    of α.
    """
    say = partial(Console(quiet=not show).print, highlight=False, soft_wrap=True, markup=False)
    notes: list[str] = []

    def note(*lines: str) -> None:
        notes.extend(lines)
        for line in lines:
            say(line)

    # Prepare the base and the data, and embed all that the run needs, once.
    prepared = prepare(with_precision(recipe), opened)
    recipe = prepared.recipe
    vectors, held, text_tower = embed_run(prepared, opened, out, say, note, show=show)

    # Choose α with cross-validation, and train with all images.
    began = time.monotonic()
    say("cross-validation: each third of the images judges a run without it")
    keys = {tower_of(site.key): site.key for site in prepared.sites}
    scale, bias = logit_scale_and_bias(prepared.base.model.state_dict())
    train = partial(learn, sides=[*keys], scale=scale, loss=loss_of(prepared.base, recipe))
    with threads_for(vectors):
        folds = cross_validate(vectors, recipe, train)
        [maps] = train(vectors, [np.arange(len(vectors.images))], recipe)
    choice = choose(vectors, folds, recipe.alpha, held_out_digest(prepared.data))
    recipe = dataclasses.replace(recipe, alpha=choice.alpha if choice else WITHOUT_FOLDS)
    if choice is not None:
        say(f"{_summary(choice)} ({time.monotonic() - began:.1f} s)")
    note(*_not_judged(vectors, folds, recipe.alpha))

    plan = recipe.resolved(len(vectors.images))
    notes += plan.notes

    # Judge with images that the adapters were not trained with, and write.
    judges = [(vectors, fold) for fold in folds]
    scores = {point.alpha: point.score for point in choice.curve} if choice else {}
    if held is not None:
        judges = [(held, Fold(np.arange(len(held.images)), maps))]
        scores = {a: float(judge(*judges[0], a)[0].mean()) for a in sorted({recipe.alpha, 1.0})}
    metrics = {f"{vectors.metric}@alpha={a:g}": round(each, 4) for a, each in scores.items()}
    facts: dict[str, Any] = {"text_tower": text_tower} if "text" in keys else {}
    if [*keys] == ["text"]:  # a server may have the adapter beside a release
        images_of = SET if held is None else HELD_OUT
        facts["confidence"], lines = calibrate(judges, recipe.alpha, scale, bias, images_of)
        note(*lines)
    adapter = write_adapter(prepared, recipe, named(maps, keys), metrics, out, **facts)
    write_recipe(recipe, out)
    if choice is not None:
        choice = dataclasses.replace(choice, adapter_digest=adapter.digest)
        alpha_choice.save_choice(choice, out)
        known = hardly_known(scores, len(vectors.names)) if vectors.of_classes else []
        for line in (*choice.notes, *known):
            say(line)
    following = f"radapter-export --adapter {shlex.quote(str(out))} --alpha {recipe.alpha:g}"
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


def cross_validate(
    vectors: Vectors,
    recipe: Recipe,
    train: Callable[[Vectors, Sequence[NDArray[np.int64]], Recipe], Sequence[Maps]],
) -> list[Fold]:
    """Train without each fold; no folds if too few images have one."""
    folds = folds_of(vectors, recipe.seed)
    if np.mean(folds >= 0) < LEAST_IN_FOLDS:
        return []
    numbers = [number for number in range(FOLDS) if (folds == number).any()]
    runs = train(vectors, [np.flatnonzero(folds != number) for number in numbers], recipe)
    return [
        Fold(np.flatnonzero(folds == number), maps)
        for number, maps in zip(numbers, runs, strict=True)
    ]


def choose(
    vectors: Vectors, folds: Sequence[Fold], own_alpha: float, images_digest: str
) -> Choice | None:
    """Judge each fold at `ALPHAS`, and choose with `RULE`, as `radapter-eval --alpha auto` writes
    it, but for the adapter's digest; None without folds.
    """
    if not folds:
        return None
    right: dict[float, NDArray[np.float64]] = {}
    kept: dict[float, float] = {}
    for alpha in ALPHAS:
        judged = [judge(vectors, fold, alpha) for fold in folds]
        right[alpha] = np.concatenate([each for each, _ in judged]).astype(float)
        kept[alpha] = float(np.concatenate([same for _, same in judged]).mean())
    # Rounded, so that equal scores are equal; the smaller α wins a tie.
    scores = {alpha: round(float(each.mean()), 9) for alpha, each in right.items()}
    most_kept = max(ALPHAS, key=lambda alpha: (scores[alpha], kept[alpha]))
    curve = []
    for alpha, score in scores.items():
        behind = right[most_kept] - right[alpha]
        error = float(behind.std() / len(behind) ** 0.5)
        figures = (float(behind.mean()), error, kept[alpha], {SET: score})
        curve.append(CurvePoint(alpha, score, *figures))
    best = max(ALPHAS, key=lambda alpha: (scores[alpha], -alpha))
    sets = {SET: ValidationSet("id", vectors.metric, len(behind), images_digest)}
    alpha = alpha_choice.pick(curve, own_alpha)
    return Choice(alpha, best, own_alpha, RULE, curve, sets, "")


def _summary(choice: Choice) -> str:
    """One line about the choice."""
    figures = choice.sets[SET]
    point = next(point for point in choice.curve if point.alpha == choice.alpha)
    items = "images" if figures.metric == ACCURACY else "captions"
    assert point.kept is not None
    return (
        f"chose alpha {point.alpha:g}: {100 * point.score:.1f} % of {figures.n:,} held-out {items}"
        f" right, {100 * choice.curve[0].score:.1f} % with the base; {100 * point.kept:.1f} % of"
        " the base's answers among other nouns kept"
    )


def _not_judged(vectors: Vectors, folds: Sequence[Fold], alpha: float) -> list[str]:
    """A note about images that no run was judged with."""
    alone = len(vectors.images) - sum(len(fold.held_out) for fold in folds)
    if not folds:
        return [
            "note: too few images share their class with another one, so none are held out: alpha"
            f" {alpha:g} was not chosen on these images"
        ]
    if alone:
        return [
            f"note: {alone:,} images, such as the only one of a class, are in no third: each run is"
            " trained with them, and none is judged with them"
        ]
    return []


def learn(
    vectors: Vectors,
    parts: Sequence[NDArray[np.int64]],
    recipe: Recipe,
    *,
    sides: Sequence[str],
    scale: float,
    loss: partial[Tensor],
) -> list[Maps]:
    """Train an adapter for each tower in `sides` with each part of the images: R runs at once, in
    products of batches. Returns the averages of each run.
    """
    plan = recipe.resolved(min(map(len, parts)))
    torch.manual_seed(recipe.seed)  # for the first values at low rank
    generator = torch.Generator().manual_seed(recipe.seed)
    # Each tensor is learned transposed, as its gradient comes: AdamW would copy another one.
    learned: dict[str, dict[str, Tensor]] = {}
    for side in sides:
        first = LinearAdapter(vectors.texts.shape[1], recipe.rank).named_parameters()
        learned[side] = {name: p.detach().T.repeat(len(parts), 1, 1) for name, p in first}
    parameters = [tensor.requires_grad_() for each in learned.values() for tensor in each.values()]
    means = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=recipe.weight_decay, fused=True)
    batches = _batches(vectors, parts, plan, generator)
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        gates = {}  # adapter dropping
        for side in sides:
            switched_on = torch.rand((), generator=generator).item() >= recipe.drop
            gates[side] = switched_on / (1 - recipe.drop)
        base_images, base_texts, positive = next(batches)
        count = base_texts.shape[1]
        keeps = bool(recipe.preserve or recipe.preserve_words)
        if keeps:  # some words, the same in all runs
            some = torch.randperm(len(vectors.words), generator=generator)[:WORDS]
            base_words = vectors.words[some].expand(len(parts), -1, -1)
            base_texts = torch.cat([base_texts, base_words], dim=1)
        maps = {side: {n: t.mT for n, t in each.items()} for side, each in learned.items()}
        images = moved(maps, "image", base_images, gates.get("image", 1.0))
        texts = moved(maps, "text", base_texts, gates.get("text", 1.0))
        value = loss(images, texts[:, :count], positive)
        if keeps:
            kept = (images, texts[:, count:], base_images, base_words)
            value = value + _change_of(*kept, sides, scale, recipe)

        # Losses are means over the runs. Each run has the gradient of its own loss, and its norm.
        optimizer.zero_grad()
        (len(parts) * value).backward()  # type: ignore[no-untyped-call]
        if recipe.grad_clip is not None:
            _clip(parameters, recipe.grad_clip)
        optimizer.step()
        m = plan.momentum
        if recipe.bias_correction:
            m = m * (1 - m**step) / (1 - m ** (step + 1))
        for mean, parameter in zip(means, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - m)
    if not math.isfinite(value.item()):
        raise RAdapterError(f"the loss is {value.item()}; lower --learning-rate")
    average = iter(means)
    averages = {side: {name: next(average).mT for name in each} for side, each in learned.items()}
    return [
        {side: {name: t[run] for name, t in each.items()} for side, each in averages.items()}
        for run in range(len(parts))
    ]


def _change_of(
    images: Tensor,
    words: Tensor,
    base_images: Tensor,
    base_words: Tensor,
    sides: Sequence[str],
    scale: float,
    recipe: Recipe,
) -> Tensor:
    """The part of the loss that keeps embeddings near the base's."""
    divergence = divergence_from_base(images, words, base_images, base_words, scale)
    value = recipe.preserve_words * divergence
    if "image" in sides:
        value = value + recipe.preserve * distance_to_base(images, base_images)
    if "text" in sides:
        value = value + recipe.preserve * distance_to_base(words, base_words)
    return value


def _batches(
    vectors: Vectors, parts: Sequence[NDArray[np.int64]], plan: Plan, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each step images of each run [R, B, D], texts of owners to tell apart [R, T, D],
    and whether they belong together [R, B, T].
    """
    count_of = torch.tensor([len(each) for each in vectors.texts_of])
    texts_of = pad_sequence([torch.tensor(each) for each in vectors.texts_of], batch_first=True)
    rows = [torch.from_numpy(part) for part in parts]
    orders = [part[:0] for part in rows]
    while True:
        for run, part in enumerate(rows):
            if len(orders[run]) < plan.part:
                orders[run] = part[torch.randperm(len(part), generator=generator)]
        batch = torch.stack([order[: plan.part] for order in orders])
        orders = [order[plan.part :] for order in orders]

        # All runs tell the same classes apart, and each the owners of its captions.
        of_images = vectors.owners[batch]
        if vectors.of_classes:
            drawn = torch.unique(of_images[of_images != NO_LABEL])
            absent = torch.randperm(len(count_of), generator=generator)
            absent = absent[~torch.isin(absent, drawn)][: max(0, _CLASSES - len(drawn))]
            drawn = torch.cat([drawn, absent]).expand(len(rows), -1)
        else:
            drawn = of_images[..., 0].sort(dim=1).values
        drawn = drawn.repeat_interleave(plan.recipe.captions_per_image, dim=1)
        pick = (torch.rand(drawn.shape[1], generator=generator) * count_of[drawn]).long()
        base_texts = vectors.texts[texts_of[drawn, pick]]
        yield vectors.images[batch], base_texts, positives_of(of_images, drawn)


@torch.no_grad()
def _clip(parameters: Sequence[Tensor], most: float) -> None:
    """Scale the gradients of each run [R, ...] to a norm of at most `most`, as torch's
    `clip_grad_norm_` does for one.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.norm(dim=(1, 2)) for g in gradients]).norm(dim=0)
    factors = (most / (norms + 1e-6)).clamp(max=1)[:, None, None]
    for gradient in gradients:
        gradient *= factors


def calibrate(
    judges: Sequence[tuple[Vectors, Fold]],
    alpha: float,
    scale: float,
    bias: float | None,
    images_of: str,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Calibrated scores for a server that has the adapter beside a release, or None, with a note,
    if there are too few images, each of one class.
    """
    if not judges or not judges[0][0].of_classes or judges[0][0].owners.shape[1] > 1:
        return None, []
    try:
        fitted = fit_confidence(*class_cosines(judges, alpha), scale, bias, images_of)
    except RAdapterError as error:
        return None, [f"note: the run has no calibrated scores: {error}"]
    return dataclasses.asdict(fitted), []


@torch.no_grad()
def class_cosines(
    judges: Sequence[tuple[Vectors, Fold]], alpha: float
) -> tuple[Floats, NDArray[np.int64]]:
    """The cosines of images to all classes, [N, C], as a server sees them, and the class of each:
    of some images of each fold.
    """
    most = max(1, _CALIBRATED // len(judges))
    cosines = []
    owners = []
    for vectors, fold in judges:
        every = max(1, -(-len(fold.held_out) // most))
        some = torch.from_numpy(fold.held_out[::every])
        embeds = moved(fold.maps, "image", vectors.images[some], alpha)
        cosines.append(embeds @ classes_at(vectors, fold.maps, alpha).T)
        owners.append(vectors.owners[some, 0])
    return torch.cat(cosines).numpy(), torch.cat(owners).numpy()


def classes_at(vectors: Vectors, maps: Maps, alpha: float) -> Tensor:
    """Unit vectors of the classes [C, D], each the mean over all prompts of its names."""
    texts = moved(maps, "text", vectors.texts, alpha)
    means = torch.stack([texts[each].mean(dim=0) for each in vectors.names])
    return F.normalize(means, dim=-1)


@torch.no_grad()
def judge(
    vectors: Vectors, fold: Fold, alpha: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each image of a fold, as a server sees it, is of the owner that it is nearest to, or,
    for captions, whether each caption of these images is nearest to its own image; and whether
    images have the same nearest noun as with the base.
    """
    maps = fold.maps if alpha else {}
    places = torch.from_numpy(fold.held_out[: None if vectors.of_classes else _SEARCHED])
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
