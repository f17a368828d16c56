"""Accuracy of the demo's models over α on its test drawings, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table
from torch import Tensor

from radapter_serve.clip.base import load_base
from radapter_serve.demo.data import BASE, FINE_TUNED, DemoData, style_of
from radapter_serve.evaluation.metrics import Floats, paired_difference
from radapter_serve.evaluation.models import Candidate, candidates_in_torch
from radapter_serve.evaluation.run import evaluate_set, open_set
from radapter_serve.evaluation.suite import Entry, Suite

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
OURS = "R-Adapter"
RIVAL = "WiSE-FT"
Hits = dict[str, NDArray[np.bool_]]  # by style, whether each of its images is right
Line = dict[float, Hits]  # by α


@dataclass(frozen=True)
class Ends:
    """Weights of a CLIP, and of a linear head, [C, D + 1] with the bias last, before and after
    training.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    first: Floats
    last: Floats
    classes: Sequence[str]  # of the head's rows


@dataclass(frozen=True, eq=False)
class HeadCandidate(Candidate):
    """A CLIP with a linear head in place of the text tower."""

    head: Mapping[str, Floats]  # row of each class, [D + 1], with the bias last

    def embed_images(self, pixels: Sequence[NDArray[np.uint8]]) -> Floats:
        embeds = super().embed_images(pixels)
        return np.column_stack([embeds, np.ones(len(embeds), np.float32)])

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Floats:
        return np.stack([self.head[line] for line in classes])


def wise_ft(ends: Ends, alphas: Sequence[float]) -> list[Candidate]:
    """Models on the line of WiSE-FT (Wortsman et al., CVPR 2022), of the demo's base."""
    deltas = {name: ends.end[name].float() - start.float() for name, start in ends.start.items()}
    deltas = {name: delta for name, delta in deltas.items() if delta.any()}
    models: list[Candidate] = []
    for model in candidates_in_torch(RIVAL, load_base(f"local-dir:{BASE}"), deltas, alphas):
        rows = ends.first + np.float32(model.alpha) * (ends.last - ends.first)
        head = dict(zip(ends.classes, rows, strict=True))
        models.append(HeadCandidate(model.source, model.alpha, model.facts, model.loaded, head))
    return models


def right(models: Sequence[Candidate], data: DemoData, limit: int | None = None) -> Line:
    """Evaluate whether each test image is right, by α."""
    settings: dict[str, Any] = {"classes": data.classes, "templates": str(data.templates)}
    line: Line = {}
    for style, folder in track(data.test.items(), "Evaluating"):
        entry = Entry(f"imagefolder:{folder}", name=style, **settings)
        images = open_set(Suite(style, (entry,)), entry, limit=limit)
        for row, _ in evaluate_set(models, images):
            assert row.alpha is not None and row.per_image is not None
            line.setdefault(row.alpha, {})[style] = row.per_image.astype(bool)
    models[0].close()
    return line


def accuracies(line: Line) -> list[tuple[str, int, dict[float, list[float]]]]:
    """Style, number of images, and accuracy in per cent by α, of each test set."""
    sets = []
    for style, of_base in line[0.0].items():
        values = {alpha: [100 * float(hits[style].mean())] for alpha, hits in line.items()}
        sets.append((style, len(of_base), values))
    return sets


def compared(hits: Mapping[str, Line], alpha: float) -> list[dict[str, Any]]:
    """Accuracy of five systems in per cent, and the lead over each by R-Adapter at an α, with the
    half-width of its 95 % interval.
    """
    line = hits[OURS]
    rival = hits[RIVAL]
    systems = {
        "zero-shot": line[0.0],
        f"{OURS}, α = {alpha:g}": line[alpha],
        f"{OURS}, α = 1": line[1.0],
        "full fine-tuning": rival[1.0],
        f"{RIVAL}, α = 0.5": rival[0.5],
    }
    shifts = [style for style in line[0.0] if style != FINE_TUNED]
    groups = {"in_distribution": [FINE_TUNED], "shifts": shifts}
    rows = []
    for name, of_system in systems.items():
        row: dict[str, Any] = {"system": name}
        for group, styles in groups.items():
            pair = _compared(of_system, line[alpha], styles)
            row[group] = {
                "n": pair["n"],
                "accuracy": pair["before"],
                "lead": pair["gain"],
                "interval": pair["interval"],
            }
        rows.append(row)
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]], alpha: float) -> Table:
    """Table of the accuracy of each system, and R-Adapter's lead."""
    title = f"Accuracy in %, and what {OURS} at α = {alpha:g} leads by, with intervals of 95 %"
    result = Table("system", title=title)
    groups = {"in distribution": "in_distribution", "mean of the shifts": "shifts"}
    for title, group in groups.items():
        result.add_column(f"{title}, {rows[0][group]['n']:,} images", justify="right")
        result.add_column(f"{OURS}'s lead", justify="right")
    for row in rows:
        cells = [row["system"]]
        for group in groups.values():
            cells.append(f"{row[group]['accuracy']:.1f}")
            lead = lead_in_words(row[group]["lead"], row[group]["interval"])
            cells.append("" if row is rows[1] else lead)
        result.add_row(*cells)
    return result


def lead_in_words(lead: float, interval: float) -> str:
    """A lead in words, such as `+3.2 ± 1.1, larger than its interval`."""
    verdict = "larger than its interval" if abs(lead) > interval else "within its interval"
    return f"{lead:+.1f} ± {interval:.1f}, {verdict}"


def gains(before: Hits, after: Hits) -> list[dict[str, Any]]:
    """Accuracy before and after, and the gain, of each style, and of the mean of the shifts."""
    shifts = [style for style in before if style != FINE_TUNED]
    groups = {style: [style] for style in before}
    groups[f"mean of the other {len(shifts)}"] = shifts
    return [{"style": name, **_compared(before, after, of)} for name, of in groups.items()]


def _compared(before: Hits, after: Hits, styles: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy over styles before and after, and the gain with its 95 % half-width."""
    gain, half = paired_difference([after[s] for s in styles], [before[s] for s in styles])
    return {
        "n": sum(len(before[s]) for s in styles),
        "before": 100 * float(np.mean([before[s].mean() for s in styles])),
        "after": 100 * float(np.mean([after[s].mean() for s in styles])),
        "gain": 100 * gain,
        "interval": 100 * half,
    }


def gain_table(rows: Sequence[Mapping[str, Any]], alpha: float) -> Table:
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
