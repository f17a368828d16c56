"""A model in torch as the tasks see it: what an export of it in fp32 would answer."""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radapter_export.facts import dense_facts, preprocess_facts
from radapter_export.tokenizer import ServedTokenizer
from radapter_serve.adapter import Adapter
from radapter_serve.adapter.file import check_alpha, check_base
from radapter_serve.adapter.fold import fold
from radapter_serve.clip.base import Base
from radapter_serve.clip.dense import encode_patches
from radapter_serve.clip.towers import (
    encode_image,
    encode_text,
    is_causal,
    logit_scale_and_bias,
    normalised,
    to_device,
)
from radapter_serve.contract.alpha import Alpha
from radapter_serve.contract.mask_crop import MaskCrop
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.encoders.needs import complete
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Release
from radapter_serve.tasks.labels import embed_labels

CLASSES = "classes"  # the label set of a run's own classes
_TEMPLATES = ("a photo of a {}.",)


def load_in_torch(
    base: Base,
    adapter: Adapter | None = None,
    *,
    told: Release | None = None,
    alpha: float | None = None,
    dense: str | None = None,
    device: str | None = None,
    indexes: Path = Path("indexes"),
) -> LoadedRelease:
    """A base, or a base with an adapter folded into it, in torch.

    Args:
        base: its weights become those of the fold.
        adapter: to be folded; None for the base alone.
        told: what `release.json` says beside a merged checkpoint; None where there is none.
        alpha: of the fold, in [0, 1]; the adapter's own if None.
        dense: method of dense embeddings, naclip or maskclip, for `segment`; None for what the run
            was trained for, if for any.
        device: of torch, such as "cpu" or "cuda"; None takes a GPU where there is one.
        indexes: folder of the indexes that `retrieve` searches.

    Raises:
        RAdapterError: the adapter is another base's, α is none, or there is no such device.
    """
    if adapter is None and alpha not in (None, 0.0):
        raise RAdapterError(f"alpha is {alpha:g}, but {base.name} has no adapter; leave it out")
    classes: tuple[str, ...] = ()
    if adapter is not None:
        alpha = adapter.metadata.alpha if alpha is None else alpha
        check_alpha(alpha)
        check_base(base.model.state_dict(), adapter)
        base.model.load_state_dict(fold(base.model.state_dict(), adapter, alpha))
        classes = tuple(adapter.metadata.classes or ())
        if dense is None and adapter.metadata.source.dense != "none":
            dense = adapter.metadata.source.dense
    encoder = TorchEncoder(base, device)
    with tempfile.TemporaryDirectory() as folder:
        written = ServedTokenizer.write(
            base.tokenizer,
            Path(folder) / "tokenizer.json",
            dynamic_length=is_causal(base.model),
        )
    release = _describe(base, adapter, alpha or 0.0, dense, written.spec)
    if told is not None:
        release = _as_told(release, told, base, dense)
    encoder.release = release

    def label_sets(loaded: LoadedRelease) -> dict[str, LabelSet]:
        # The classes that a run was trained for.
        if not classes:
            return {}
        return {CLASSES: complete(embed_labels(loaded, classes, release.templates))}

    return LoadedRelease(
        release,
        encoder,
        written.encode,
        read_label_sets=label_sets,
        indexes=indexes,
        origin={"model_repository": base.name},
    )


class TorchEncoder:
    """The encoders of a model in torch.

    Args:
        base: whose model has its weights.
        device: of torch; None takes a GPU where there is one.

    Attributes:
        release: its facts.
    """

    release: Release

    def __init__(self, base: Base, device: str | None) -> None:
        self._model = base.model
        self._device = to_device(base.model, device)

    @torch.inference_mode()
    def images(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        return _floats(encode_image(self._model, self._pixels(pixels)))

    @torch.inference_mode()
    def patches(self, pixels: NDArray[np.uint8], alpha: Alpha | None = None) -> NDArray[np.float32]:
        method = (self.release.dense or {})["way"]
        return _floats(encode_patches(self._model, self._pixels(pixels), method))

    @torch.inference_mode()
    def tokens(self, tokens: NDArray[np.int32], alpha: Alpha | None = None) -> NDArray[np.float32]:
        rows = torch.from_numpy(np.asarray(tokens, np.int64)).to(self._device)
        return _floats(encode_text(self._model, rows))

    def close(self) -> None:
        """The model goes with its last user."""

    def _pixels(self, pixels: NDArray[np.uint8]) -> Tensor:
        return normalised(pixels, self.release.preprocess, self._device)


def _describe(
    base: Base,
    adapter: Adapter | None,
    alpha: float,
    dense: str | None,
    tokenizer: dict[str, Any],
) -> Release:
    """The facts that an export would write, without those that are measured."""
    scale, bias = logit_scale_and_bias(base.model.state_dict())
    source = None if adapter is None else adapter.metadata.source
    mean = base.preprocess["mean"]
    crop = MaskCrop.filled_with(mean) if source is None else source.mask_crop(mean)
    return Release(
        version=1,
        alpha=alpha,
        architecture=base.name,
        base_digest="" if adapter is None else adapter.metadata.base_digest,
        adapter_digest="" if adapter is None else adapter.digest,
        preprocess=preprocess_facts(
            base, exif_orientation=True if source is None else source.exif_orientation
        ),
        tokenizer=tokenizer,
        embed_dim=int(base.config["embed_dim"]),
        logit_scale=scale,
        logit_bias=bias,
        templates=list(_TEMPLATES) if adapter is None else adapter.metadata.templates,
        agreement={},
        dense=dense_facts(base, dense),
        crop=crop.to_dict(),
        runtime="torch",
        tools={"torch": torch.__version__},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _as_told(release: Release, told: Release, base: Base, dense: str | None) -> Release:
    """The facts of a merged checkpoint, of which its `release.json` knows more than the weights."""
    way = dense if dense is not None else (told.dense or {}).get("way")
    return dataclasses.replace(
        release,
        alpha=told.alpha,
        base_digest=told.base_digest,
        adapter_digest=told.adapter_digest,
        adapters=told.adapters,
        templates=told.templates,
        preprocess=preprocess_facts(
            base, exif_orientation=told.preprocess.get("exif_orientation", True)
        ),
        crop=told.crop,
        dense=dense_facts(base, way),
        confidence=told.confidence,
    )


def _floats(values: Tensor) -> NDArray[np.float32]:
    return np.asarray(values.float().cpu().numpy(), np.float32)
