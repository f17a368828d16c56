"""The export of releases in one function: source, fold, graphs, agreement check, release."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from safetensors import SafetensorError
from torch import Tensor

from radapter_export.card import card_of
from radapter_export.checks import BATCHES, Inputs, measure, open_validation, samples_at
from radapter_export.forms import (
    DISK_ADVICE,
    OPEN_CLIP_FILES,
    WRITER,
    TransformersForm,
    check_replaceable,
    save_open_clip,
)
from radapter_export.graph import Graph, graph_weights, image_graph, patch_graph, text_graph
from radapter_export.hub import prepare_push, push
from radapter_export.immich import ImmichForm
from radapter_export.precision import TYPES, Batches, calibrate, lower, quantize
from radapter_export.repository import LABELLED, TOKENIZED, Repository
from radapter_export.settings import ExportSettings, checked
from radapter_export.source import Fold, Source, put_reference, read_source
from radapter_serve.adapter.in_torch import base_facts
from radapter_serve.adapter.tuned import Line, towers_of
from radapter_serve.clip.base import Base
from radapter_serve.clip.tokenizer import write_tokenizer
from radapter_serve.clip.towers import is_causal
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import require_images
from radapter_serve.contract.labels import SAME, indistinguishable, shared_name
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.encoder import EncoderGraph, GraphEncoder
from radapter_serve.encoders.labels import MAX_PROMPTS_BYTES, PROMPTS, LabelSet, prompt_counts
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.plans import PLAN, write_plan
from radapter_serve.encoders.tensorrt import find_gpu, import_tensorrt
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import kept_at
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.rows import what_is_kept
from radapter_serve.files import digest_of, disk_errors, staged_folder, written_array
from radapter_serve.release.adapters import AdapterFacts, releases_beside
from radapter_serve.release.agreement import TOLERANCES, Agreement, Agreements, Samples, compare
from radapter_serve.release.release import (
    TASKS,
    Accuracy,
    LabelSetFacts,
    Quantization,
    Release,
)
from radapter_serve.release.repository import MODELS, PATCH_ENCODER, RUNTIMES, TENSORRT
from radapter_serve.sources import CARD
from radapter_serve.tasks.classify import with_rows
from radapter_serve.tasks.embed import embed_labels

UNFITTED = (
    "this release of a SigLIP refuses multi_label: training does not update the sigmoid's scale and"
    " bias; export with --validation DATA to fit them again"
)
UNMOVED = (
    "its images move no label: they need to show two labels or more, and do not move these if the"
    " texts alone find the labels of the images as well; a weight moves them all the same"
)
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "radapter-serve")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A graph of a release, or its weights in the form of another library.

    Attributes:
        name: such as `image_encoder` or `transformers`.
        size: of its weights, in bytes.
        agreement: with torch.
        seconds: taken to write and check it.
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
        warnings: information for the user, one line each.
        forms: the weights in the forms of other libraries that were asked for.
        pushed: `hf-hub:NAME@COMMIT` on the hub; None if it was not pushed.
    """

    release: Release = field(repr=False)
    graphs: list[Exported] = field(repr=False)
    merged: Path
    warnings: list[str] = field(repr=False)
    forms: list[Exported] = field(repr=False)
    pushed: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """A copy of the values in `release.json`."""
        return self.release.to_dict()

    @property
    def version(self) -> int:
        """Number of the release in its model repository."""
        return self.release.version

    @property
    def accuracy(self) -> Accuracy | None:
        """On validation data, with torch and with the encoders; None if it was not measured."""
        return self.release.accuracy

    @property
    def alpha(self) -> float:
        """The folded re-scaling, or the default if requests may give another."""
        return self.release.alpha


