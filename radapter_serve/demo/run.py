"""The demo: from drawings to a served model, each step by the same functions as the commands."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from radapter_client import Client
from radapter_export import export_release
from radapter_serve.adapter import load_adapter
from radapter_serve.adapter.file import check_alpha
from radapter_serve.base import load_base
from radapter_serve.data import load_labelled
from radapter_serve.demo.data import BASE, FINE_TUNED, SHIFTS, STYLES, prepare
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.plots import plot_alpha_curve
from radapter_serve.evaluation.sweep import alpha_sweep
from radapter_serve.serving.labels import read_label_file, read_templates
from radapter_serve.serving.server import TritonServer, free_ports
from radapter_serve.training import load_recipe, train

ALPHAS = [round(0.1 * i, 1) for i in range(11)]
LABEL_SET = "emoji"


def run_demo(out: Path, *, seed: int = 0, steps: int | None = None, alpha: float | None = None) -> dict[str, object]:
    """Fine-tune on one style of drawing, judge on others, export, serve, query, and check that all agree.

    Args:
        out: folder for everything that the demo makes; what an earlier demo made there is replaced.
        seed: of the fine-tuning.
        steps: optimizer steps; the recipe's if None.
        alpha: re-scaling of the exported release, in [0, 1]; the recipe's if None.

    Returns:
        What `results.json` in `out` holds.

    Raises:
        RAdapterError: something is missing, or served and local answers differ.
    """
    check_alpha(0.0 if alpha is None else alpha)
    console, started = Console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)

    def chapter(text: str) -> None:
        console.print(f"\n[bold]{text}[/]  [dim]{time.perf_counter() - started:.0f} s[/]", highlight=False)

    chapter("1. Draw the images: emoji by several vendors")
    data = prepare(out / "data")

    chapter(f"2. Fine-tune the base on one style: {STYLES[FINE_TUNED]}")
    recipe = load_recipe(Path(__file__).parent / "recipe.yaml")
    folder = out / "runs" / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # the demo's own, from an earlier call
    run = train(
        dataclasses.replace(
            recipe,
            architecture=f"local-dir:{BASE}",
            data=f"imagefolder:{data.train}",
            val_data=f"imagefolder:{data.val}",
            classes=data.classes,
            templates=str(data.templates),
            steps=recipe.steps if steps is None else steps,
            warmup_steps=min(recipe.warmup_steps, (steps or recipe.warmup_steps * 10) // 10),
            seed=seed,
            out=folder,
        )
    )
    alpha = recipe.alpha if alpha is None else alpha

    chapter("3. The α curve on concepts that neither the base nor fine-tuning has seen")
    adapter = load_adapter(run)
    sets = {style: load_labelled(f"imagefolder:{folder}", classes=data.classes) for style, folder in data.test.items()}
    alphas = sorted({*ALPHAS, alpha})
    rows = alpha_sweep(load_base(adapter.metadata.architecture), adapter, alphas, sets)
    counts = {style: len(labelled.rows) for style, labelled in sets.items()}
    console.print(_table(rows, alpha, counts))
    plot_alpha_curve(
        rows, FINE_TUNED, SHIFTS, out / "alpha.png", title=f"Fine-tuned on {STYLES[FINE_TUNED]}, seed {seed}"
    )
    console.print(f"the curve: {out / 'alpha.png'}", highlight=False)

    chapter(f"4. Fold at α = {alpha:g}, export, check against torch")
    (release,) = export_release(
        run,
        [alpha],
        model_repository=out / "model_repository",
        merged=out / "merged",
        label_sets={LABEL_SET: data.classes},
        progress=lambda line: console.print(f"[dim]{line}[/]", highlight=False),
    )
    for graph in release.graphs:
        console.print(f"{graph.name}: max error {graph.agreement.max_error:.1e} against torch", highlight=False)

    chapter("5. Serve with tritonserver, and classify through the client")
    files = sorted(file for folder in data.test.values() for file in folder.rglob("*.png"))
    files = random.Random(seed).sample(files, 60)
    with TritonServer(out / "model_repository", "127.0.0.1", *free_ports()) as server:
        with Client(server.grpc_url) as client:
            answers = client.classify(files, label_set=LABEL_SET, top_k=1)
            console.print(
                f"{server.grpc_url} answers for release {client.release.version} at α = {client.release.alpha:g}"
            )
        expected = _locally(release.merged, files, data.classes, data.templates)
        served = [(answer.top, answer.scores[0]) for answer in answers]
        same = sum(a[0] == b[0] for a, b in zip(served, expected, strict=True))
        error = max(abs(a[1] - b[1]) for a, b in zip(served, expected, strict=True))
        console.print(
            f"served and open_clip's own pipeline: {same} of {len(files)} labels equal, scores within {error:.1e}",
            soft_wrap=True,
        )
        _gallery(files[:18], [label for label, _ in served], out / "classified.png")
    console.print(f"the pictures with their labels: {out / 'classified.png'}; the server has stopped", highlight=False)
    if same < len(files):
        raise RAdapterError(f"{len(files) - same} served labels differ from the local ones; see {out}")

    seconds = time.perf_counter() - started
    results: dict[str, object] = {
        "seed": seed, "alpha": alpha, "n": counts, "rows": rows, "score_error": error, "seconds": round(seconds, 1),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    chapter("Done. To go on by hand:")
    console.print(f"  cd {out} && radapter-serve", highlight=False)
    return results


def _table(rows: Sequence[dict[str, float]], alpha: float, counts: dict[str, int]) -> Table:
    by_alpha = {row["alpha"]: row for row in rows}
    table = Table(title="Accuracy in %, zero-shot classification")
    for column in ("style", "images", "zero-shot", "fine-tuned, α = 1", f"α = {alpha:g}"):
        table.add_column(column, justify="left" if column == "style" else "right")
    lines = [(f"{STYLES[name]} ({'in distribution' if name == FINE_TUNED else 'shift'})", [name]) for name in counts]
    lines.append((f"mean of the {len(SHIFTS)} shifts", list(SHIFTS)))
    for label, names in lines:
        means = [sum(by_alpha[a][name] for name in names) / len(names) for a in (0.0, 1.0, alpha)]
        table.add_row(label, str(sum(counts[name] for name in names)), *(f"{mean:.1f}" for mean in means))
    return table


@torch.no_grad()
def _locally(merged: Path, files: Sequence[Path], classes: Path, templates: Path) -> list[tuple[str, float]]:
    """Best label and score of each file by open_clip alone, from the merged checkpoint."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{merged}")
    model.eval()
    names = [line.split(",")[0] for line in read_label_file(classes)]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{merged}")
    prompts = [template.replace("{}", name) for name in names for template in read_templates(templates)]
    texts = model.encode_text(tokenizer(prompts), normalize=True).unflatten(0, (len(names), -1)).mean(dim=1)
    texts = torch.nn.functional.normalize(texts, dim=-1)
    images = model.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
    scores, best = (model.logit_scale.exp() * images @ texts.T).softmax(dim=1).max(dim=1)
    return [(names[index], score) for index, score in zip(best.tolist(), scores.tolist(), strict=True)]


def _gallery(files: Sequence[Path], labels: Sequence[str], path: Path) -> None:
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    for axes, file, label in zip(figure.subplots(3, 6).flat, files, labels, strict=False):
        axes.imshow(np.asarray(Image.open(file).convert("RGB")))
        right = label == file.parent.name
        axes.set_title(
            label if right else f"{label}\n(is {file.parent.name})", fontsize=8, color="green" if right else "red"
        )
        axes.axis("off")
    figure.savefig(path)
