"""The full demo, `radapter-demo --full`: an adapter for each task, evaluated over α on all styles,
and compared with full fine-tuning and WiSE-FT.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch.optim import AdamW

from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, linear_head, zero_shot_classifier
from radapter_serve.contract.errors import check_alpha
from radapter_serve.demo import DemoSettings
from radapter_serve.demo.compare import (
    ALPHAS,
    OURS,
    RIVAL,
    Ends,
    accuracies,
    compared,
    comparison_table,
    right,
    wise_ft,
)
from radapter_serve.demo.data import (
    FINE_TUNED,
    SHORT_SIDE,
    STYLES,
    DemoData,
    SceneData,
    prepare,
    prepare_scenes,
    style_of,
)
from radapter_serve.demo.run import Log, fields_of, recipe_of
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.plots import plot_alpha_curve
from radapter_serve.evaluation.rows import Results
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.training import Recipe, train
from radapter_serve.training.batches import Examples, endless
from radapter_serve.training.data import open_run
from radapter_serve.training.setup import augmentation

# Name, number of images, and metrics in per cent by α, of each data set.
Sets = list[tuple[str, int, dict[float, list[float]]]]


@dataclass(frozen=True)
class Lesson:
    """One task of the demo."""

    task: str  # its name in recipes
    fields: dict[str, Any]  # of the recipe, for the demo's data
    metrics: tuple[str, ...]  # of the table; the curve shows the first
    caption: str  # of the table
    # One for each style, the in-distribution one first; then others.
    entries: tuple[Entry, ...] = ()


def run_full(settings: DemoSettings) -> dict[str, Any]:
    """Run the full demo in ten minutes or more on two CPU cores; returns its results."""
    out = settings.out
    seed = settings.seed
    check_alpha(0.0 if settings.alpha is None else settings.alpha)
    log = Log()
    log.chapter("1. Draw the images: drawings by many hands, and scenes with masks and captions")
    data = prepare(out / "data")
    scenes = prepare_scenes(out / "data" / "scenes")
    results: dict[str, Any] = {"seed": seed}
    for number, lesson in enumerate(lessons(data, scenes), 2):
        task = lesson.task
        log.chapter(
            f"{number}. {task.capitalize()}: fine-tune on drawings {STYLES[FINE_TUNED]}, evaluate"
            " on unseen ones"
        )
        recipe = recipe_of(task, out, seed, settings.steps)
        recipe = dataclasses.replace(recipe, **lesson.fields)
        shutil.rmtree(recipe.out or "", ignore_errors=True)  # left by an earlier demo
        run = train(recipe, progress=True).folder
        at = recipe.alpha if settings.alpha is None else settings.alpha
        facts: dict[str, Any] = {"alpha": at, "metrics": lesson.metrics}

        # Evaluate, and compare classification with full fine-tuning.
        other_methods: dict[str, list[dict[str, float]]] = {}
        if task == "classification":
            whole = recipe_of("full", out, seed, settings.steps)
            rival = fine_tune(dataclasses.replace(whole, **lesson.fields))
            ours = right(from_adapter(run, sorted({*ALPHAS, at})), data, settings.limit)
            theirs = right(wise_ft(rival, (0.5, 1.0)), data, settings.limit)
            hits = {OURS: ours, RIVAL: {0.0: ours[0.0], **theirs}}  # both start at the base
            systems = compared(hits, at)
            log.console.print(comparison_table(systems, at))
            sets = accuracies(hits[OURS])
            of_rival = accuracies(hits[RIVAL])
            other_methods = {f"{RIVAL}, full fine-tuning at α = 1": _points(of_rival)}
            facts |= {"systems": systems, RIVAL: with_mean(of_rival)}
        else:
            sets = evaluate(lesson, run, at, settings.limit)
        results[task] = {**facts, "sets": with_mean(sets)}

        # Print a table with a row for each data set, and draw the curve.
        columns = ("data", "images", "zero-shot", "fine-tuned, α = 1", f"α = {at:g}")
        table = Table(*columns, title=lesson.caption)
        for name, count, values in with_mean(sets):
            cells = (" / ".join(f"{value:.1f}" for value in values[a]) for a in (0.0, 1.0, at))
            table.add_row(style_of(name), str(count), *cells)
        log.console.print(table)
        names = [name for name, *_ in sets if name in STYLES]
        picture = out / ("alpha.png" if task == "classification" else f"alpha-{task}.png")
        title = f"{task.capitalize()}, fine-tuned on drawings {STYLES[FINE_TUNED]}"
        plot_alpha_curve(
            _points(sets),
            names[:1],
            names[1:],
            picture,
            title=title,
            other_methods=other_methods,
        )
        log.say(f"the curve: {picture}")
    log.end(results, out)
    log.say(f"  radapter-export --adapter {out}/runs/retrieval && radapter-serve")
    return results


def lessons(data: DemoData, scenes: SceneData) -> list[Lesson]:
    """The three tasks of the demo, on drawings, captions of scenes, and masks of scenes."""
    captions = tuple(
        Entry(f"csv:{folder / 'captions.csv'}", "retrieval", name=name)
        for name, folder in scenes.test.items()
    )
    masks: dict[str, Any] = {"task": "segmentation", "classes": scenes.classes}
    proposals = tuple(
        Entry(f"masks:{folder}", name=name, dense="proposals", threshold=0.0, **masks)
        for name, folder in scenes.test.items()
    )
    dense = Entry(
        f"masks:{scenes.test[FINE_TUNED]}",
        name=f"{FINE_TUNED}, dense",
        dense="naclip",
        short_side=SHORT_SIDE,
        **masks,
    )
    accuracy = "Accuracy in %, zero-shot classification"
    of_scenes = {
        "data": f"masks:{scenes.train}",
        "classes": scenes.classes,
        "templates": str(data.templates),
    }
    return [
        Lesson("classification", fields_of(data), ("acc1",), accuracy),
        Lesson(
            "retrieval",
            {"data": f"csv:{scenes.train / 'captions.csv'}"},
            ("image_retrieval_recall@1", "image_retrieval_recall@5", "image_retrieval_recall@10"),
            "R@1 / R@5 / R@10 in %, scenes found by their captions",
            captions,
        ),
        Lesson(
            "segmentation",
            of_scenes,
            ("miou",),
            "mIoU in %, true masks as proposals, and dense by naclip",
            (*proposals, dense),
        ),
    ]


def fine_tune(recipe: Recipe) -> Ends:
    """Fine-tune the whole image tower and a linear head, as WiSE-FT does (Wortsman et al., CVPR
    2022), on the batches that R-Adapter gets with the same seed.
    """
    base = load_base(recipe.architecture, recipe.pretrained)
    data, _ = open_run(recipe, images=False).ready(recipe, base)
    model: Any = base.model
    embeds = zero_shot_classifier(model, base.tokenizer, data.classes, data.templates)  # type: ignore[union-attr]
    head = linear_head(embeds, float(model.state_dict()["logit_scale"].exp()))
    model.requires_grad_(False).visual.requires_grad_(True)
    learning = [*model.visual.parameters(), *head.parameters()]
    optimizer = AdamW(learning, weight_decay=recipe.weight_decay)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    first = torch.column_stack([head.weight, head.bias]).detach().numpy()
    examples = Examples(data, augmentation(base, recipe), recipe.seed)
    source = endless(examples, recipe.batch_size, workers=recipe.workers)
    plan = recipe.resolved(None)
    for step in track(range(plan.steps), "Full fine-tuning"):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        _, batch = next(source)
        loss = F.cross_entropy(head(encode_image(model, batch["pixels"])), batch["labels"])
        if not math.isfinite(loss.item()):
            raise RAdapterError(f"the loss is {loss.item()} at step {step}; lower learning_rate")
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    last = torch.column_stack([head.weight, head.bias]).detach().numpy()
    return Ends(start, model.state_dict(), first, last, data.classes)  # type: ignore[union-attr]


def evaluate(lesson: Lesson, run: Path, alpha: float, limit: int | None) -> Sets:
    """Evaluate a run over α, and at the `alpha` of its release, on unseen drawings."""
    models = from_adapter(run, sorted({*ALPHAS, alpha}))
    try:
        # One call for all data sets, so that the names of the classes are embedded once.
        suite = Suite(lesson.task, lesson.entries)
        rows = evaluate_suite(models, suite, Results(run), limit=limit)
    finally:
        models[0].close()
    sets: Sets = []
    for entry in lesson.entries:
        of_set = [row for row in rows if row.dataset == entry.name]
        values = {
            row.alpha or 0.0: [100 * row.metrics[m] for m in lesson.metrics] for row in of_set
        }
        sets.append((entry.name, of_set[0].n, values))
    return sets


def with_mean(sets: Sets) -> Sets:
    """Insert the mean of the shifts after the shifted sets."""
    shifts = [row for row in sets[1:] if row[0] in STYLES]
    mean = {}
    for alpha in sets[0][2]:
        columns = zip(*(values[alpha] for *_, values in shifts), strict=True)
        mean[alpha] = [sum(column) / len(shifts) for column in columns]
    row = (f"mean of the {len(shifts)} shifts", sum(n for _, n, _ in shifts), mean)
    return [sets[0], *shifts, row, *sets[len(shifts) + 1 :]]


def _points(sets: Sets) -> list[dict[str, float]]:
    """One row for each α, with the first metric of each set by its name."""
    return [
        {"alpha": alpha, **{name: values[alpha][0] for name, _, values in sets}}
        for alpha in sets[0][2]
    ]
