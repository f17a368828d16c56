"""Models to evaluate: loaded releases at one α each, encoded with torch, a runtime or a server."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from radapter_serve.adapter import load_adapter
from radapter_serve.adapter.file import changes, check_base
from radapter_serve.adapter.in_torch import in_torch
from radapter_serve.adapter.tuned import Line, load_base_of
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import TorchEncoder, check_dense, logit_scale_and_bias, to_device
from radapter_serve.contract.embeddings import Point
from radapter_serve.contract.errors import Alpha
from radapter_serve.contract.preprocess import MaskCrop
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.encoder import ServerEncoder
from radapter_serve.encoders.loaded import LoadedRelease, Place
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.metrics import Floats, check_finite
from radapter_serve.evaluation.rows import display_name
from radapter_serve.evaluation.suite import PROPOSALS
from radapter_serve.files import digest_of
from radapter_serve.release.adapters import shortened
from radapter_serve.release.release import FILE, Release, Tower
from radapter_serve.sources import LOCAL
from radapter_serve.tasks.dense import SegmentOptions, encode_windows, segment_densely
from radapter_serve.tasks.embed import embed_labels, embed_prompts
from radapter_serve.tasks.segment import segment_proposals

TEMPLATES = ["a photo of a {}."]  # of models that name no templates
_MAX_TEXTS = 256  # in a batch of torch


@dataclass(frozen=True)
class SegmentQuery:
    """Arguments of a segmentation."""

    labels: Sequence[str]  # with synonyms after commas
    templates: Sequence[str]  # of prompts
    dense: str  # a dense method, or `proposals`
    options: SegmentOptions


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model at one α."""

    source: str  # `adapter`, `checkpoint`, `lora`, `merged`, `release` or `server`
    alpha: float | None  # None if unknown
    facts: Mapping[str, Any]  # fields of `Row` about the model
    loaded: LoadedRelease  # at this α
    # Place of the texts, if they are of an adapter beside the release
    place: Place | None = field(default=None, kw_only=True)
    # The last batch of images and its embeddings, shared by models that embed images alike
    last: list[Any] | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """The model's name in messages."""
        return display_name(self.source, self.alpha)

    def embed_images(self, pixels: Sequence[NDArray[np.uint8]]) -> Floats:
        """Embed prepared images, float32 [N, D] of unit length."""
        if self.last is None:
            return self.loaded.embed_pixels(pixels)
        if not self.last or self.last[0] is not pixels:
            self.last[:] = [pixels, self.loaded.embed_pixels(pixels)]
        embeds: Floats = self.last[1]
        return embeds

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Embed texts, float32 [N, D] of unit length."""
        if self.place is None:
            return self.loaded.embed_texts(texts)
        return complete(embed_prompts(self.loaded, texts, self.place))

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Floats:
        """Embed classes, float32 [C, D]: the mean over a class's names and all templates."""
        if not templates:
            raise RAdapterError("no prompt template; give one or more, such as 'a photo of a {}.'")
        labels = complete(embed_labels(self.loaded, classes, templates, place=self.place))
        return check_finite(labels.embeds)

    def dense_method(self, dense: str | None) -> str:
        """The dense method, by default the model's; an error if the model lacks it."""
        release = self.loaded.release
        method = release.method
        if dense == PROPOSALS or (method and dense in (None, method)):
            return dense or str(method)
        has = f"has dense {method}" if method else "has no patch_encoder"
        raise RAdapterError(
            f"release {release.version} {has}; export one with radapter-export --dense"
            f" {dense or 'naclip'}"
        )

    def segment(
        self,
        image: Image.Image,
        query: SegmentQuery,
        masks: NDArray[np.uint8] | None = None,
        scores: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint16]:
        """Label each pixel of an image, uint16 [H, W]; C is the background. `masks` are proposals,
        uint8 [N, H, W], with the probabilities of their labels in `scores`, [N, C].
        """
        loaded = self.by_method(query.dense)
        embeds = self.embed_classes(query.labels, query.templates)
        if query.dense == PROPOSALS:
            assert masks is not None
            crops = segment_proposals(loaded, image, embeds, masks, scores, query.options)
            return encode_windows(crops, loaded.embed_pixels).mask
        rows = min(16, loaded.release.max_batch_size)
        views = segment_densely(loaded, image, embeds, query.options, rows=rows)
        return encode_windows(views, loaded.embed_patches).mask

    def by_method(self, dense: str) -> LoadedRelease:
        """The release with this dense method."""
        return self.loaded

    def close(self) -> None:
        """Close the encoder, which this model shares with the others that were loaded with it."""
        self.loaded.close()


