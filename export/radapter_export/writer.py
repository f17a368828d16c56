"""The writing of releases: fold, graphs with weights, their check against torch, and all other files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from radapter_export.accuracy import Accuracy, Validation
from radapter_export.agreement import BATCHES, Inputs, mixed_alphas, references_at
from radapter_export.files import disk_errors
from radapter_export.graph import Graph
from radapter_export.merged import Merged
from radapter_export.quantization import PROMPTS, Calibration, calibration_images, quantize, spread
from radapter_export.repository import TASKS, Repository
from radapter_export.settings import ExportSettings
from radapter_export.source import Source
from radapter_export.tokenizer import write_tokenizer
from radapter_serve.adapter import Adapters, attach_adapter, fold
from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import check_dense
from radapter_serve.clip.towers import is_causal
from radapter_serve.index.collection import Collection
from radapter_serve.inputs.alpha import at
from radapter_serve.inputs.labels import LabelEmbedder, split_label
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.inputs.preprocess import Preprocess
from radapter_serve.inputs.probabilities import SAME, indistinguishable
from radapter_serve.inputs.tokenizer import Tokenizer
from radapter_serve.release.agreement import Agreement, Samples, compare
from radapter_serve.release.repository import RUNTIMES
from radapter_serve.runtimes.encoder import Encoder
from radapter_serve.runtimes.tensorrt.plan_writer import PlanWriter

FORMAT = 1
TOKENIZED = ("embed_text", "segment", "classify")
LABELLED = ("segment", "classify")
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "radapter-serve")


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
        warnings: what a user should know, a line each.
    """

    facts: dict[str, Any]
    graphs: list[Exported]
    merged: Path
    accuracy: Accuracy | None
    warnings: list[str]

    @property
    def version(self) -> int:
        """Number of the release in its model repository."""
        return int(self.facts["version"])

    @property
    def alpha(self) -> float:
        """The re-scaling that was folded, or the default where requests may bring their own."""
        return float(self.facts["alpha"])


