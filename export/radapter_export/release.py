"""From what was learned to releases: source, fold, graphs, agreement check, release."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnxruntime
from safetensors import SafetensorError

from radapter_export.checks import BATCHES, Accuracy, Inputs, measure, open_validation, samples_at
from radapter_export.forms import (
    DISK_ADVICE,
    FORM_FILES,
    OPEN_CLIP_FILES,
    WRITER,
    base_form,
    check_form,
    check_replaceable,
    save_form,
    save_open_clip,
)
from radapter_export.graph import Graph, check, image_graph, patch_graph, text_graph
from radapter_export.hub import card_of, files_of, prepare_push, push
from radapter_export.in_torch import base_facts
from radapter_export.precision import TYPES, Calibration, calibrate, lower, quantize
from radapter_export.repository import LABELLED, TOKENIZED, Repository
from radapter_export.settings import ExportSettings
from radapter_export.source import Fold, Source, put_reference, read_source
from radapter_export.tokenizer import ServedTokenizer
from radapter_serve.adapter.tuned import Line
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import check_dense, is_causal
from radapter_serve.clip.transformers import Form
from radapter_serve.contract.errors import TaskError, check_alpha
from radapter_serve.contract.labels import SAME, indistinguishable
from radapter_serve.data.rows import open_images
from radapter_serve.encoders.encoder import EncoderGraph, GraphEncoder
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import LoadedRelease, complete
from radapter_serve.encoders.plans import PLAN, write_plan
from radapter_serve.encoders.tensorrt import find_gpu, import_tensorrt
from radapter_serve.errors import RAdapterError, check_installed
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.files import digest_of, disk_errors, staged_folder
from radapter_serve.release.agreement import TOLERANCES, Agreement, compare
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import MODELS, PATCH_ENCODER, RUNTIMES, TENSORRT
from radapter_serve.sources import CARD
from radapter_serve.tasks.classify import mix_examples
from radapter_serve.tasks.embed import embed_labels

UNFITTED = (
    "this release of a SigLIP refuses multi_label: training does not update the sigmoid's scale and"
    " bias; export with --validation DATA to fit them again"
)
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "radapter-serve")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A graph of a release, or a form of its weights that another library opens.

    Attributes:
        name: such as `image_encoder` or `transformers`.
        size: of its weights, in bytes.
        agreement: with torch.
        seconds: that it took to write and check.
    """

    name: str
    size: int
    agreement: Agreement
    seconds: float


