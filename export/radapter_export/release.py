"""One call from an adapter to releases: fold, export, check, write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from radapter_export.accuracy import open_validation
from radapter_export.graph import image_graph, patch_graph, text_graph
from radapter_export.merged import Merged
from radapter_export.precision import TYPES, check_precision, lower
from radapter_export.repository import MODELS, PATCH_ENCODER, Repository
from radapter_export.towers import check
from radapter_export.update import Newest
from radapter_export.writer import Exported, Release, Writer
from radapter_serve.adapter import average_adapters, load_adapter
from radapter_serve.adapter.file import check_alpha, check_base
from radapter_serve.clip.base import load_base
from radapter_serve.clip.dense import check_dense
from radapter_serve.clip.prompts import templates_of
from radapter_serve.errors import RAdapterError
from radapter_serve.index.collection import open_collection
from radapter_serve.inputs.errors import TaskError
from radapter_serve.inputs.labels import check_labels, read_label_file
from radapter_serve.release.agreement import TOLERANCES, Tolerance
from radapter_serve.release.repository import RUNTIMES, TENSORRT
from radapter_serve.runtimes.tensorrt.plan_writer import PlanWriter

__all__ = ["Exported", "Release", "export_release"]


def export_release(
    adapter_path: str | Path | Sequence[str | Path],
    alphas: Sequence[float] | Literal["dynamic"] | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    pretrained: str | None = None,
    model_repository: str | Path = "model_repository",
    merged: str | Path = "merged",
    label_sets: Mapping[str, str | Path] | None = None,
    templates: str | Path | Sequence[str] | None = None,
    dense: str | None = None,
    precision: str | None = None,
    calibration: str | None = None,
    validation: str | None = None,
    max_drop: float = 0.5,
    runtime: str | None = None,
    tolerance: float | None = None,
    max_batch_size: int | None = None,
    update: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Release]:
    """Fold an adapter at one or several α, and add a release for each to a model repository.

    Nothing is written unless all of it succeeds; what a killed export left is removed by the next one.

    Args:
        adapter_path: adapter file, or the folder of a run; several of one base are averaged.
        alphas: re-scalings in [0, 1], each another release; the last is the newest, which clients get by default.
            "dynamic": one release whose encoders take α as an input, the adapter's own by default. The adapter's own
            if None.
        weights: of the adapters in their average, see `average_adapters`; equal ones if None.
        base: open_clip architecture or `local-dir:PATH`; what the adapter was trained on if None.
        pretrained: open_clip tag or a checkpoint's path; what the adapter was trained on if None.
        model_repository: folder that Triton serves; made if there is none.
        merged: folder for the merged checkpoint, replaced if it holds one; with several α, for a folder of each.
        label_sets: name to label file; their text embeddings become part of the release.
        templates: prompt templates, a file of them or the name of a built-in set; the adapter's own if None.
        dense: how patches are embedded, one of `radapter_serve.clip.dense.WAYS`; "none" leaves `patch_encoder` out; the
            adapter's own if None.
        runtime: what runs the encoders in the server, and checks them here, one of
            `radapter_serve.release.repository.RUNTIMES`; `onnxruntime` if None.
        precision: of the encoders: `fp32`, `fp16`, `bf16` or `int8`; `fp32` if None.
        calibration: images for `int8`, as of `radapter_serve.index.collection.open_collection`: the ranges of
            activations are found by them and fixed (static); found for each batch if None (dynamic).
        validation: labelled images, captions or masks, of the form of a recipe's `val_data`, by which torch and the
            encoders are compared; the run's own if None and the precision is not `fp32`; "none" for none.
        max_drop: points of the task's metric, in per cent, that the encoders may lose there.
        tolerance: largest difference allowed between the runtime and torch, per component of a unit-length embedding;
            what `radapter_serve.release.agreement.TOLERANCES` says of the precision if None.
        max_batch_size: rows that the server puts into one batch; 64 if None.
        update: put other weights into the graphs of the repository's newest release instead of exporting them again.
            What is None is taken from that release: label sets, templates, dense, precision, runtime, max_batch_size.
        progress: called with a short line before each step.

    Returns:
        The releases in the order of `alphas`.

    Raises:
        RAdapterError: bad input, graphs that differ from torch, a full disk; nothing was written then.
    """
    say = progress or (lambda line: None)
    newest = Newest(model_repository) if update else None
    paths = [adapter_path] if isinstance(adapter_path, (str, Path)) else list(adapter_path)
    adapters = [load_adapter(path) for path in paths]
    shares = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    adapter = average_adapters(adapters, shares)
    meta = adapter.metadata
    dial = alphas == "dynamic" or (alphas is None and newest is not None and newest.dial)
    numbers = [meta.alpha] if alphas is None or isinstance(alphas, str) else list(alphas)
    labels = {}
    if newest is not None:
        newest.check(adapter, dense, precision, dial)
        facts = newest.facts
        dense, precision, runtime = newest.dense, newest.precision, runtime or newest.runtime
        templates = facts["templates"] if templates is None else templates
        max_batch_size = facts["max_batch_size"] if max_batch_size is None else max_batch_size
        labels = newest.label_sets()
    precision, runtime = precision or "fp32", runtime or "onnxruntime"
    max_batch_size = 64 if max_batch_size is None else max_batch_size
    _check_arguments(numbers, runtime, tolerance, max_drop, max_batch_size)
    check_precision(precision, calibration, runtime)
    if dial and calibration is not None:
        raise RAdapterError(
            "--calibration finds ranges at one alpha, and --alpha dynamic has all; leave one of them out"
        )
    engines = PlanWriter(progress=say) if runtime == TENSORRT else None  # which looks for a GPU, before all else
    bounds = TOLERANCES[precision] if tolerance is None else Tolerance(tolerance)
    prompts = templates_of(templates if templates is not None else meta.templates or "simple")
    labels |= {name: _read_labels(name, path) for name, path in (label_sets or {}).items()}
    way = dense or meta.recipe.get("dense")
    way = None if way == "none" else way
    judged_by = open_validation(meta, validation, way, precision, max_drop)
    collection = None if calibration is None else open_collection(calibration.removeprefix("imagefolder:"))
    say("loading the base")
    clip = load_base(base or meta.architecture, pretrained or meta.pretrained)
    check(clip)
    if way is not None:
        check_dense(clip.model, way)
    state = dict(clip.model.state_dict())
    check_base(state, adapter)
    if newest is not None:
        say(f"reading the graphs of release {newest.facts['version']}")
        graphs = newest.graphs(state, adapter)
    else:
        beside = adapter if dial else None
        say("exporting image_encoder")
        graphs = [image_graph(clip, beside)]
        if way is not None:
            say("exporting patch_encoder")
            graphs.append(patch_graph(clip, way, beside))
        say("exporting text_encoder")
        graphs.append(text_graph(clip, beside))
        if precision in TYPES:
            graphs = [lower(graph, precision) for graph in graphs]
    models = [model for model in MODELS if model != PATCH_ENCODER or way is not None]
    with Merged(merged) as checkpoints, Repository(model_repository, models) as repository:
        writer = Writer(
            base=clip,
            adapter=adapter,
            adapters=[{"digest": one.digest, "weight": share} for one, share in zip(adapters, shares, strict=True)],
            dial=dial,
            graphs=graphs,
            way=way,
            templates=prompts,
            labels=labels,
            runtime=runtime,
            engines=engines,
            precision=precision,
            collection=collection,
            bounds=bounds,
            max_batch_size=max_batch_size,
        )
        first = repository.next_version()
        releases = []
        for version, alpha in enumerate(numbers, first):
            name = f"alpha-{alpha:g}" if len(numbers) > 1 else ""
            releases.append(writer.write(version, alpha, checkpoints, name, repository, judged_by, say))
        for model in models:
            repository.add_config(model, [release.facts for release in releases], writer.dims, max_batch_size)
        say("putting everything in place")
        checkpoints.commit()
        repository.commit([release.version for release in releases])
    return releases


def _check_arguments(
    alphas: Sequence[float], runtime: str, tolerance: float | None, max_drop: float, max_batch_size: int
) -> None:
    if not alphas:
        raise RAdapterError("no alpha; give at least one number from 0 to 1, such as --alpha 0.5")
    for alpha in alphas:
        check_alpha(alpha)
    if len({f"{alpha:g}" for alpha in alphas}) < len(alphas):
        raise RAdapterError(f"an alpha is given twice: {' '.join(f'{alpha:g}' for alpha in alphas)}")
    if runtime not in RUNTIMES:
        raise RAdapterError(f"--runtime is {runtime}; allowed are {', '.join(RUNTIMES)}")
    if tolerance is not None and not 0 < tolerance <= 1:
        raise RAdapterError(f"tolerance is {tolerance}; allowed: more than 0, at most 1, such as 1e-4")
    if not 0 <= max_drop <= 100:
        raise RAdapterError(f"max_drop is {max_drop}; allowed: points from 0 to 100, such as 0.5")
    if max_batch_size < 1:
        raise RAdapterError(f"max_batch_size is {max_batch_size}; allowed: 1 or more, 64 is usual")


def _read_labels(name: str, path: str | Path) -> list[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise RAdapterError(f"label set {name!r}: allowed in a name are letters, digits, and _ . - after the first")
    labels = read_label_file(path)
    try:
        check_labels(labels)
    except TaskError as error:
        raise RAdapterError(f"{path}: {error.message}") from error
    return labels
