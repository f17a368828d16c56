"""The export of releases in one function: source, fold, graphs, agreement check, release."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from radapter_export.graph import graph_weights, image_graph, patch_graph, text_graph
from radapter_export.hub import card_of, prepare_push, push
from radapter_export.in_torch import base_facts
from radapter_export.precision import TYPES, Batches, calibrate, lower, quantize
from radapter_export.repository import LABELLED, TOKENIZED, Repository
from radapter_export.settings import ExportSettings, checked
from radapter_export.source import Fold, Source, put_reference, read_source
from radapter_export.tokenizer import write_tokenizer
from radapter_serve.clip.towers import is_causal
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.images import require_images
from radapter_serve.contract.labels import SAME, indistinguishable
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import EncoderGraph, GraphEncoder
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import LoadedRelease, complete
from radapter_serve.encoders.plans import PLAN, write_plan
from radapter_serve.encoders.tensorrt import find_gpu, import_tensorrt
from radapter_serve.errors import RAdapterError
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
        accuracy: on validation data, by torch and by the encoders; None if it was not measured.
        warnings: information for the user, one line each.
        forms: the weights in the forms of other libraries that were asked for.
        pushed: `hf-hub:NAME@COMMIT` on the hub; None if it was not pushed.
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
        """A copy of the values in `release.json`."""
        return copy.deepcopy(self.release.to_dict())

    @property
    def version(self) -> int:
        """Number of the release in its model repository."""
        return self.release.version

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
        alphas: re-scalings in [0, 1], each another release; the last is the newest, which clients
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
    say = progress or (lambda line: None)
    settings = checked(vars(settings))

    # Source: read the adapters and label sets, and refuse wrong input before the work.
    paths = [adapter_path] if isinstance(adapter_path, (str, Path)) else list(adapter_path)
    source = read_source(paths, alphas, settings)
    precision = settings.precision
    dynamic = source.dynamic_alpha
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

    # Fold: load the base, and the change that α scales.
    say("loading the base")
    base, change = source.load(settings)
    check_replaceable(settings.merged.absolute(), "--merged", OPEN_CLIP_FILES)
    form = None
    if settings.transformers is not None:
        check_replaceable(settings.transformers.absolute(), "--transformers", FORM_FILES)
        form = base_form(base)
    models = [model for model in MODELS if model != PATCH_ENCODER or source.dense is not None]
    unfinished = Repository(settings.model_repository, models)

    # Graphs: export them without weights, so that one graph serves every α.
    adapter = source.adapter if dynamic else None
    say("exporting image_encoder")
    graphs = [image_graph(base, adapter)]
    if source.dense is not None:
        say("exporting patch_encoder")
        graphs.append(patch_graph(base, source.dense, adapter))
    say("exporting text_encoder")
    graphs.append(text_graph(base, adapter))
    if precision in TYPES:
        graphs = [lower(graph, precision) for graph in graphs]

    # Work in temporary folders, which are moved into place once all releases are complete.
    releases = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(settings.model_repository, DISK_ADVICE, (SafetensorError,)))
        checkpoints = {"open_clip": stack.enter_context(staged_folder(settings.merged, WRITER))}
        if settings.transformers is not None:
            checkpoints["transformers"] = stack.enter_context(
                staged_folder(settings.transformers, WRITER)
            )
        repository = stack.enter_context(unfinished)
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        tokens = Path(scratch, "tokenizer.json")
        spec = write_tokenizer(base.tokenizer, tokens, dynamic_length=is_causal(base.model))
        tokenizer = Tokenizer.load(tokens, spec)
        quantization: dict[str, Any] | None = None
        calibration: Mapping[str, Batches] = {}
        if precision == "int8":
            quantization = {"kind": "dynamic"}
        if images is not None:
            calibration, inputs_facts = calibrate(images, base, source, tokenizer)
            quantization = {"kind": "static", **inputs_facts}
        inputs = Inputs(base, tokenizer, base.image_size)
        set_alpha = put_reference(base, change)

        for version, alpha in enumerate(source.alphas, repository.next_version()):
            # Fold: write the merged checkpoint.
            say(f"folding at alpha {alpha:g}")
            folded = change.at(alpha)
            name = f"alpha-{alpha:g}" if len(source.alphas) > 1 else ""
            folders = {library: folder / name for library, folder in checkpoints.items()}
            for folder in folders.values():
                folder.mkdir(exist_ok=True)
            save_open_clip(folders["open_clip"], base, folded)

            # References: torch's embeddings of seeded inputs, with nothing folded.
            say(f"torch's embeddings at alpha {alpha:g}{' and others' * dynamic}, nothing folded")
            samples = samples_at(base, set_alpha, inputs, alpha, source.dense, mixed=dynamic)

            # Graphs: add the weights, run them as the server does, and compare with the references.
            for model in models:
                repository.staged(model, version).mkdir()
            weights = folded
            if adapter is not None:
                assert isinstance(change, Fold)
                weights = graph_weights(change.weights, adapter)
            encoders = {}
            written = []
            for graph in graphs:
                say(f"writing and checking {graph.name} at alpha {alpha:g}")
                start = time.perf_counter()
                folder = repository.staged(graph.name, version)
                samples[graph.name].save(folder)
                size = graph.save(weights, folder / "model.onnx")
                if precision == "int8":
                    size = quantize(folder / "model.onnx", calibration.get(graph.name, ()))
                if settings.runtime == TENSORRT:
                    write_plan(
                        graph.name,
                        folder,
                        max_batch_size=settings.max_batch_size,
                        max_length=int(spec["context_length"]),
                        bounds=settings.bounds,
                        progress=say,
                    )
                    size = (folder / PLAN).stat().st_size
                file = folder / RUNTIMES[settings.runtime].file
                encoder = EncoderGraph(file, settings.runtime, precision=precision)
                label = f"{graph.name} in {precision}"
                agreement = compare(label, encoder, samples[graph.name], settings.bounds)
                seconds = time.perf_counter() - start
                written.append(Exported(graph.name, size, agreement, seconds))
                encoders[graph.name] = encoder

            # Form of transformers, always in fp32
            forms = []
            if form is not None:
                say(f"writing and checking the form of transformers at alpha {alpha:g}")
                start = time.perf_counter()
                folder = folders["transformers"]
                size = save_form(folder, base, form, folded)
                if dynamic:  # the samples above mix several α
                    samples = samples_at(base, set_alpha, inputs, alpha)
                bounds = settings.bounds if precision == "fp32" else TOLERANCES["fp32"]
                agreement = check_form(folder, base, samples, bounds, form)
                seconds = time.perf_counter() - start
                forms.append(Exported("transformers", size, agreement, seconds))

            # Facts of the release
            tools = [*_TOOLS, *(["openvino"] if settings.runtime == "openvino" else [])]
            release = Release(
                version=version,
                alpha=alpha,
                dynamic_alpha=dynamic,
                base_digest=change.base_digest,
                adapter_digest=change.digest,
                adapters=source.adapters,
                made_of=change.made_of,
                precision=precision,
                quantization=quantization,
                runtime=settings.runtime,
                tokenizer=spec,
                crop=source.metadata.source.mask_crop(base.preprocess["mean"]).to_dict(),
                templates=source.templates,
                max_batch_size=settings.max_batch_size,
                tools={
                    **{
                        tool.removesuffix("_torch"): importlib.metadata.version(tool)
                        for tool in tools
                    },
                    "onnxruntime": onnxruntime.__version__,  # same for onnxruntime-gpu
                },
                agreement={
                    **{graph.name: asdict(graph.agreement) for graph in written},
                    "batches": list(BATCHES),
                    "tolerance": settings.bounds.max_error,
                    "min_cosine": settings.bounds.min_cosine,
                },
                **base_facts(
                    base,
                    folded,
                    source.dense,
                    exif_orientation=source.metadata.source.exif_orientation,
                ),
            )

            # Embed label sets by these encoders, and measure the accuracy on validation data.
            loaded = LoadedRelease(release, GraphEncoder(encoders), tokenizer)
            places = [repository.staged(model, version) / "label_sets" for model in LABELLED]
            label_sets, facts, warnings = _write_label_sets(loaded, source, places, say)
            release = replace(release, label_sets=facts)
            accuracy = None
            if validation is not None:
                set_alpha(alpha)
                by_text = [
                    label_set
                    for name, label_set in label_sets.items()
                    if name not in release.sets_by_example
                ]
                accuracy, confidence = measure(
                    validation, settings.max_drop, base, loaded, by_text, say
                )
                release = replace(release, accuracy=asdict(accuracy))
                if isinstance(confidence, str):
                    warnings.append(confidence)
                elif confidence is not None:
                    release = replace(release, confidence=asdict(confidence))
            loaded.close()
            if release.logit_bias is not None and release.confidence is None:
                warnings.append(UNFITTED)

            # Add release.json, tokenizer and code to each task, and a card to each checkpoint.
            repository.add_code(version)
            for model in TASKS:
                release.save(repository.staged(model, version))
            for model in TOKENIZED:
                target = repository.staged(model, version) / "tokenizer.json"
                shutil.copyfile(tokens, target)
            for library, folder in folders.items():
                release.save(folder)
                card = card_of(release, source.metadata, source.curve, library)
                (folder / CARD).write_text(card, encoding="utf-8")
            place = settings.merged.absolute() / name
            releases.append(ExportedRelease(release, written, place, accuracy, warnings, forms))

        repository.add_configs([each.release for each in releases])
        say("writing the digests of all files")
        for each in releases:
            repository.add_sums(each.version)
        say("putting everything in place")
        repository.commit([each.version for each in releases])
    if hub is None:
        return releases

    # Push the one release, now that it is complete on this machine.
    say(f"pushing to {hub}")
    [exported] = releases
    card = card_of(
        exported.release, source.metadata, source.curve, "open_clip", hub, transformers=bool(form)
    )
    return [replace(exported, pushed=push(hub, exported.release, settings, card))]


def _write_label_sets(
    loaded: LoadedRelease, source: Source, folders: Sequence[Path], say: Say
) -> tuple[dict[str, LabelSet], dict[str, dict[str, Any]], list[str]]:
    """Embed the label sets by a release's encoders, and write them into each folder. Returns the
    label sets, the facts of each, and warnings about labels that the model cannot tell apart.
    """
    templates = source.templates
    alpha = loaded.request_alpha(None)
    first, *others = folders
    first.mkdir()
    label_sets = {}
    facts: dict[str, dict[str, Any]] = {}
    warnings = []
    for name, file in source.label_sets.items():

        def done(count: int, name: str = name, total: int = len(file.labels)) -> None:
            say(f"embedding label set {name}: {count} of {total} labels")

        done(0)
        steps = embed_labels(loaded, file.labels, templates, alpha=alpha, progress=done)
        label_set = complete(steps)
        if file.images:
            say(f"embedding the {len(file.images)} examples of label set {name}")
            examples = file.examples(loaded.preprocess)
            try:
                label_set = complete(mix_examples(loaded, label_set, examples, alpha))
            except TaskError as error:
                raise RAdapterError(error.message) from None
            # If α is an input, servers need the examples for other α.
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
