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
    """The loss over images, each repeated for its texts, against a loop over N images and N·k
    texts.
    """
    torch.manual_seed(0)
    count = 4
    several = 3
    scale = 20.0
    x = torch.randn(count, 5).double().requires_grad_()
    y = torch.randn(count * several, 5).double().requires_grad_()
    owner = torch.arange(count).repeat_interleave(several)
    cosines = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
    logits = scale * (cosines + delta * (owner != torch.arange(count)[:, None]))
    total = torch.zeros((), dtype=torch.float64)
    for text, image in enumerate(owner.tolist()):
        # An image's target is spread evenly over its texts, and a text has one image.
        total = total - logits[image].log_softmax(0)[text] / several / count / 2
        total = total - logits[:, text].log_softmax(0)[image] / len(owner) / 2
    total.backward()
    p = x.detach().float().requires_grad_()
    q = y.detach().float().requires_grad_()
    loss = mpm_nce(
        F.normalize(p, dim=-1).repeat_interleave(several, dim=0),
        F.normalize(q, dim=-1),
        owner,
        logit_scale=scale,
        delta=delta,
        epsilon=0.0,
    )
    loss.backward()
    assert loss.item() == pytest.approx(total.item() + np.log(several) / 2, rel=1e-5)
    for mine, expected in ((p, x), (q, y)):
        assert mine.grad is not None and expected.grad is not None
        torch.testing.assert_close(mine.grad, expected.grad.float(), rtol=1e-4, atol=1e-6)


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
def test_a_run_learns_and_its_validation_is_recall_of_the_folded_model(
    recipe: Recipe, captions_per_image: int
) -> None:
    run = train(dataclasses.replace(recipe, steps=30, captions_per_image=captions_per_image))
    losses = [row["loss"] for row in rows(run.folder) if "loss" in row]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    adapter = load_adapter(run)
    assert adapter.metadata.task == "retrieval"
    metrics = adapter.metadata.metrics
    assert metrics["text_retrieval_recall@1@alpha=1"] == 1  # plain colours
    val = load_captioned(recipe.val_data or "")
    texts = [(text, number) for number, image in enumerate(val.images) for text in image.captions]
    owner = torch.tensor([number for _, number in texts])
    expected = {}
    for alpha in (0.8, 1.0):
        base = load_base(recipe.architecture)
        model: Any = base.model
        model.load_state_dict(fold(model.state_dict(), adapter, alpha))
        _, _, preprocess = open_clip.create_model_and_transforms(recipe.architecture)
        images = [preprocess(val.image(val.table[image.row])) for image in val.images]
        with torch.no_grad():
            f = model.encode_image(torch.stack(images), normalize=True)
            g = model.encode_text(base.tokenizer([text for text, _ in texts]), normalize=True)
        to_image = (g @ f.T).argmax(1) == owner
        to_text = owner[(f @ g.T).argmax(1)] == torch.arange(len(f))
        expected[f"image_retrieval_recall@1@alpha={alpha:g}"] = to_image.float().mean().item()
        expected[f"text_retrieval_recall@1@alpha={alpha:g}"] = to_text.float().mean().item()
    assert metrics == pytest.approx(expected, abs=1e-4)


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
