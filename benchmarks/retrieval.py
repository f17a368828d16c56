"""Training retrieval: the margin δ, and several captions of an image in a batch; on the demo's
scenes or on others.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, Report, say

from radapter_serve.demo.data import BASE
from radapter_serve.demo.run import RECIPES
from radapter_serve.demo.scenes import prepare_scenes
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.rows import Results
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.training import load_recipe, train

RECALLS = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 10)]


def main() -> None:
    """Train once for each δ and once with several captions an image, evaluate, and write the
    table.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--train", help="captions to train on, as csv:FILE; the demo's scenes if left out"
    )
    parser.add_argument(
        "--evaluate", nargs="+", default=[], help="captions to evaluate on; the demo's test scenes"
    )
    parser.add_argument(
        "--architecture",
        default=f"local-dir:{BASE}",
        help="open_clip model; the demo's if left out",
    )
    parser.add_argument("--pretrained", help="open_clip tag, or a checkpoint's path")
    parser.add_argument(
        "--deltas", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1], help="margins"
    )
    parser.add_argument(
        "--captions", type=int, default=2, help="captions an image of the last run; 1 leaves it out"
    )
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    recipe = dataclasses.replace(
        load_recipe(RECIPES / "retrieval.yaml"),
        architecture=arguments.architecture,
        pretrained=arguments.pretrained,
        steps=arguments.steps,
        warmup_steps=arguments.steps // 10,
        seed=arguments.seed,
        tracker="none",
    )
    report = Report(
        "retrieval",
        "Retrieval: the margin δ, and captions of an image in a batch",
        f"{arguments.steps} steps of {recipe.batch_size} images, otherwise the demo's recipe for"
        " retrieval; one seed. Recall in %, mean over the sets to evaluate on: the demo's test"
        " scenes (100 in each of three styles, two captions each) unless the command names others."
        " There an R@1 of 18 % has a standard error of 1.6 for images (600 captions ask) and of"
        " 2.2 for texts (300 images ask).",
        timed=False,
    )
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = arguments.train
        evaluated = dict(enumerate(arguments.evaluate))
        if source is None:
            scenes = prepare_scenes(folder / "scenes")
            source = f"csv:{scenes.train / 'captions.csv'}"
            evaluated = evaluated or {
                style: f"csv:{place / 'captions.csv'}" for style, place in scenes.test.items()
            }
        suite = Suite(
            "retrieval",
            tuple(Entry(place, "retrieval", name=str(key)) for key, place in evaluated.items()),
        )
        runs = [(delta, 1) for delta in arguments.deltas]
        runs += [(recipe.delta, arguments.captions)] if arguments.captions > 1 else []
        for delta, captions in runs:
            say(f"δ = {delta:g}, {captions} captions an image")
            out = folder / f"{delta:g}-{captions}"
            train(
                dataclasses.replace(
                    recipe, data=source, delta=delta, captions_per_image=captions, out=out
                ),
                progress=True,
            )
            models = from_adapter(out, [recipe.alpha, 1.0] if lines else [0.0, recipe.alpha, 1.0])
            rows = evaluate_suite(models, suite, Results(out))
            for alpha in sorted({row.alpha for row in rows}):
                mine = [row.metrics for row in rows if row.alpha == alpha]
                cells = [
                    f"{100 * statistics.mean(metrics[recall] for metrics in mine):.1f}"
                    for recall in RECALLS
                ]
                say(f"α = {alpha:g}: {' '.join(cells)}")
                head = [f"δ = {delta:g}", str(captions)] if alpha else ["before training", ""]
                lines.append([*head, f"{alpha:g}", *cells])
    columns = [
        "",
        "captions an image",
        "α",
        *(f"{way} R@{k}" for way in ("image", "text") for k in (1, 10)),
    ]
    report.table(f"Seed {arguments.seed}", columns, lines)
    report.write(arguments.out)


if __name__ == "__main__":
    main()