def export_release(
    adapter_path: str | Path | Sequence[str | Path] = (),
    alphas: Sequence[float] | Literal["dynamic"] | None = None,
    settings: ExportSettings = ExportSettings(),  # noqa: B008  # frozen
    *,
    progress: Say | None = None,
) -> list[ExportedRelease]:
    """Fold an adapter at one or several α, and add a release for each to a model repository.

    Nothing is written unless all of it succeeds; leftovers of a killed export are removed by the
    next one.

    Args:
        adapter_path: adapter file, or the folder of a run; several of one base are averaged. Empty
            if the settings name a checkpoint or a LoRA.
        alphas: α in [0, 1], each another release; the last is the newest, which clients
            get by default. None: the one that `auto` chose on validation data for this very
            adapter, or else the adapter's own. "dynamic": one release whose encoders take α as an
            input, with the same default.
        settings: all other settings; the fields are the flags of `radapter-export`.
        progress: called with a short line before each step.

    Returns:
        The releases in the order of `alphas`.

    Raises:
        RAdapterError: bad input, graphs that differ from torch, a full disk; then nothing was
            written.
    """
    settings = checked(vars(settings))
    paths = [adapter_path] if isinstance(adapter_path, (str, Path)) else list(adapter_path)
    source = read_source(paths, alphas, settings)
    return export_source(source, settings, progress or (lambda line: None), {})


def export_source(
    source: Source, settings: ExportSettings, say: Say, adapters: Mapping[str, AdapterFacts]
) -> list[ExportedRelease]:
    """Export the releases of a source that was read with these checked settings; refuse the
    adapters that could not lie beside them.
    """
    prepared = prepare(source, settings, say, adapters)

    # Work in temporary folders, which are moved into place once all releases are complete.
    releases = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(settings.model_repository, DISK_ADVICE, (SafetensorError,)))
        checkpoints = {"open_clip": stack.enter_context(staged_folder(settings.merged, WRITER))}
        for form in prepared.forms:
            folder = getattr(settings, form.name)
            checkpoints[form.name] = stack.enter_context(staged_folder(folder, WRITER))
        repository = stack.enter_context(prepared.repository)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = Work(prepared, checkpoints, scratch / "tokenizer.json")
        for version, alpha in enumerate(source.alphas, repository.next_version()):
            written = write(work, version, alpha, say)
            releases.append(verify(work, written, say))
        repository.add_configs([each.release for each in releases])
        say("writing the digests of all files")
        for each in releases:
            repository.add_sums(each.version)
        say("putting everything in place")
        repository.commit([each.version for each in releases])
    if prepared.hub is None:
        return releases

    # Push the one release, now that it is complete on this machine.
    say(f"pushing to {prepared.hub}")
    [exported] = releases
    card = card_of(
        exported.release,
        source.metadata,
        source.curve,
        "open_clip",
        prepared.hub,
        transformers=settings.transformers is not None,
    )
    return [replace(exported, pushed=push(prepared.hub, exported.release, settings, card))]


@dataclass(frozen=True)
class Prepared:
    """All that an export needs before it writes the first file."""

    source: Source
    settings: ExportSettings
    validation: EvaluationSet | None
    images: Sequence[Path] | None  # for the ranges of int8
    hub: str | None  # repository to push to
    base: Base
    change: Fold | Line
    digests: Mapping[str, Any]  # of base, change and towers, as in a release
    forms: Sequence[TransformersForm | ImmichForm]  # of other libraries
    models: Sequence[str]
    graphs: Sequence[Graph]  # without weights, so that one graph serves every α
    repository: Repository


