"""Training with captions: the loss of several texts an image by hand, recall on the way, whole runs
that resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.data.captions import load_captioned
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, mpm_nce, train
from tests.helpers.by_hand import assert_same
from tests.helpers.short_run import rows, short_run

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 200, 40),
    "blue": (30, 40, 220),
    "grey": (120, 120, 120),
}
PHRASES = ("a {} square", "all is {} here", "the colour {}")


@pytest.fixture
def recipe(tiny_clip_dir: str, tmp_path: Path) -> Recipe:
    """16 images in four colours, three captions each, as rows."""
    generator = np.random.default_rng(0)
    rows = []
    for name, colour in COLOURS.items():
        for index in range(4):
            noise = generator.integers(-20, 20, (36, 36, 3))
            Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(
                tmp_path / f"{name}{index}.png"
            )
            rows += [(f"{name}{index}.png", phrase.format(name)) for phrase in PHRASES]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows[::12] + rows[1::12], columns=["image", "caption"]).to_csv(
        tmp_path / "val.csv", index=False
    )
    return short_run(
        tiny_clip_dir,
        tmp_path,
        task="retrieval",
        data=f"csv:{tmp_path}/rows.csv",
        val_data=f"csv:{tmp_path}/val.csv",
        alpha=0.8,
        epsilon=0.0,
        grad_clip=None,
    )


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_several_texts_an_image_by_hand(delta: float) -> None:
    """The loss over images that stand beside each of their texts against a loop over N images and
    N·k texts.
    """
    torch.manual_seed(0)
    count = 4
    several = 3
    scale = 20.0
    images = torch.randn(count, 5).double()
    texts = torch.randn(count * several, 5).double()
    x = images.clone().requires_grad_()
    y = texts.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    f = F.normalize(x, dim=-1)
    g = F.normalize(y, dim=-1)
    own = {i: range(i * several, (i + 1) * several) for i in range(count)}
    for i in range(count):  # an image's target is spread evenly over its texts
        logits = torch.stack(
            [scale * (f[i] @ g[t] + (0 if t in own[i] else delta)) for t in range(count * several)]
        )
        total = total - sum(logits.log_softmax(0)[t] for t in own[i]) / several / count / 2
    for t in range(count * several):  # a text has one image
        logits = torch.stack(
            [scale * (f[i] @ g[t] + (0 if t in own[i] else delta)) for i in range(count)]
        )
        total = total - logits.log_softmax(0)[t // several] / (count * several) / 2
    total.backward()
    p = images.float().requires_grad_()
    q = texts.float().requires_grad_()
    found = mpm_nce(
        F.normalize(p, dim=-1).repeat_interleave(several, dim=0),
        F.normalize(q, dim=-1),
        torch.arange(count).repeat_interleave(several),
        logit_scale=scale,
        delta=delta,
        epsilon=0.0,
    )
    found.backward()
    assert found.item() == pytest.approx(total.item() + np.log(several) / 2, rel=1e-5)
    torch.testing.assert_close(p.grad, x.grad.float(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    torch.testing.assert_close(q.grad, y.grad.float(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_the_first_loss_is_that_of_the_base(recipe: Recipe, captions_per_image: int) -> None:
    """One batch of everything: the loop's loss equals MPM-NCE over plain open_clip embeddings,
    element by element.
    """
    size = 16 if captions_per_image == 3 else 48
    recipe = dataclasses.replace(
        recipe,
        captions_per_image=captions_per_image,
        batch_size=size,
        steps=1,
        warmup_steps=0,
        crop_scale=1.0,
        val_data=None,
        drop=0.0,
    )
    (row,) = rows(train(recipe).folder)
    model, _, preprocess = open_clip.create_model_and_transforms(recipe.architecture)
    table = pd.read_csv(recipe.data.removeprefix("csv:"))
    folder = Path(recipe.data.removeprefix("csv:")).parent
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(folder / name)) for name in table["image"]])
        f = model.eval().encode_image(pixels, normalize=True)
        g = model.encode_text(
            open_clip.get_tokenizer(recipe.architecture)(list(table["caption"])), normalize=True
        )
    positive = torch.tensor([[a == b for b in table["image"]] for a in table["image"]])
    logits = model.logit_scale.exp() * (f @ g.T + recipe.delta * ~positive)
    ways = [logits.log_softmax(1)[positive].mean(), logits.T.log_softmax(1)[positive].mean()]
    assert row["loss"] == pytest.approx(
        -sum(ways).item() / 2, rel=2e-2
    )  # crops resize a little differently


@pytest.mark.parametrize("captions_per_image", [1, 2])
def test_a_run_learns_to_find_captions(recipe: Recipe, captions_per_image: int) -> None:
    out = train(dataclasses.replace(recipe, steps=30, captions_per_image=captions_per_image)).folder
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    adapter = load_adapter(out)
    assert adapter.metadata.task == "retrieval"
    names = {
        f"{way}_retrieval_recall@1@alpha={alpha}"
        for way in ("image", "text")
        for alpha in ("0.8", "1")
    }
    assert set(adapter.metadata.metrics) == names
    assert adapter.metadata.metrics["text_retrieval_recall@1@alpha=1"] == 1  # plain colours


def test_validation_is_recall_of_the_folded_model(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, steps=4)
    adapter = load_adapter(train(recipe))
    val = load_captioned(recipe.val_data or "")
    for alpha in (0.8, 1.0):
        base = load_base(recipe.architecture)
        model: Any = base.model
        model.load_state_dict(fold(model.state_dict(), adapter, alpha))
        _, _, preprocess = open_clip.create_model_and_transforms(recipe.architecture)
        texts = [
            (text, number) for number, image in enumerate(val.images) for text in image.captions
        ]
        with torch.no_grad():
            pixels = torch.stack(
                [preprocess(val.image(val.table[image.row])) for image in val.images]
            )
            f = model.encode_image(pixels, normalize=True)
            g = model.encode_text(base.tokenizer([text for text, _ in texts]), normalize=True)
        owner = torch.tensor([number for _, number in texts])
        to_image = ((g @ f.T).argmax(1) == owner).float().mean().item()
        to_text = (owner[(f @ g.T).argmax(1)] == torch.arange(len(f))).float().mean().item()
        found = adapter.metadata.metrics
        assert found[f"image_retrieval_recall@1@alpha={alpha:g}"] == pytest.approx(
            to_image, abs=1e-4
        )
        assert found[f"text_retrieval_recall@1@alpha={alpha:g}"] == pytest.approx(to_text, abs=1e-4)


@pytest.mark.parametrize(
    "change", [{}, {"captions_per_image": 2, "accumulate": 2}, {"streaming": True}]
)
def test_a_killed_run_resumes_to_the_same_result(
    recipe: Recipe, assert_resumes: Callable[[Recipe, int], None], change: dict[str, Any]
) -> None:
    assert_resumes(dataclasses.replace(recipe, val_data=None, **change), 6)


@pytest.mark.slow
@pytest.mark.parametrize("captions_per_image", [1, 2])
def test_two_processes_train_to_the_same_adapter_as_one(
    recipe: Recipe, tmp_path: Path, train_in_two_processes: Any, captions_per_image: int
) -> None:
    recipe = dataclasses.replace(recipe, captions_per_image=captions_per_image)
    one = load_adapter(train(recipe))
    train_in_two_processes(recipe, tmp_path / "two")
    two = load_adapter(tmp_path / "two")
    assert two.metadata.metrics == one.metadata.metrics
    assert_same(two.tensors, one.tensors)


def test_broken_images_and_rows_without_captions(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "red0.png").write_bytes(b"no image")
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("red1.png,\n")
    with pytest.raises(RAdapterError, match=r"row 49 of .* has no text in 'caption'"):
        train(recipe)
    out = train(dataclasses.replace(recipe, on_broken="skip", out=tmp_path / "skipped")).folder
    broken = (out / "broken.txt").read_text()
    assert "red0.png can't be read: 8 bytes are not an image\n" in broken and "row 49 of" in broken
    assert load_adapter(out).metadata.metrics  # the broken image is in the validation data too


def test_images_in_another_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "rows.csv").rename(tmp_path / "tables" / "rows.csv")
    data = f"csv:{tmp_path}/tables/rows.csv"
    with pytest.raises(RAdapterError, match="can't be read"):
        train(dataclasses.replace(recipe, data=data, val_data=None, steps=1, warmup_steps=0))
    other = dataclasses.replace(
        recipe, data=data, val_data=None, steps=1, warmup_steps=0, out=tmp_path / "other"
    )
    assert train(dataclasses.replace(other, images=tmp_path)).adapter.exists()
