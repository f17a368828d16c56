"""Fine-tuned on the photos of PACS, evaluated on its photos, art, cartoons and sketches, over α and several seeds.

α is chosen on photos that neither training nor testing sees; the other styles choose nothing.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from common import RESULTS, Report, say, with_spread

from radapter_serve.adapter import load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.demo.data import BASE
from radapter_serve.evaluation.alpha_choice import Choice, choose
from radapter_serve.evaluation.plots import plot_alpha_curve
from radapter_serve.evaluation.results import Results, Row, curve
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.evaluation.torch_embedder import embedder_of
from radapter_serve.training import Recipe, train

VALIDATION = "photo, validation"
STYLES = ("photo", "art_painting", "cartoon", "sketch")
ALPHAS = [round(0.1 * step, 1) for step in range(11)]
HELD_OUT = 5  # every fifth photo of a class is not trained on: these are for the test and, every other one, choose α
RECIPE = Recipe(
    momentum=0.99,
    bias_correction=True,
    batch_size=96,
    steps=150,
    warmup_steps=20,
    crop_scale=0.7,
    flip=True,
    workers=0,
    save_every=None,
    tracker="none",
)


def main() -> None:
    """Train once a seed and write the mean of the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder with photo/CLASS/*.jpg, art_painting, cartoon and sketch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the fine-tuning")
    parser.add_argument("--architecture", default=f"local-dir:{BASE}", help="base; the demo's small one by default")
    parser.add_argument("--pretrained", help="open_clip tag or checkpoint of the base")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="of the fine-tuning")
    parser.add_argument("--limit", type=int, default=1000, help="images of a style at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table and the picture")
    arguments = parser.parse_args()
    report = Report(
        "pacs",
        "PACS: fine-tuned on photos, evaluated on other styles too",
        f"Zero-shot accuracy in % on {arguments.limit} images of a style at most. Every {HELD_OUT}th photo is kept "
        f"from fine-tuning: half of these choose α, the others are for the test. The demo's small base "
        f"unless another one is named, batches of {RECIPE.batch_size}, "
        f"{arguments.steps} steps. Mean over the seeds, ± the standard deviation. 50 % over 1,000 images has a "
        "standard error of 1.6.",
        timed=False,
    )
    curves: list[list[dict[str, float]]] = []
    chosen: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_csv, val_csv, test_csv = _split(arguments.root / "photo", folder)
        for seed in arguments.seeds:
            say(f"seed {seed}: training")
            run = train(
                dataclasses.replace(
                    RECIPE,
                    architecture=arguments.architecture,
                    pretrained=arguments.pretrained,
                    data=f"csv:{train_csv}",
                    steps=arguments.steps,
                    seed=seed,
                    out=folder / f"seed-{seed}",
                )
            )
            say(f"seed {seed}: evaluating")
            choice, rows = _evaluate(run, val_csv, test_csv, arguments.root, arguments.limit)
            chosen.append(choice.alpha)
            curves.append(curve(rows))
            for point, evaluated in zip(curves[-1], choice.curve, strict=True):
                point[VALIDATION] = evaluated[VALIDATION]
    counts = {row["dataset"]: row["n"] for row in rows} | {VALIDATION: choice.sets[VALIDATION]["n"]}
    points = [
        {"alpha": alpha, **{s: statistics.mean(c[i][s] for c in curves) for s in STYLES}}
        for i, alpha in enumerate(ALPHAS)
    ]
    table = []
    groups = [*((s, [s]) for s in STYLES), ("mean of the shifts", list(STYLES[1:]))]
    for label, styles in [(VALIDATION, [VALIDATION]), *groups]:
        cells = [label + (" (in distribution)" if label == STYLES[0] else ""), str(sum(counts[s] for s in styles))]
        for index in range(len(ALPHAS)):
            values = [statistics.mean(c[index][s] for s in styles) for c in curves]
            cells.append(with_spread(values))
        table.append(cells)
    columns = ["style", "images", *(f"α = {alpha:g}" for alpha in ALPHAS)]
    report.table(f"Seeds {', '.join(map(str, arguments.seeds))}", columns, table)
    at = [ALPHAS.index(alpha) for alpha in chosen]
    report.table(
        f"At the α that validation chooses for each seed: {', '.join(f'{alpha:g}' for alpha in chosen)}",
        ["style", "α = 0", "chosen α"],
        [
            [
                label,
                with_spread([statistics.mean(c[0][s] for s in styles) for c in curves]),
                with_spread([statistics.mean(c[i][s] for s in styles) for c, i in zip(curves, at, strict=True)]),
            ]
            for label, styles in groups
        ],
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    title = "Fine-tuned on the photos of PACS"
    plot_alpha_curve(points, STYLES[0], STYLES[1:], arguments.out / "pacs.png", title=title)
    report.write(arguments.out)


def _split(photos: Path, folder: Path) -> list[Path]:
    """CSV files of the photos to train on, of those to choose α by, and of those to evaluate on."""
    parts: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for class_folder in sorted(path for path in photos.iterdir() if path.is_dir()):
        for number, file in enumerate(sorted(class_folder.iterdir())):
            part = "train" if number % HELD_OUT else ("val", "test")[number // HELD_OUT % 2]
            parts[part].append((file.absolute(), class_folder.name))
    paths = [folder / f"photo-{part}.csv" for part in ("train", "val", "test")]
    for path, part in zip(paths, ("train", "val", "test"), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *parts[part]])
    return paths


def _evaluate(run: Path, validation: Path, photos: Path, root: Path, limit: int) -> tuple[Choice, list[Row]]:
    """The choice of α by the validation photos, and the rows of the tests, which come after it."""
    places = {s: f"imagefolder:{root.absolute() / s}" for s in STYLES} | {STYLES[0]: f"csv:{photos}"}
    entries = tuple(
        Entry(s, place, shift="id" if s == STYLES[0] else "ood", templates="simple") for s, place in places.items()
    )
    adapter = load_adapter(run)
    embedder = embedder_of(load_base(adapter.metadata.architecture, adapter.metadata.pretrained), adapter, ALPHAS)
    own = Entry(VALIDATION, f"csv:{validation}", split="validation", templates="simple")
    suite, results = Suite("pacs", (own, *entries)), Results(run / "evaluated")
    choice = choose(evaluate_suite(embedder, suite, results, split="validation"))
    return choice, evaluate_suite(embedder, suite, results, limit=limit)


if __name__ == "__main__":
    main()