@dataclass(frozen=True)
class ExportedRelease:
    """One exported release.

    Attributes:
        release: its facts, by name.
        graphs: the encoders.
        merged: folder of the merged checkpoint.
        accuracy: on validation data, by torch and by the encoders; None if it was not measured.
        warnings: what a user should know, a line each.
        forms: of the weights for other libraries, that were asked for.
        pushed: `hf-hub:NAME@COMMIT`, where it is on the hub; None if it was not sent there.
    """

    release: Release = field(repr=False)
    graphs: list[Exported] = field(repr=False)
    merged: Path
    accuracy: Accuracy | None = field(repr=False)
    warnings: list[str] = field(repr=False)
    forms: list[Exported] = field(repr=False)
    pushed: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What `release.json` holds."""
        return copy.deepcopy(self.release.to_dict())

    @property
    def version(self) -> int:
        """Number of the release in its model repository."""
        return self.release.version

    @property
    def alpha(self) -> float:
        """The re-scaling that was folded, or the default where requests may bring their own."""
        return self.release.alpha


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that the releases of one call share, and where they are written."""

    settings: ExportSettings
    source: Source
    base: Base
    change: Fold | Line
    set_alpha: Callable[[float], None]
    graphs: Sequence[Graph]
    form: Form | None
    tokenizer: ServedTokenizer
    calibration: Calibration | None
    validation: EvaluationSet | None
    repository: Repository
    merged: Path
    transformers: Path | None
    say: Say


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

    # Source: what was learned, with templates and label sets; and all that can be refused early.
    paths = [adapter_path] if isinstance(adapter_path, (str, Path)) else list(adapter_path)
    source = read_source(paths, settings, dynamic_alpha=alphas == "dynamic")
    numbers = [source.alpha] if alphas is None or isinstance(alphas, str) else list(alphas)
    if not numbers:
        raise RAdapterError("no alpha; give at least one number from 0 to 1, such as --alpha 0.5")
    for alpha in numbers:
        check_alpha(alpha)
    if len({f"{alpha:g}" for alpha in numbers}) < len(numbers):
        shown = " ".join(f"{alpha:g}" for alpha in numbers)
        raise RAdapterError(f"an alpha is given twice: {shown}")
    if source.dynamic_alpha and settings.calibration is not None:
        raise RAdapterError(
            "--calibration finds ranges at one alpha, and --alpha dynamic has all; leave one of"
            " them out"
        )
    if settings.precision == "bf16" and settings.served_by == "onnxruntime":
        raise RAdapterError(
            "ONNX Runtime cannot compute in bf16 on a CPU; add --runtime openvino, or use fp16"
        )
    if settings.precision == "int8" and not settings.calibration and settings.served_by == TENSORRT:
        raise RAdapterError(
            "TensorRT takes only int8 with fixed ranges; add --calibration DATA, a folder of images"
        )
    if settings.transformers is not None:
        check_installed("transformers", "huggingface")
    validation = open_validation(
        source.metadata, settings.validation, source.dense, settings.precision
    )
    images = None
    if settings.calibration is not None:
        images = open_images(settings.calibration, "--calibration")
    hub = None
    if settings.push is not None:
        say("asking the Hugging Face hub")
        hub = prepare_push(settings.push, len(numbers), settings.served_by)
    if settings.served_by == TENSORRT:
        find_gpu()
        import_tensorrt()

    # Fold: the base, and what α scales.
    say("loading the base")
    base, change = source.load(settings)
    check(base)
    if source.dense is not None:
        check_dense(base.model, source.dense)
    for alpha in numbers:
        change.check(alpha)
    check_replaceable(settings.merged.absolute(), "--merged", OPEN_CLIP_FILES)
    form = None
    if settings.transformers is not None:
        check_replaceable(settings.transformers.absolute(), "--transformers", FORM_FILES)
        form = base_form(base)
    models = [model for model in MODELS if model != PATCH_ENCODER or source.dense is not None]
    unfinished = Repository(settings.model_repository, models)

    # Graphs: without weights, so that every α fills the same ones.
    adapter = source.adapter if source.dynamic_alpha else None
    say("exporting image_encoder")
    graphs = [image_graph(base, adapter)]
    if source.dense is not None:
        say("exporting patch_encoder")
        graphs.append(patch_graph(base, source.dense, adapter))
    say("exporting text_encoder")
    graphs.append(text_graph(base, adapter))
    if settings.precision in TYPES:
        graphs = [lower(graph, settings.precision) for graph in graphs]

    # Agreement check and release, for each α, in temporary folders that take their places together.
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(settings.model_repository, DISK_ADVICE, (SafetensorError,)))
        merged = stack.enter_context(staged_folder(settings.merged, WRITER))
        transformers = None
        if settings.transformers is not None:
            transformers = stack.enter_context(staged_folder(settings.transformers, WRITER))
        repository = stack.enter_context(unfinished)
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        tokenizer = ServedTokenizer.write(
            base.tokenizer, Path(scratch, "tokenizer.json"), dynamic_length=is_causal(base.model)
        )
        calibration = None
        if images is not None:
            calibration = calibrate(images, base, source, tokenizer.encode)
        job = _Job(
            settings=settings,
            source=source,
            base=base,
            change=change,
            set_alpha=put_reference(base, change),
            graphs=graphs,
            form=form,
            tokenizer=tokenizer,
            calibration=calibration,
            validation=validation,
            repository=repository,
            merged=merged,
            transformers=transformers,
            say=say,
        )
        releases = []
        for version, alpha in enumerate(numbers, repository.next_version()):
            name = f"alpha-{alpha:g}" if len(numbers) > 1 else ""
            releases.append(_write_release(job, version, alpha, name))
        repository.add_configs([each.release for each in releases])
        say("writing the digests of all files")
        for each in releases:
            repository.add_sums(each.version)
        say("putting everything in place")
        repository.commit([each.version for each in releases])
    if hub is None:
        return releases

    # Push: the one release, once it is complete here.
    say(f"pushing to {hub}")
    [exported] = releases
    release = exported.release
    card = None
    if settings.card:
        has_form = settings.transformers is not None
        card = card_of(
            release, source.metadata, source.curve, "open_clip", hub, transformers=has_form
        )
    files = files_of(
        settings.model_repository, release, settings.merged, settings.transformers, card
    )
    where = f"{settings.model_repository} and {settings.merged}"
    return [replace(exported, pushed=push(hub, files, release, where))]


