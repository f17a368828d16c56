"""The writing of releases: fold, graphs with weights, their check against torch, and all other
files.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from radapter_export.accuracy import Validation
from radapter_export.exported import Exported, ExportedRelease
from radapter_export.files import disk_errors
from radapter_export.forms import Forms
from radapter_export.graph import Graph
from radapter_export.merged import Merged
from radapter_export.quantization import PROMPTS, Calibration, calibration_images, quantize
from radapter_export.references import BATCHES, Inputs, mixed_alphas, references_at
from radapter_export.repository import Repository
from radapter_export.settings import ExportSettings
from radapter_export.source import Source
from radapter_export.tokenizer import write_tokenizer
from radapter_serve.adapter import Adapters, attach_adapter, fold
from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import check_dense
from radapter_serve.clip.towers import is_causal
from radapter_serve.contract.alpha import Encode, at
from radapter_serve.contract.image_files import spread
from radapter_serve.contract.labels import split_label
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.contract.probabilities import SAME, indistinguishable
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.files import digest_of
from radapter_serve.index.collection import Collection
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.release import Release
from radapter_serve.release.repository import RUNTIMES, TASKS
from radapter_serve.runtimes.encoder import Encoder
from radapter_serve.runtimes.tensorrt.plan_writer import PlanWriter
from radapter_serve.tasks.label_embeddings import LabelEmbedder

TOKENIZED = ("embed_text", "segment", "classify")
LABELLED = ("segment", "classify")
UNFITTED = (
    "this release of a SigLIP refuses multi_label: training leaves the sigmoid's own scale and bias"
    " behind; export with --validation DATA to fit them again"
)
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "radapter-serve")


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
        self._crop = source.adapter.metadata.source.mask_crop(base.preprocess["mean"])
        self._size, self._width = base.image_size, int(base.config["embed_dim"])
        self._grid = (
            0 if source.way is None else int(check_dense(base.model, source.way).grid_size[0])
        )
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
        forms: Forms,
        name: str,
        repository: Repository,
        validation: Validation | None,
        say: Callable[[str], None],
    ) -> ExportedRelease:
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
            say(
                f"torch's embeddings at alpha {alpha:g}{' and others' * source.dynamic_alpha},"
                " adapters attached"
            )
            samples = self._samples(alpha, tokenizer, dynamic=source.dynamic_alpha)
            if self._collection is not None and not self._calibration.images:
                self._calibration = self._calibrate(self._collection, tokenizer)
            exported = []
            for graph in self._graphs:
                say(f"writing and checking {graph.name} at alpha {alpha:g}")
                start = time.perf_counter()
                folder = repository.staged(graph.name, version)
                samples[graph.name].save(folder)
                size = self._write_graph(graph, weights, folder, int(spec["context_length"]))
                encoder = self._encoder(folder)
                named = f"{graph.name} in {self._settings.precision}"
                agreement = compare(named, encoder, samples[graph.name], self._settings.bounds)
                exported.append(Exported(graph.name, size, agreement, time.perf_counter() - start))
            folders = [repository.staged(model, version) / "label_sets" for model in LABELLED]
            others = (
                forms.write(
                    name, alpha, folded, self._samples_alone(alpha, samples, tokenizer), say
                )
                if forms
                else []
            )
            encode = at(
                encoder, alpha if source.dynamic_alpha else None
            )  # of texts, which come last
            sets, warnings = self._write_label_sets(folders, encode, tokenizer, say)
            release = self._release(version, alpha, folded, spec, sets, exported)
            for model in TASKS:
                repository.add_model_file(model, version)
                release.save(repository.staged(model, version))
            accuracy = None
            if validation is not None:
                self._at(alpha)
                with repository.view(version) as view:
                    measured = validation(
                        self._base, alpha, view, source.templates, self._crop, say
                    )
                accuracy, warnings = measured.accuracy, [*warnings, *measured.warnings]
                fitted = None if measured.confidence is None else asdict(measured.confidence)
                release = replace(release, accuracy=asdict(accuracy), confidence=fitted)
                for model in TASKS:
                    release.save(repository.staged(model, version))
        if release.logit_bias is not None and release.confidence is None:
            warnings = [*warnings, UNFITTED]
        checkpoints.add_release(name, release)
        forms.add_release(name, release)
        return ExportedRelease(
            release, exported, checkpoints.folder / name, accuracy, warnings, others
        )

    def _samples(self, alpha: float, tokenizer: Tokenizer, *, dynamic: bool) -> dict[str, Samples]:
        """Inputs of each graph, and torch's embeddings of them with adapters attached."""
        inputs = Inputs(self._base, tokenizer, self._size)
        alphas = (
            mixed_alphas(alpha) if dynamic else [np.full((batch, 1), alpha) for batch in BATCHES]
        )
        references = references_at(self._base, self._at(alpha), alphas, inputs, self._source.way)
        return {
            name: Samples(inputs.of(name), found, alphas if dynamic else ())
            for name, found in references.items()
        }

    def _samples_alone(
        self, alpha: float, samples: dict[str, Samples], tokenizer: Tokenizer
    ) -> dict[str, Samples]:
        """The same for weights that are folded at one α."""
        return (
            self._samples(alpha, tokenizer, dynamic=False)
            if self._source.dynamic_alpha
            else samples
        )

    def _write_graph(
        self, graph: Graph, weights: Mapping[str, Tensor], folder: Path, max_length: int
    ) -> int:
        """Write a graph with its weights, and what the runtime makes of it; gives the size in
        bytes.
        """
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
        """Images of the collection; some prompts of label sets, and texts that agreement is not
        checked with.
        """
        turns = {"exif_orientation": self._source.exif_orientation}
        images = calibration_images(
            collection, Preprocess.from_dict({**self._base.preprocess, **turns})
        )
        prompts = [
            template.replace("{}", name)
            for labels in self._source.label_sets.values()
            for label in labels
            for name in split_label(label)
            for template in self._source.templates
        ]
        some = spread(prompts, PROMPTS)
        texts = [tokenizer(some[start : start + 64]) for start in range(0, len(some), 64)]
        return Calibration(
            images, [*Inputs(self._base, tokenizer, self._size, seed=1).tokens, *texts]
        )

    def _write_tokenizers(
        self, repository: Repository, version: int
    ) -> tuple[Tokenizer, dict[str, Any]]:
        path, *others = (
            repository.staged(model, version) / "tokenizer.json" for model in TOKENIZED
        )
        spec = write_tokenizer(self._base.tokenizer, path, dynamic_length=self._dynamic_length)
        for other in others:
            shutil.copyfile(path, other)
        return Tokenizer.load(path, spec), spec

    def _write_label_sets(
        self,
        folders: Sequence[Path],
        encode: Encode,
        tokenizer: Tokenizer,
        say: Callable[[str], None],
    ) -> tuple[dict[str, Any], list[str]]:
        """Their facts by name, and a warning for each that has labels which can't be told apart."""
        folder, templates = folders[0], self._source.templates
        folder.mkdir()
        embed = LabelEmbedder(tokenizer, encode, max_batch_size=self._settings.max_batch_size)
        facts, warnings = {}, []
        for name, labels in self._source.label_sets.items():
            line = f"embedding label set {name}: {{}} of {len(labels)} labels"
            say(line.format(0))
            path = folder / f"{name}.npz"
            found = embed(
                labels,
                templates,
                progress=lambda done, line=line: say(line.format(done)),  # type: ignore[misc]
            )
            found.save(path)
            facts[name] = {"labels": len(labels), "templates": templates, "digest": digest_of(path)}
            if alike := indistinguishable(found.labels, found.embeds):
                pairs = "; ".join(f"{one!r} and {other!r}" for one, other in alike[:10])
                more = f"; and {len(alike) - 10} more pairs" if len(alike) > 10 else ""
                warnings.append(
                    f"label set {name} has labels that the text tower can't tell apart (cosine"
                    f" above {SAME}), so that an image scores them alike: {pairs}{more}; name them"
                    " by other words"
                )
        for other in folders[1:]:
            shutil.copytree(folder, other)
        return facts, warnings

    def _release(
        self,
        version: int,
        alpha: float,
        folded: Mapping[str, Tensor],
        tokenizer: dict[str, Any],
        label_sets: dict[str, Any],
        exported: Sequence[Exported],
    ) -> Release:
        base, source, settings = self._base, self._source, self._settings
        quantization = None
        if settings.precision == "int8":
            fixed = self._collection is not None
            quantization = (
                {"kind": "static", **self._calibration.facts()} if fixed else {"kind": "dynamic"}
            )
        bias = folded.get("logit_bias")
        tools = (*_TOOLS, *(["openvino"] if settings.served_by == "openvino" else []))
        return Release(
            version=version,
            alpha=alpha,
            dynamic_alpha=source.dynamic_alpha,
            architecture=base.name,
            base_digest=source.adapter.metadata.base_digest,
            adapter_digest=source.adapter.digest,
            adapters=source.adapters,
            precision=settings.precision,
            quantization=quantization,
            runtime=settings.served_by,
            preprocess={
                "size": self._size,
                **{
                    key: base.preprocess[key]
                    for key in ("mode", "interpolation", "resize_mode", "fill_color")
                },
                **{
                    key: [float(value) for value in base.preprocess[key]] for key in ("mean", "std")
                },
                "exif_orientation": source.exif_orientation,
            },
            tokenizer=tokenizer,
            embed_dim=self._width,
            dense=None if source.way is None else {"way": source.way, "grid": self._grid},
            crop=self._crop.to_dict(),
            logit_scale=float(folded["logit_scale"].float().exp()),
            logit_bias=None if bias is None else float(bias),
            templates=source.templates,
            label_sets=label_sets,
            max_batch_size=settings.max_batch_size,
            tools={name.removesuffix("_torch"): importlib.metadata.version(name) for name in tools}
            | {
                "onnxruntime": onnxruntime.__version__
            },  # installed as onnxruntime or onnxruntime-gpu
            agreement={
                **{graph.name: asdict(graph.agreement) for graph in exported},
                "batches": list(BATCHES),
                "tolerance": settings.bounds.max_error,
                "min_cosine": settings.bounds.min_cosine,
            },
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
