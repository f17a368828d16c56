"""The demo: train once, fold, export one release, serve it, and ask it for all three tasks; each
step by the functions of the commands.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from radapter_client import Client
from radapter_export import ExportSettings, export_release
from radapter_serve.contract.errors import check_alpha
from radapter_serve.contract.labels import read_label_file, split_label
from radapter_serve.demo import DemoSettings
from radapter_serve.demo.ask import LABEL_SET, ask_labels, ask_masks, ask_search, served
from radapter_serve.demo.compare import OURS, gain_table, gains, line_of, right
from radapter_serve.demo.data import BASE, FINE_TUNED, SHIFTS, STYLES, DemoData, prepare
from radapter_serve.demo.scenes import prepare_scenes
from radapter_serve.encoders.loaded import load_release
from radapter_serve.index.build import build
from radapter_serve.training import Recipe, load_recipe, train

RECIPES = Path(__file__).parent / "recipes"
OTHERS = SHIFTS[:3]  # the first three styles that it does not train on, whatever they show
# Half of the recipe's steps at twice its rate. With seed 0 and α = 0.5 they label 45.5 % of the 325
# validation drawings; the recipe itself labels 44.9 %, the base 43.1 %.
STEPS = 40
RATE = 1e-3
INDEX = "drawings"
QUERIES = 4
PICTURES = ("classified", "found", "segmented")


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo in about two minutes on two CPU cores; returns what `results.json` holds."""
    out = settings.out
    seed = settings.seed
    check_alpha(0.0 if settings.alpha is None else settings.alpha)
    log = Log()
    log.chapter("1. Draw the images: drawings by many hands, and scenes of them with masks")
    data = prepare(out / "data", styles=(FINE_TUNED, *OTHERS))
    scenes = prepare_scenes(out / "data" / "scenes", train=0)

    log.chapter(f"2. Fine-tune on drawings {STYLES[FINE_TUNED]}")
    steps = STEPS if settings.steps is None else settings.steps
    recipe = recipe_of("classification", out, seed, steps)
    fields = fields_of(data)
    fields |= {"val_data": None, "learning_rate": RATE}  # nothing is chosen here
    shutil.rmtree(recipe.out or "", ignore_errors=True)  # of an earlier demo
    run = train(dataclasses.replace(recipe, **fields), progress=True).folder
    alpha = recipe.alpha if settings.alpha is None else settings.alpha
    hits = right({OURS: line_of(run)}, data, {OURS: (0.0, alpha)}, settings.limit)[OURS]
    rows = gains(hits[0.0], hits[alpha])
    log.console.print(gain_table(rows, alpha))

    log.chapter(f"3. Fold at α = {alpha:g}, export one release, check it against torch")
    repository = out / "model_repository"
    merged = export(run, alpha, repository, out / "merged", data, log)

    log.chapter("4. Index the drawings of the other styles, serve, and ask for all three tasks")
    index = out / "indexes" / INDEX
    count = build(str(out / "data" / "shifts"), index, load_release(repository)).count
    log.say(f"{index}: an index of {count:,} drawings")
    classes = [split_label(line)[0] for line in read_label_file(data.classes)]
    queries = []
    for name in random.Random(seed).sample(classes, QUERIES):
        queries.append((f"a drawing of {name}", lambda id, name=name: Path(id).parent.name == name))
    with served(repository, index.parent) as url, Client(url) as client:
        log.say(ask_labels(client, merged, data, out / "classified.png", seed))
        log.say(ask_search(client, INDEX, queries, out / "found.png"))
        log.say(ask_masks(client, scenes, out / "segmented.png", seed))
    log.say(f"the pictures: {', '.join(str(out / f'{name}.png') for name in PICTURES)}")

    results = {"seed": seed, "alpha": alpha, "styles": rows}
    log.end(results, out)
    log.say(f"  cd {out} && radapter-serve")
    return results


class Log:
    """What a demo prints, with the seconds since its start."""

    def __init__(self) -> None:
        self.console = Console()
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def chapter(self, text: str) -> None:
        """Print a heading."""
        self.say(f"\n[bold]{text}[/]  [dim]{time.perf_counter() - self.started:.0f} s[/]")

    def end(self, results: dict[str, Any], out: Path) -> None:
        """Write `results.json`, and say what comes next."""
        results["seconds"] = round(time.perf_counter() - self.started, 1)
        (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        self.chapter("Done. To continue by hand:")


def recipe_of(name: str, out: Path, seed: int, steps: int | None) -> Recipe:
    """A recipe of the demo on its base; `steps` in place of the recipe's if they are given."""
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


def fields_of(data: DemoData) -> dict[str, Any]:
    """The fields of a recipe of classification that the data decide."""
    return {
        "data": f"imagefolder:{data.train}",
        "val_data": f"imagefolder:{data.val}",
        "classes": data.classes,
        "templates": str(data.templates),
    }


def export(
    run: Path, alpha: float, repository: Path, merged: Path, data: DemoData, log: Log
) -> Path:
    """Export a release into a repository of the demo; returns the folder of its checkpoint."""
    shutil.rmtree(repository, ignore_errors=True)  # of an earlier demo
    settings = ExportSettings(
        model_repository=repository,
        merged=merged,
        label_sets={LABEL_SET: data.classes},
        templates=data.templates,
        dense="naclip",
    )
    (release,) = export_release(
        run, [alpha], settings, progress=lambda line: log.say(f"[dim]{line}[/]")
    )
    errors = [f"{graph.name} {graph.agreement.max_error:.1e}" for graph in release.graphs]
    log.say(f"max error against torch: {', '.join(errors)}")
    return release.merged
