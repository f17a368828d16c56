"""Other ways to keep the base: each distance by hand, and what a table of them chooses and says."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from radapter_serve.adapter import Adapters, attach
from radapter_serve.clip.base import Base, load_base
from radapter_serve.clip.towers import encode_image
from rivals.cells import read_lines
from rivals.preserve import (
    distance_of_mixed,
    distance_of_others,
    distance_of_similarities,
    main,
    random_tokens,
    ways,
)
from tests.helpers.by_hand import ClipWithAdapters
from tests.rivals.test_table import benchmark_file as benchmark_file
from tests.rivals.test_table import here as here


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's precision
    return Accelerator(cpu=True)


@pytest.fixture(params=["activation", "weight"])
def learned(request: pytest.FixtureRequest, tiny_clip_dir: str) -> tuple[Base, Adapters]:
    """A base with adapters of random values, in training."""
    base = load_base(tiny_clip_dir)
    adapters = attach(base.model, form=request.param)
    torch.manual_seed(0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    return base, adapters


def both(name: str, adapters: Adapters, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The images with the adapters and without, by hand."""
    clip = ClipWithAdapters(name, adapters.named_tensors())
    found = clip.images(pixels)
    with clip.at(0.0):
        return found, clip.images(pixels)


def size_of(base: Base) -> tuple[int, int]:
    """Height and width of what the base sees."""
    visual: Any = base.model.visual
    height, width = visual.image_size
    return height, width


def has_gradients(adapters: Adapters) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in adapters.parameters())


def test_similarities_are_to_the_texts_of_the_base(
    learned: tuple[Base, Adapters], tiny_clip_dir: str, accelerator: Accelerator
) -> None:
    base, adapters = learned
    pixels = torch.randn(5, 3, *size_of(base))
    embeds = encode_image(base.model, pixels)
    found = distance_of_similarities(base, adapters, accelerator, pixels, embeds)
    f, f0 = both(tiny_clip_dir, adapters, pixels)
    tokens = random_tokens(base)
    texts = F.normalize(ClipWithAdapters(tiny_clip_dir).model.encode_text(tokens), dim=-1)
    expected = ((f @ texts.T - f0 @ texts.T) ** 2).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert adapters.alpha == 1.0
    found.backward()
    assert has_gradients(adapters)


def test_random_texts_have_eight_tokens_that_the_base_knows(tiny_clip_dir: str) -> None:
    base = load_base(tiny_clip_dir)
    model: Any = base.model
    with torch.no_grad():
        model.token_embedding.weight[:40000] = 0
    tokens = random_tokens(base)
    start, _, end = base.tokenizer(["a"])[0, :3].tolist()
    assert len(tokens) == len(tokens.unique(dim=0)) == 80
    assert (tokens[:, 0] == start).all() and (tokens[:, 9] == end).all()
    assert tokens[:, 1:9].min() >= 40000 and not torch.isin(tokens[:, 1:9], tokens[0, [0, 9]]).any()
    assert not tokens[:, 10:].any()
    assert model.encode_text(tokens).isfinite().all()
    assert torch.equal(tokens, random_tokens(base))


