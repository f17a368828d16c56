"""Models in torch: a base with an adapter at any α, a fine-tuned copy for WiSE-FT, a merged
checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from radapter_serve.adapter import Adapter, load_adapter
from radapter_serve.adapter.checkpoint import read_weights
from radapter_serve.adapter.file import check_base
from radapter_serve.adapter.line import Tuned, check_weights
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.dense import check_dense, encode_patches
from radapter_serve.clip.towers import (
    encode_image,
    encode_texts,
    logit_scale_and_bias,
    normalised,
    to_device,
)
from radapter_serve.contract.alpha import check_alpha
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.contract.preprocess import Preprocess, decode
from radapter_serve.contract.probabilities import class_probabilities
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.embedder import (
    PROPOSALS,
    NoSuchWay,
    SegmentImage,
    SegmentQuery,
    Variant,
    release_facts,
    segment_here,
)
from radapter_serve.evaluation.evaluation_set import class_embeds
from radapter_serve.evaluation.metrics import Floats
from radapter_serve.evaluation.row import ModelFacts
from radapter_serve.files import digest_of
from radapter_serve.hub import LOCAL
from radapter_serve.release.release import FILE, Release
from radapter_serve.tasks.dense import DenseSegmenter
from radapter_serve.tasks.proposals import ProposalSegmenter

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WINDOWS = 16


@dataclass
class Interpolation:
    """Weights on a line from the base, `W + α·delta`: a folded adapter, or WiSE-FT."""

    source: str
    deltas: dict[str, Tensor]
    facts: ModelFacts = field(default_factory=ModelFacts)


class TorchEmbedder:
    """A base, and models that differ from it by α times a fixed change; selecting one computes that
    sum in place.

    Args:
        base: gives model, preprocessing and tokenizer; its weights change until `close`.
        lines: the changes.
        alphas: re-scalings in [0, 1], for each line.
        templates: prompt templates for data sets that bring none.
        dense: the lines' own way of dense embeddings; None where they name none.
        crop: how the masks of proposals are shown; None takes the usual crop.
        precision: fp32, or bf16 or fp16 by autocast.
        device: of torch; None takes a GPU where there is one.
    """

    def __init__(
        self,
        base: Base,
        lines: Sequence[Interpolation],
        alphas: Sequence[float | None],
        templates: list[str],
        *,
        dense: str | None = None,
        crop: MaskCrop | None = None,
        precision: Precision = "fp32",
        device: str | None = None,
    ) -> None:
        self.templates = templates
        self._dense = dense
        self._precision = precision
        self._base = base
        self._model = base.model
        self._device = to_device(base.model, device)
        self._transform = image_transform_v2(PreprocessCfg(**base.preprocess), is_train=False)
        self._preprocess = Preprocess.from_dict(base.preprocess)
        self.size = self._preprocess.size[0]
        self.exif_orientation = self._preprocess.exif_orientation
        self.crop = crop or MaskCrop.filled_with(base.preprocess["mean"])
        self._tensors = self._model.state_dict()
        self._lines = {line.source: line for line in lines}
        self.variants: Sequence[Variant] = [
            Variant(line.source, alpha, _facts(base, line.facts, precision))
            for line in lines
            for alpha in alphas
        ]
        changed = sorted({key for line in lines for key in line.deltas})
        self._originals = {key: self._tensors[key].clone() for key in changed}
        for line in lines:
            line.deltas = {key: value.to(self._device) for key, value in line.deltas.items()}
        self._selected: Variant | None = None

    @torch.no_grad()
    def select(self, variant: Variant) -> None:
        if variant is self._selected:
            return
        line = self._lines[variant.source]
        for key, original in self._originals.items():
            value = original
            if key in line.deltas and variant.alpha is not None:
                value = torch.add(original.float(), line.deltas[key], alpha=variant.alpha)
            self._tensors[key].copy_(value)
        self._selected = variant

    def prepare(self, data: bytes) -> Any:
        return self._transform(decode(data))  # type: ignore[arg-type]

    @torch.inference_mode()
    def embed_images(self, items: Sequence[Any]) -> Floats:
        with self._autocast():
            embeds = encode_image(self._model, torch.stack(list(items)).to(self._device))
        return np.asarray(embeds.float().cpu().numpy())

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Floats:
        with self._autocast():
            embeds = encode_texts(self._model, self._base.tokenizer(list(texts)))
        return np.asarray(embeds.float().cpu().numpy())

    def probabilities(self, cosines: Floats) -> Floats:
        return class_probabilities(cosines, *self._logits())

    def way(self, dense: str | None) -> str:
        way = dense or self._dense
        if way is None:
            raise NoSuchWay(
                "these models have no way of their own (dense: none); give the set one, as in"
                " dense: naclip"
            )
        if way != PROPOSALS:
            check_dense(self._model, way)
        return way

    def segmenter(self, query: SegmentQuery, known: dict[Any, Floats]) -> SegmentImage:
        embeds = class_embeds(self.embed_texts, query.labels, query.templates, known)

        @torch.inference_mode()
        def encode(windows: NDArray[np.uint8], way: str | None = None) -> Floats:
            pixels = normalised(windows, self._base.preprocess, self._device)
            with self._autocast():
                found = (
                    encode_image(self._model, pixels)
                    if way is None
                    else encode_patches(self._model, pixels, way)
                )
            return np.asarray(found.float().cpu().numpy())

        scale, bias = self._logits()
        segmenter: DenseSegmenter | ProposalSegmenter
        if query.dense == PROPOSALS:
            segmenter = ProposalSegmenter(
                encode, self._preprocess, self.crop, scale, _WINDOWS, bias
            )
        else:
            patches = functools.partial(encode, way=query.dense)
            segmenter = DenseSegmenter(patches, self._preprocess, _WINDOWS, scale, bias)
        return segment_here(segmenter, embeds, query.options)

    @torch.no_grad()
    def close(self) -> None:
        for key, original in self._originals.items():
            self._tensors[key].copy_(original)
        self._selected = None

    def _logits(self) -> tuple[float, float | None]:
        return logit_scale_and_bias(self._tensors)

    def _autocast(self) -> Any:
        kind = _AUTOCAST.get(self._precision)
        return torch.autocast(self._device.type, kind, enabled=kind is not None)


def from_adapter(
    path: str | Path,
    alphas: Sequence[float] | None = None,
    *,
    base: str | None = None,
    pretrained: str | None = None,
    finetuned: str | Path | None = None,
    precision: Precision = "fp32",
    device: str | None = None,
) -> TorchEmbedder:
    """A run at several α.

    Args:
        path: adapter file, or the folder of a run.
        alphas: re-scalings in [0, 1]; 0, the adapter's own and 1 if None.
        base: open_clip architecture or `local-dir:PATH`; what the adapter was trained on if None.
        pretrained: open_clip tag or a checkpoint's path; what the adapter was trained on if None.
        finetuned: a fine-tuned checkpoint of the same base, for WiSE-FT at the same α beside it.
        precision: of the towers.
        device: of torch.

    Raises:
        RAdapterError: no adapter, no base, or they do not fit.
    """
    adapter = load_adapter(path)
    meta = adapter.metadata
    alphas = sorted({0.0, meta.alpha, 1.0}) if alphas is None else alphas
    clip = load_base(base or meta.architecture, pretrained or meta.pretrained)
    return embedder_of(
        clip, adapter, alphas, finetuned=finetuned, precision=precision, device=device
    )


def embedder_of(
    base: Base,
    adapter: Adapter,
    alphas: Sequence[float],
    *,
    finetuned: str | Path | None = None,
    precision: Precision = "fp32",
    device: str | None = None,
) -> TorchEmbedder:
    """`from_adapter` with base and adapter already loaded."""
    for alpha in alphas:
        check_alpha(alpha)
    weights = base.model.state_dict()
    check_base(weights, adapter)
    base_digest = adapter.metadata.base_digest
    deltas = {}
    for key in adapter.keys:
        for name in (f"{key}.weight", f"{key}.bias"):
            if name in weights:
                deltas[name] = adapter.matrix(key) @ weights[name].float().cpu()
    lines = [
        Interpolation(
            "adapter", deltas, ModelFacts(base_digest=base_digest, adapter_digest=adapter.digest)
        )
    ]
    if finetuned is not None:
        change, digest = _difference(Path(finetuned), weights)
        facts = ModelFacts(base_digest=base_digest, weights_digest=digest)
        lines.append(Interpolation("wise-ft", change, facts))
    source = adapter.metadata.source
    return TorchEmbedder(
        base,
        lines,
        alphas,
        adapter.metadata.templates,
        dense=None if source.dense == "none" else source.dense,
        crop=source.mask_crop(base.preprocess["mean"]),
        precision=precision,
        device=device,
    )


def from_attached(
    base: Base,
    alpha: float,
    templates: list[str],
    *,
    dense: str | None = None,
    crop: MaskCrop | None = None,
) -> TorchEmbedder:
    """A base with adapters attached to it, as they are set now.

    Args:
        base: stays on its device, because adapters behind activations would not move with it.
        alpha: that its rows report.
        templates: prompt templates for data sets that bring none.
        dense: way of dense embeddings.
        crop: how the masks of proposals are shown.
    """
    device = str(next(base.model.parameters()).device)
    return TorchEmbedder(
        base,
        [Interpolation("adapter", {})],
        [alpha],
        templates,
        dense=dense,
        crop=crop,
        device=device,
    )


def from_line(
    tuned: Tuned,
    alphas: Sequence[float] = (),
    *,
    precision: Precision = "fp32",
    device: str | None = None,
) -> TorchEmbedder:
    """A checkpoint or a LoRA that was tuned elsewhere, at several α.

    Args:
        tuned: from `load_checkpoint` or `load_lora`.
        alphas: re-scalings in [0, 1]; if none, 0, 0.5 and 1, or 1 alone where there is no base.
        precision: of the towers.
        device: of torch.

    Raises:
        RAdapterError: the line has no such α.
    """
    line = tuned.line
    alphas = alphas or ((1.0,) if line.base is None else (0.0, 0.5, 1.0))
    for alpha in alphas:
        line.check(alpha)
    changes = {} if line.base is None else _changes(line.base, line.tuned)
    facts = ModelFacts(base_digest=line.base_digest, weights_digest=line.digest)
    return TorchEmbedder(
        tuned.base,
        [Interpolation(line.made_of["kind"], changes, facts)],
        alphas,
        ["a photo of a {}."],
        precision=precision,
        device=device,
    )


def from_merged(
    folder: str | Path, *, precision: Precision = "fp32", device: str | None = None
) -> TorchEmbedder:
    """A merged checkpoint, or any folder that `load_base` takes by `local-dir:`.

    Raises:
        RAdapterError: no such folder.
    """
    folder = Path(folder)
    base = load_base(f"{LOCAL}{folder}")
    release = Release.load(folder) if (folder / FILE).exists() else None
    candidates = [*folder.glob("open_clip_*"), *folder.glob("model.safetensors")]
    weights = next((p for p in candidates if p.suffix in (".safetensors", ".bin", ".pt")), None)
    facts = release_facts(release) if release else ModelFacts()
    line = Interpolation(
        "merged", {}, replace(facts, weights_digest=digest_of(weights) if weights else None)
    )
    return TorchEmbedder(
        base,
        [line],
        [release.alpha if release else None],
        release.templates if release and release.templates else ["a photo of a {}."],
        dense=release.dense["way"] if release and release.dense else None,
        crop=MaskCrop.from_dict(release.crop) if release and release.crop else None,
        precision=precision,
        device=device,
    )


def _facts(base: Base, facts: ModelFacts, precision: str) -> ModelFacts:
    """What a row says about a model of a base; a release has a name of its own."""
    if facts.release is None:
        facts = replace(facts, model=base.name, pretrained=base.pretrained)
    return replace(facts, precision=precision)


def _difference(path: Path, base: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The change from the base to a fine-tuned checkpoint, and the checkpoint's digest."""
    file = path / "open_clip_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise RAdapterError(
            f"no checkpoint at {file}; --finetuned takes a .pt or .safetensors file or a model"
            " folder"
        )
    start = {name: tensor.cpu() for name, tensor in base.items()}
    tuned = check_weights(str(file), read_weights(file), start)
    return _changes(start, tuned), digest_of(file)


def _changes(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What α scales, of the weights that differ."""
    changes = {
        name: tuned[name].float() - tensor.float()
        for name, tensor in base.items()
        if tensor.is_floating_point()
    }
    return {name: change for name, change in changes.items() if change.any()}