def prepare(
    source: Source, settings: ExportSettings, say: Say, adapters: Mapping[str, AdapterFacts]
) -> Prepared:
    """Refuse what can't be exported, load the base, and export its graphs; nothing is written."""
    precision = settings.precision
    if precision == "bf16" and settings.runtime == "onnxruntime":
        raise RAdapterError(
            "ONNX Runtime cannot compute in bf16 on a CPU; add --runtime openvino, or use fp16"
        )
    if precision == "int8" and not settings.calibration and settings.runtime == TENSORRT:
        raise RAdapterError(
            "TensorRT takes only int8 with fixed ranges; add --calibration DATA, a folder of images"
        )
    validation = open_validation(source.metadata, settings.validation, source.dense, precision)
    images = None
    if settings.calibration is not None:
        images = require_images(
            Path(settings.calibration), "--calibration a folder of images"
        ).images
    hub = None
    if settings.push is not None:
        say("asking the Hugging Face hub")
        hub = prepare_push(settings.push, len(source.alphas), settings.runtime)
    if settings.runtime == TENSORRT:
        find_gpu()
        import_tensorrt()

    # Load the base, and the change that α scales.
    say("loading the base")
    base, change = source.load(settings)
    towers = towers_of(base.model, change.changes)
    digests = {"base_digest": change.base_digest, "adapter_digest": change.digest, **towers}
    text_towers = {towers["text_tower"].digest(alpha) for alpha in source.alphas}
    _check_beside(adapters, text_towers, base, settings.model_repository)
    check_replaceable(settings.merged.absolute(), "--merged", OPEN_CLIP_FILES)
    forms: list[TransformersForm | ImmichForm] = []
    for kind in (TransformersForm, ImmichForm):
        folder = getattr(settings, kind.name)
        if folder is not None:
            check_replaceable(folder.absolute(), f"--{kind.name}", kind.files)
            say(f"preparing the form of {kind.name}")
            forms.append(kind(base))
    models = [model for model in MODELS if model != PATCH_ENCODER or source.dense is not None]
    repository = Repository(settings.model_repository, models)

    return Prepared(
        source=source,
        settings=settings,
        validation=validation,
        images=images,
        hub=hub,
        base=base,
        change=change,
        digests=digests,
        forms=forms,
        models=models,
        graphs=_export_graphs(base, source, precision, say),
        repository=repository,
    )


def _check_beside(
    adapters: Mapping[str, AdapterFacts], text_towers: Set[str], base: Base, repository: Path
) -> None:
    """Refuse adapters that fit neither the releases to come nor one that is there."""
    for name, facts in adapters.items():
        fits = facts.text_tower in text_towers and facts.width == base.config["embed_dim"]
        if not fits and not releases_beside(repository, facts):
            raise RAdapterError(
                f"the adapter {name!r} was trained with another text tower than this release would"
                " have; leave out --adapter, --checkpoint, --lora and --alpha to export its base,"
                " and the adapter beside it"
            )


def _export_graphs(base: Base, source: Source, precision: str, say: Say) -> list[Graph]:
    """Export the graph of each encoder, without weights."""
    adapter = source.adapter if source.dynamic_alpha else None
    say("exporting image_encoder")
    graphs = [image_graph(base, adapter)]
    if source.dense is not None:
        say("exporting patch_encoder")
        graphs.append(patch_graph(base, source.dense, adapter))
    say("exporting text_encoder")
    graphs.append(text_graph(base, adapter))
    if precision in TYPES:
        graphs = [lower(graph, precision) for graph in graphs]
    return graphs


class Work:
    """What all releases of an export share while they are written: their folders, the tokenizer,
    the ranges of int8 and the model with the change attached.
    """

    def __init__(self, prepared: Prepared, checkpoints: Mapping[str, Path], tokens: Path) -> None:
        base = prepared.base
        self.prepared = prepared
        self.checkpoints = checkpoints  # folders by library
        self.tokens = tokens
        dynamic_length = is_causal(base.model)
        self.tokens_facts = write_tokenizer(base.tokenizer, tokens, dynamic_length=dynamic_length)
        self.tokenizer = Tokenizer.load(tokens, self.tokens_facts)
        self.quantization: Quantization | None = None
        self.calibration: Mapping[str, Batches] = {}
        if prepared.settings.precision == "int8":
            self.quantization = Quantization("dynamic")
        if prepared.images is not None:
            self.calibration, self.quantization = calibrate(
                prepared.images, base, prepared.source, self.tokenizer
            )
        self.inputs = Inputs(base, self.tokenizer, base.image_size)
        self.set_alpha = put_reference(base, prepared.change)