@pytest.mark.parametrize(
    "distance", [distance_of_mixed, distance_of_others, distance_of_similarities]
)
def test_the_base_is_at_no_distance_from_itself_in_bf16(
    distance: Any, tiny_clip_dir: str, images: Path
) -> None:
    base = load_base(tiny_clip_dir)
    adapters = attach(base.model)
    if distance is distance_of_others:
        distance = functools.partial(distance_of_others, images)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    pixels = torch.randn(4, 3, *size_of(base))
    with torch.no_grad(), accelerator.autocast():
        embeds = encode_image(base.model, pixels)
    with torch.no_grad():
        found = distance(base, adapters, accelerator, pixels, embeds)
    assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_other_images_are_drawn_from_the_folder(
    learned: tuple[Base, Adapters], tiny_clip_dir: str, accelerator: Accelerator, tmp_path: Path
) -> None:
    base, adapters = learned
    for number in range(3):
        chance = torch.Generator().manual_seed(number)
        noise = torch.randint(256, (40, 40, 3), generator=chance, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{number}.png")
    pixels = torch.zeros(7, 3, *size_of(base))
    torch.manual_seed(2)
    found = distance_of_others(tmp_path, base, adapters, accelerator, pixels, torch.empty(0))
    torch.manual_seed(2)
    drawn = torch.randint(3, (7,)).tolist()
    clip = ClipWithAdapters(tiny_clip_dir)
    images = [clip.transform(Image.open(tmp_path / f"{number}.png")) for number in drawn]
    f, f0 = both(tiny_clip_dir, adapters, torch.stack(images))
    assert found.item() == pytest.approx((1 - F.cosine_similarity(f, f0)).mean().item(), abs=1e-5)
    found.backward()
    assert has_gradients(adapters)


def test_half_of_a_mixed_image_is_that_of_another(
    learned: tuple[Base, Adapters],
    tiny_clip_dir: str,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapters = learned
    height, width = size_of(base)
    torch.manual_seed(0)
    chance = torch.rand(2, 1, 4, 4)
    sizes = list[tuple[int, ...]]()

    def drawn(*size: int) -> Tensor:
        sizes.append(size)
        return chance

    monkeypatch.setattr(torch, "rand", drawn)
    monkeypatch.setattr(torch, "randperm", lambda _: torch.tensor([1, 0]))
    pixels = torch.randn(2, 3, height, width)
    found = distance_of_mixed(base, adapters, accelerator, pixels, torch.empty(0))
    assert sizes == [(2, 1, 4, 4)]
    mixed = pixels.clone()
    for down in range(height):
        for across in range(width):
            for number in range(2):
                if chance[number, 0, down * 4 // height, across * 4 // width] >= 0.5:
                    mixed[number, :, down, across] = pixels[1 - number, :, down, across]
    f, f0 = both(tiny_clip_dir, adapters, mixed)
    assert found.item() == pytest.approx((1 - F.cosine_similarity(f, f0)).mean().item(), abs=1e-5)
    found.backward()
    assert has_gradients(adapters)


@pytest.mark.slow
def test_validation_chooses_the_weight_and_alpha_of_each_way(
    benchmark_file: Path, here: list[str], images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags: list[Any] = ["--data", benchmark_file, "--unlabelled", images, "--out", out]
    assert main([*map(str, flags), "--seeds", "0", "1", "--rate", "3"]) == 0
    text = (out / "preserve.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == list(ways(images))
    lines = list(read_lines(out / "preserve.jsonl"))
    for name, weighed in ways(images).items():
        # each weight and seed is judged once by validation, and one weight by the test sets
        own = [line for line in lines if line.name == name]
        assert len(own) == 2 * len(weighed) + 2
        assert len({line.digest for line in own}) == len(own)
    assert all("'learning_rate': 0.0015" in line.method for line in lines)
    figures = {}
    for line in lines:
        of = {row.dataset: 100 * row.metrics["acc1"] for row in line.rows}
        if line.split == "test":
            shifts = (of["other"] + of["third"]) / 2
            figures[line.name, line.seed] = np.array([of["same"], shifts])
    heads = rows[0]
    for row in rows[2:]:
        own = np.stack([figures[row[0], seed] for seed in (0, 1)])
        found = [row[heads.index(head)].split(" ± ")[0] for head in ("in distribution", "shifts")]
        assert found == [f"{value:.1f}" for value in own.mean(axis=0)]
        if row is rows[2]:
            continue
        lead = (own - np.stack([figures["nothing", seed] for seed in (0, 1)])).mean(axis=0)
        ahead = [row[heads.index(f"lead, {head}")] for head in ("in distribution", "shifts")]
        assert [one.split(" ± ")[0] for one in ahead] == [f"{value:+.1f}" for value in lead]


def test_refuses_a_folder_without_images(
    benchmark_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = ["--data", str(benchmark_file), "--unlabelled", str(empty)]
    assert main(flags) == 2
    assert "holds no images" in capsys.readouterr().err
    shutil.rmtree(empty)
    assert main(flags) == 2
    assert "cannot read the folder" in " ".join(capsys.readouterr().err.split())
