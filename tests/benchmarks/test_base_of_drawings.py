"""The training of the drawings' base: its parts against torch's and open_clip's own, and that it
goes on as it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from benchmarks import train_drawings_base as base
from benchmarks.drawings.augment import MEAN, PATCH, SIZE, STD, augment, inked, on_paper
from benchmarks.drawings.batches import Pairs, Words
from benchmarks.drawings.learning import KeptPatches, Muon, contrast
from benchmarks.drawings.pairs import COLUMNS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Drawings of noise under names that two sets have, and a set to validate with."""
    folder = tmp_path_factory.mktemp("pairs")
    names = ["star", "house", "home", "credit card", "arrow left", "moon"]
    rows = [
        [source, name, name, "", "", "1", split]
        for source, split in (("first", "train"), ("second", "train"), ("held", "validation"))
        for name in names
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (len(rows), SIZE, SIZE, 4)).astype(np.uint8)
    np.save(folder / "pixels.npy", np.minimum(pixels, pixels[..., 3:]))
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return folder


@pytest.fixture
def small(monkeypatch) -> None:
    """A model of two blocks."""
    monkeypatch.setitem(
        base.MODEL, "vision_cfg", {**base.MODEL["vision_cfg"], "width": 64, "layers": 1}
    )
    monkeypatch.setitem(
        base.MODEL, "text_cfg", {**base.MODEL["text_cfg"], "width": 64, "heads": 1, "layers": 1}
    )


def arguments(folder: Path, out: Path, **changes: object) -> argparse.Namespace:
    fields = {
        "pairs": folder,
        "out": out,
        "start": None,
        "steps": 4,
        "decay": 0,
        "names": 4,
        "class_share": 0.5,
    }
    fields |= {
        "patches": 8,
        "learning_rate": 1e-3,
        "warmup": 2,
        "average": 0.9,
        "bf16": True,
        "threads": 1,
        "seed": 0,
    }
    return argparse.Namespace(**{**fields, "measure_every": 1e9, "save_every": 1e9, **changes})


def weights(out: Path) -> dict[str, Any]:
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    return {
        **state["model"],
        **{f"average {name}": value for name, value in state["average"].items()},
    }


def test_names_that_mean_one_thing_are_one_name(folder):
    pairs = Pairs(folder)
    assert sorted(pairs.by_name) == ["arrow left", "credit card", "home", "moon", "star"]
    assert {source: len(rows) for source, rows in pairs.by_name["home"].items()} == {
        "first": 2,
        "second": 2,
    }
    assert len(pairs.validation["held"]) == 4  # the moon and the arrow are no classes
    assert [pairs.words[i] for i in np.flatnonzero(pairs.one_way)] == ["arrow left"] * 3


def test_a_batch_has_two_hands_and_one_caption_of_each_name(folder):
    pairs = Pairs(folder)
    draw = random.Random(0)
    for _ in range(20):
        rows, captions = pairs.batch(["home", "arrow left"], draw)
        assert [row // 6 for row in sorted(rows[:2].tolist())] == [0, 1]
        assert {pairs.words[row] for row in rows[:2].tolist()} <= {"home", "house"}
        assert captions[0].split()[-1] in ("home", "house") and captions[1].endswith("arrow left")


def test_tokens_are_open_clips_own():
    texts = ["a drawing of credit card", "an icon of t-shirt", "xylophone"]
    words = Words(set(texts))
    tokens = words(texts)
    theirs = open_clip.tokenize(texts)
    own = torch.tensor(words.used)[tokens]
    for row, (mine, other) in enumerate(zip(own, theirs, strict=True)):
        length = int(other.argmax()) + 1
        assert mine[:length].tolist() == other[:length].tolist(), texts[row]
    assert own.argmax(1).tolist() == theirs.argmax(1).tolist()  # where the tower pools


def test_contrast_is_clips_loss_where_each_caption_has_one_drawing():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(2, 8, 16), dim=-1)
    ours = contrast(images, texts, torch.tensor(20.0))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(images, texts, torch.tensor(20.0)))


