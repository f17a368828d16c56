"""The demo's three fine-tunings, one adapter a task, and their α curves, by the functions of the
commands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from radapter_serve.demo.data import BASE, FINE_TUNED, STYLES, DemoData, style_of
from radapter_serve.demo.scenes import SHORT_SIDE, SceneData
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.plots import plot_alpha_curve
from radapter_serve.evaluation.rows import Results
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.training import Recipe, load_recipe

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECIPES = Path(__file__).parent / "recipes"
Sets = list[
    tuple[str, int, dict[float, list[float]]]
]  # name, images and, by α, the metrics in per cent of each


@dataclass(frozen=True)
class Lesson:
    """One task of the demo.

    Attributes:
        task: as recipes name it.
        fields: of the recipe, what the demo's data decide.
        metrics: shown in the table, in the rows' names; the first is what the curve shows.
        caption: of the table.
        entries: what it is evaluated on as suites are: the first in distribution, then the same in
            other styles.
        rest: evaluated at the α of the table alone.
    """

    task: str
    fields: dict[str, Any]
    metrics: tuple[str, ...]
    caption: str
    entries: tuple[Entry, ...] = ()
    rest: tuple[Entry, ...] = ()


def lessons(data: DemoData, scenes: SceneData) -> list[Lesson]:
    """The three tasks on the demo's data: drawings, captions of scenes, and masks of scenes."""
    templates = str(data.templates)
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
    folders = {"data": f"imagefolder:{data.train}", "val_data": f"imagefolder:{data.val}"}
    return [
        Lesson(
            "classification",
            {**folders, "classes": data.classes, "templates": templates},
            ("acc1",),
            "Accuracy in %, zero-shot classification",
        ),
        Lesson(
            "retrieval",
            {"data": f"csv:{scenes.train / 'captions.csv'}"},
            ("image_retrieval_recall@1", "image_retrieval_recall@5", "image_retrieval_recall@10"),
            "R@1 / R@5 / R@10 in %, scenes found by their captions",
            captions,
        ),
        Lesson(
            "segmentation",
            {"data": f"masks:{scenes.train}", "classes": scenes.classes, "templates": templates},
            ("miou",),
            "mIoU in %, true masks as proposals, and dense by naclip",
            proposals,
            (dense,),
        ),
    ]


def recipe_of(
    lesson: Lesson, out: Path, *, seed: int, steps: int | None, name: str | None = None
) -> Recipe:
    """The recipe of a task on the demo's base and data.

    Args:
        lesson: the task.
        out: the demo's folder.
        seed: of the fine-tuning.
        steps: optimizer steps; the recipe's if None.
        name: of the recipe, if not the task's.
    """
    recipe = load_recipe(RECIPES / f"{name or lesson.task}.yaml")
    steps = recipe.steps if steps is None else steps
    assert steps is not None
    warmup = min(recipe.warmup_steps or steps, steps // 10)
    own: dict[str, Any] = {
        "architecture": f"local-dir:{BASE}",
        "out": out / "runs" / lesson.task,
        "seed": seed,
    }
    return dataclasses.replace(recipe, steps=steps, warmup_steps=warmup, **own, **lesson.fields)


def evaluate(lesson: Lesson, run: Path, alpha: float, limit: int | None) -> Sets:
    """Evaluate a run over α on drawings that it has never seen.

    Args:
        lesson: the task.
        run: its folder.
        alpha: of its release.
        limit: images of each data set at most; all if None.
    """
    models = from_adapter(run, sorted({*ALPHAS, alpha}))
    try:
        results = Results(run)
        # One call for all data sets of the curve, because a call embeds the names of the classes
        # once.
        rows = evaluate_suite(models, Suite(lesson.task, lesson.entries), results, limit=limit)
        few = [model for model in models if model.alpha in (0.0, alpha, 1.0)]  # in no curve
        rows += evaluate_suite(few, Suite(lesson.task, lesson.rest), results, limit=limit)
    finally:
        models[0].close()
    sets: Sets = []
    for entry in (*lesson.entries, *lesson.rest):
        of = [row for row in rows if row.dataset == entry.name]
        values = {
            row.alpha: [100 * row.metrics[name] for name in lesson.metrics]
            for row in of
            if row.alpha is not None
        }
        sets.append((entry.name, of[0].n, values))
    return sets


def draw_curve(
    lesson: Lesson, sets: Sets, path: Path, beside: dict[str, Sets] | None = None
) -> None:
    """Draw the α curve of a task: in distribution against shifts.

    Args:
        lesson: the task.
        sets: from `evaluate`, or of `compare`.
        path: of the picture.
        beside: other methods' sets, by name.
    """
    names = [name for name, _, values in sets if len(values) >= len(ALPHAS)]
    others = {method: _points(of) for method, of in (beside or {}).items()}
    title = f"{lesson.task.capitalize()}, fine-tuned on drawings {STYLES[FINE_TUNED]}"
    plot_alpha_curve(_points(sets), names[0], names[1:], path, title=title, beside=others)


def with_mean(sets: Sets) -> Sets:
    """The sets, followed by the mean of the shifts."""
    shifts = [of for of in sets[1:] if of[0] in STYLES]
    mean = {
        alpha: [
            sum(column) / len(shifts)
            for column in zip(*(values[alpha] for *_, values in shifts), strict=True)
        ]
        for alpha in sets[0][2]
    }
    row = (f"mean of the {len(shifts)} shifts", sum(n for _, n, _ in shifts), mean)
    return [sets[0], *shifts, row, *sets[len(shifts) + 1 :]]


def table(lesson: Lesson, sets: Sets, alpha: float) -> Table:
    """Data sets down; zero-shot, fine-tuned and the release's α across."""
    result = Table(title=lesson.caption)
    for column in ("data", "images", "zero-shot", "fine-tuned, α = 1", f"α = {alpha:g}"):
        result.add_column(column, justify="left" if column == "data" else "right")
    for name, count, values in with_mean(sets):
        cells = (" / ".join(f"{value:.1f}" for value in values[at]) for at in (0.0, 1.0, alpha))
        result.add_row(style_of(name), str(count), *cells)
    return result


def _points(sets: Sequence[tuple[str, int, dict[float, list[float]]]]) -> list[dict[str, float]]:
    """The first metric of each set by its name, a row an α."""
    return [
        {"alpha": alpha, **{name: of[alpha][0] for name, _, of in sets if alpha in of}}
        for alpha in sets[0][2]
    ]
