"""What a base that is scored by sigmoids gains by the loss that fits it: accuracy and calibration
of a run by that loss, and of one by the paper's, beside the base.

SigLIP's own weights can't be trained on a small machine in minutes. So the base is the demo's
small CLIP, trained on by SigLIP's loss on the drawings that it was trained on, with a scale and a
bias of its own.

python -m benchmarks.drawings.pairs --package package --out pairs
python benchmarks/sigmoid_loss.py --pairs pairs --data-root DATA
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, Report, say, with_spread
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # rivals and benchmarks are not installed

from benchmarks.drawings.augment import augment
from benchmarks.drawings.batches import Pairs
from radapter_serve import evaluate, load_adapter, train
from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.demo.data import BASE
from radapter_serve.evaluation.rows import own_metric
from radapter_serve.threads import limit_threads
from radapter_serve.training.loss import pairwise_sigmoid
from rivals.benchmark import load_benchmark
from rivals.tables import TABLES

ROOT = Path(__file__).parents[1]
NAMES = 32  # a step, with two drawings each
RATE = 1e-4
ALPHAS = (0.5, 1.0)
OWN = "the base's own: pairwise sigmoid"
PAPER = "the paper's: MPM-NCE"


def sigmoid_base(pairs: Pairs, steps: int, folder: Path) -> None:
    """Train the demo's base on by SigLIP's loss; write it with its bias, and without into plain/.

    Args:
        pairs: that the base was trained on.
        steps: of 64 drawings.
        folder: to make.
    """
    torch.manual_seed(0)
    draw = random.Random(0)
    base = load_base(f"local-dir:{BASE}")
    model: Any = base.model
    model.logit_bias = nn.Parameter(torch.tensor(-10.0))  # where SigLIP's paper starts both
    model.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
    own = [model.logit_bias, model.logit_scale]
    towers = [p for name, p in model.named_parameters() if not name.startswith("logit_")]
    for parameter in towers:
        parameter.requires_grad_(True)
    # two numbers that have far to go, in few steps
    groups = [{"params": towers, "lr": RATE}, {"params": own, "lr": 200 * RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps
    )
    every = sorted(pairs.by_name)
    positive = torch.eye(NAMES, dtype=torch.bool).repeat_interleave(2, dim=0)
    for step in range(steps):
        rows, captions = pairs.batch(draw.sample(every, NAMES), draw)
        pixels = augment(pairs.pixels[rows], pairs.black[rows], pairs.one_way[rows])
        loss = pairwise_sigmoid(
            encode_image(model, pixels),
            encode_text(model, base.tokenizer(captions)),
            positive,
            logit_scale=model.logit_scale.exp(),
            logit_bias=model.logit_bias,
            delta=0.0,
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
            say(f"step {step + 1}: loss {loss.item():.2f}, scale {scale:.1f}, bias {bias:.1f}")
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    _write(weights, folder)
    weights.pop("logit_bias")
    _write(weights, folder / "plain")


def _write(weights: dict[str, Tensor], folder: Path) -> None:
    """A folder that open_clip loads."""
    folder.mkdir(parents=True)
    config = json.loads((Path(BASE) / "open_clip_config.json").read_text(encoding="utf-8"))
    if "logit_bias" in weights:
        config["model_cfg"]["init_logit_bias"] = -10.0
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "open_clip_model.safetensors")


def learned(base: Path, fields: dict[str, Any], seed: int, out: Path) -> Path:
    """An adapter file of one run."""
    run = train(
        **{**fields, "architecture": f"local-dir:{base}", "seed": seed, "out": out},
        threads=torch.get_num_threads(),
        tracker="none",
        save_every=None,
    )
    return run.adapter


def of_base(adapter: Path, base: Path) -> Path:
    """An adapter for another base with the same towers."""
    found = load_adapter(adapter)
    metadata = dataclasses.replace(found.metadata, architecture=f"local-dir:{base}")
    save_adapter(Adapter(found.tensors, metadata), adapter)
    return adapter


def judged(
    adapter: Path, alphas: Sequence[float], data_root: Path, out: Path
) -> dict[float, list[float]]:
    """By α: accuracy and ECE in colour, and the means of both over the other styles, in %."""
    done = evaluate(
        adapter,
        alphas,
        suite=ROOT / "recipes" / "suites" / "drawings.yaml",
        data_root=data_root,
        threads=torch.get_num_threads(),
        out=out,
    )
    found = {}
    for alpha in alphas:
        rows = [row for row in done.rows if row.alpha == alpha]
        found[alpha] = [
            mean(value(row) for row in rows if row.shift == shift)
            for shift in ("id", "ood")
            for value in (own_metric, lambda row: 100 * row.metrics["ece"])
        ]
    return found


def main() -> None:
    """Make the base, train by both losses, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="folder that benchmarks.drawings.pairs made")
    add("--data-root", type=Path, required=True, help="folder with drawings/")
    add("--steps", type=int, default=600, help="of the base, by SigLIP's loss")
    add("--seeds", type=int, default=3, help="runs of each loss")
    add("--threads", type=int, default=1, help="to compute with")
    add("--out", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    report = Report(
        "sigmoid_loss",
        "A base that is scored by sigmoids",
        f"The demo's base, trained on for {arguments.steps} steps of {2 * NAMES} drawings by"
        " SigLIP's loss with a scale and a bias of its own; then runs of R-Adapter with preserve,"
        " no dropping and the paper's rate on 1,380 coloured drawings, by each loss. All are scored"
        " by the base's sigmoids. In %, mean ± standard deviation over"
        f" {arguments.seeds} seeds: accuracy, and the ECE of the score of the chosen class, on 576"
        " coloured drawings and as the mean over nine other styles.",
        timed=False,
    )
    fields = {
        **TABLES["main"].rows["R-Adapter, preserve"].settings,
        **load_benchmark(
            ROOT / "rivals" / "benchmarks" / "drawings.yaml", arguments.data_root
        ).given,
    }
    columns = ["loss", "α", "colour", "colour, ECE", "nine styles", "nine styles, ECE"]
    found: dict[tuple[str, float], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        sigmoid_base(Pairs(arguments.pairs), arguments.steps, base)
        for seed in range(arguments.seeds):
            for loss, start in ((OWN, base), (PAPER, base / "plain")):
                out = folder / f"{seed}-{start.name}"
                adapter = of_base(learned(start, fields, seed, out), base)
                alphas = ALPHAS if found else (0.0, *ALPHAS)  # the base is the same for all
                of_alphas = judged(adapter, alphas, arguments.data_root, out / "judged")
                for alpha, figures in of_alphas.items():
                    key = ("none: the base", alpha) if alpha == 0 else (loss, alpha)
                    found.setdefault(key, []).append(figures)
                    say(f"seed {seed}, {key}: {figures}")
                shutil.rmtree(out)
    rows = [
        [loss, f"{alpha:g}", *(with_spread(column) for column in zip(*of, strict=True))]
        for (loss, alpha), of in found.items()
    ]
    report.table("Scores of the base's sigmoids", columns, rows)
    report.write(arguments.out)


if __name__ == "__main__":
    main()