@dataclass(frozen=True)
class Written:
    """A release whose weights are written, and not checked yet."""

    version: int
    alpha: float
    folders: Mapping[str, Path]  # of the checkpoints, by library
    samples: Mapping[str, Samples]  # torch's embeddings, by graph
    weights: Mapping[str, Tensor]  # folded
    sizes: Mapping[str, int]  # of each graph and form, in bytes
    seconds: Mapping[str, float]  # that each took

    def checked(self, name: str, start: float, agreement: Agreement) -> Exported:
        """The facts of a graph or form, whose check began at `start`."""
        seconds = self.seconds[name] + time.perf_counter() - start
        return Exported(name, self.sizes[name], agreement, seconds)


def write(work: Work, version: int, alpha: float, say: Say) -> Written:
    """Write the checkpoint, the graphs and the forms of one release."""
    prepared = work.prepared
    source = prepared.source
    settings = prepared.settings
    base = prepared.base
    repository = prepared.repository

    # Fold, and write the merged checkpoint.
    say(f"folding at alpha {alpha:g}")
    folded = prepared.change.at(alpha)
    name = f"alpha-{alpha:g}" if len(source.alphas) > 1 else ""
    folders = {library: folder / name for library, folder in work.checkpoints.items()}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    save_open_clip(folders["open_clip"], base, folded)

    # Embed seeded inputs in torch, with nothing folded.
    dynamic = source.dynamic_alpha
    say(f"torch's embeddings at alpha {alpha:g}{' and others' * dynamic}, nothing folded")
    samples = samples_at(base, work.set_alpha, work.inputs, alpha, source.dense, mixed=dynamic)

    # Add the weights to the graphs.
    for model in prepared.models:
        repository.staged(model, version).mkdir()
    weights = folded
    if dynamic:
        assert isinstance(prepared.change, Fold)
        weights = graph_weights(prepared.change.weights, prepared.change.adapter)
    sizes = {}
    seconds = {}
    for graph in prepared.graphs:
        say(f"writing {graph.name} at alpha {alpha:g}")
        start = time.perf_counter()
        folder = repository.staged(graph.name, version)
        samples[graph.name].save(folder)
        sizes[graph.name] = graph.save(weights, folder / "model.onnx")
        if settings.precision == "int8":
            ranges = work.calibration.get(graph.name, ())
            sizes[graph.name] = quantize(folder / "model.onnx", ranges)
        if settings.runtime == TENSORRT:
            write_plan(
                graph.name,
                folder,
                max_batch_size=settings.max_batch_size,
                max_length=work.tokenizer.context_length,
                bounds=settings.bounds,
                progress=say,
            )
            sizes[graph.name] = (folder / PLAN).stat().st_size
        seconds[graph.name] = time.perf_counter() - start

    # Write the forms of other libraries, which are always in fp32.
    for form in prepared.forms:
        say(f"writing the form of {form.name} at alpha {alpha:g}")
        start = time.perf_counter()
        sizes[form.name] = form.save(folders[form.name], folded)
        seconds[form.name] = time.perf_counter() - start
    return Written(version, alpha, folders, samples, folded, sizes, seconds)


