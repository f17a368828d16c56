"""The writing of releases: what all of one call share, and the files of each."""

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
from radapter_export.tokenizer import write_tokenizer
from radapter_serve.adapter import Adapter, Adapters, attach_adapter, fold
from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import check_dense
from radapter_serve.clip.towers import is_causal
from radapter_serve.index.collection import Collection
from radapter_serve.inputs.alpha import Encode, at
from radapter_serve.inputs.labels import LabelEmbedder, split_label
from radapter_serve.inputs.mask_crop import MaskCrop
from radapter_serve.inputs.preprocess import Preprocess
from radapter_serve.inputs.tokenizer import Tokenizer
from radapter_serve.release.agreement import Agreement, Samples, Tolerance, compare
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
        """The re-scaling that was folded, or the default where requests may bring their own."""
        return float(self.facts["alpha"])


@dataclass
class Writer:
    """What all releases of one call share, and the writing of each.

    Args:
        base: of the adapter; adapters are attached to its model.
        adapter: to be folded, or to stand beside its layers.
        adapters: digest and weight of each that it is the average of.
        dial: whether α is an input of the graphs.
        graphs: of the encoders, without weights.
        way: how patches are embedded; None if they are not.
        templates: prompt templates.
        labels: of each label set, by name.
        runtime: of the encoders.
        engines: writes those of TensorRT, where it is the runtime.
        precision: of the encoders.
        collection: images by which the ranges of int8 are found; None if they are not fixed.
        bounds: of the difference from torch.
        max_batch_size: rows that the server puts into one batch.
    """

    base: Base
    adapter: Adapter
    adapters: list[dict[str, Any]]
    dial: bool
    graphs: Sequence[Graph]
    way: str | None
    templates: list[str]
    labels: Mapping[str, list[str]]
    runtime: str
    engines: PlanWriter | None
    precision: str
    collection: Collection | None
    bounds: Tolerance
    max_batch_size: int

    def __post_init__(self) -> None:
        self._state = dict(self.base.model.state_dict())  # before adapters are attached
        self._attached: Adapters | None = None
        self._calibration = Calibration((), ())
        self._crop = MaskCrop.from_recipe(self.adapter.metadata.recipe, self.base.preprocess["mean"])
        self._size, self._width = self.base.image_size, int(self.base.config["embed_dim"])
        self._grid = 0 if self.way is None else int(check_dense(self.base.model, self.way).grid_size[0])
        self._dynamic_length = is_causal(self.base.model)

    @property
    def dims(self) -> dict[str, list[int]]:
        """Shapes of the encoders' tensors, without the batch."""
        length: int = self.base.tokenizer.context_length  # type: ignore[attr-defined]
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
        say(f"folding at alpha {alpha:g}")
        folded = fold(self._state, self.adapter, alpha)
        weights = {**self._state, **self.adapter.tensors} if self.dial else folded
        own = alpha if self.dial else None
        checkpoints.add(name, self.base, folded)
        with disk_errors(repository.folder):
            for model in repository.models:
                repository.staged(model, version).mkdir()
            tokenizer, spec = self._write_tokenizers(repository, version)
            say(f"torch's embeddings at alpha {alpha:g}{' and others' * self.dial}, adapters attached")
            inputs = Inputs(self.base, tokenizer, self._size)
            alphas = mixed_alphas(alpha) if self.dial else [np.full((batch, 1), alpha) for batch in BATCHES]
            references = references_at(self.base, self._at(alpha), alphas, inputs, self.way)
            if self.collection is not None and not self._calibration.images:
                self._calibration = self._calibrate(self.collection, tokenizer)
            exported, sets = [], {}
            for graph in self.graphs:
                say(f"writing and checking {graph.name} at alpha {alpha:g}")
                start = time.perf_counter()
                path = repository.staged(graph.name, version) / "model.onnx"
                size = graph.save(weights, path)
                if self.precision == "int8":
                    size = quantize(path, self._calibration.of(graph.name))
                samples = Samples(inputs.of(graph.name), references[graph.name], alphas if self.dial else ())
                samples.save(path.parent)
                if self.engines is not None:
                    size = self.engines.write(
                        graph.name,
                        path.parent,
                        max_batch_size=self.max_batch_size,
                        max_length=int(spec["context_length"]),
                        bounds=self.bounds,
                        donors=repository.folder / graph.name,
                    ).size
                served = path.with_name(RUNTIMES[self.runtime].file)
                encoder = Encoder(served, self.runtime, precision=self.precision)
                agreement = compare(f"{graph.name} in {self.precision}", encoder, samples, self.bounds)
                exported.append(Exported(graph.name, size, agreement, time.perf_counter() - start))
                if graph.name == "text_encoder":
                    folders = [repository.staged(model, version) for model in LABELLED]
                    sets = self._write_label_sets(folders, at(encoder, own), tokenizer, say)
                del encoder
            facts = self._facts(version, alpha, folded, spec, sets, exported)
            for model in TASKS:
                repository.add_model_file(model, version)
            _write_facts(repository, facts)
            accuracy = None
            if judged_by is not None:
                self._at(alpha)
                with repository.view(version) as view:
                    accuracy = judged_by(self.base, alpha, view, self.templates, self._crop, say)
                facts["accuracy"] = asdict(accuracy)
                _write_facts(repository, facts)
        checkpoints.add_release(name, facts)
        return Release(facts, exported, checkpoints.folder / name, accuracy)

    def _at(self, alpha: float) -> Adapters:
        """The adapters, attached and set to this α."""
        if self._attached is None:
            self._attached = attach_adapter(self.base.model, self.adapter, alpha)
        self._attached.alpha = alpha
        return self._attached

    def _calibrate(self, collection: Collection, tokenizer: Tokenizer) -> Calibration:
        """Images of the collection; some prompts of label sets, and texts that agreement is not checked with."""
        images = calibration_images(collection, Preprocess.from_dict(self.base.preprocess))
        prompts = [
            template.replace("{}", name)
            for labels in self.labels.values()
            for label in labels
            for name in split_label(label)
            for template in self.templates
        ]
        some = spread(prompts, PROMPTS)
        texts = [tokenizer(some[start : start + 64]) for start in range(0, len(some), 64)]
        return Calibration(images, [*Inputs(self.base, tokenizer, self._size, seed=1).tokens, *texts])

    def _write_tokenizers(self, repository: Repository, version: int) -> tuple[Tokenizer, dict[str, Any]]:
        path, *others = (repository.staged(model, version) / "tokenizer.json" for model in TOKENIZED)
        spec = write_tokenizer(self.base.tokenizer, path, dynamic_length=self._dynamic_length)
        for other in others:
            shutil.copyfile(path, other)
        return Tokenizer.load(path, spec), spec

    def _write_label_sets(
        self, folders: Sequence[Path], encode: Encode, tokenizer: Tokenizer, say: Callable[[str], None]
    ) -> dict[str, Any]:
        embed = LabelEmbedder(tokenizer, encode, max_batch_size=self.max_batch_size)
        sets = folders[0] / "label_sets"
        sets.mkdir()
        facts = {}
        for name, labels in self.labels.items():
            say(f"embedding label set {name}: {len(labels)} labels")
            path = sets / f"{name}.npz"
            embed(labels, self.templates).save(path)
            digest = f"sha256:{sha256(path.read_bytes()).hexdigest()}"
            facts[name] = {"labels": len(labels), "templates": self.templates, "digest": digest}
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
        preprocess, meta = self.base.preprocess, self.adapter.metadata
        quantization = {}
        if self.precision == "int8":
            kind = {"kind": "dynamic"} if self.collection is None else {"kind": "static", **self._calibration.facts()}
            quantization = {"quantization": kind}
        bias = folded.get("logit_bias")
        return {
            "format": FORMAT,
            "version": version,
            "alpha": alpha,
            "dynamic_alpha": self.dial,
            "architecture": self.base.name,
            "base_digest": meta.base_digest,
            "adapter_digest": self.adapter.digest,
            "adapters": self.adapters,
            "precision": self.precision,
            **quantization,
            "runtime": self.runtime,
            "preprocess": {
                "size": self._size,
                **{key: preprocess[key] for key in ("mode", "interpolation", "resize_mode", "fill_color")},
                **{key: [float(value) for value in preprocess[key]] for key in ("mean", "std")},
            },
            "tokenizer": dict(tokenizer),
            "embed_dim": self._width,
            "dense": None if self.way is None else {"way": self.way, "grid": self._grid},
            "crop": self._crop.to_dict(),
            "logit_scale": float(folded["logit_scale"].float().exp()),
            "logit_bias": None if bias is None else float(bias),
            "templates": self.templates,
            "label_sets": dict(label_sets),
            "max_batch_size": self.max_batch_size,
            "tools": {
                name.removesuffix("_torch"): importlib.metadata.version(name)
                for name in (*_TOOLS, *(["openvino"] if self.runtime == "openvino" else []))
            }
            | {"onnxruntime": onnxruntime.__version__},  # installed as onnxruntime or onnxruntime-gpu
            "agreement": {
                **{graph.name: asdict(graph.agreement) for graph in exported},
                "batches": list(BATCHES),
                "tolerance": self.bounds.max_error,
                "min_cosine": self.bounds.min_cosine,
            },
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


def _write_facts(repository: Repository, facts: Mapping[str, Any]) -> None:
    for model in TASKS:
        path = repository.staged(model, facts["version"]) / "release.json"
        path.write_text(json.dumps(facts, indent=2), encoding="utf-8")
