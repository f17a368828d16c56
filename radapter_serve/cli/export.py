"""`radapter-export`: fold an adapter, export, check, and add releases to a model repository."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from radapter_export import start
from radapter_export.settings import ExportSettings
from radapter_export.start import Export
from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.rows import metric_name
from radapter_serve.release.release import (
    MIN_SCORE_SHARE,
    WHY_NO_TEMPERATURE,
    Confidence,
    Release,
)
from radapter_serve.release.repository import SERVED
from radapter_serve.sources import CLASSES

FIRST = (
    *("alpha", "adapter", "checkpoint", "lora", "base", "label_set", "templates", "dense"),
    *("precision", "validation", "model_repository", "merged", "transformers", "runtime"),
    *("format", "push"),
)


def _pairs(flag: str, kind: str, values: Sequence[str]) -> dict[str, Path]:
    """Split the values NAME=FILE or NAME=RUN of a flag."""
    paths: dict[str, Path] = {}
    example = "animals.txt" if kind == "FILE" else "runs/animals"
    for value in values:
        name, _, path = value.partition("=")
        if not (name and path) or name in paths:
            raise RAdapterError(
                f"{flag} {value}: write NAME={kind}, such as {flag} animals={example}, and each"
                " name once"
            )
        paths[name] = Path(path)
    return paths


def export(
    *,
    alpha: Annotated[tuple[str, ...], tyro.conf.arg(metavar="A [A ...]|auto|best|dynamic")] = (),
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    label_set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    adapters: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=RUN ...")] = (),
    format: Literal["onnx", "tensorrt"] = "onnx",
    threads: int | None = None,
    settings: tyro.conf.OmitArgPrefixes[ExportSettings] = ExportSettings(),  # noqa: B008  # frozen
) -> None:
    """Fold an adapter into its base, or take a checkpoint or a LoRA; export the towers, and check
    them against torch.

    Each alpha becomes a merged checkpoint, which open_clip loads, and a release in a model
    repository, which radapter-serve serves. Nothing is written unless all of it succeeds.

    Args:
        alpha: α, from 0 (the base) to 1 (all that was learned). If not given, the one that
            radapter-eval --alpha auto chose for this very adapter, or else the run's own, and 1 for
            a checkpoint or a LoRA. auto requires that choice; best takes the one with the highest
            score on validation data; dynamic makes one release that takes any alpha with each
            request, and for requests without one the alpha that is chosen if this is not given.
        adapter: folder of a run or adapter file; the newest run in ./runs if not given. If given
            several times, the average of these adapters, which must have one base, is exported.
        label_set: NAME=FILE, classes whose embeddings become part of the release: text, a class a
            line, or YAML, in which classes may have images. The run's own classes become the label
            set "classes" without a flag.
        adapters: adapters on the text's projection to put beside the release, which requests name
            (radapter-release add-adapter adds more); without --adapter their base is exported.
        format: tensorrt also builds engines for this machine's GPU, and sets them to be served:
            --runtime tensorrt.
        threads: threads to compute with; one a core if not given. Fewer are faster if the machine
            has other work.
        settings: settings of the releases; the fields of `ExportSettings` in Python.
    """
    began = time.perf_counter()
    replaced = None  # the α of the merged checkpoint that this export replaces
    with contextlib.suppress(RAdapterError):
        replaced = Release.load(settings.merged).alpha
    label_sets = _pairs("--label-set", "FILE", label_set)
    done = start.export(
        adapter or None,
        alpha or None,
        adapters=_pairs("--adapters", "RUN", adapters),
        format=format,
        threads=threads,
        progress=True,
        **{**vars(settings), "label_sets": label_sets},
    )
    for note in done.notes:
        Console(stderr=True).print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    _print_graphs(done, settings.precision, time.perf_counter() - began)
    for line in (*_measured(done, settings), *_places(done, replaced)):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _print_graphs(done: Export, precision: str, seconds: float) -> None:
    """Print a row for each graph, with its agreement with torch."""
    count = f"{len(done.releases)} release{'s' if len(done.releases) > 1 else ''}"
    title = f"{', '.join(done.made_of)}: {count} in {precision}, {seconds:.0f} s"
    table = Table(title=title)
    for column in ("release", "alpha", "graph", "MB", "max error", "1 - cosine", "seconds"):
        left = column == "graph"
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for release in done.releases:
        for graph in [*release.graphs, *release.forms]:
            table.add_row(
                str(release.version),
                f"{release.alpha:g}{' (dynamic)' if release.release.dynamic_alpha else ''}",
                graph.name,
                f"{graph.size / 1e6:.1f}",
                f"{graph.agreement.max_error:.1e}",
                f"{1 - graph.agreement.min_cosine:.1e}",
                f"{graph.seconds:.1f}",
            )
    Console().print(table)


def _measured(done: Export, settings: ExportSettings) -> list[str]:
    """Lines about accuracy and calibration on validation data."""
    releases = done.releases
    lines = []
    for release in releases:
        if accuracy := release.accuracy:
            lines.append(
                f"Release {release.version}: {metric_name(accuracy.metric)} on {accuracy.n} images"
                f" of {accuracy.dataset}: {accuracy.release:.2f} %, torch {accuracy.torch:.2f} %"
            )
        if confidence := release.release.confidence:
            lines.append(f"Release {release.version}: {_calibrated(confidence)}")
    if settings.precision != "fp32" and settings.validation is None and not releases[-1].accuracy:
        lines.append(
            "No task accuracy was measured: the run has no validation data here; give some with"
            " --validation DATA"
        )
    return lines


def _places(done: Export, replaced: float | None) -> list[str]:
    """Lines about the paths of all results, and the next commands; `replaced` is the α of the
    merged checkpoint that this export replaced.
    """
    releases = done.releases
    merged = ", ".join(str(release.merged) for release in releases)
    if replaced is not None and replaced != done.alpha:
        merged += f", instead of the one at alpha {replaced:g}"
    lines = [f"Merged: {merged}"]
    if done.transformers is not None:
        lines.append(f"Transformers: {done.transformers}")
    if done.immich is not None:
        lines.append(f"immich: {done.immich}")
    if releases[-1].pushed is not None:
        lines.append(f"Pushed: {releases[-1].pushed}")
    folder = done.model_repository
    repository = "" if folder == ExportSettings.model_repository else f" {shlex.quote(str(folder))}"
    lines.append(f"Next:   radapter-serve{repository}")
    if (folder / SERVED).exists():  # then a start serves the chosen releases, not the newest
        numbers = " ".join(str(release.version) for release in releases)
        where = f" --model-repository{repository}" if repository else ""
        lines.append(f"        radapter-release load {numbers}{where}")
    if sets := sorted(releases[-1].release.label_sets):
        name = CLASSES if CLASSES in sets else sets[0]
        lines.append(f"        radapter-query classify PHOTO.jpg --label-set {shlex.quote(name)}")
    return lines


def _calibrated(fitted: Confidence) -> str:
    """A sentence about the calibrated scores of a release."""
    labels = (
        f"--multi-label scores have a calibration error of {100 * fitted.label_ece:.2f} %; a"
        f" search with --min-score calibrated ({fitted.min_score:.3f}) keeps"
        f" {MIN_SCORE_SHARE:.0%} of the images, and still finds images for"
        f" {fitted.false_answers:.0%} of the queries that no image fits"
    )
    before = f"ECE {100 * fitted.ece_before:.2f} %"
    if fitted.ece_after is None:
        return (
            f"scores are calibrated; {before}; no temperature can be fitted: {WHY_NO_TEMPERATURE};"
            f" {labels}"
        )
    way = "a sigmoid"
    if fitted.temperature is not None:
        way = f"temperature {fitted.temperature:.3f}"
    grows = round(fitted.ece_after, 4) > round(fitted.ece_before, 4)
    worse = " (worse, so do not ask for calibrated)" if grows else ""
    return (
        f"scores are calibrated with {way}: {before} before, {100 * fitted.ece_after:.2f} %"
        f" after{worse}; {labels}"
    )


def main(argv: list[str] | None = None) -> int:
    return run(export, argv, prog="radapter-export", first={"": FIRST})