def verify(work: Work, written: Written, say: Say) -> ExportedRelease:
    """Compare a written release with torch, and add its label sets, its facts and its cards."""
    prepared = work.prepared
    source = prepared.source
    repository = prepared.repository
    version = written.version
    alpha = written.alpha
    encoders, graphs = _check_encoders(prepared, written, say)
    forms = _check_forms(work, written, say)
    release = _facts(work, written, graphs)

    # Embed label sets by these encoders, and measure the accuracy on validation data.
    loaded = LoadedRelease(release, GraphEncoder(encoders), work.tokenizer)
    places = [repository.staged(model, version) / "label_sets" for model in LABELLED]
    text_encoder = repository.staged("text_encoder", version)
    facts, warnings = _write_label_sets(loaded, source, places, text_encoder, say)
    release = replace(release, label_sets=facts)
    if prepared.validation is not None:
        work.set_alpha(alpha)
        # Embedding 80 templates of 1,000 labels takes minutes; this release has them in its cache.
        max_drop = prepared.settings.max_drop
        accuracy, confidence = measure(prepared.validation, max_drop, prepared.base, loaded, say)
        if isinstance(confidence, str):
            warnings.append(confidence)
            confidence = None
        release = replace(release, accuracy=accuracy, confidence=confidence)
    loaded.close()
    if release.logit_bias is not None and release.confidence is None:
        warnings.append(UNFITTED)
    if (share := kept_at(source.curve, alpha)) is not None:
        warnings.append(what_is_kept(alpha, share))

    # Add release.json, tokenizer and code to each task, and a card to each checkpoint.
    repository.add_code(version)
    for model in TASKS:
        release.save(repository.staged(model, version))
    for model in TOKENIZED:
        shutil.copyfile(work.tokens, repository.staged(model, version) / "tokenizer.json")
    for library, folder in written.folders.items():
        release.save(folder)
        if library != ImmichForm.name:  # no library opens that folder
            card = card_of(release, source.metadata, source.curve, library)
            (folder / CARD).write_text(card, encoding="utf-8")
    name = written.folders["open_clip"].relative_to(work.checkpoints["open_clip"])
    merged = prepared.settings.merged.absolute() / name
    return ExportedRelease(release, graphs, merged, warnings, forms)


def _check_encoders(
    prepared: Prepared, written: Written, say: Say
) -> tuple[dict[str, EncoderGraph], list[Exported]]:
    """Run the encoders as the server does, and compare them with torch."""
    settings = prepared.settings
    encoders = {}
    graphs = []
    for graph in prepared.graphs:
        say(f"checking {graph.name} at alpha {written.alpha:g}")
        start = time.perf_counter()
        folder = prepared.repository.staged(graph.name, written.version)
        file = folder / RUNTIMES[settings.runtime].file
        encoder = EncoderGraph(file, settings.runtime, precision=settings.precision)
        label = f"{graph.name} in {settings.precision}"
        agreement = compare(label, encoder, written.samples[graph.name], settings.bounds)
        encoders[graph.name] = encoder
        graphs.append(written.checked(graph.name, start, agreement))
    return encoders, graphs


def _check_forms(work: Work, written: Written, say: Say) -> list[Exported]:
    """Open the forms of other libraries as they do, and compare them with torch."""
    prepared = work.prepared
    settings = prepared.settings
    alpha = written.alpha
    forms = []
    samples = written.samples
    bounds = settings.bounds if settings.precision == "fp32" else TOLERANCES["fp32"]
    if prepared.source.dynamic_alpha and prepared.forms:  # the samples mix several α
        samples = samples_at(prepared.base, work.set_alpha, work.inputs, alpha)
    for form in prepared.forms:
        say(f"checking the form of {form.name} at alpha {alpha:g}")
        start = time.perf_counter()
        parts = []
        for name, opened in form.open(written.folders[form.name]).items():
            label = f"{name} in the form of {form.name}"
            parts.append(compare(label, opened, samples[name], bounds, is_fixed=True))
        forms.append(written.checked(form.name, start, Agreement.worst(*parts)))
    return forms


