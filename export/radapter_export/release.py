"""One call from an adapter to releases: fold, export, check, write."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from radapter_export.accuracy import Accuracy, Validation, open_validation
from radapter_export.agreement import BATCHES, Inputs, References
from radapter_export.files import disk_errors
from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_export.merged import Merged
from radapter_export.precision import TYPES, check_precision, lower
from radapter_export.quantization import Calibration, calibration_images, quantize
from radapter_export.repository import MODELS, PATCH_ENCODER, TASKS, Repository
from radapter_export.tokenizer import write_tokenizer
from radapter_export.towers import check
from radapter_serve.adapter import Adapter, Adapters, attach_adapter, fold, load_adapter
from radapter_serve.adapter.file import check_alpha, check_base
from radapter_serve.base import Base, load_base
from radapter_serve.dense import check_dense
from radapter_serve.errors import RAdapterError
from radapter_serve.prompts import templates_of
from radapter_serve.serving.agreement import TOLERANCES, Agreement, Samples, Tolerance, compare
from radapter_serve.serving.collection import Collection, open_collection
from radapter_serve.serving.encoder import Encoder
from radapter_serve.serving.errors import TaskError
from radapter_serve.serving.labels import LabelEmbedder, check_labels, read_label_file, split_label
from radapter_serve.serving.masks import MaskCrop
from radapter_serve.serving.preprocess import Preprocess
from radapter_serve.serving.runtimes import RUNTIMES
from radapter_serve.serving.tokenizer import Tokenizer
from radapter_serve.towers import is_causal

FORMAT = 1
TOKENIZED = ("embed_text", "segment", "classify")
LABELLED = ("segment", "classify")
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "radapter-serve")


@dataclass(frozen=True)
class Exported:
    """One graph of a release: its size in bytes, its agreement with torch, the seconds it took to write and check."""

    name: str
    size: int
    agreement: Agreement
    seconds: float


@dataclass(frozen=True)
class Release:
    """One exported release.

    Attributes:
        facts: what `release.json` holds.
        graphs: the encoders.
        merged: folder of the merged checkpoint.
        accuracy: on validation data, by torch and by the encoders; None if it was not measured.
    """

    facts: dict[str, Any]
    graphs: list[Exported]
    merged: Path
    accuracy: Accuracy | None

    @property
    def version(self) -> int:
        """Number of the release in its model repository."""
        return int(self.facts["version"])

    @property
    def alpha(self) -> float:
        """The re-scaling that was folded."""
        return float(self.facts["alpha"])


def export_release(
    adapter_path: str | Path,
    alphas: Sequence[float] | None = None,
    *,
    base: str | None = None,
    pretrained: str | None = None,
    model_repository: str | Path = "model_repository",
    merged: str | Path = "merged",
    label_sets: Mapping[str, str | Path] | None = None,
    templates: str | Path | Sequence[str] | None = None,
    dense: str | None = None,
    precision: str = "fp32",
    calibration: str | None = None,
    validation: str | None = None,
    max_drop: float = 0.5,
    runtime: str = "onnxruntime",
    tolerance: float | None = None,
    max_batch_size: int = 64,
    progress: Callable[[str], None] | None = None,
) -> list[Release]:
    """Fold an adapter at one or several α, and add a release for each to a model repository.

    Nothing is written unless all of it succeeds; what a killed export left is removed by the next one.

    Args:
        adapter_path: adapter file, or the folder of a run.
        alphas: re-scalings in [0, 1], each another release; the last is the newest, which clients get by default.
            The adapter's own if None.
        base: open_clip architecture or `local-dir:PATH`; what the adapter was trained on if None.
        pretrained: open_clip tag or a checkpoint's path; what the adapter was trained on if None.
        model_repository: folder that Triton serves; made if there is none.
        merged: folder for the merged checkpoint, replaced if it holds one; with several α, for a folder of each.
        label_sets: name to label file; their text embeddings become part of the release.
        templates: prompt templates, a file of them or the name of a built-in set; the adapter's own if None.
        dense: how patches are embedded, one of `radapter_serve.dense.WAYS`; "none" leaves `patch_encoder` out; the
            adapter's own if None.
        runtime: what runs the encoders in the server, and checks them here, one of
            `radapter_serve.serving.runtimes.RUNTIMES`.
        precision: of the encoders: `fp32`, `fp16`, `bf16` or `int8`.
        calibration: images for `int8`, as of `radapter_serve.serving.collection.open_collection`: the ranges of
            activations are found by them and fixed (static); found for each batch if None (dynamic).
        validation: labelled images, captions or masks, of the form of a recipe's `val_data`, by which torch and the
            encoders are compared; the run's own if None and the precision is not `fp32`; "none" for none.
        max_drop: points of the task's metric, in per cent, that the encoders may lose there.
        tolerance: largest difference allowed between the runtime and torch, per component of a unit-length embedding;
            what `radapter_serve.serving.agreement.TOLERANCES` says of the precision if None.
        max_batch_size: rows that the server puts into one batch.
        progress: called with a short line before each step.

    Returns:
        The releases in the order of `alphas`.

    Raises:
        RAdapterError: bad input, graphs that differ from torch, a full disk; nothing was written then.
    """
    say = progress or (lambda line: None)
    adapter = load_adapter(adapter_path)
    meta = adapter.metadata
    alphas = [meta.alpha] if alphas is None else alphas
    _check_arguments(alphas, runtime, tolerance, max_drop, max_batch_size)
    check_precision(precision, calibration, runtime)
    bounds = TOLERANCES[precision] if tolerance is None else Tolerance(tolerance, -1.0)
    own = meta.templates or "simple"
    prompts = templates_of(own if templates is None else templates)
    labels = {name: _read_labels(name, path) for name, path in (label_sets or {}).items()}
    way = dense or meta.recipe.get("dense")
    way = None if way == "none" else way
    judged_by = open_validation(meta, validation, way, precision, max_drop)
    collection = None if calibration is None else open_collection(calibration.removeprefix("imagefolder:"))
    say("loading the base")
    clip = load_base(base or meta.architecture, pretrained or meta.pretrained)
    check(clip)
    if way is not None:
        check_dense(clip.model, way)
    weights = dict(clip.model.state_dict())
    check_base(weights, adapter)
    say("exporting image_encoder")
    graphs = [image_graph(clip)]
    if way is not None:
        say("exporting patch_encoder")
        graphs.append(patch_graph(clip, way))
    say("exporting text_encoder")
    graphs.append(text_graph(clip))
    if precision in TYPES:
        graphs = [lower(graph, precision) for graph in graphs]
    models = [model for model in MODELS if model != PATCH_ENCODER or way is not None]
    with Merged(merged) as checkpoints, Repository(model_repository, models) as repository:
        writer = _Writer(
            clip, adapter, weights, graphs, way, prompts, labels, runtime, precision, collection, bounds, max_batch_size
        )
        first = repository.next_version()
        releases = []
        for version, alpha in enumerate(alphas, first):
            name = f"alpha-{alpha:g}" if len(alphas) > 1 else ""
            releases.append(writer.write(version, alpha, checkpoints, name, repository, judged_by, say))
        facts = [release.facts for release in releases]
        for model in models:
            repository.add_config(model, facts, writer.dims, max_batch_size)
        say("putting everything in place")
        checkpoints.commit()
        repository.commit([release.version for release in releases])
    return releases


class _Writer:
    """What all releases of one call share, and the writing of each."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        weights: dict[str, Tensor],
        graphs: Sequence[Graph],
        way: str | None,
        templates: list[str],
        labels: Mapping[str, list[str]],
        runtime: str,
        precision: str,
        collection: Collection | None,
        bounds: Tolerance,
        max_batch_size: int,
    ) -> None:
        self._base, self._adapter, self._weights, self._graphs = base, adapter, weights, graphs
        self._way, self._templates, self._labels, self._bounds = way, templates, labels, bounds
        self._runtime, self._precision, self._max_batch_size = runtime, precision, max_batch_size
        self._collection, self._calibration = collection, Calibration((), ())
        self._crop = MaskCrop.from_recipe(adapter.metadata.recipe, base.preprocess["mean"])
        self._attached: Adapters | None = None
        self.size = base.image_size
        self.embed_dim = int(base.config["embed_dim"])
        self.grid = 0 if way is None else int(check_dense(base.model, way).grid_size[0])
        dynamic = is_causal(base.model)
        self.dims = {
            "image": [self.size, self.size, 3],
            "tokens": [-1 if dynamic else base.tokenizer.context_length],  # type: ignore[attr-defined]
            "image_embeds": [self.embed_dim],
            "patch_embeds": [self.grid, self.grid, self.embed_dim],
            "text_embeds": [self.embed_dim],
        }
        self._dynamic = dynamic

    def write(
        self,
        version: int,
        alpha: float,
        checkpoints: Merged,
        name: str,
        repository: Repository,
        judged_by: Validation | None,
        say: Callable[[str], None],
    ) -> Release:
        """Write one release into the temporary folders."""
        say(f"folding at alpha {alpha:g}")
        folded = fold(self._weights, self._adapter, alpha)
        checkpoints.add(name, self._base, folded)
        with disk_errors(repository.folder):
            for model in repository.models:
                repository.staged(model, version).mkdir()
            tokenizer, spec = self._write_tokenizers(repository, version)
            say(f"torch's embeddings at alpha {alpha:g}, adapters attached")
            inputs = Inputs(self._base, tokenizer, self.size)
            references = self._references(inputs, alpha)
            if self._collection is not None and not self._calibration.images:
                self._calibration = self._calibrate(self._collection, tokenizer)
            exported, sets = [], {}
            for graph in self._graphs:
                say(f"writing and checking {graph.name} at alpha {alpha:g}")
                start = time.perf_counter()
                path = repository.staged(graph.name, version) / "model.onnx"
                size = graph.save(folded, path)
                if self._precision == "int8":
                    size = quantize(path, self._calibration.of(graph.name))
                encoder = Encoder(path, self._runtime, precision=self._precision)
                samples = Samples(inputs.of(graph.name), references.embeds[graph.name])
                samples.save(path.parent)
                agreement = compare(
                    f"{graph.name} in {self._precision}", encoder, samples, *dataclasses.astuple(self._bounds)
                )
                exported.append(Exported(graph.name, size, agreement, time.perf_counter() - start))
                if graph.name == "text_encoder":
                    folders = [repository.staged(model, version) for model in LABELLED]
                    sets = self._write_label_sets(folders, encoder, tokenizer, say)
                del encoder
            facts = self._facts(version, alpha, folded, spec, sets, exported)
            for model in TASKS:
                repository.add_model_file(model, version)
            _write_facts(repository, facts)
            accuracy = None
            if judged_by is not None:
                with repository.view(version) as view:
                    accuracy = judged_by(self._base, alpha, view, self._templates, self._crop, say)
                facts["accuracy"] = asdict(accuracy)
                _write_facts(repository, facts)
        checkpoints.add_release(name, facts)
        return Release(facts, exported, checkpoints.folder / name, accuracy)

    def _calibrate(self, collection: Collection, tokenizer: Tokenizer) -> Calibration:
        """Images of the collection; prompts of label sets, and texts that agreement is not checked with."""
        images = calibration_images(collection, Preprocess.from_dict(self._base.preprocess))
        prompts = [
            template.replace("{}", name)
            for labels in self._labels.values()
            for label in labels
            for name in split_label(label)
            for template in self._templates
        ]
        texts = [tokenizer(prompts[start : start + 64]) for start in range(0, len(prompts), 64)]
        return Calibration(images, [*Inputs(self._base, tokenizer, self.size, seed=1).tokens, *texts])

    def _references(self, inputs: Inputs, alpha: float) -> References:
        if self._attached is None:
            self._attached = attach_adapter(self._base.model, self._adapter, alpha)
        self._attached.alpha = alpha
        return References(self._base, inputs, self._way)

    def _write_tokenizers(self, repository: Repository, version: int) -> tuple[Tokenizer, dict[str, Any]]:
        path, *others = (repository.staged(model, version) / "tokenizer.json" for model in TOKENIZED)
        spec = write_tokenizer(self._base.tokenizer, path, dynamic_length=self._dynamic)
        for other in others:
            shutil.copyfile(path, other)
        return Tokenizer.load(path, spec), spec

    def _write_label_sets(
        self, folders: Sequence[Path], encoder: Encoder, tokenizer: Tokenizer, say: Callable[[str], None]
    ) -> dict[str, Any]:
        embed = LabelEmbedder(tokenizer, encoder, max_batch_size=self._max_batch_size)
        sets = folders[0] / "label_sets"
        sets.mkdir()
        facts = {}
        for name, labels in self._labels.items():
            say(f"embedding label set {name}: {len(labels)} labels")
            path = sets / f"{name}.npz"
            embed(labels, self._templates).save(path)
            digest = f"sha256:{sha256(path.read_bytes()).hexdigest()}"
            facts[name] = {"labels": len(labels), "templates": self._templates, "digest": digest}
        for folder in folders[1:]:
            shutil.copytree(sets, folder / sets.name)
        return facts

    def _facts(
        self,
        version: int,
        alpha: float,
        folded: Mapping[str, Tensor],
        tokenizer: Mapping[str, Any],
        label_sets: Mapping[str, Any],
        exported: Sequence[Exported],
    ) -> dict[str, Any]:
        preprocess, meta = self._base.preprocess, self._adapter.metadata
        quantization = {}
        if self._precision == "int8":
            kind = {"kind": "dynamic"} if self._collection is None else {"kind": "static", **self._calibration.facts()}
            quantization = {"quantization": kind}
        bias = folded.get("logit_bias")
        return {
            "format": FORMAT,
            "version": version,
            "alpha": alpha,
            "architecture": self._base.name,
            "base_digest": meta.base_digest,
            "adapter_digest": self._adapter.digest,
            "precision": self._precision,
            **quantization,
            "runtime": self._runtime,
            "preprocess": {
                "size": self.size,
                **{key: preprocess[key] for key in ("mode", "interpolation", "resize_mode", "fill_color")},
                **{key: [float(value) for value in preprocess[key]] for key in ("mean", "std")},
            },
            "tokenizer": dict(tokenizer),
            "embed_dim": self.embed_dim,
            "dense": None if self._way is None else {"way": self._way, "grid": self.grid},
            "crop": self._crop.to_dict(),
            "logit_scale": float(folded["logit_scale"].float().exp()),
            "logit_bias": None if bias is None else float(bias),
            "templates": self._templates,
            "label_sets": dict(label_sets),
            "max_batch_size": self._max_batch_size,
            "tools": {name.removesuffix("_torch"): importlib.metadata.version(name) for name in _TOOLS},
            "agreement": {
                **{graph.name: asdict(graph.agreement) for graph in exported},
                "batches": list(BATCHES),
                "tolerance": self._bounds.max_error,
            },
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


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


def _write_facts(repository: Repository, facts: Mapping[str, Any]) -> None:
    for model in TASKS:
        path = repository.staged(model, facts["version"]) / "release.json"
        path.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _read_labels(name: str, path: str | Path) -> list[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise RAdapterError(f"label set {name!r}: allowed in a name are letters, digits, and _ . - after the first")
    labels = read_label_file(path)
    try:
        check_labels(labels)
    except TaskError as error:
        raise RAdapterError(f"{path}: {error.message}") from error
    return labels