class TorchCandidate(Candidate):
    """A model in torch, which has every dense method."""

    def dense_method(self, dense: str | None) -> str:
        method = dense or self.loaded.release.method
        if method is None:
            raise RAdapterError(
                "this model has no dense method (dense: none); name one for the set, such as"
                " dense: naclip"
            )
        if method != PROPOSALS:
            check_dense(self._encoder.model, method)
        return str(method)

    def by_method(self, dense: str) -> LoadedRelease:
        loaded = copy.copy(self.loaded)
        loaded.encoder = self._encoder.by_method(dense)
        return loaded

    @property
    def _encoder(self) -> TorchEncoder:
        assert isinstance(self.loaded.encoder, TorchEncoder)
        return self.loaded.encoder


class ServerCandidate(Candidate):
    """A release of a live server, which only segments."""

    def segment(
        self,
        image: Image.Image,
        query: SegmentQuery,
        masks: NDArray[np.uint8] | None = None,
        scores: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint16]:
        encoder = self.loaded.encoder
        assert isinstance(encoder, ServerEncoder)
        options = query.options
        windows = {}
        if query.dense != PROPOSALS:
            windows = {name: getattr(options, name) for name in ("short_side", "stride", "refine")}
        answer = encoder.ask(
            encoder.client.segment,
            np.asarray(image.convert("RGB")),
            list(query.labels),
            templates=list(query.templates),
            threshold=options.threshold,
            proposals=masks,
            proposal_scores=scores,
            proposal_weight=None if scores is None else options.proposal_weight,
            **encoder.point_of(self.loaded.place().encoder_alpha),
            **windows,
        )
        return np.asarray(answer.mask, np.uint16)


class LineEncoder(TorchEncoder):
    """Sets the weights to `W + α·delta` for each batch, in place; an α of None leaves them as they
    are. The deltas are tuned minus base weights, of an adapter at α = 1 or of a model tuned as a
    whole.
    """

    def __init__(self, base: Base, deltas: Mapping[str, Tensor], dense: str | None) -> None:
        super().__init__(base.model, base.preprocess, dense)
        self._deltas = {key: delta.to(self._device) for key, delta in deltas.items()}
        self._tensors = base.model.state_dict()
        self._base = {key: self._tensors[key].clone() for key in deltas}
        self._alpha = 0.0

    def embed(self, encode: Callable[..., Tensor], alpha: Alpha | None, *inputs: Any) -> Floats:
        if alpha is not None:
            self._move(float(alpha[0, 0]))
        return super().embed(encode, alpha, *inputs)

    def logits(self, alpha: float) -> tuple[float, float | None]:
        """Logit scale and bias at an α."""
        keys = [key for key in ("logit_scale", "logit_bias") if key in self._tensors]
        return logit_scale_and_bias({key: self._at(key, alpha) for key in keys})

    def close(self) -> None:
        """Set the weights back to the base."""
        self._move(0.0)

    @torch.no_grad()
    def _move(self, alpha: float) -> None:
        if alpha != self._alpha:
            self._alpha = float("nan")  # unknown until all tensors are copied
            for key in self._base:
                self._tensors[key].copy_(self._at(key, alpha))
            self._alpha = alpha

    def _at(self, key: str, alpha: float) -> Tensor:
        base: Tensor = self._base.get(key, self._tensors[key])
        delta = self._deltas.get(key)
        return base if delta is None else torch.add(base.float(), delta, alpha=alpha)


def candidates_in_torch(
    source: str,
    base: Base,
    deltas: Mapping[str, Tensor],
    alphas: Sequence[float | None],
    *,
    facts: Mapping[str, Any] | None = None,
    templates: Sequence[str] = TEMPLATES,
    dense: str | None = None,
    crop: MaskCrop | None = None,
    device: str | None = None,
) -> list[Candidate]:
    """Candidates at each α from a base and the deltas of `LineEncoder`; the base's weights change
    in place until `close`.
    """
    to_device(base.model, device)
    encoder = LineEncoder(base, deltas, dense)
    facts = {**(facts or {}), "precision": "fp32"}
    if "release" not in facts:  # the facts of a release name its model
        facts |= {"model": base.name, "pretrained": base.pretrained}
    loaded = in_torch(
        base,
        encoder,
        dense,
        alpha=0.0,
        dynamic_alpha=bool(deltas),
        base_digest="",
        adapter_digest="",
        image_tower=Tower("", None),
        text_tower=Tower("", None),
        templates=list(templates),
        crop=crop or MaskCrop.filled_with(base.preprocess["mean"]),
        max_batch_size=_MAX_TEXTS,
    )
    candidates: list[Candidate] = []
    for alpha in alphas:
        scale, bias = encoder.logits(alpha or 0.0)
        point = copy.copy(loaded)
        point.release = replace(
            loaded.release, alpha=alpha or 0.0, logit_scale=scale, logit_bias=bias
        )
        candidates.append(TorchCandidate(source, alpha, facts, point))
    return candidates


