"""The demo: train once, fold, export one release, serve it, and query it for all three tasks, with
the functions of the commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from radapter_client import Client
from radapter_export import export
from radapter_serve.adapter import load_adapter
from radapter_serve.clip.towers import zero_shot_classifier
from radapter_serve.contract.errors import check_alpha
from radapter_serve.contract.labels import read_label_file, read_templates, split_label
from radapter_serve.data.masks import load_masked
from radapter_serve.data.source import DataSource
from radapter_serve.demo import DemoSettings
from radapter_serve.demo.data import (
    BASE,
    FINE_TUNED,
    SHIFTS,
    SHORT_SIDE,
    STYLES,
    DemoData,
    SceneData,
    prepare,
    prepare_scenes,
    style_of,
)
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import read_choice
from radapter_serve.evaluation.metrics import paired_difference
from radapter_serve.evaluation.models import from_adapter
from radapter_serve.evaluation.plots import draw_choice
from radapter_serve.evaluation.rows import Results, Row
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.suite import Entry, Suite
from radapter_serve.gateway.in_process import answering
from radapter_serve.gateway.settings import Settings
from radapter_serve.index.build import build
from radapter_serve.playground import PageSettings, serving
from radapter_serve.server.config import Endpoints, ServerConfig, free_ports
from radapter_serve.training import load_recipe, train

OTHERS = SHIFTS[:3]  # the first three styles that are not trained on, not chosen with results
INDEX = "drawings"
QUERIES = 4
PICTURES = ("classified", "found", "segmented")
LABEL_SET = "things"
QUESTIONS = 60  # drawings whose labels are compared with open_clip's
SHOWN = 18  # of these drawings, in the picture
SCENES = 5
CLOSE = 1e-3  # largest difference of two scores


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo in about a minute on two CPU cores; returns the content of `results.json`."""
    out = settings.out
    seed = settings.seed
    check_alpha(0.0 if settings.alpha is None else settings.alpha)
    log = Log()
    log.chapter("1. Draw the images: drawings by many hands, and scenes of them with masks")
    data = prepare(out / "data", styles=(FINE_TUNED, *OTHERS))
    scenes = prepare_scenes(out / "data" / "scenes", train=0)

    log.chapter(f"2. Fine-tune on drawings {STYLES[FINE_TUNED]}")
    quick = load_recipe("quick")
    run = out / "runs" / "classification"
    shutil.rmtree(run, ignore_errors=True)  # left by an earlier demo
    train(
        quick,
        base=f"local-dir:{BASE}",
        out=run,
        seed=seed,
        steps=settings.steps or quick.steps,
        progress=True,
        **fields_of(data),
    )
    choice = read_choice(run, load_adapter(run).digest)
    log.say(f"the curve over alpha: {draw_choice(choice, run)}")
    alpha = choice.alpha if settings.alpha is None else settings.alpha
    rows = gains(evaluate(run, (0.0, alpha), suite_of(data), settings.limit), alpha)
    log.console.print(gain_table(rows, alpha))

    log.chapter(f"3. Fold at α = {alpha:g}, export one release, check it against torch")
    repository = out / "model_repository"
    shutil.rmtree(repository, ignore_errors=True)  # left by an earlier demo
    merged = out / "merged"
    export_to(repository, merged, run, alpha, data, log)

    log.chapter("4. Index the drawings of the other styles, serve, and ask for all three tasks")
    index = out / "indexes" / INDEX
    count = build(str(out / "data" / "shifts"), index, load_release(repository)).count
    log.say(f"{index}: an index of {count:,} drawings")
    classes = [split_label(line)[0] for line in read_label_file(data.classes)]
    names = random.Random(seed).sample(classes, QUERIES)
    with served(repository, index.parent) as url, Client(url) as client:
        log.say(ask_labels(client, merged, data, out / "classified.png", seed))
        log.say(ask_search(client, names, out / "found.png"))
        log.say(ask_masks(client, scenes, out / "segmented.png", seed))
    log.say(f"the pictures: {', '.join(str(out / f'{name}.png') for name in PICTURES)}")

    results = {"seed": seed, "alpha": alpha, "styles": rows}
    log.end(results, out)
    log.say(f"  cd {out} && {command('radapter-serve', out)}")
    log.say(
        "With photos of your own, in photos/CLASS/, and ViT-B-32, which is fetched once (605 MB):"
    )
    log.say(f"  {command('radapter-train')} --recipe quick --data photos --out runs/photos")
    log.say(f"  {command('radapter-export')} --adapter runs/photos && {command('radapter-serve')}")
    return results


