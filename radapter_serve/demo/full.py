"""The full demo, `radapter-demo --full`: an adapter for each task, evaluated over α on all
styles.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from radapter_serve.contract.errors import check_alpha
from radapter_serve.demo import DemoSettings
from radapter_serve.demo.data import (
    BASE,
    FINE_TUNED,
    SHORT_SIDE,
    STYLES,
    DemoData,
    SceneData,
    prepare,
    prepare_scenes,
)
from radapter_serve.demo.run import Log, command, evaluate, fields_of, suite_of
from radapter_serve.evaluation.plots import draw
from radapter_serve.evaluation.rows import table
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.training import Recipe, load_recipe, train

RECIPES = Path(__file__).parent / "recipes"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


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
    for number, (suite, fields) in enumerate(lessons(data, scenes), 2):
        task = suite.name
        log.chapter(
            f"{number}. {task.capitalize()}: fine-tune on drawings {STYLES[FINE_TUNED]}, evaluate"
            " on unseen ones"
        )
        recipe = dataclasses.replace(recipe_of(task, out, seed, settings.steps), **fields)
        shutil.rmtree(recipe.out or "", ignore_errors=True)  # left by an earlier demo
        run = train(recipe, progress=True).folder
        at = recipe.alpha if settings.alpha is None else settings.alpha
        rows = evaluate(run, (*ALPHAS, at), suite, settings.limit)
        title = f"{task.capitalize()}, fine-tuned on drawings {STYLES[FINE_TUNED]}"
        log.console.print(table(rows, title))
        pictures = draw(rows, run, title)
        log.say(f"the pictures: {', '.join(map(str, pictures))}")
        names = ("dataset", "n", "alpha", "metrics")
        results[task] = {
            "alpha": at,
            "rows": [{name: getattr(row, name) for name in names} for row in rows],
        }
    log.end(results, out)
    following = f"{command('radapter-export')} --adapter {out}/runs/retrieval"
    log.say(f"  {following} && {command('radapter-serve')}")
    return results


def lessons(data: DemoData, scenes: SceneData) -> list[tuple[Suite, dict[str, Any]]]:
    """Test sets and fields of the recipe of each task: on drawings, captions of scenes, and masks
    of scenes.
    """
    captions: list[Entry] = []
    masks: list[Entry] = []
    of_masks: dict[str, Any] = {"task": "segmentation", "classes": scenes.classes}
    for style, folder in scenes.test.items():
        named: dict[str, Any] = {"name": style, "shift": "id" if style == FINE_TUNED else "ood"}
        captions.append(Entry(f"csv:{folder / 'captions.csv'}", "retrieval", **named))
        named |= {"dense": "proposals", "threshold": 0.0}
        masks.append(Entry(f"masks:{folder}", **named, **of_masks))
    masks.append(
        Entry(
            f"masks:{scenes.test[FINE_TUNED]}",
            name=f"{FINE_TUNED}, dense",
            dense="naclip",
            short_side=SHORT_SIDE,
            **of_masks,
        )
    )
    of_scenes = {
        "data": f"masks:{scenes.train}",
        "classes": scenes.classes,
        "templates": str(data.templates),
    }
    return [
        (suite_of(data), {**fields_of(data), "val_data": f"imagefolder:{data.val}"}),
        (Suite("retrieval", tuple(captions)), {"data": f"csv:{scenes.train / 'captions.csv'}"}),
        (Suite("segmentation", tuple(masks)), of_scenes),
    ]


def recipe_of(name: str, out: Path, seed: int, steps: int | None) -> Recipe:
    """Load a recipe of the demo, for its base; `steps` replaces the recipe's if given."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    steps = steps or recipe.steps
    assert steps is not None
    return dataclasses.replace(
        recipe,
        architecture=f"local-dir:{BASE}",
        out=out / "runs" / name,
        seed=seed,
        steps=steps,
        warmup_steps=min(recipe.warmup_steps or steps, steps // 10),
    )