class Writer:
    """Writes the releases of one call.

    Args:
        base: of the adapter; adapters are attached to its model.
        source: what is exported.
        graphs: of the encoders, without weights.
        settings: of the call.
        engines: writes those of TensorRT, where it is the runtime.
        collection: images by which the ranges of int8 are found; None if they are not fixed.
    """

    def __init__(
        self,
        base: Base,
        source: Source,
        graphs: Sequence[Graph],
        settings: ExportSettings,
        engines: PlanWriter | None = None,
        collection: Collection | None = None,
    ) -> None:
        self._base, self._source, self._graphs, self._settings = base, source, graphs, settings
        self._engines, self._collection = engines, collection
        self._state = dict(base.model.state_dict())  # before adapters are attached
        self._attached: Adapters | None = None
        self._calibration = Calibration((), ())
        self._crop = MaskCrop.from_recipe(source.adapter.metadata.recipe, base.preprocess["mean"])
        self._size, self._width = base.image_size, int(base.config["embed_dim"])
        self._grid = 0 if source.way is None else int(check_dense(base.model, source.way).grid_size[0])
        self._dynamic_length = is_causal(base.model)

    @property
    def dims(self) -> dict[str, list[int]]:
        """Shapes of the encoders' tensors, without the batch."""
        length: int = self._base.tokenizer.context_length  # type: ignore[attr-defined]
        return {
            "image": [self._size, self._size, 3],
            "tokens": [-1 if self._dynamic_length else length],
            "image_embeds": [self._width],
            "patch_embeds": [self._grid, self._grid, self._width],
            "text_embeds": [self._width],
        }

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
        source = self._source
        say(f"folding at alpha {alpha:g}")
        folded = fold(self._state, source.adapter, alpha)
        weights = {**self._state, **source.adapter.tensors} if source.dynamic_alpha else folded
        checkpoints.add(name, self._base, folded)
        with disk_errors(repository.folder):
            for model in repository.models:
                repository.staged(model, version).mkdir()
            tokenizer, spec = self._write_tokenizers(repository, version)
            say(f"torch's embeddings at alpha {alpha:g}{' and others' * source.dynamic_alpha}, adapters attached")
            samples = self._samples(alpha, tokenizer)
            if self._collection is not None and not self._calibration.images:
                self._calibration = self._calibrate(self._collection, tokenizer)
            exported = []
            for graph in self._graphs:
                say(f"writing and checking {graph.name} at alpha {alpha:g}")
                start = time.perf_counter()
                folder = repository.staged(graph.name, version)
                samples[graph.name].save(folder)
                size = self._write_graph(graph, weights, folder, int(spec["context_length"]))
                agreement = compare(
                    f"{graph.name} in {self._settings.precision}",
                    self._encoder(folder),
                    samples[graph.name],
                    self._settings.bounds,
                )
                exported.append(Exported(graph.name, size, agreement, time.perf_counter() - start))
            sets, warnings = self._write_label_sets(repository, version, alpha, tokenizer, say)
            facts = self._facts(version, alpha, folded, spec, sets, exported)
            for model in TASKS:
                repository.add_model_file(model, version)
            _write_facts(repository, facts)
            accuracy = None
            if judged_by is not None:
                self._at(alpha)
                with repository.view(version) as view:
                    accuracy = judged_by(self._base, alpha, view, source.templates, self._crop, say)
                facts["accuracy"] = asdict(accuracy)
                _write_facts(repository, facts)
        checkpoints.add_release(name, facts)
        return Release(facts, exported, checkpoints.folder / name, accuracy, warnings)

    def _samples(self, alpha: float, tokenizer: Tokenizer) -> dict[str, Samples]:
        """Inputs of each graph, and torch's embeddings of them with adapters attached."""
        dynamic = self._source.dynamic_alpha
        inputs = Inputs(self._base, tokenizer, self._size)
        alphas = mixed_alphas(alpha) if dynamic else [np.full((batch, 1), alpha) for batch in BATCHES]
        references = references_at(self._base, self._at(alpha), alphas, inputs, self._source.way)
        return {name: Samples(inputs.of(name), found, alphas if dynamic else ()) for name, found in references.items()}

    def _write_graph(self, graph: Graph, weights: Mapping[str, Tensor], folder: Path, max_length: int) -> int:
        """Write a graph with its weights, and what the runtime makes of it; gives the size in bytes."""
        path = folder / "model.onnx"
        size = graph.save(weights, path)
        if self._settings.precision == "int8":
            size = quantize(path, self._calibration.of(graph.name))
        if self._engines is None:
            return size
        built = self._engines.write(
            graph.name,
            folder,
            max_batch_size=self._settings.max_batch_size,
            max_length=max_length,
            bounds=self._settings.bounds,
        )
        return built.size

    def _encoder(self, folder: Path) -> Encoder:
        """A graph as it is served."""
        runtime = self._settings.served_by
        return Encoder(folder / RUNTIMES[runtime].file, runtime, precision=self._settings.precision)

    def _at(self, alpha: float) -> Adapters:
        """The adapters, attached and set to this α."""
        if self._attached is None:
            self._attached = attach_adapter(self._base.model, self._source.adapter, alpha)
        self._attached.alpha = alpha
        return self._attached

    def _calibrate(self, collection: Collection, tokenizer: Tokenizer) -> Calibration:
        """Images of the collection; some prompts of label sets, and texts that agreement is not checked with."""
        turns = {"exif_orientation": self._source.exif_orientation}
        images = calibration_images(collection, Preprocess.from_dict({**self._base.preprocess, **turns}))
        prompts = [
            template.replace("{}", name)
            for labels in self._source.label_sets.values()
            for label in labels
            for name in split_label(label)
            for template in self._source.templates
        ]
        some = spread(prompts, PROMPTS)
        texts = [tokenizer(some[start : start + 64]) for start in range(0, len(some), 64)]
        return Calibration(images, [*Inputs(self._base, tokenizer, self._size, seed=1).tokens, *texts])

    def _write_tokenizers(self, repository: Repository, version: int) -> tuple[Tokenizer, dict[str, Any]]:
        path, *others = (repository.staged(model, version) / "tokenizer.json" for model in TOKENIZED)
        spec = write_tokenizer(self._base.tokenizer, path, dynamic_length=self._dynamic_length)
        for other in others:
            shutil.copyfile(path, other)
        return Tokenizer.load(path, spec), spec

    def _write_label_sets(
        self, repository: Repository, version: int, alpha: float, tokenizer: Tokenizer, say: Callable[[str], None]
    ) -> tuple[dict[str, Any], list[str]]:
        """Their facts by name, and a warning for each that has labels which can't be told apart."""
        folder, *others = (repository.staged(model, version) / "label_sets" for model in LABELLED)
        folder.mkdir()
        encoder = self._encoder(repository.staged("text_encoder", version))
        own, templates = alpha if self._source.dynamic_alpha else None, self._source.templates
        embed = LabelEmbedder(tokenizer, at(encoder, own), max_batch_size=self._settings.max_batch_size)
        facts, warnings = {}, []
        for name, labels in self._source.label_sets.items():
            say(f"embedding label set {name}: {len(labels)} labels")
            path, found = folder / f"{name}.npz", embed(labels, templates)
            found.save(path)
            digest = f"sha256:{sha256(path.read_bytes()).hexdigest()}"
            facts[name] = {"labels": len(labels), "templates": templates, "digest": digest}
            if alike := indistinguishable(found.labels, found.embeds):
                pairs = "; ".join(f"{one!r} and {other!r}" for one, other in alike[:10])
                more = f"; and {len(alike) - 10} more pairs" if len(alike) > 10 else ""
                warnings.append(
                    f"label set {name} has labels that the text tower can't tell apart (cosine above {SAME}), so that "
                    f"an image scores them alike: {pairs}{more}; name them by other words"
                )
        for other in others:
            shutil.copytree(folder, other)
        return facts, warnings

    def _facts(
        self,
        version: int,
        alpha: float,
        folded: Mapping[str, Tensor],
        tokenizer: Mapping[str, Any],
        label_sets: Mapping[str, Any],
        exported: Sequence[Exported],
    ) -> dict[str, Any]:
        preprocess, meta = self._base.preprocess, self._source.adapter.metadata
        quantization = {}
        if self._settings.precision == "int8":
            kind = {"kind": "dynamic"} if self._collection is None else {"kind": "static", **self._calibration.facts()}
            quantization = {"quantization": kind}
        bias = folded.get("logit_bias")
        return {
            "format": FORMAT,
            "version": version,
            "alpha": alpha,
            "dynamic_alpha": self._source.dynamic_alpha,
            "architecture": self._base.name,
            "base_digest": meta.base_digest,
            "adapter_digest": self._source.adapter.digest,
            "adapters": self._source.adapters,
            "precision": self._settings.precision,
            **quantization,
            "runtime": self._settings.served_by,
            "preprocess": {
                "size": self._size,
                **{key: preprocess[key] for key in ("mode", "interpolation", "resize_mode", "fill_color")},
                **{key: [float(value) for value in preprocess[key]] for key in ("mean", "std")},
                "exif_orientation": self._source.exif_orientation,
            },
            "tokenizer": dict(tokenizer),
            "embed_dim": self._width,
            "dense": None if self._source.way is None else {"way": self._source.way, "grid": self._grid},
            "crop": self._crop.to_dict(),
            "logit_scale": float(folded["logit_scale"].float().exp()),
            "logit_bias": None if bias is None else float(bias),
            "templates": self._source.templates,
            "label_sets": dict(label_sets),
            "max_batch_size": self._settings.max_batch_size,
            "tools": {
                name.removesuffix("_torch"): importlib.metadata.version(name)
                for name in (*_TOOLS, *(["openvino"] if self._settings.served_by == "openvino" else []))
            }
            | {"onnxruntime": onnxruntime.__version__},  # installed as onnxruntime or onnxruntime-gpu
            "agreement": {
                **{graph.name: asdict(graph.agreement) for graph in exported},
                "batches": list(BATCHES),
                "tolerance": self._settings.bounds.max_error,
                "min_cosine": self._settings.bounds.min_cosine,
            },
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def _write_facts(repository: Repository, facts: Mapping[str, Any]) -> None:
    for model in TASKS:
        path = repository.staged(model, facts["version"]) / "release.json"
        path.write_text(json.dumps(facts, indent=2), encoding="utf-8")
