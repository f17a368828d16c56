"""Models in torch as loaded releases; their answers equal those of their export in fp32."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radapter_serve.adapter import Adapter, Metadata, fold
from radapter_serve.adapter.tuned import towers_of
from radapter_serve.clip.base import Base
from radapter_serve.clip.tokenizer import write_tokenizer
from radapter_serve.clip.towers import (
    TorchEncoder,
    check_dense,
    is_causal,
    logit_scale_and_bias,
    to_device,
)
from radapter_serve.contract.facts import PreprocessFacts
from radapter_serve.contract.labels import check_names, merge_same_names
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.batcher import complete
from radapter_serve.encoders.labels import LabelSet
from radapter_serve.encoders.loaded import LoadedRelease
from radapter_serve.errors import RAdapterError
from radapter_serve.release.release import Dense, Release
from radapter_serve.sources import CLASSES
from radapter_serve.tasks.embed import embed_labels


def base_facts(
    base: Base, weights: Mapping[str, Tensor], dense: str | None, *, exif_orientation: bool
) -> dict[str, Any]:
    """Fields of a `Release` that follow from a base with the dense method, and its weights."""
    preprocess = base.preprocess
    scale, bias = logit_scale_and_bias(weights)
    grid = None if dense is None else int(check_dense(base.model, dense).grid_size[0])
    return {
        "architecture": base.name,
        "preprocess": PreprocessFacts(
            size=base.image_size,
            mode=preprocess["mode"],
            interpolation=preprocess["interpolation"],
            resize_mode=preprocess["resize_mode"],
            fill_color=preprocess["fill_color"],
            mean=[float(value) for value in preprocess["mean"]],
            std=[float(value) for value in preprocess["std"]],
            exif_orientation=exif_orientation,
        ),
        "embed_dim": int(base.config["embed_dim"]),
        "logit_scale": scale,
        "logit_bias": bias,
        "dense": None if grid is None else Dense(str(dense), grid),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def in_torch(
    base: Base,
    encoder: TorchEncoder,
    dense: str | None,
    *,
    exif_orientation: bool = True,
    label_sets: Callable[[LoadedRelease], Mapping[str, LabelSet]] = lambda loaded: {},
    indexes: Path = Path("indexes"),
    **facts: Any,
) -> LoadedRelease:
    """A base in torch as a loaded release; `facts` are fields of its `Release`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        read_by = write_tokenizer(base.tokenizer, path, dynamic_length=is_causal(base.model))
        tokenizer = Tokenizer.load(path, read_by)
    release = Release(
        version=1,
        tokenizer=read_by,
        agreement=None,
        runtime="torch",
        tools={"torch": torch.__version__},
        **facts,
        **base_facts(base, base.model.state_dict(), dense, exif_orientation=exif_orientation),
    )
    return LoadedRelease(
        release,
        encoder,
        tokenizer,
        read_label_sets=label_sets,
        indexes=indexes,
        origin={"model_repository": base.name},
    )


def load_in_torch(
    base: Base,
    adapter: Adapter | None = None,
    *,
    exported: Release | None = None,
    alpha: float | None = None,
    dense: str | None = None,
    device: str | None = None,
    indexes: Path = Path("indexes"),
) -> LoadedRelease:
    """Load a base in torch, with an adapter folded into its weights; `exported` has the facts of a
    merged checkpoint.
    """
    if adapter is None and alpha not in (None, 0.0):
        raise RAdapterError(f"alpha is {alpha:g}, but {base.name} has no adapter; leave it out")
    # Fold the adapter, and take its metadata; without an adapter, take empty metadata.
    metadata = Metadata(architecture=base.name, base_digest="", alpha=0.0)
    towers = {} if exported else towers_of(base.model, adapter.tensors if adapter else {})
    if adapter is not None:
        metadata = adapter.metadata
        alpha = metadata.alpha if alpha is None else alpha
        base.model.load_state_dict(fold(base.model.state_dict(), adapter, alpha))
    source = metadata.source
    classes = metadata.classes or []
    facts: dict[str, Any] = {
        "alpha": alpha or 0.0,
        "base_digest": metadata.base_digest,
        "adapter_digest": "" if adapter is None else adapter.digest,
        **towers,
        "templates": metadata.templates,
        "crop": source.mask_crop(base.preprocess["mean"]),
    }
    exif_orientation = source.exif_orientation
    if exported is not None:
        names = (*facts, "image_tower", "text_tower", "adapters", "confidence")
        facts = {name: getattr(exported, name) for name in names}
        exif_orientation = exported.preprocess.exif_orientation
        dense = dense or exported.method
    elif dense is None and source.dense != "none":
        dense = source.dense
    to_device(base.model, device)

    def label_sets(loaded: LoadedRelease) -> dict[str, LabelSet]:
        # The label set of the run's classes
        if not classes:
            return {}
        labels = merge_same_names(classes)
        check_names(labels, distinct=False)
        return {CLASSES: complete(embed_labels(loaded, labels, loaded.release.templates))}

    return in_torch(
        base,
        TorchEncoder(base.model, base.preprocess, dense),
        dense,
        exif_orientation=exif_orientation,
        label_sets=label_sets,
        indexes=indexes,
        **facts,
    )
