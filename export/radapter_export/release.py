"""One call from an adapter to releases: fold, graphs, check, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from radapter_export.accuracy import open_validation
from radapter_export.calibration import calibrate
from radapter_export.change import Change
from radapter_export.exported import Exported, ExportedRelease
from radapter_export.files import disk_errors
from radapter_export.forms import Forms, check_forms
from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_export.hub import Hub, check_push, files_of
from radapter_export.merged import Merged
from radapter_export.precision import TYPES, check_precision, lower
from radapter_export.repository import Repository
from radapter_export.settings import ExportSettings
from radapter_export.source import Source
from radapter_export.tokenizer import ServedTokenizer
from radapter_export.towers import check
from radapter_export.writer import Outputs, Writer
from radapter_serve.adapter.file import check_alpha
from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import check_dense
from radapter_serve.clip.towers import is_causal
from radapter_serve.data.image_files import open_images
from radapter_serve.encoders.tensorrt.plan_writer import PlanWriter
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import MODELS, PATCH_ENCODER, RUNTIMES, TENSORRT

__all__ = ["Exported", "ExportedRelease", "export_release"]

Say = Callable[[str], None]


def export_release(
    adapter_path: str | Path | Sequence[str | Path] = (),
    alphas: Sequence[float] | Literal["dynamic"] | None = None,
    settings: ExportSettings = ExportSettings(),  # noqa: B008  # frozen
    *,
    progress: Say | None = None,
) -> list[ExportedRelease]:
    """Fold an adapter at one or several α, and add a release for each to a model repository.

    Nothing is written unless all of it succeeds; what a killed export left is removed by the next
    one.

    Args:
        adapter_path: adapter file, or the folder of a run; several of one base are averaged. None
            where the settings name a checkpoint or a LoRA.
        alphas: re-scalings in [0, 1], each another release; the last is the newest, which clients
            get by default. None: what `auto` chose on validation data for this very adapter, or
            else the adapter's own. "dynamic": one release whose encoders take α as an input, by
            default the same.
        settings: everything else; its fields are the flags of `radapter-export`.
        progress: called with a short line before each step.

    Returns:
        The releases in the order of `alphas`.

    Raises:
        RAdapterError: bad input, graphs that differ from torch, a full disk; nothing was written
            then.
    """
    say = progress or (lambda line: None)
    paths = [adapter_path] if isinstance(adapter_path, (str, Path)) else list(adapter_path)
    source = Source.read(paths, settings, dynamic_alpha=alphas == "dynamic")
    numbers = [source.alpha] if alphas is None or isinstance(alphas, str) else list(alphas)
    _check_arguments(numbers, source, settings)
    engines = (
        PlanWriter(progress=say) if settings.served_by == TENSORRT else None
    )  # looks for a GPU, before all else
    validation = open_validation(
        source.metadata,
        settings.validation,
        source.way,
        settings.precision,
        settings.max_drop,
    )
    images = None
    if settings.calibration is not None:
        images = open_images(settings.calibration, "--calibration")
    hub = None
    if settings.push is not None:
        say("asking the Hugging Face hub")
        hub = Hub.open(settings.push)
    base, change = _load(source, settings, say)
    for alpha in numbers:
        change.check(alpha)
    unfinished = Forms(settings, base)  # which refuses bases without such a form
    models = [model for model in MODELS if model != PATCH_ENCODER or source.way is not None]
    staged = Repository(settings.model_repository, models)
    graphs = _graphs(base, source, settings.precision, say)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Merged(settings.merged) as merged,
        unfinished as forms,
        staged as repository,
    ):
        with disk_errors(Path(scratch)):
            tokenizer = ServedTokenizer.write(
                base.tokenizer,
                Path(scratch, "tokenizer.json"),
                dynamic_length=is_causal(base.model),
            )
        calibration = None
        if images is not None:
            calibration = calibrate(images, base, source, tokenizer.encode)
        writer = Writer(
            base=base,
            source=source,
            change=change,
            reference=change.reference(base),
            graphs=graphs,
            settings=settings,
            tokenizer=tokenizer,
            outputs=Outputs(merged, forms, repository),
            validation=validation,
            calibration=calibration,
            engines=engines,
            say=say,
        )
        releases = []
        for version, alpha in enumerate(numbers, repository.next_version()):
            name = f"alpha-{alpha:g}" if len(numbers) > 1 else ""
            releases.append(writer.write(version, alpha, name))
        for model in models:
            written = [release.release for release in releases]
            repository.add_config(model, written)
        say("writing the digests of all files")
        for release in releases:
            repository.add_sums(release.version)
        say("putting everything in place")
        merged.commit()
        forms.commit()
        repository.commit([release.version for release in releases])
    if hub is not None:
        say(f"pushing to {hub.name}")
        releases = [_pushed(hub, releases[0], writer, settings)]
    return releases


def _pushed(
    hub: Hub, exported: ExportedRelease, writer: Writer, settings: ExportSettings
) -> ExportedRelease:
    """A release, once it is on the hub."""
    release = exported.release
    card = writer.card(release, library="open_clip", hub=hub.name) if settings.card else None
    files = files_of(
        settings.model_repository, release, exported.merged, settings.transformers, card
    )
    where = f"{settings.model_repository} and {settings.merged}"
    return replace(exported, pushed=hub.push(files, release, where))


def _check_arguments(alphas: Sequence[float], source: Source, settings: ExportSettings) -> None:
    if not alphas:
        raise RAdapterError("no alpha; give at least one number from 0 to 1, such as --alpha 0.5")
    for alpha in alphas:
        check_alpha(alpha)
    if len({f"{alpha:g}" for alpha in alphas}) < len(alphas):
        raise RAdapterError(
            f"an alpha is given twice: {' '.join(f'{alpha:g}' for alpha in alphas)}"
        )
    if settings.served_by not in RUNTIMES:
        raise RAdapterError(f"--runtime is {settings.runtime}; allowed are {', '.join(RUNTIMES)}")
    if settings.push is not None:
        check_push(settings.push, len(alphas), settings.served_by)
    check_forms(settings)
    check_precision(settings.precision, settings.calibration, settings.served_by)
    if source.dynamic_alpha and settings.calibration is not None:
        raise RAdapterError(
            "--calibration finds ranges at one alpha, and --alpha dynamic has all; leave one of"
            " them out"
        )


def _load(source: Source, settings: ExportSettings, say: Say) -> tuple[Base, Change]:
    """The base and what α scales, once it is checked that they can be exported."""
    say("loading the base")
    base, change = source.load(settings)
    check(base)
    if source.way is not None:
        check_dense(base.model, source.way)
    return base, change


def _graphs(base: Base, source: Source, precision: str, say: Say) -> list[Graph]:
    """The encoders without weights: every alpha fills the same ones."""
    beside = source.adapter if source.dynamic_alpha else None
    say("exporting image_encoder")
    graphs = [image_graph(base, beside)]
    if source.way is not None:
        say("exporting patch_encoder")
        graphs.append(patch_graph(base, source.way, beside))
    say("exporting text_encoder")
    graphs.append(text_graph(base, beside))
    return [lower(graph, precision) for graph in graphs] if precision in TYPES else graphs