def command(name: str, folder: Path = Path()) -> str:
    """A command of this environment, as somebody types it in a folder: its name if it is on PATH,
    else its path.
    """
    program = Path(sys.executable).parent / name
    if shutil.which(name) == str(program):
        return name
    return shlex.quote(os.path.relpath(program, folder))


class Log:
    """Prints the lines of a demo, and the seconds since its start."""

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
        """Write `results.json`, and print the heading of the next steps."""
        results["seconds"] = round(time.perf_counter() - self.started, 1)
        (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        self.chapter("Done. To continue by hand:")


def fields_of(data: DemoData) -> dict[str, Any]:
    """Recipe fields of classification for the demo's data."""
    return {
        "data": f"imagefolder:{data.train}",
        "classes": data.classes,
        "templates": str(data.templates),
    }


def suite_of(data: DemoData) -> Suite:
    """The test drawings as a suite, a data set for each style."""
    entries = [
        Entry(
            f"imagefolder:{folder}",
            name=style,
            shift="id" if style == FINE_TUNED else "ood",
            classes=data.classes,
            templates=str(data.templates),
        )
        for style, folder in data.test.items()
    ]
    return Suite("classification", tuple(entries))


def evaluate(run: Path, alphas: Sequence[float], suite: Suite, limit: int | None) -> list[Row]:
    """Evaluate a run at each α; its folder keeps the rows."""
    models = from_adapter(run, sorted({*alphas}))
    try:
        return evaluate_suite(models, suite, Results(run), limit=limit)
    finally:
        models[0].close()


def gains(rows: Sequence[Row], alpha: float) -> list[dict[str, Any]]:
    """Accuracy in per cent before and after, and the gain with the half-width of its 95 % interval,
    of each style and of the mean of the shifts.
    """
    hits = {(row.dataset, row.alpha): np.asarray(row.per_image) for row in rows}
    groups = {row.dataset: [row.dataset] for row in rows}
    shifts = [style for style in groups if style != FINE_TUNED]
    groups[f"mean of the other {len(shifts)}"] = shifts
    result = []
    for name, styles in groups.items():
        before = [hits[style, 0.0] for style in styles]
        after = [hits[style, alpha] for style in styles]
        gain, half = paired_difference(after, before)
        figures = {
            "style": name,
            "n": sum(map(len, before)),
            "before": 100 * float(np.mean([values.mean() for values in before])),
            "after": 100 * float(np.mean([values.mean() for values in after])),
            "gain": 100 * gain,
            "interval": 100 * half,
        }
        result.append(figures)
    return result


def gain_table(rows: Sequence[dict[str, Any]], alpha: float) -> Table:
    """Table of the zero-shot accuracy, the fine-tuned accuracy and the gain of each style."""
    result = Table(
        title="Accuracy in % on drawings that were not trained on",
        caption="±: interval of 95 % over images; *: the gain is larger",
    )
    for column in ("style", "drawings", "zero-shot", f"α = {alpha:g}", "gain"):
        result.add_column(column, justify="left" if column == "style" else "right")
    for row in rows:
        star = "*" if abs(row["gain"]) > row["interval"] else " "
        result.add_row(
            style_of(row["style"]),
            f"{row['n']:,}",
            f"{row['before']:.1f}",
            f"{row['after']:.1f}",
            f"{row['gain']:+.1f} ± {row['interval']:.1f}{star}",
        )
    return result


def export_to(
    repository: Path, merged: Path, run: Path, alpha: float | str, data: DemoData, log: Log
) -> None:
    """Export a release into a repository, and its merged checkpoint."""
    done = export(
        run,
        alpha,
        model_repository=repository,
        merged=merged,
        label_sets={LABEL_SET: data.classes},
        templates=data.templates,
        dense="naclip",
        progress=True,
    )
    errors = [f"{name} {agreement.max_error:.1e}" for name, agreement in done.agreement.items()]
    log.say(f"max error against torch: {', '.join(errors)}")


@contextlib.contextmanager
def served(repository: Path, indexes: Path) -> Iterator[str]:
    """Serve a release and its indexes over HTTP from this process; yields the URL."""
    config = ServerConfig(repository, Endpoints.on_free_ports(), indexes=indexes)
    settings = Settings(port=config.endpoints.http_port, indexes=config.indexes)
    with answering(config, settings):
        yield config.endpoints.http_url


def ask_labels(client: Client, merged: Path, data: DemoData, path: Path, seed: int) -> str:
    """Classify drawings of all styles, compare the answers with open_clip's own, and draw some;
    returns a line with the number of right labels.
    """
    files = sorted(file for folder in data.test.values() for file in folder.rglob("*.png"))
    files = random.Random(seed).sample(files, QUESTIONS)
    answers = client.classify(files, label_set=LABEL_SET, top_k=1)

    # Compare with open_clip alone.
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{merged}")
    model.eval()
    lines = read_label_file(data.classes)
    with torch.no_grad():
        classes = zero_shot_classifier(model, tokenizer, lines, read_templates(data.templates))
        pixels = torch.stack([preprocess(Image.open(file)) for file in files])  # type: ignore[operator]
        images = model.encode_image(pixels, normalize=True)
        scores = (model.logit_scale.exp() * images @ classes.T).softmax(dim=1)
    names = [split_label(line)[0] for line in lines]
    error = 0.0
    same = 0
    for answer, row in zip(answers, scores, strict=True):
        same += answer.top == names[int(row.argmax())]
        error = max(error, abs(answer.scores[0] - float(row.max())))
    if same < len(files) or error > CLOSE:
        raise RAdapterError(
            f"served answers differ from open_clip's: {same} of {len(files)} labels equal, scores"
            f" within {error:.1e}"
        )

    right = sum(answer.top == f.parent.name for answer, f in zip(answers, files, strict=True))
    figure = Figure(figsize=(10, 6.3), dpi=110, layout="constrained")
    panels = figure.subplots(3, SHOWN // 3).flat
    for axes, file, answer in zip(panels, files[:SHOWN], answers[:SHOWN], strict=True):
        axes.imshow(np.asarray(Image.open(file).convert("RGB")))
        correct = answer.top == file.parent.name
        title = answer.top if correct else f"{answer.top}\n(is {file.parent.name})"
        axes.set_title(title, fontsize=8, color="green" if correct else "red")
        axes.axis("off")
    _save(figure, path, f"labels out of {len(names)}, zero-shot classification after fine-tuning")
    return (
        f"labels: {right} of {len(files)} drawings right, and all {same} labels equal to"
        " open_clip's own"
    )


def ask_search(client: Client, names: Sequence[str], path: Path) -> str:
    """Search for some classes, and draw the best hits; returns a line with the right searches."""
    figure = Figure(figsize=(9, 1.85 * len(names) + 0.3), dpi=80, layout="constrained")
    rows = figure.subfigures(len(names), 1, squeeze=False)[:, 0]
    count = 0
    for row, name in zip(rows, names, strict=True):
        text = f"a drawing of {name}"
        hits = client.search(text, index=INDEX, top_k=6, thumbnails=True)
        is_right = [Path(hit.id).parent.name == name for hit in hits]
        row.suptitle(text, fontsize=9, x=0.01, ha="left")
        for axes, hit, hit_is_right in zip(row.subplots(1, len(hits)), hits, is_right, strict=True):
            axes.imshow(np.asarray(Image.open(io.BytesIO(hit.thumbnail or b""))))
            axes.set_xlabel(f"{hit.score:.2f}", fontsize=7)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="green" if hit_is_right else "red", linewidth=3)
        count += any(is_right)
    _save(figure, path, "the best six hits of each search, with their cosines")
    return f"searches: {count} of {len(names)} have a right image among the first six"


def ask_masks(client: Client, data: SceneData, path: Path, seed: int) -> str:
    """Segment scenes with their masks as proposals, and densely, and draw them; returns a line."""
    masked = load_masked(DataSource(f"masks:{data.test[FINE_TUNED]}", classes=data.classes))
    images = random.Random(seed).sample(list(masked.images), min(SCENES, len(masked.images)))
    figure = Figure(figsize=(9, 5.9), dpi=100, layout="constrained")
    panels = figure.subplots(3, len(images), squeeze=False)
    right = [0, 0]
    count = 0
    for column, masked_image in zip(panels.T, images, strict=True):
        image = Image.open(io.BytesIO(masked_image.data()))
        segments = masked_image.segments()
        masks = np.stack([mask for _, mask in segments])
        labels = [masked.classes[label] for label, _ in segments]
        count += len(labels)
        answers = (
            client.segment(image, masked.classes, proposals=masks, threshold=0.0),
            client.segment(image, labels, short_side=SHORT_SIDE),
        )
        column[0].imshow(np.asarray(image))
        for number, (axes, answer) in enumerate(zip(column[1:], answers, strict=True)):
            axes.imshow(np.asarray(answer.overlay(legend=False)))
            for label, mask in zip(labels, masks, strict=True):
                most = answer.labels[np.bincount(answer.mask[mask]).argmax()]
                correct = most == split_label(label)[0]
                right[number] += correct
                y, x = (place.mean() for place in np.nonzero(mask))
                box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0}
                color = "green" if correct else "red"
                axes.text(x, y, most, fontsize=6, color=color, ha="center", bbox=box)
    titles = (
        "the scenes",
        f"their masks as proposals, {len(masked.classes)} labels",
        "dense, the labels of the scene",
    )
    for axes in panels.flat:
        axes.axis("off")
    for axes, title in zip(panels[:, 0], titles, strict=True):
        axes.set_title(title, fontsize=8, loc="left")
    _save(figure, path, "each drawing by the label of most of its pixels")
    return (
        f"masks: of {count} drawings in scenes {right[0]} right with proposals and"
        f" {len(masked.classes)} labels, {right[1]} with dense patches and the scene's labels"
    )


def _save(figure: Figure, path: Path, what: str) -> None:
    figure.supxlabel(f"green: right, red: wrong; {what}", fontsize=8)
    figure.savefig(path)


def play(out: Path) -> None:
    """Serve the playground on the results of a demo, open it in a browser, and
    stay until Ctrl-C.
    """
    folder = out / "playground"
    repository = folder / "model_repository"
    indexes = folder / "indexes"
    log = Log()
    data = prepare(out / "data", styles=(FINE_TUNED,))
    scenes = prepare_scenes(out / "data" / "scenes", train=0)
    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier call
    log.chapter("The playground: export with any α, index the scenes, serve")
    run = out / "runs" / "classification"
    export_to(repository, folder / "merged", run, "dynamic", data, log)
    build(f"csv:{scenes.gallery}", indexes / "scenes", load_release(repository))
    log.say(f"drawings to drop on the page: {out / 'data' / 'test'} and {scenes.gallery.parent}")
    port, *_ = free_ports()
    with served(repository, indexes) as server, serving(PageSettings(server, port=port)) as url:
        log.say(f"playground  {url}\nCtrl-C stops it.")
        webbrowser.open(url)
        threading.Event().wait()
