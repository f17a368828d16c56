"""The base that is scored by sigmoids: what its loss teaches, and adapters that change bases."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.drawings.batches import Pairs
from radapter_serve.adapter import (
    Metadata,
    attach,
    attach_adapter,
    base_digest,
    load_adapter,
    save_adapter,
)
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, logit_scale_and_bias
from radapter_serve.training.loss import pairwise_sigmoid


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
    script: Any, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def heard(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments, named))
        return pairwise_sigmoid(*arguments, **named)

    monkeypatch.setattr(script, "pairwise_sigmoid", heard)
    script.sigmoid_base(pairs, 3, tmp_path / "base")
    assert len(asked) == 3
    for (images, texts, positive), named in asked:
        assert images.shape == (64, 128) and texts.shape == (32, 128) and named["delta"] == 0
        # two drawings of each name, one after the other
        assert positive.nonzero().tolist() == [[row, row // 2] for row in range(64)]
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
    script: Any, pairs: Pairs, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    script.sigmoid_base(pairs, 1, base)
    model = load_base(f"local-dir:{base / 'plain'}").model
    before = model.state_dict()
    adapters = attach(model)
    digest = base_digest(before, [site.key for site in adapters.sites])
    metadata = Metadata(
        architecture=f"local-dir:{base / 'plain'}", pretrained=None, base_digest=digest
    )
    path = tmp_path / "adapter.safetensors"
    save_adapter(adapters.adapter(metadata), path)
    moved = load_adapter(script.of_base(path, base))
    target = load_base(moved.metadata.architecture).model
    assert logit_scale_and_bias(target.state_dict())[1] is not None
    attach_adapter(target, moved, 1.0)  # refuses an adapter of another base


def test_figures_are_means_of_their_sets(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(alpha: float, shift: str, accuracy: float, ece: float) -> Any:
        metrics = {"acc1": accuracy, "ece": ece}
        return SimpleNamespace(alpha=alpha, shift=shift, metric="acc1", metrics=metrics)

    rows = [
        one
        for alpha in (0.5, 1.0)
        for one in (
            row(alpha, "id", 0.5 + alpha / 10, 0.2),
            row(alpha, "ood", 0.3, 0.1),
            row(alpha, "ood", 0.4, 0.3),
        )
    ]
    monkeypatch.setattr(script, "evaluate", lambda *_, **__: SimpleNamespace(rows=rows))
    found = script.judged(Path("adapter"), [0.5, 1.0], Path("DATA"), Path("out"))
    assert found[0.5] == pytest.approx([55, 20, 35, 20])
    assert found[1.0] == pytest.approx([60, 20, 35, 20])