def from_adapter(
    path: str | Path,
    alphas: Sequence[float] = (),
    *,
    base: str | None = None,
    device: str | None = None,
) -> list[Candidate]:
    """Candidates of a run at each α; by default 0, its own and 1."""
    adapter = load_adapter(path)
    metadata = adapter.metadata
    alphas = alphas or sorted({0.0, metadata.alpha, 1.0})
    clip = load_base_of(adapter, base)
    weights = clip.model.state_dict()
    check_base(weights, adapter)
    deltas = dict(changes(weights, adapter))
    facts = {"base_digest": metadata.base_digest, "adapter_digest": adapter.digest}
    source = metadata.source
    return candidates_in_torch(
        "adapter",
        clip,
        deltas,
        alphas,
        facts=facts,
        templates=metadata.templates,
        dense=None if source.dense == "none" else source.dense,
        crop=source.mask_crop(clip.preprocess["mean"]),
        device=device,
    )


def from_line(
    base: Base, line: Line, alphas: Sequence[float] = (), *, device: str | None = None
) -> list[Candidate]:
    """Candidates of a checkpoint or LoRA that was tuned elsewhere, at each α; by default 0, 0.5 and
    1, or 1 alone if there is no base.
    """
    alphas = alphas or ((1.0,) if line.base is None else (0.0, 0.5, 1.0))
    deltas = {}
    if line.base is not None:
        deltas = {name: tensor - line.base[name] for name, tensor in line.changes.items()}
    facts = {"base_digest": line.base_digest, "weights_digest": line.digest}
    kind = line.made_of.kind
    return candidates_in_torch(kind, base, deltas, alphas, facts=facts, device=device)


def from_merged(folder: str | Path, *, device: str | None = None) -> list[Candidate]:
    """Candidate of a merged checkpoint, or of any folder that `load_base` takes as `local-dir:`."""
    folder = Path(folder)
    base = load_base(f"{LOCAL}{folder}")
    release = Release.load(folder) if (folder / FILE).exists() else None
    files = [*folder.glob("open_clip_*"), *folder.glob("model.safetensors")]
    weights = next((file for file in files if file.suffix in (".safetensors", ".bin", ".pt")), None)
    facts = release_facts(release) if release else {}
    facts["weights_digest"] = digest_of(weights) if weights else None
    return candidates_in_torch(
        "merged",
        base,
        {},
        [release.alpha if release else None],
        facts=facts,
        templates=release.templates if release and release.templates else TEMPLATES,
        dense=release.method if release else None,
        crop=release.crop if release else None,
        device=device,
    )


def from_release(
    loaded: LoadedRelease, alphas: Sequence[float] = (), source: str = "release", adapter: str = ""
) -> list[Candidate]:
    """Candidates of a loaded release at each α, by default its own; or of an adapter beside it, by
    default at 0, its own α and 1.
    """
    facts = release_facts(loaded.release)
    if loaded.release.quantization is not None:  # of int8
        facts["quantization"] = loaded.release.quantization
    kind = ServerCandidate if source == "server" else Candidate
    if not adapter:
        points = [loaded.at(alpha) for alpha in alphas] or [loaded]
        return [kind(source, point.release.alpha, facts, point) for point in points]

    # All α embed images once, and share a cache of the base's prompts.
    last: list[Any] = []
    encoder = loaded.encoder
    candidates: list[Candidate] = []
    if isinstance(encoder, ServerEncoder):  # the server maps the texts
        black = np.zeros((32, 32, 3), np.uint8)
        receipt = encoder.ask(encoder.client.classify, black, ["a"], adapter=adapter).receipt
        facts |= {"adapter": adapter, "adapter_digest": receipt.adapter_digest}
        for alpha in alphas or sorted({0.0, receipt.alpha, 1.0}):
            point = copy.copy(loaded)
            point.encoder = encoder.at(Point(adapter, alpha))
            candidates.append(kind(source, alpha, facts, point, last=last))
        return candidates
    default_place = loaded.place(Point(adapter))
    assert default_place.adapter is not None
    facts |= {"adapter": adapter, "adapter_digest": shortened(default_place.adapter.digest)}
    beside = copy.copy(loaded)
    beside.release = replace(loaded.release, templates=default_place.adapter.facts.templates)
    for alpha in alphas or sorted({0.0, default_place.alpha, 1.0}):
        place = loaded.place(Point(adapter, alpha))
        candidates.append(kind(source, alpha, facts, beside, place=place, last=last))
    return candidates


def release_facts(release: Release) -> dict[str, Any]:
    """Fields of `Row` about a release."""
    return {
        "model": release.architecture,
        "base_digest": release.base_digest,
        "adapter_digest": release.adapter_digest,
        "precision": release.precision,
        "release": release.version,
    }
