"""The demo's three fine-tunings, one adapter a task, and their α curves, by the functions of the commands."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from radapter_serve.demo.data import BASE, FINE_TUNED, SHIFTS, STYLES, DemoData, style_of
from radapter_serve.demo.scenes import SCENE_SHIFTS, SHORT_SIDE, SceneData
from radapter_serve.evaluation.plots import plot_alpha_curve
from radapter_serve.evaluation.results import Results, curve
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.evaluation.torch_embedder import from_adapter
from radapter_serve.training import load_recipe, train

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Lesson:
    """One task of the demo.

    Attributes:
        task: as recipes name it.
        fields: of the recipe, what the demo's data decide.
        entries: what it is evaluated on; the first in distribution, the next `shifts` the same in other styles.
        shifts: number of these.
        metrics: shown in the table, in the rows' names; the first is what the curve shows.
        caption: of the table.
        alphas: of the curve.
    """

    task: str
    fields: dict[str, Any]
    entries: tuple[Entry, ...]
    shifts: int
    metrics: tuple[str, ...]
    caption: str
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Learned:
    """What one task's fine-tuning gave.

    Attributes:
        run: its folder.
        alpha: for its release.
        rows: of `evaluate_suite`, every data set at every α.
    """

    run: Path
    alpha: float
    rows: list[dict[str, Any]]


def lessons(data: DemoData, scenes: SceneData) -> list[Lesson]:
    """The three tasks on the demo's data: drawings, captions of scenes, and masks of scenes."""
    classes: dict[str, Any] = {"classes": data.classes, "templates": str(data.templates)}
    drawings = tuple(
        Entry(name, f"imagefolder:{folder}", classes=str(data.classes)) for name, folder in data.test.items()
    )
    captions = tuple(Entry(name, f"csv:{folder / 'captions.csv'}", "retrieval") for name, folder in scenes.test.items())
    masks: dict[str, Any] = {"task": "segmentation", "classes": str(scenes.classes)}
    proposals = tuple(
        Entry(name, f"masks:{folder}", dense="proposals", threshold=0.0, **masks)
        for name, folder in scenes.test.items()
    )
    dense = Entry(
        f"{FINE_TUNED}, dense", f"masks:{scenes.test[FINE_TUNED]}", dense="naclip", short_side=SHORT_SIDE, **masks
    )
    return [
        Lesson(
            "classification",
            {"data": f"imagefolder:{data.train}", "val_data": f"imagefolder:{data.val}", **classes},
            drawings,
            len(SHIFTS),
            ("acc1",),
            "Accuracy in %, zero-shot classification",
            ALPHAS,
        ),
        Lesson(
            "retrieval",
            {"data": f"csv:{scenes.train / 'captions.csv'}"},
            captions,
            len(SCENE_SHIFTS),
            ("image_retrieval_recall@1", "image_retrieval_recall@5", "image_retrieval_recall@10"),
            "R@1 / R@5 / R@10 in %, scenes found by their captions",
        ),
        Lesson(
            "segmentation",
            {"data": f"masks:{scenes.train}", **classes},
            (*proposals, dense),
            len(SCENE_SHIFTS),
            ("miou",),
            "mIoU in %, true masks as proposals, and dense by naclip",
        ),
    ]


def learn(
    lesson: Lesson, out: Path, *, seed: int, steps: int | None, alpha: float | None, limit: int | None
) -> Learned:
    """Fine-tune the base for one task, and evaluate it over α on concepts that it has never seen.

    Args:
        lesson: the task.
        out: the demo's folder; an earlier run of the task there is replaced.
        seed: of the fine-tuning.
        steps: optimizer steps; the recipe's if None.
        alpha: for the release; the recipe's if None.
        limit: images of each data set at most that are evaluated; all if None.
    """
    recipe = load_recipe(RECIPES / f"{lesson.task}.yaml")
    folder = out / "runs" / lesson.task
    shutil.rmtree(folder, ignore_errors=True)  # the demo's own, from an earlier call
    steps = recipe.steps if steps is None else steps
    assert steps is not None
    fields = {
        **lesson.fields,
        "steps": steps,
        "warmup_steps": min(recipe.warmup_steps or steps, steps // 10),
        "seed": seed,
    }
    run = train(dataclasses.replace(recipe, architecture=f"local-dir:{BASE}", out=folder, **fields))
    alpha = recipe.alpha if alpha is None else alpha
    embedder = from_adapter(run, sorted({0.0, *lesson.alphas, 1.0, alpha}))
    try:
        results, inner = Results(folder), lesson.shifts + 1
        # One call for all data sets of the curve, because a call embeds the names of the classes once.
        rows = evaluate_suite(embedder, Suite(lesson.task, lesson.entries[:inner]), results, limit=limit)
        few = [v for v in embedder.variants if v.alpha in (0.0, alpha, 1.0)]  # of what is in no curve
        rest = Suite(lesson.task, lesson.entries[inner:])
        rows += evaluate_suite(embedder, rest, results, variants=few, limit=limit)
    finally:
        embedder.close()
    return Learned(run, alpha, rows)


def draw_curve(lesson: Lesson, learned: Learned, path: Path) -> None:
    """Draw the α curve of a task: in distribution against shifts."""
    names = [entry.name for entry in lesson.entries[: lesson.shifts + 1]]
    title = f"{lesson.task.capitalize()}, fine-tuned on {STYLES[FINE_TUNED]}"
    plot_alpha_curve(curve(learned.rows), names[0], names[1:], path, title=title)


def figures(lesson: Lesson, learned: Learned) -> list[tuple[str, int, dict[float, list[float]]]]:
    """Name, images and, by α, the metrics in per cent of each data set, and of the mean of the shifts."""
    found: list[tuple[str, int, dict[float, list[float]]]] = []
    for entry in lesson.entries:
        rows = [row for row in learned.rows if row["dataset"] == entry.name]
        values = {row["alpha"]: [100 * row["metrics"][name] for name in lesson.metrics] for row in rows}
        found.append((entry.name, rows[0]["n"], values))
    shifts = found[1 : lesson.shifts + 1]
    mean = {
        alpha: [sum(column) / len(shifts) for column in zip(*(values[alpha] for _, _, values in shifts), strict=True)]
        for alpha in found[0][2]
    }
    found.insert(lesson.shifts + 1, (f"mean of the {len(shifts)} shifts", sum(n for _, n, _ in shifts), mean))
    return found


def table(lesson: Lesson, learned: Learned) -> Table:
    """Data sets down; zero-shot, fine-tuned and the release's α across."""
    result = Table(title=lesson.caption)
    for column in ("data", "images", "zero-shot", "fine-tuned, α = 1", f"α = {learned.alpha:g}"):
        result.add_column(column, justify="left" if column == "data" else "right")
    for name, count, values in figures(lesson, learned):
        cells = (" / ".join(f"{value:.1f}" for value in values[alpha]) for alpha in (0.0, 1.0, learned.alpha))
        result.add_row(style_of(name), str(count), *cells)
    return result
