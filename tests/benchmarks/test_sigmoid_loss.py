"""The base that is scored by sigmoids: what its loss teaches, and adapters that change bases."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.drawings.batches import Pairs
from radapter_serve.adapter import (
    Metadata,
    attach,
    base_digest,
    fold,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, logit_scale_and_bias


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("sigmoid_loss")


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """Noise of 40 names."""
    count = 40
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (count, 48, 48, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    np.save(tmp_path / "pixels.npy", pixels)
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["set", "name", "words", "number", "style", "black", "split"])
        for number in range(count):
            words = f"thing {chr(97 + number % 26)}{chr(97 + number // 26)}"
            table.writerow(["hand", words, words, "", "", 0, "train"])
    return Pairs(tmp_path)


def test_the_base_has_a_bias_and_the_other_the_same_towers(
    script: Any, pairs: Pairs, tmp_path: Path
) -> None:
    script.sigmoid_base(pairs, 3, tmp_path / "base")
    base = load_base(f"local-dir:{tmp_path / 'base'}")
    plain = load_base(f"local-dir:{tmp_path / 'base' / 'plain'}")
    scale, bias = logit_scale_and_bias(base.model.state_dict())
    assert bias is not None and -10 < bias < -9.5  # it started from -10
    assert logit_scale_and_bias(plain.model.state_dict()) == (scale, None)
    pixels = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        found = encode_image(base.model, pixels)
        torch.testing.assert_close(found, encode_image(plain.model, pixels), rtol=0, atol=0)
        start = encode_image(load_base(f"local-dir:{script.BASE}").model, pixels)
    assert not torch.allclose(found, start, atol=1e-4)


def test_an_adapter_goes_to_the_base_with_the_same_towers(
    script: Any, tiny_clip_dir: str, tmp_path: Path
) -> None:
    base = load_base(tiny_clip_dir)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    adapters = attach(base.model)
    torch.manual_seed(0)
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter)
    digest = base_digest(before, [site.key for site in adapters.sites])
    metadata = Metadata(architecture="local-dir:plain", pretrained=None, base_digest=digest)
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapters.adapter(metadata), path)
    place = Path(tiny_clip_dir.removeprefix("local-dir:"))
    moved = load_adapter(script.of_base(path, place))
    assert moved.metadata.architecture == tiny_clip_dir
    folded = fold(before, moved, 1.0)
    key = f"{adapters.sites[0].key}.weight"
    matrix = adapters.named_tensors()[adapters.sites[0].key].detach()
    torch.testing.assert_close(folded[key], before[key] + matrix @ before[key])
