"""Models of open_clip as large as they are, with random weights: adapters attached against the
folded graph.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from radapter_export.graph import image_graph, text_graph
from radapter_serve.adapter import Metadata, attach, base_digest, fold
from radapter_serve.clip.base import Base
from radapter_serve.clip.towers import normalised
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.release.agreement import Samples, compare

NAMES = (
    *("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"),
    *("coca_ViT-B-32", "ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "MobileCLIP-B", "EVA02-B-16"),
    *("PE-Core-B-16", "RN50", "MobileCLIP-S1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_folded_graph_agrees_with_attached_adapters(name: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config(name)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = open_clip.create_model(name).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # mostly zeros and ones, which a wrong graph could do without
                parameter.add_(torch.randn_like(parameter) * 0.02)
        weights = dict(model.state_dict())
        adapters = attach(model, rank=4, partial=name in ("RN50", "MobileCLIP-S1"))
        for tensor in adapters.parameters():
            tensor.normal_(std=0.1)
        digest = base_digest(weights, [site.key for site in adapters.sites])
        adapter = adapters.adapter(Metadata(name, digest, rank=4))
    context = config["text_cfg"]["context_length"]
    tokenizer: Any = SimpleNamespace(context_length=context)
    base = Base(name, None, model, config, dict(model.visual.preprocess_cfg), tokenizer)

    random = np.random.default_rng(0)
    side = base.image_size
    images = [random.integers(0, 256, (n, side, side, 3), dtype=np.uint8) for n in (1, 2)]
    words = config["text_cfg"]["vocab_size"]
    tokens = [random.integers(1, words, (n, context), dtype=np.int32) for n in (1, 3)]
    with torch.inference_mode():
        by_image = [model.encode_image(normalised(of, base.preprocess, "cpu")) for of in images]
        by_text = [model.encode_text(torch.from_numpy(of)) for of in tokens]
    adapters.remove()
    folded = fold(weights, adapter, 1.0)
    inputs: Any
    for make, inputs, outputs in (
        (image_graph, images, by_image),
        (text_graph, tokens, by_text),
    ):
        graph = make(base)
        graph.save(folded, tmp_path / "model.onnx")
        references = [nn.functional.normalize(embeds, dim=-1).numpy() for embeds in outputs]
        encoder = EncoderGraph(tmp_path / "model.onnx")
        compare(graph.name, encoder, Samples(inputs, references), 1e-4)
