"""Every family from its adapter to a release, and what the release holds against open_clip itself;
and models as large as they are, with random weights.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from radapter_export.graph import image_graph, text_graph
from radapter_export.release import UNFITTED
from radapter_serve.adapter import Metadata, attach, base_digest, fold, load_adapter, save_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import normalised
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.contract.tokenizer import Tokenizer
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.release.agreement import TOLERANCES, Samples, compare
from tests.export.conftest import Export
from tests.helpers.small_models import FAMILIES, make_base, random_adapter

QUICK = ("roberta",)
CROPPED = (
    *("vit", "vit-quickgelu", "vit-layer-scale", "vit-custom-blocks", "mobileclip-b", "eva02"),
    *("pe-core", "resnet"),
)
NOT_IN_TENSORRT = {"Attention", "ReduceL2", "SequenceAt", "SplitToSequence"}
TEXTS = ["a photo of a cat", "", "many words " * 60, "Sand, sea & sun"]


def base_with_adapter(family: str, folder: Path) -> str:
    name = make_base(family, folder / "base")
    adapter = random_adapter(name, partial=FAMILIES[family].partial)
    save_adapter(adapter, folder / "adapter.safetensors")
    return name


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES]
)
def test_release_of_a_family_gives_what_open_clip_gives(
    family: str, export: Export, tmp_path: Path
) -> None:
    name = base_with_adapter(family, tmp_path)
    (release,) = export([0.7], adapter=tmp_path)
    assert (UNFITTED in release.warnings) == ("siglip" in family)

    # The merged checkpoint is the fold, to the bit.
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{release.merged}")
    model, _, transform = loaded
    weights = load_base(name).model.state_dict()
    folded = fold(weights, load_adapter(tmp_path), 0.7)
    assert folded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, folded[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, weights[key]) for key, value in folded.items())

    # The served graphs give what open_clip gives with it.
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    preprocess = Preprocess.from_dict(release.facts["preprocess"])
    pixels = decode_pixels((tmp_path / "image.png").read_bytes(), preprocess)
    repository = tmp_path / "repository"
    spec = release.facts["tokenizer"]
    tokens = Tokenizer.load(repository / "classify" / "1" / "tokenizer.json", spec)(TEXTS)
    full = open_clip.get_tokenizer(f"local-dir:{release.merged}")(TEXTS)
    assert spec["dynamic_length"] == (family in CROPPED)
    assert np.array_equal(tokens, full[:, : tokens.shape[1]])
    with torch.no_grad():
        images = model.eval().encode_image(transform(image)[None], normalize=True)
        texts = model.encode_text(full, normalize=True)
    names: set[str] = set()
    for encoder, values, expected in (
        ("image_encoder", pixels[None], images),
        ("text_encoder", tokens, texts),
    ):
        path = repository / encoder / "1" / "model.onnx"
        np.testing.assert_allclose(EncoderGraph(path)(values), expected, atol=1e-5)
        graph = onnx.load(path).graph
        assert not {node.op_type for node in graph.node} & NOT_IN_TENSORRT
        names |= {tensor.name for tensor in graph.initializer}
    unused = ("logit_", "text_decoder.", "num_batches_tracked")
    assert {key for key in weights if not any(part in key for part in unused)} <= names


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_release_of_a_family_that_takes_any_alpha(
    family: str, export: Export, tmp_path: Path
) -> None:
    base = load_base(base_with_adapter(family, tmp_path))
    (release,) = export("dynamic", adapter=tmp_path)
    base.model.load_state_dict(fold(base.model.state_dict(), load_adapter(tmp_path), 0.7))
    repository = tmp_path / "repository"
    tokenizer = Tokenizer.load(
        repository / "classify" / "1" / "tokenizer.json", release.facts["tokenizer"]
    )
    alpha = np.full((len(TEXTS), 1), 0.7, np.float32)
    encoder = EncoderGraph(repository / "text_encoder" / "1" / "model.onnx")
    with torch.no_grad():
        expected = base.model.encode_text(base.tokenizer(TEXTS), normalize=True)  # type: ignore[operator]
    np.testing.assert_allclose(encoder(tokenizer(TEXTS), alpha), expected, atol=1e-5)


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
        compare(graph.name, encoder, Samples(inputs, references), TOLERANCES["fp32"])