def _write_release(job: _Job, version: int, alpha: float, name: str) -> ExportedRelease:
    """Write and check one release in the temporary folders.

    `name` is its subfolder among the merged checkpoints, "" where there is one alone.
    """
    settings = job.settings
    source = job.source
    base = job.base
    repository = job.repository
    dynamic = source.dynamic_alpha
    say = job.say

    # Fold: the plain checkpoint.
    say(f"folding at alpha {alpha:g}")
    folded = job.change.at(alpha)
    merged = job.merged / name
    merged.mkdir(exist_ok=True)
    save_open_clip(merged, base, folded)

    # What the graphs must give: torch's embeddings of seeded inputs, nothing folded.
    say(f"torch's embeddings at alpha {alpha:g}{' and others' if dynamic else ''}, nothing folded")
    inputs = Inputs(base, job.tokenizer.encode, base.image_size)
    samples = samples_at(base, job.set_alpha, inputs, alpha, source.dense, mixed=dynamic)

    # Graphs: weights in, then as the server runs them, against those embeddings.
    for model in repository.models:
        repository.staged(model, version).mkdir()
    weights = folded
    if dynamic:
        assert isinstance(job.change, Fold)
        weights = {**job.change.weights, **job.change.adapter.tensors}
    graphs = []
    encoders = {}
    for graph in job.graphs:
        say(f"writing and checking {graph.name} at alpha {alpha:g}")
        start = time.perf_counter()
        folder = repository.staged(graph.name, version)
        samples[graph.name].save(folder)
        size = graph.save(weights, folder / "model.onnx")
        if settings.precision == "int8":
            ranges = () if job.calibration is None else job.calibration.of(graph.name)
            size = quantize(folder / "model.onnx", ranges)
        if settings.served_by == TENSORRT:
            write_plan(
                graph.name,
                folder,
                max_batch_size=settings.max_batch_size,
                max_length=int(job.tokenizer.spec["context_length"]),
                bounds=settings.bounds,
                progress=say,
            )
            size = (folder / PLAN).stat().st_size
        runtime = settings.served_by
        file = folder / RUNTIMES[runtime].file
        encoder = EncoderGraph(file, runtime, precision=settings.precision)
        label = f"{graph.name} in {settings.precision}"
        agreement = compare(label, encoder, samples[graph.name], settings.bounds)
        graphs.append(Exported(graph.name, size, agreement, time.perf_counter() - start))
        encoders[graph.name] = encoder

    # The form of transformers, in fp32 whatever the precision of the graphs.
    forms = []
    if job.transformers is not None and job.form is not None:
        say(f"writing and checking the form of transformers at alpha {alpha:g}")
        start = time.perf_counter()
        folder = job.transformers / name
        folder.mkdir(exist_ok=True)
        size = save_form(folder, base, job.form, folded)
        if dynamic:  # the samples above are at several α
            samples = samples_at(base, job.set_alpha, inputs, alpha)
        bounds = settings.bounds if settings.precision == "fp32" else TOLERANCES["fp32"]
        agreement = check_form(folder, base, samples, bounds, job.form)
        forms.append(Exported("transformers", size, agreement, time.perf_counter() - start))

    # Facts.
    quantization: dict[str, Any] | None = None
    if settings.precision == "int8":
        quantization = {"kind": "dynamic"}
        if job.calibration is not None:
            quantization = {"kind": "static", **job.calibration.facts()}
    tools = [*_TOOLS, *(["openvino"] if settings.served_by == "openvino" else [])]
    release = Release(
        version=version,
        alpha=alpha,
        dynamic_alpha=dynamic,
        base_digest=job.change.base_digest,
        adapter_digest=job.change.digest,
        adapters=source.adapters,
        made_of=job.change.made_of,
        precision=settings.precision,
        quantization=quantization,
        runtime=settings.served_by,
        tokenizer=job.tokenizer.spec,
        crop=source.metadata.source.mask_crop(base.preprocess["mean"]).to_dict(),
        templates=source.templates,
        max_batch_size=settings.max_batch_size,
        tools={
            **{tool.removesuffix("_torch"): importlib.metadata.version(tool) for tool in tools},
            "onnxruntime": onnxruntime.__version__,  # of onnxruntime or of onnxruntime-gpu
        },
        agreement={
            **{graph.name: asdict(graph.agreement) for graph in graphs},
            "batches": list(BATCHES),
            "tolerance": settings.bounds.max_error,
            "min_cosine": settings.bounds.min_cosine,
        },
        **base_facts(base, folded, source.dense, exif_orientation=source.exif_orientation),
    )

    # Label sets by these encoders, and what the release costs on validation data.
    loaded = LoadedRelease(release, GraphEncoder(encoders), job.tokenizer.encode)
    label_sets, facts, warnings = _write_label_sets(job, loaded)
    release = replace(release, label_sets=facts)
    accuracy = None
    if job.validation is not None:
        job.set_alpha(alpha)
        with_labels = LoadedRelease(
            release, loaded.encoder, job.tokenizer.encode, read_label_sets=lambda _: label_sets
        )
        accuracy, confidence = measure(job.validation, settings.max_drop, base, with_labels, say)
        release = replace(release, accuracy=asdict(accuracy))
        if isinstance(confidence, str):
            warnings.append(confidence)
        elif confidence is not None:
            release = replace(release, confidence=asdict(confidence))
    loaded.close()
    if release.logit_bias is not None and release.confidence is None:
        warnings.append(UNFITTED)

    # Release: release.json, tokenizer and code in each task, and a card beside each checkpoint.
    repository.add_code(version)
    for model in TASKS:
        release.save(repository.staged(model, version))
    for model in TOKENIZED:
        shutil.copyfile(job.tokenizer.path, repository.staged(model, version) / "tokenizer.json")
    libraries = {"open_clip": merged}
    if job.transformers is not None:
        libraries["transformers"] = job.transformers / name
    for library, folder in libraries.items():
        release.save(folder)
        if settings.card:
            card = card_of(release, source.metadata, source.curve, library)
            (folder / CARD).write_text(card, encoding="utf-8")
    return ExportedRelease(
        release, graphs, settings.merged.absolute() / name, accuracy, warnings, forms
    )


