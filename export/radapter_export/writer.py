"""The writing of releases: fold, graphs with weights, their check against torch, and all other
files.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from radapter_export.accuracy import Measured, Validation
from radapter_export.calibration import Calibration
from radapter_export.card import card_of
from radapter_export.change import Change, Reference
from radapter_export.exported import Exported, ExportedRelease
from radapter_export.facts import dense_facts, preprocess_facts
from radapter_export.files import disk_errors
from radapter_export.forms import Forms
from radapter_export.graph import Graph
from radapter_export.merged import Merged
from radapter_export.quantization import quantize
from radapter_export.references import BATCHES, Inputs, mixed_alphas, references_at
from radapter_export.repository import Repository
from radapter_export.settings import ExportSettings
from radapter_export.source import Source
from radapter_export.tokenizer import ServedTokenizer
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import logit_scale_and_bias
from radapter_serve.contract.errors import TaskError
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.probabilities import SAME, indistinguishable
from radapter_serve.encoders.encoder import EncoderGraph, GraphEncoder
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import complete
from radapter_serve.encoders.tensorrt.plan_writer import PlanWriter
from radapter_serve.errors import RAdapterError
from radapter_serve.files import digest_of
from radapter_serve.release.agreement import Samples, compare
from radapter_serve.release.release import TASKS, Release
from radapter_serve.release.repository import RUNTIMES
from radapter_serve.tasks.classify import mix_examples
from radapter_serve.tasks.labels import embed_labels

TOKENIZED = ("embed_text", "segment", "classify")
LABELLED = ("segment", "classify")
UNFITTED = (
    "this release of a SigLIP refuses multi_label: training leaves the sigmoid's own scale and bias"
    " behind; export with --validation DATA to fit them again"
)
_TOOLS = ("torch", "open_clip_torch", "onnx", "onnxscript", "radapter-serve")


@dataclass(frozen=True)
class Outputs:
    """Where the releases of one call are written, until all of them are committed."""

    merged: Merged
    forms: Forms
    repository: Repository


@dataclass(frozen=True)
class LabelSets:
    """The label sets of one release.

    Attributes:
        facts: number of labels, templates and digest, by name.
        warnings: of each label set with labels that can't be told apart.
    """

    facts: dict[str, dict[str, Any]]
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes the releases of one call.

    Attributes:
        base: gives configuration, preprocessing and tokenizer.
        source: what is exported.
        change: what α scales.
        reference: the base's model with the change in it, at an α that can be set.
        graphs: of the encoders, without weights.
        settings: of the call.
        tokenizer: as it is served.
        outputs: where to write.
        validation: data that each release is evaluated on; None leaves that out.
        calibration: inputs by which the ranges of int8 are found; None if they are not fixed.
        engines: writes those of TensorRT, where it is the runtime.
        say: called with a line before each step.
    """

    base: Base
    source: Source
    change: Change
    reference: Reference
    graphs: Sequence[Graph]
    settings: ExportSettings
    tokenizer: ServedTokenizer
    outputs: Outputs
    validation: Validation | None
    calibration: Calibration | None
    engines: PlanWriter | None
    say: Callable[[str], None]

    def write(self, version: int, alpha: float, name: str) -> ExportedRelease:
        """Write one release into the temporary folders.

        Args:
            version: its number in the repository.
            alpha: re-scaling in [0, 1].
            name: of its subfolder among the merged checkpoints, "" for none.
        """
        merged = self.outputs.merged
        repository = self.outputs.repository
        self.say(f"folding at alpha {alpha:g}")
        folded = self.change.fold(alpha)
        merged.add(name, self.base, folded)
        with disk_errors(repository.folder):
            self._make_folders(version)
            samples = self._samples(alpha)
            graphs, encoders = self._write_graphs(version, alpha, folded, samples)
            others = self._write_forms(name, alpha, folded, samples)
            release = self._describe(version, alpha, folded, graphs)
            label_sets = self._write_label_sets(release, encoders)
            release = replace(release, label_sets=label_sets.facts)
            self._save(release)
            measured = self._measure(release)
            if measured is not None:
                release = measured.added_to(release)
                self._save(release)  # again: what was measured is the release as it is written
        card = self.card if self.settings.card else None
        merged.add_release(name, release, card)
        self.outputs.forms.add_release(name, release, card)
        warnings = [*label_sets.warnings, *(measured.warnings if measured else ())]
        if release.logit_bias is not None and release.confidence is None:
            warnings.append(UNFITTED)
        return ExportedRelease(
            release=release,
            graphs=graphs,
            merged=merged.folder / name,
            accuracy=None if measured is None else measured.accuracy,
            warnings=warnings,
            forms=others,
        )

    def card(self, release: Release, *, library: str, hub: str | None = None) -> str:
        """The text of a release's model card; see `card_of`."""
        return card_of(
            release,
            self.source.metadata,
            self.source.curve,
            library,
            hub,
            transformers=self.settings.transformers is not None,
        )

    @property
    def _width(self) -> int:
        return int(self.base.config["embed_dim"])

    @property
    def _crop(self) -> MaskCrop:
        return self.source.crop(self.base.preprocess["mean"])

    def _make_folders(self, version: int) -> None:
        """Make the version's folder in every model, with the tokenizer in those that need it."""
        repository = self.outputs.repository
        for model in repository.models:
            repository.staged(model, version).mkdir()
        for model in TOKENIZED:
            shutil.copyfile(
                self.tokenizer.path, repository.staged(model, version) / "tokenizer.json"
            )

    def _samples(self, alpha: float) -> dict[str, Samples]:
        """Inputs of each graph, and torch's embeddings of them."""
        dynamic = self.source.dynamic_alpha
        others = " and others" if dynamic else ""
        self.say(f"torch's embeddings at alpha {alpha:g}{others}, nothing folded")
        return self._samples_at(mixed_alphas(alpha) if dynamic else _one_alpha(alpha), dynamic)

    def _samples_at(self, alphas: Sequence[NDArray[Any]], dynamic: bool) -> dict[str, Samples]:
        inputs = Inputs(self.base, self.tokenizer.encode, self.base.image_size)
        references = references_at(self.base, self.reference, alphas, inputs, self.source.way)
        return {
            name: Samples(inputs.of(name), found, alphas if dynamic else ())
            for name, found in references.items()
        }

    def _write_graphs(
        self,
        version: int,
        alpha: float,
        folded: Mapping[str, Tensor],
        samples: Mapping[str, Samples],
    ) -> tuple[list[Exported], dict[str, EncoderGraph]]:
        """Write and check all graphs; also gives the encoders by name."""
        dynamic = self.source.dynamic_alpha
        weights = self.change.beside() if dynamic else folded
        exported = []
        encoders: dict[str, EncoderGraph] = {}
        for graph in self.graphs:
            self.say(f"writing and checking {graph.name} at alpha {alpha:g}")
            start = time.perf_counter()
            folder = self.outputs.repository.staged(graph.name, version)
            samples[graph.name].save(folder)
            size = self._write_graph(graph, weights, folder)
            encoder = self._encoder(folder)
            named = f"{graph.name} in {self.settings.precision}"
            agreement = compare(named, encoder, samples[graph.name], self.settings.bounds)
            exported.append(Exported(graph.name, size, agreement, time.perf_counter() - start))
            encoders[graph.name] = encoder
        return exported, encoders

    def _write_graph(self, graph: Graph, weights: Mapping[str, Tensor], folder: Path) -> int:
        """Write a graph with its weights, and what the runtime makes of it; gives the size in
        bytes.
        """
        path = folder / "model.onnx"
        size = graph.save(weights, path)
        if self.settings.precision == "int8":
            inputs = () if self.calibration is None else self.calibration.of(graph.name)
            size = quantize(path, inputs)
        if self.engines is None:
            return size
        built = self.engines.write(
            graph.name,
            folder,
            max_batch_size=self.settings.max_batch_size,
            max_length=int(self.tokenizer.spec["context_length"]),
            bounds=self.settings.bounds,
        )
        return built.size

    def _encoder(self, folder: Path) -> EncoderGraph:
        """A graph as it is served."""
        runtime = self.settings.served_by
        return EncoderGraph(
            folder / RUNTIMES[runtime].file, runtime, precision=self.settings.precision
        )

    def _write_forms(
        self,
        name: str,
        alpha: float,
        folded: Mapping[str, Tensor],
        samples: Mapping[str, Samples],
    ) -> list[Exported]:
        """Write and check the forms of the folded weights that other libraries open."""
        forms = self.outputs.forms
        if not forms:
            return []
        if self.source.dynamic_alpha:  # whose samples are of several α
            samples = self._samples_at(_one_alpha(alpha), dynamic=False)
        return forms.write(name, alpha, folded, samples, self.say)

    def _write_label_sets(
        self, release: Release, encoders: Mapping[str, EncoderGraph]
    ) -> LabelSets:
        """Embed the labels, and write them for each task that uses them."""
        repository = self.outputs.repository
        folders = [repository.staged(model, release.version) / "label_sets" for model in LABELLED]
        first, *others = folders
        first.mkdir()
        loaded = LoadedRelease(release, GraphEncoder(encoders), self.tokenizer.encode)
        alpha = loaded.request_alpha(None)
        templates = self.source.templates
        facts: dict[str, dict[str, Any]] = {}
        warnings = []
        for name, labels in self.source.label_sets.items():
            progress = self._labels_done(name, len(labels))
            found = complete(
                embed_labels(loaded, labels, templates, alpha=alpha, progress=progress)
            )
            shown = self.source.shown.get(name)
            if shown is not None:
                self.say(f"embedding the {len(shown.files)} examples of label set {name}")
                examples = shown.examples(loaded.preprocess)
                try:
                    mixed = complete(mix_examples(loaded, found, examples, alpha))
                except TaskError as error:
                    raise RAdapterError(error.message) from None
                # Where α is an input, servers mix them in again for other α.
                found = replace(mixed, examples=examples if release.dynamic_alpha else None)
            path = first / f"{name}.npz"
            found.save(path)
            facts[name] = {"labels": len(labels), "templates": templates, "digest": digest_of(path)}
            if shown is not None:
                facts[name]["examples"] = len(shown.files)
            if alike := indistinguishable(found.labels, found.embeds):
                warnings.append(_alike(name, alike))
        loaded.close()
        for other in others:
            shutil.copytree(first, other)
        return LabelSets(facts, warnings)

    def _labels_done(self, name: str, count: int) -> Callable[[int], None]:
        def say(done: int) -> None:
            self.say(f"embedding label set {name}: {done} of {count} labels")

        say(0)
        return say

    def _save(self, release: Release) -> None:
        """Write `release.json`, and the code of the models, into the release's folders."""
        repository = self.outputs.repository
        for model in TASKS:
            repository.add_model_file(model, release.version)
            release.save(repository.staged(model, release.version))

    def _measure(self, release: Release) -> Measured | None:
        """Evaluate the release on the validation data, as it would be served."""
        if self.validation is None:
            return None
        self.reference.alpha = release.alpha
        with self.outputs.repository.view(release.version) as view:
            return self.validation(
                self.base, release.alpha, view, self.source.templates, self._crop, self.say
            )

    def _describe(
        self,
        version: int,
        alpha: float,
        folded: Mapping[str, Tensor],
        exported: Sequence[Exported],
    ) -> Release:
        source = self.source
        settings = self.settings
        scale, bias = logit_scale_and_bias(folded)
        return Release(
            version=version,
            alpha=alpha,
            dynamic_alpha=source.dynamic_alpha,
            architecture=self.base.name,
            base_digest=self.change.base_digest,
            adapter_digest=self.change.digest,
            adapters=source.adapters,
            made_of=self.change.made_of,
            precision=settings.precision,
            quantization=self._quantization(),
            runtime=settings.served_by,
            preprocess=preprocess_facts(
                self.base,
                exif_orientation=source.exif_orientation,
            ),
            tokenizer=self.tokenizer.spec,
            embed_dim=self._width,
            dense=dense_facts(self.base, source.way),
            crop=self._crop.to_dict(),
            logit_scale=scale,
            logit_bias=bias,
            templates=source.templates,
            max_batch_size=settings.max_batch_size,
            tools=_versions(settings.served_by),
            agreement={
                **{graph.name: asdict(graph.agreement) for graph in exported},
                "batches": list(BATCHES),
                "tolerance": settings.bounds.max_error,
                "min_cosine": settings.bounds.min_cosine,
            },
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    def _quantization(self) -> dict[str, Any] | None:
        if self.settings.precision != "int8":
            return None
        if self.calibration is None:
            return {"kind": "dynamic"}
        return {"kind": "static", **self.calibration.facts()}


def _one_alpha(alpha: float) -> list[NDArray[Any]]:
    """The same α for each row of each batch."""
    return [np.full((batch, 1), alpha) for batch in BATCHES]


def _alike(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A warning about labels that can't be told apart."""
    shown = "; ".join(f"{one!r} and {other!r}" for one, other in pairs[:10])
    more = f"; and {len(pairs) - 10} more pairs" if len(pairs) > 10 else ""
    return (
        f"label set {name} has labels that the model can't tell apart (cosine above {SAME}),"
        f" so that an image scores them alike: {shown}{more}; name them by other words"
    )


def _versions(runtime: str) -> dict[str, str]:
    """The versions of what makes a release, by name."""
    names = (*_TOOLS, *(["openvino"] if runtime == "openvino" else []))
    versions = {name.removesuffix("_torch"): importlib.metadata.version(name) for name in names}
    versions["onnxruntime"] = onnxruntime.__version__  # of onnxruntime or of onnxruntime-gpu
    return versions
