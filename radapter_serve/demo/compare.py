"""Accuracy of the demo's models over α on its test drawings, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from rich.progress import track
from rich.table import Table
from torch import Tensor

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image, zero_shot_classifier
from radapter_serve.contract.labels import read_label_file, read_templates, split_label
from radapter_serve.data.labelled import load_labelled
from radapter_serve.data.source import DataSource
from radapter_serve.demo.data import BASE, FINE_TUNED, DemoData, style_of
from radapter_serve.evaluation.image_sets import drawn
from radapter_serve.evaluation.metrics import paired_difference

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
OURS = "R-Adapter"
RIVAL = "WiSE-FT"
Hits = dict[str, NDArray[np.bool_]]  # by style, whether each of its images is right
Line = dict[float, Hits]  # by α
Weights = dict[str, Tensor]
_BATCH = 32  # a larger batch leaves a CPU's cache and is slower


@dataclass(frozen=True)
class Ends:
    """Weights of a CLIP and its classifier before and after training."""

    start: Weights
    end: Weights
    # Weights [C, D] and bias [C] before, and after; None if the text tower makes the classifier
    # from the names of the classes.
    classifiers: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def line_of(run: Path) -> Ends:
    """Weights of the demo's base, and of a run on it at α = 1."""
    state = load_base(f"local-dir:{BASE}").model.state_dict()
    start = {name: value.clone() for name, value in state.items()}
    return Ends(start, fold(start, load_adapter(run), 1.0))


def right(
    lines: Mapping[str, Ends],
    data: DemoData,
    alphas: Mapping[str, Sequence[float]],
    limit: int | None = None,
) -> dict[str, Line]:
    """Evaluate whether each test image is right, by method and α; all start at the demo's base."""
    base = load_base(f"local-dir:{BASE}")
    model: Any = base.model
    classes = read_label_file(data.classes)
    templates = read_templates(data.templates)
    images = {style: _read(base, place, classes, limit) for style, place in data.test.items()}
    hits: dict[str, Line] = {method: {} for method in lines}
    points = [(method, alpha) for method in lines for alpha in alphas[method]]
    for method, alpha in track(points, "Evaluating"):
        line = lines[method]
        zero_shot = [other[0.0] for other in hits.values() if 0.0 in other]
        if alpha == 0.0 and zero_shot:  # all lines start at the base
            hits[method][alpha] = zero_shot[0]
            continue
        with torch.inference_mode():
            # Set the model to (1−α)·start + α·end, and make its classifier.
            for name, value in model.state_dict().items():
                value.copy_(torch.lerp(line.start[name].float(), line.end[name].float(), alpha))
            if line.classifiers is None:
                weights = zero_shot_classifier(model, base.tokenizer, classes, templates)
                bias = torch.zeros(len(weights))
            else:
                first, last = line.classifiers
                weights = torch.lerp(first[0], last[0], alpha)
                bias = torch.lerp(first[1], last[1], alpha)

            hits[method][alpha] = {}
            for style, (pixels, labels) in images.items():
                parts = torch.split(pixels, _BATCH)
                scores = torch.cat([encode_image(model, part) @ weights.T + bias for part in parts])
                hits[method][alpha][style] = np.asarray(scores.argmax(dim=1) == labels)
    return hits


def _read(
    base: Base, folder: Path, classes: Sequence[str], limit: int | None
) -> tuple[Tensor, Tensor]:
    """Read pixels [N, 3, S, S] and labels [N] of the images of a folder."""
    data = load_labelled(DataSource(f"imagefolder:{folder}"), every_class=False)
    rows = data.rows.select(drawn(len(data.rows), limit, 0))
    transform: Any = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
    names = [split_label(line)[0] for line in classes]
    labels = [names.index(data.keys[data.label(row)]) for row in rows]
    return torch.stack([transform(data.image(row)) for row in rows]), torch.tensor(labels)


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