def _write_label_sets(
    job: _Job, loaded: LoadedRelease
) -> tuple[dict[str, LabelSet], dict[str, dict[str, Any]], list[str]]:
    """Embed the label sets by a release's encoders, and write them for each task that uses them;
    returns them, the facts of each, and warnings about labels that are alike.
    """
    version = loaded.release.version
    templates = job.source.templates
    alpha = loaded.request_alpha(None)
    first, *others = (job.repository.staged(model, version) / "label_sets" for model in LABELLED)
    first.mkdir()
    label_sets = {}
    facts: dict[str, dict[str, Any]] = {}
    warnings = []
    for name, file in job.source.label_sets.items():

        def done(count: int, name: str = name, total: int = len(file.labels)) -> None:
            job.say(f"embedding label set {name}: {count} of {total} labels")

        done(0)
        steps = embed_labels(loaded, file.labels, templates, alpha=alpha, progress=done)
        label_set = complete(steps)
        if file.images:
            job.say(f"embedding the {len(file.images)} examples of label set {name}")
            examples = file.examples(loaded.preprocess)
            try:
                label_set = complete(mix_examples(loaded, label_set, examples, alpha))
            except TaskError as error:
                raise RAdapterError(error.message) from None
            # Where α is an input, servers mix them in again for other α.
            kept = examples if loaded.release.dynamic_alpha else None
            label_set = replace(label_set, examples=kept)
        label_sets[name] = label_set
        path = first / f"{name}.npz"
        label_set.save(path)
        facts[name] = {
            "labels": len(label_set.labels),
            "templates": templates,
            "digest": digest_of(path),
        }
        if file.images:
            facts[name]["examples"] = len(file.images)
        if pairs := indistinguishable(label_set.labels, label_set.embeds):
            shown = "; ".join(f"{one!r} and {other!r}" for one, other in pairs[:10])
            more = f"; and {len(pairs) - 10} more pairs" if len(pairs) > 10 else ""
            warnings.append(
                f"label set {name} has labels that the model can't tell apart (cosine above"
                f" {SAME}), so that an image scores them alike: {shown}{more}; name them by other"
                " words"
            )
    for folder in others:
        shutil.copytree(first, folder)
    return label_sets, facts, warnings
