"""Models of open_clip as large as they are, with random weights: adapters attached against the
folded graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from radapter_export.graph import Graph, image_graph, text_graph
from radapter_serve.adapter import Metadata, attach, base_digest, fold
from radapter_serve.clip.base import Base
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.release.agreement import Samples, compare

NAMES = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336",
    "ViT-H-14",
    "coca_ViT-B-32",
    "ViT-B-16-SigLIP",
    "ViT-B-32-SigLIP2-256",
    "MobileCLIP-B",
    "EVA02-B-16",
    "PE-Core-B-16",
    "RN50",
    "MobileCLIP-S1",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_folded_graph_agrees_with_attached_adapters(name: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config(name)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = open_clip.create_model(name).eval()
        for parameter in model.parameters():
            if (
                parameter.ndim == 1
            ):  # mostly zeros and ones, which a wrong graph could well do without
                parameter.add_(torch.randn_like(parameter) * 0.02)
        weights = dict(model.state_dict())
        adapters = attach(model, rank=4, partial=name in ("RN50", "MobileCLIP-S1"))
        for tensor in adapters.parameters():
            tensor.normal_(std=0.1)
        adapter = adapters.adapter(
            Metadata(name, base_digest(weights, [site.key for site in adapters.sites]), rank=4)
        )
    context = config["text_cfg"]["context_length"]
    tokenizer: Any = SimpleNamespace(context_length=context)
    base = Base(name, None, model, config, dict(model.visual.preprocess_cfg), tokenizer)

    random = np.random.default_rng(0)
    images = [
        random.integers(0, 256, (n, base.image_size, base.image_size, 3), dtype=np.uint8)
        for n in (1, 2)
    ]
    tokens = [
        random.integers(1, config["text_cfg"]["vocab_size"], (n, context), dtype=np.int32)
        for n in (1, 3)
    ]
    mean, std = (torch.tensor(base.preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        pixels = [
            (torch.from_numpy(image).permute(0, 3, 1, 2) / 255 - mean) / std for image in images
        ]
        references = [
            [nn.functional.normalize(encode(values), dim=-1).numpy() for values in batches]
            for encode, batches in (
                (model.encode_image, pixels),
                (model.encode_text, map(torch.from_numpy, tokens)),
            )
        ]
    adapters.remove()
    folded = fold(weights, adapter, 1.0)
    made: tuple[Callable[[Base], Graph], ...] = (image_graph, text_graph)
    inputs: Any
    for make, inputs, reference in zip(made, (images, tokens), references, strict=True):
        graph = make(base)
        graph.save(folded, tmp_path / "model.onnx")
        compare(graph.name, EncoderGraph(tmp_path / "model.onnx"), Samples(inputs, reference), 1e-4)
