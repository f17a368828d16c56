"""The demo's comparison: R-Adapter and full fine-tuning over α, on the same test images, with
paired intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table
from torch import Tensor

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image
from radapter_serve.contract.labels import read_label_file, read_templates, split_label
from radapter_serve.data import load_labelled
from radapter_serve.demo.data import BASE, FINE_TUNED, DemoData
from radapter_serve.demo.full import Ends
from radapter_serve.demo.learn import ALPHAS
from radapter_serve.evaluation.classification import evaluation_batches, zero_shot_classifier
from radapter_serve.evaluation.image_sets import drawn
from radapter_serve.evaluation.intervals import paired_difference

OURS = "R-Adapter"
RIVAL = "WiSE-FT"
Hits = dict[str, NDArray[np.bool_]]  # by style, which of its images are right
_BATCH = 32  # on a CPU more are slower: what lies between the layers leaves its cache
_SURE = {True: "larger than its interval", False: "within its interval"}


@dataclass(frozen=True)
class Comparison:
    """Which test images are right at every point of both lines.

    Attributes:
        hits: by method and α.
        alpha: at which R-Adapter is compared.
    """

    hits: dict[str, dict[float, Hits]]
    alpha: float

    @property
    def systems(self) -> dict[str, Hits]:
        """What is compared, by name; R-Adapter at its α is the second."""
        ours = self.hits[OURS]
        rival = self.hits[RIVAL]
        return {
            "zero-shot": ours[0.0],
            f"{OURS}, α = {self.alpha:g}": ours[self.alpha],
            f"{OURS}, α = 1": ours[1.0],
            "full fine-tuning": rival[1.0],
            f"{RIVAL}, α = 0.5": rival[0.5],
        }

    def sets(self, method: str) -> list[tuple[str, int, dict[float, list[float]]]]:
        """Style, images and, by α, the accuracy in per cent, of each test set."""
        line = self.hits[method]
        return [
            (
                style,
                len(of),
                {alpha: [100 * float(hits[style].mean())] for alpha, hits in line.items()},
            )
            for style, of in line[0.0].items()
        ]

    def facts(self) -> list[dict[str, Any]]:
        """Of each system: accuracy in per cent in distribution and as the mean of the shifts, and
        R-Adapter's lead.

        A lead has the half-width of its interval of 95 %, which is over images.
        """
        groups = {
            "in_distribution": [FINE_TUNED],
            "shifts": [s for s in self.hits[OURS][0.0] if s != FINE_TUNED],
        }
        ours = list(self.systems.values())[1]
        found = []
        for name, hits in self.systems.items():
            row: dict[str, Any] = {"system": name}
            for group, styles in groups.items():
                lead, half = paired_difference([ours[s] for s in styles], [hits[s] for s in styles])
                mean = float(np.mean([hits[s].mean() for s in styles]))
                n = sum(len(hits[s]) for s in styles)
                row[group] = {
                    "n": n,
                    "accuracy": 100 * mean,
                    "lead": 100 * lead,
                    "interval": 100 * half,
                }
            found.append(row)
        return found

    def table(self) -> Table:
        """Systems down; accuracy and lead across, and whether the lead is larger than its
        interval.
        """
        facts = self.facts()
        result = Table(
            title=(
                f"Accuracy in %, and what {OURS} at α = {self.alpha:g} leads by, with intervals of"
                " 95 %"
            )
        )
        result.add_column("system")
        for title, group in (
            ("in distribution", "in_distribution"),
            ("mean of the shifts", "shifts"),
        ):
            result.add_column(f"{title}, {facts[0][group]['n']:,} images", justify="right")
            result.add_column(f"{OURS}'s lead", justify="right")
        for row in facts:
            cells = [row["system"]]
            for group in ("in_distribution", "shifts"):
                of = row[group]
                cells += [
                    f"{of['accuracy']:.1f}",
                    "" if row is facts[1] else lead_in_words(of["lead"], of["interval"]),
                ]
            result.add_row(*cells)
        return result


def lead_in_words(lead: float, interval: float) -> str:
    """Such as `+3.2 ± 1.1, larger than its interval`."""
    return f"{lead:+.1f} ± {interval:.1f}, {_SURE[abs(lead) > interval]}"


def compare(
    run: Path,
    rival: Ends,
    data: DemoData,
    alpha: float,
    limit: int | None = None,
) -> Comparison:
    """Evaluate R-Adapter and full fine-tuning at points from zero-shot, α = 0, to the end of
    learning, α = 1.

    Full fine-tuning is evaluated at both ends and in the middle, where WiSE-FT is.

    Args:
        run: folder of R-Adapter's run on the demo's base.
        rival: from `fine_tune`.
        data: test folders, and the classes in the order of the rival's classifier.
        alpha: at which R-Adapter is compared.
        limit: images of a style at most, drawn by a fixed seed; all if None.
    """
    start = {
        name: value.clone()
        for name, value in load_base(f"local-dir:{BASE}").model.state_dict().items()
    }
    lines = {OURS: Ends(start, fold(start, load_adapter(run), 1.0)), RIVAL: rival}
    points = {OURS: sorted({*ALPHAS, alpha}), RIVAL: (0.0, 0.5, 1.0)}
    return Comparison(right(lines, data, points, limit), alpha)


def right(
    lines: Mapping[str, Ends],
    data: DemoData,
    alphas: Mapping[str, Sequence[float]],
    limit: int | None = None,
) -> dict[str, dict[float, Hits]]:
    """Which test images are right, by method and α.

    Args:
        lines: methods, all of which start at the demo's base.
        data, limit: as of `compare`.
        alphas: of each method.
    """
    base = load_base(f"local-dir:{BASE}")
    classes = read_label_file(data.classes)
    templates = read_templates(data.templates)
    ready: dict[str, tuple[Tensor, Tensor]] = {}
    for style, folder in data.test.items():
        ready[style] = _read(base, folder, classes, limit)
    hits: dict[str, dict[float, Hits]] = {method: {} for method in lines}
    points = [(method, alpha) for method in lines for alpha in alphas[method]]
    for method, alpha in track(points, "Evaluating"):
        known = [
            of[0.0] for of in hits.values() if alpha == 0.0 and 0.0 in of
        ]  # all lines start at zero-shot
        if known:
            hits[method][alpha] = known[0]
        else:
            weights, bias = _select(base, lines[method], alpha, classes, templates)
            hits[method][alpha] = {
                style: _right(base, *of, weights, bias) for style, of in ready.items()
            }
    return hits


@torch.no_grad()
def _select(
    base: Base, line: Ends, alpha: float, classes: Sequence[str], templates: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Set the model to `(1−α)·start + α·end`; returns its classifier, [C, D] and [C]."""
    state = base.model.state_dict()
    for name, value in state.items():
        value.copy_(torch.lerp(line.start[name].float(), line.end[name].float(), alpha))
    if line.classifiers is None:
        embeds = zero_shot_classifier(base.model, base.tokenizer, classes, templates)
        return embeds, torch.zeros(len(embeds))
    first, last = line.classifiers
    return torch.lerp(first[0], last[0], alpha), torch.lerp(first[1], last[1], alpha)


def _read(
    base: Base, folder: Path, classes: Sequence[str], limit: int | None
) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, S, S] and labels [N] of images of a folder."""
    data = load_labelled(f"imagefolder:{folder}", every_class=False)
    rows = data.rows.select(drawn(len(data.rows), limit, 0))
    pixels, labels = zip(
        *evaluation_batches(base, rows, lambda row: (data.image(row), data.label(row))), strict=True
    )
    numbers = {split_label(line)[0]: number for number, line in enumerate(classes)}
    number_of = torch.tensor([numbers[name] for name in data.own])
    return torch.cat(pixels), number_of[torch.cat(labels)]


@torch.inference_mode()
def _right(
    base: Base, pixels: Tensor, labels: Tensor, weights: Tensor, bias: Tensor
) -> NDArray[np.bool_]:
    scores = [
        encode_image(base.model, some) @ weights.T + bias for some in torch.split(pixels, _BATCH)
    ]
    return np.asarray(torch.cat(scores).argmax(dim=1) == labels)