def _facts(work: Work, written: Written, graphs: Sequence[Exported]) -> Release:
    """The facts of a release that are known before its label sets and its accuracy."""
    prepared = work.prepared
    source = prepared.source
    settings = prepared.settings
    base = prepared.base
    tools = [*_TOOLS, *(["openvino"] if settings.runtime == "openvino" else [])]
    return Release(
        version=written.version,
        alpha=written.alpha,
        dynamic_alpha=source.dynamic_alpha,
        **prepared.digests,
        adapters=source.adapters,
        made_of=prepared.change.made_of,
        precision=settings.precision,
        quantization=work.quantization,
        runtime=settings.runtime,
        tokenizer=work.tokens_facts,
        crop=source.metadata.source.mask_crop(base.preprocess["mean"]),
        templates=source.templates,
        max_batch_size=settings.max_batch_size,
        tools={
            **{tool.removesuffix("_torch"): importlib.metadata.version(tool) for tool in tools},
            "onnxruntime": onnxruntime.__version__,  # same for onnxruntime-gpu
        },
        agreement=Agreements(
            **{graph.name: graph.agreement for graph in graphs},
            batches=list(BATCHES),
            tolerance=settings.bounds.max_error,
            min_cosine=settings.bounds.min_cosine,
        ),
        **base_facts(
            base,
            written.weights,
            source.dense,
            exif_orientation=source.metadata.source.exif_orientation,
        ),
    )


def _write_label_sets(
    loaded: LoadedRelease, source: Source, folders: Sequence[Path], text_encoder: Path, say: Say
) -> tuple[dict[str, LabelSetFacts], list[str]]:
    """Embed the label sets with a release's encoders, and write them into each folder; and the
    embeddings of their prompts into that of the text encoder, if adapters can map them. Returns the
    facts of each, and warnings about labels that the model cannot tell apart.
    """
    templates = source.templates
    place = loaded.place()
    first, *others = folders
    first.mkdir()
    facts: dict[str, LabelSetFacts] = {}
    warnings = []
    for name, file in source.label_sets.items():

        def done(count: int, name: str = name, total: int = len(file.labels)) -> None:
            say(f"embedding label set {name}: {count} of {total} labels")

        done(0)
        steps = partial(embed_labels, loaded, file.labels, templates, place=place, progress=done)
        # Adapters belong to the base's text tower, and do not map labels by example.
        tower = loaded.release.text_tower
        is_base = tower.digest(loaded.release.alpha) == tower.base
        prompts = sum(prompt_counts(file.labels, templates)), loaded.release.embed_dim
        kept_in: Path | None = None
        if is_base and not file.images and 4 * math.prod(prompts) <= MAX_PROMPTS_BYTES:
            kept_in = text_encoder / f"{name}{PROMPTS}"
            with written_array(kept_in, prompts) as keep:
                label_set = complete(steps(keep=keep))
        else:
            label_set = complete(steps())
        if file.images:
            say(f"embedding the {len(file.images)} examples of label set {name}")
            examples = file.examples(loaded.preprocess)
            texts = label_set.embeds
            try:
                label_set = complete(with_rows(loaded, label_set, examples, place))
            except TaskError as error:
                raise RAdapterError(error.message) from None
            if np.array_equal(label_set.embeds, texts):
                warnings.append(f"label set {name}: {UNMOVED}")
            # If α is an input, servers need the examples for other α.
            kept = examples if loaded.release.dynamic_alpha else None
            label_set = replace(label_set, examples=kept)
        path = first / f"{name}.npz"
        label_set.save(path)
        facts[name] = LabelSetFacts(
            labels=len(label_set.labels),
            templates=templates,
            digest=digest_of(path),
            examples=len(file.images) or None,
            prompts=None if kept_in is None else digest_of(kept_in),
        )
        if alike := _alike(file.labels, label_set):
            warnings.append(f"label set {name}{alike}")
    for folder in others:
        shutil.copytree(first, folder)
    return facts, warnings


def _alike(labels: Sequence[str], label_set: LabelSet) -> str:
    """What to say of labels that the model can't tell apart, or that share a name; else empty."""
    if pairs := indistinguishable(label_set.labels, label_set.embeds):
        shown = "; ".join(f"{label!r} and {other!r}" for label, other in pairs[:10])
        more = f"; and {len(pairs) - 10} more pairs" if len(pairs) > 10 else ""
        return (
            f" has labels that the model can't tell apart (cosine above {SAME}), so that an image"
            f" gives them the same score: {shown}{more}; use other words"
        )
    shared = shared_name(labels)
    return f": {shared}" if shared else ""
