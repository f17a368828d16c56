"""α by depth and tower: folded, and in graphs with α as an input, against weights that are folded by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from radapter_export import ExportSettings, export_release
from radapter_export.graph import Graph
from radapter_serve.adapter import Adapter, Metadata, load_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.errors import RAdapterError
from radapter_serve.release.alpha_schedule import AlphaSchedule
from radapter_serve.runtimes.encoder import Encoder

BLOCKS = [0.25, 1.0]  # of two blocks, at depth 0.25


def by_hand(base: Base, adapter: Adapter, alpha: float) -> dict[str, Tensor]:
    """The tiny CLIP at alpha, depth 0.25 and half of alpha in the text tower, folded in float64."""
    folded = dict(base.model.state_dict())
    for tower, share in (("visual.", 1.0), ("", 0.5)):
        for block, factor in enumerate(BLOCKS):
            for layer in ("attn.out_proj", "mlp.c_proj"):
                key = f"{tower}transformer.resblocks.{block}.{layer}"
                change = alpha * share * factor * adapter.tensors[key].double()
                for name in (f"{key}.weight", f"{key}.bias"):
                    folded[name] = (folded[name].double() + change @ folded[name].double()).float()
    return folded


@torch.no_grad()
def test_a_release_and_its_checkpoint_have_the_alpha_of_each_layer(
    tiny_clip_dir: str, adapter_path: Path, dynamic_graphs: dict[str, Graph], tmp_path: Path
) -> None:
    settings = ExportSettings(
        model_repository=tmp_path / "repository", merged=tmp_path / "merged", alpha_depth=0.25, alpha_text=0.5
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("image", "text"):
            graph = dynamic_graphs[f"{name}_encoder"]
            patch.setattr(f"radapter_export.release.{name}_graph", lambda *_, graph=graph: graph)
        [release] = export_release(adapter_path, "dynamic", settings)
    base, adapter = load_base(tiny_clip_dir), load_adapter(adapter_path)
    merged = load_file(tmp_path / "merged" / "open_clip_model.safetensors")
    for name, value in by_hand(base, adapter, 0.5).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    for place in (tmp_path / "merged", tmp_path / "repository" / "classify" / "1"):
        facts = json.loads((place / "release.json").read_text(encoding="utf-8"))
        assert facts["alpha_schedule"] == {"depth": 0.25, "image": 1.0, "text": 0.5}
        assert facts["adapters"] == [{"digest": adapter.digest, "weight": 1.0}]
    assert release.release.alpha == 0.5
    tokens = base.tokenizer(["a cat", "many words about a dog"])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    alphas = [0.2, 1.0]  # each row's own
    folder = tmp_path / "repository"
    found = {
        name: Encoder(folder / name / "1" / "model.onnx")(values, np.array(alphas, np.float32)[:, None])
        for name, values in (("image_encoder", images), ("text_encoder", tokens.numpy().astype(np.int32)))
    }
    mean, std = (torch.tensor(base.preprocess[name])[:, None, None] for name in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    model = base.model
    for row, alpha in enumerate(alphas):
        model.load_state_dict(by_hand(load_base(tiny_clip_dir), adapter, alpha))
        image = F.normalize(model.encode_image(pixels[row : row + 1]), dim=-1)  # type: ignore[operator]
        text = F.normalize(model.encode_text(tokens[row : row + 1]), dim=-1)  # type: ignore[operator]
        np.testing.assert_allclose(found["image_encoder"][row], image[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(found["text_encoder"][row], text[0].numpy(), atol=1e-5)


def test_factors_rise_evenly_with_the_block() -> None:
    keys = [f"visual.transformer.resblocks.{block}.mlp.c_proj" for block in range(12)]
    texts = [f"text.transformer.encoder.layer.{block}.output.dense" for block in range(3)]
    factors = AlphaSchedule(depth=0.1, text=0.5).factors([*keys, *texts])
    assert [factors[key] for key in keys] == pytest.approx(np.linspace(0.1, 1, 12))
    assert [factors[key] for key in texts] == pytest.approx([0.05, 0.275, 0.5])
    assert set(AlphaSchedule().factors(keys).values()) == {1.0}


def test_low_rank_is_scaled_once(adapter_path: Path) -> None:
    tensors = {
        f"{key}.{name}": torch.randn(shape)
        for key in load_adapter(adapter_path).keys
        for name, shape in (("up", (64, 2)), ("down", (2, 64)))
    }
    adapter = Adapter(tensors, Metadata("x", "y", rank=2))
    scaled = adapter.scaled(AlphaSchedule(image=0.5, text=0.25))
    for key in adapter.keys:
        share = 0.5 if key.startswith("visual.") else 0.25
        torch.testing.assert_close(scaled.matrix(key), share * adapter.matrix(key))


def test_numbers_out_of_range() -> None:
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(RAdapterError, match=f"alpha-depth is {value}; allowed: 0 to 1"):
            ExportSettings(alpha_depth=value)
    with pytest.raises(RAdapterError, match="alpha-text is 2; allowed: 0 to 1"):
        ExportSettings(alpha_text=2)