def test_contrast_of_two_drawings_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = 2 * images @ texts.T
    rows = [-logits[i].log_softmax(0)[i // 2] for i in range(4)]
    columns = [-logits[:, i // 2].log_softmax(0)[i] for i in range(4)]
    torch.testing.assert_close(
        contrast(images, texts, torch.tensor(2.0)), sum(rows + columns) / torch.tensor(8.0)
    )


def test_muon_moves_as_torchs_own_does():
    torch.manual_seed(0)
    start = [torch.randn(12, 8), torch.randn(8, 20), torch.randn(12, 8)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    mine = Muon(ours, 0.01, momentum=0.95, decay=0.1)  # type: ignore[no-untyped-call]
    other = torch.optim.Muon(
        theirs, 0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for first, second in zip(ours, theirs, strict=True):
            first.grad = torch.randn_like(first)
            second.grad = first.grad.clone()
        mine.step()
        other.step()
    for before, first, second in zip(start, ours, theirs, strict=True):
        torch.testing.assert_close(
            first - before, second - before, atol=3e-4, rtol=0.05
        )  # torch's is in bfloat16


def test_patches_with_ink_are_looked_at():
    torch.manual_seed(0)
    pixels = torch.ones(1000, 3, SIZE, SIZE)
    pixels[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH : 2] = 0  # in the patch 1 · 6 + 2
    kept = inked(pixels, 6)
    assert kept.shape == (1000, 6) and all(len(set(row)) == 6 for row in kept.tolist())
    assert (kept == 8).any(1).float().mean() > 0.3  # 6 of 36 are a sixth
    assert kept.unique().numel() == 36  # the others are drawn, too


def test_only_kept_patches_go_through_the_tower():
    module = KeptPatches()
    x = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    module.index = torch.tensor([[3, 0], [1, 2]])
    torch.testing.assert_close(module(x), torch.stack([x[0, [0, 4, 1]], x[1, [0, 2, 3]]]))
    torch.testing.assert_close(module.eval()(x), x)


def test_a_drawing_on_paper_is_what_pillow_pastes():
    drawn = np.zeros((1, SIZE, SIZE, 4), np.uint8)
    drawn[:, :, :24] = (60, 30, 0, 120)
    pixels = (
        on_paper(torch.from_numpy(drawn)) * torch.tensor(STD)[:, None, None]
        + torch.tensor(MEAN)[:, None, None]
    )
    torch.testing.assert_close(pixels[0, :, 0, 0] * 255, torch.tensor([195.0, 165.0, 135.0]))
    torch.testing.assert_close(pixels[0, :, 0, 40], torch.ones(3))


def test_augmenting_leaves_the_drawing_visible_and_mirrors_no_arrow():
    torch.manual_seed(0)
    drawn = torch.zeros(64, SIZE, SIZE, 4, dtype=torch.uint8)
    drawn[:, 12:36, 6:18, 3] = 255  # a bar on the left
    black = torch.ones(64, dtype=torch.bool)
    pixels = augment(drawn, black, black)
    assert pixels.shape == (64, 3, SIZE, SIZE) and pixels.isfinite().all()
    assert (pixels.flatten(1).std(1) > 0.05).all()
    ink = (pixels - pixels[:, :, :1, -1:]).abs().sum(1)  # against the paper, top right
    columns = torch.arange(SIZE).float()
    centre = (ink.sum(1) * columns).sum(1) / ink.sum((1, 2))
    assert (centre < SIZE / 2).float().mean() > 0.95


def test_common_names_come_more_often_up_to_a_bound():
    by_name = {
        "rare": range(1),
        "known": range(4),
        "common": range(base.MOST_HANDS),
        "everywhere": range(99),
    }
    pool = base.Pool(SimpleNamespace(by_name=by_name), by_name.keys(), 1.0)  # type: ignore[arg-type]
    expected = {"rare": 1 / 45, "known": 4 / 45, "common": 20 / 45, "everywhere": 20 / 45}
    assert dict(zip(pool.names, pool.shares, strict=True)) == pytest.approx(expected)
    assert sorted(pool.draw(9, np.random.default_rng(0))) == [
        "common",
        "everywhere",
        "known",
        "rare",
    ]


@pytest.mark.slow
def test_a_run_goes_on_as_it_would_have(folder, small, tmp_path):
    base.train(arguments(folder, tmp_path / "whole"))
    base.train(arguments(folder, tmp_path / "parts", steps=2))
    base.train(arguments(folder, tmp_path / "parts"))
    torch.testing.assert_close(
        weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=0, rtol=0
    )
    curve = [
        json.loads(line)
        for line in (tmp_path / "parts" / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(point["step"], point["images"]) for point in curve] == [(2, 16), (4, 32)]
    assert (
        set(curve[-1]["accuracy"]) == {"mean", "held"}
        and (tmp_path / "parts" / "curve.png").is_file()
    )


def test_a_signal_ends_a_run_with_its_checkpoint(folder, small, tmp_path, monkeypatch):
    step = base.Training.one_step

    def and_signal(self: base.Training, rate: float) -> float:
        loss = step(self, rate)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(base.Training, "one_step", and_signal)
    base.train(arguments(folder, tmp_path, steps=-1))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["counts"][0] == 2


def test_decay_takes_the_rate_of_a_copy_to_zero(folder, small, tmp_path, monkeypatch):
    base.train(arguments(folder, tmp_path / "level"))
    before = weights(tmp_path / "level")
    rates: list[float] = []
    step = base.Training.one_step

    def and_note(self: base.Training, rate: float) -> float:
        rates.append(rate)
        return step(self, rate)

    monkeypatch.setattr(base.Training, "one_step", and_note)
    decay = arguments(
        folder, tmp_path / "down", start=tmp_path / "level" / "checkpoint.pt", steps=-1, decay=4
    )
    base.train(decay)
    assert rates == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(weights(tmp_path / "level"), before, atol=0, rtol=0)
    model: Any = open_clip.create_model(f"local-dir:{tmp_path / 'down' / 'base'}").eval()
    average = {
        name.removeprefix("average "): w
        for name, w in weights(tmp_path / "down").items()
        if "average" in name
    }
    torch.testing.assert_close(
        model.visual.conv1.weight, average["visual.conv1.weight"], atol=1e-3, rtol=1e-3
    )
    assert model.token_embedding.weight.shape[0] == 49408


def test_other_pairs_than_a_checkpoint_has_seen_are_refused(folder, small, tmp_path):
    base.train(arguments(folder, tmp_path, steps=1))
    other = tmp_path / "other"
    other.mkdir()
    (other / "pixels.npy").symlink_to(folder / "pixels.npy")
    table = (folder / "pairs.csv").read_text(encoding="utf-8")
    (other / "pairs.csv").write_text(table.replace("moon", "lithograph"), encoding="utf-8")
    with pytest.raises(SystemExit, match="other words"):
        base.train(arguments(other, tmp_path))
