"""`radapter-export`: fold an adapter, export, check, and add releases to a model repository."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError

RUNS = Path("runs")


def export(
    *,
    alpha: Annotated[tuple[str, ...], tyro.conf.arg(metavar="A [A ...]|dynamic|auto")] = (),
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    weights: Annotated[tuple[float, ...], tyro.conf.arg(metavar="W [W ...]")] = (),
    base: str | None = None,
    pretrained: str | None = None,
    model_repository: str = "model_repository",
    merged: str = "merged",
    label_set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    templates: str | None = None,
    dense: Annotated[str | None, tyro.conf.arg(metavar="WAY")] = None,
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    calibration: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None,
    validation: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None,
    max_drop: float = 0.5,
    runtime: Literal["onnxruntime", "openvino", "tensorrt"] | None = None,
    format: Literal["onnx", "tensorrt"] = "onnx",
    tolerance: float | None = None,
    max_batch_size: int = 64,
) -> None:
    """Fold an adapter into its base, export the towers, and check them against torch with the adapters attached.

    Each alpha becomes a merged checkpoint, which open_clip loads, and a release in a model repository, which
    radapter-serve serves. Nothing is written unless all of it succeeds.

    Args:
        alpha: re-scaling from 0 (the base) to 1 (all that was learned); the run's own if none is given; auto takes what
            radapter-eval --alpha auto chose; dynamic makes one release that takes any alpha from each request.
        adapter: folder of a run or adapter file; the newest run in ./runs if none is given. Given several times, the
            average of these adapters of one base is exported.
        weights: of the adapters in their average, one each, with sum 1; equal ones if none are given.
        base: open_clip model or local-dir:PATH; what the adapter was trained on if none is given.
        pretrained: open_clip tag or path of a checkpoint; what the adapter was trained on if none is given.
        model_repository: folder that radapter-serve serves; releases are added to it.
        merged: folder for the merged checkpoint; with several alphas, for a folder of each.
        label_set: NAME=FILE, classes whose text embeddings become part of the release; one class a line.
        templates: a file of prompt templates, a built-in set, or one template; the run's own if none is given.
        dense: how the patches of an image are embedded, for segmentation: naclip, clearclip, sclip or maskclip; none
            leaves patch_encoder out; the run's own if none is given.
        precision: of the encoders' weights and matrix products. int8 is quantized as it runs,
            for CPUs; with --calibration by fixed ranges, which TensorRT takes too.
        calibration: about a hundred typical images for int8: a folder, csv:FILE or parquet:FILE.
        validation: data as of radapter-train --val-data, by which the encoders are compared with torch in the task's
            own metric; the run's own if none is given and the precision is not fp32; none for none.
        max_drop: points of that metric, in per cent, that the encoders may lose.
        runtime: what runs the encoders in the server; they are checked with it; onnxruntime if none is given.
        format: tensorrt also builds engines for this machine's GPU, and lets them be served: --runtime tensorrt.
        tolerance: largest difference from torch allowed in a component of the unit-length embeddings; the precision's
            own if none is given: 1e-4 in fp32.
        max_batch_size: images or texts in one batch of the server.
    """
    if format == "tensorrt" and runtime not in (None, "tensorrt"):
        raise RAdapterError(f"--format tensorrt is served by --runtime tensorrt, and not by {runtime}; leave one out")
    dynamic = "dynamic" in alpha
    if dynamic and len(alpha) > 1:
        raise RAdapterError("--alpha dynamic stands alone: its one release takes any alpha from 0 to 1")
    alphas = [] if dynamic else [None if value == "auto" else _number(value) for value in alpha]
    label_sets = _label_sets(label_set)
    paths = [Path(path) for path in adapter] or [newest_run()]
    if None in alphas and len(paths) > 1:
        raise RAdapterError("--alpha auto was chosen for one adapter, not for an average; give a number, or dynamic")
    console = Console(stderr=True)
    with console.status("starting") as status:
        start = time.perf_counter()
        from radapter_export import export_release  # torch and onnx take seconds to load: not for --help
        from radapter_serve.evaluation.choice import chosen_alpha
        from radapter_serve.evaluation.results import metric_name

        numbers = [chosen_alpha(paths[0]) if value is None else value for value in alphas]
        releases = export_release(
            paths,
            "dynamic" if dynamic else numbers or None,
            weights=weights or None,
            base=base,
            pretrained=pretrained,
            model_repository=model_repository,
            merged=merged,
            label_sets=label_sets,
            templates=templates,
            dense=dense,
            precision=precision,
            calibration=calibration,
            validation=validation,
            max_drop=max_drop,
            runtime="tensorrt" if format == "tensorrt" else runtime or "onnxruntime",
            tolerance=tolerance,
            max_batch_size=max_batch_size,
            progress=status.update,
        )
    seconds = time.perf_counter() - start
    names = ", ".join(map(str, paths))
    kind = f"{len(releases)} release{'s' if len(releases) > 1 else ''} in {releases[0].facts['precision']}"
    table = Table(title=f"{names}: {kind}, {seconds:.0f} s")
    for column in ("release", "alpha", "graph", "MB", "max error", "1 - cosine", "seconds"):
        left = column == "graph"
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for release in releases:
        for graph in release.graphs:
            agreement = graph.agreement
            table.add_row(
                str(release.version),
                f"{release.alpha:g}{' (dynamic)' if release.facts['dynamic_alpha'] else ''}",
                graph.name,
                f"{graph.size / 1e6:.1f}",
                f"{agreement.max_error:.1e}",
                f"{1 - agreement.min_cosine:.1e}",
                f"{graph.seconds:.1f}",
            )
    out = Console()
    out.print(table)
    for release in releases:
        if found := release.accuracy:
            out.print(
                f"Release {release.version}: {metric_name(found.metric)} on {found.n} images of {found.dataset}: "
                f"{found.release:.2f} %, torch {found.torch:.2f} %",
                soft_wrap=True,
            )
    if releases[-1].facts["precision"] != "fp32" and validation is None and not releases[-1].accuracy:
        out.print(
            "No task accuracy was measured: the run has no validation data here; give some with --validation DATA"
        )
    out.print(f"Merged: {', '.join(str(release.merged) for release in releases)}", soft_wrap=True)
    repository = "" if model_repository == "model_repository" else f" --model-repository {model_repository}"
    out.print(f"Next:   radapter-serve{repository}", soft_wrap=True)


def newest_run() -> Path:
    """The newest adapter file in ./runs.

    Raises:
        RAdapterError: there is none.
    """
    found = sorted(RUNS.glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RAdapterError(
            f"no run with an adapter in {RUNS.absolute()}; train one with radapter-train, or give --adapter FILE"
        )
    return found[-1]


def _label_sets(pairs: Sequence[str]) -> dict[str, str]:
    label_sets: dict[str, str] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise RAdapterError(f"--label-set {pair}: write NAME=FILE, such as --label-set animals=animals.txt")
        if name in label_sets:
            raise RAdapterError(f"--label-set {name} is given twice")
        label_sets[name] = file
    return label_sets


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise RAdapterError(
            f"alpha is {value!r}; allowed: a number from 0 to 1, such as 0.5, auto or dynamic"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `export`."""
    return run(export, argv, prog="radapter-export")


if __name__ == "__main__":
    raise SystemExit(main())
