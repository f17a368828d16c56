"""Adapters on projections: trained with embeddings that are made once, and chosen by
cross-validation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from radapter_serve.adapter import Adapter, average_adapters, fold, load_adapter, save_adapter
from radapter_serve.adapter.tuned import towers_of
from radapter_serve.cli.eval import main as eval_command
from radapter_serve.cli.train import main
from radapter_serve.clip import towers
from radapter_serve.clip.base import load_base
from radapter_serve.clip.towers import encode_image, encode_text
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.alpha_choice import Choice, read_choice
from radapter_serve.evaluation.rows import hardly_known
from radapter_serve.evaluation.start import evaluate
from radapter_serve.index.build import build, build_from_embeddings
from radapter_serve.training import Recipe, embedding, mpm_nce, projection, train
from radapter_serve.training.embedding import Vectors
from radapter_serve.training.projection import (
    ALPHAS,
    FOLDS,
    choose,
    cross_validate,
    folds_of,
    judge,
    learn,
    moved,
)
from tests.conftest import export_into
from tests.helpers.by_hand import mpm_nce_by_hand, pairwise_by_hand
from tests.helpers.indexes import index_facts, write_index_facts
from tests.helpers.small_models import make_base
from tests.training.test_several_labels import several
from tests.training.test_wiring import captioned

FIELDS: dict[str, Any] = {
    "adapt": "text-projection",
    "batch_size": 16,
    "steps": 40,
    "learning_rate": 1e-2,
    "drop": 0.0,
    "workers": 0,
}


@pytest.fixture
def recipe(tiny_clip_dir: str, images: Path, tmp_path: Path) -> Recipe:
    out = tmp_path / "runs" / "first"
    return Recipe(architecture=tiny_clip_dir, data=f"imagefolder:{images}", out=out, **FIELDS)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of images that are embedded."""
    sizes: list[int] = []

    def count(model: Any, pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return encode_image(model, pixels)

    monkeypatch.setattr(towers, "encode_image", count)
    return sizes


def chosen(run: Any) -> Choice:
    """The choice of α in a run's folder."""
    return read_choice(Path(run), load_adapter(run).digest)


def by_open_clip(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Embeddings of the images of class folders, in order, and of their classes' prompts."""
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    paths = sorted(folder.glob("*/*.png"))
    names = sorted({path.parent.name for path in paths})
    texts = open_clip.get_tokenizer(name)([f"a photo of a {name}." for name in names])
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(path)) for path in paths])
        return (
            model.encode_image(pixels, normalize=True),
            model.encode_text(texts, normalize=True),
        )


def test_a_run_learns_and_leaves_what_other_commands_read(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe, progress=True)
    adapter = load_adapter(run)
    assert adapter.keys == ["text_projection"]
    files = {"adapter.safetensors", "alpha.json", "embeddings", "recipe.yaml"}
    assert {path.name for path in run.folder.iterdir()} == files
    choice = chosen(run)
    assert choice.alpha == adapter.metadata.alpha == run.recipe.alpha > 0
    assert [point.alpha for point in choice.curve] == list(ALPHAS)
    assert run.metrics[f"acc1@alpha={choice.alpha:g}"] > 0.9 > run.metrics["acc1@alpha=0"]
    assert choice.curve[0].score == pytest.approx(run.metrics["acc1@alpha=0"], abs=1e-4)
    stored_recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert stored_recipe == adapter.metadata.recipe
    printed = capsys.readouterr().out
    for words in ("embedding 24 images", "chose alpha ", "next: radapter-export"):
        assert words in printed

    # `radapter-eval --alpha auto` takes the choice, and draws it.
    picture = tmp_path / "new" / "validation.png"
    command = ["--adapter", str(run.folder), "--alpha", "auto", "--out", str(picture.parent)]
    assert eval_command(command) == 0
    assert [*picture.parent.iterdir()] == [picture]
    printed = capsys.readouterr().out
    assert f"Next:   radapter-export --adapter {run.folder} --alpha auto" in printed
    assert "results.jsonl" not in printed and "--no-resume" not in printed
    assert f"read {run.folder / 'alpha.json'}: the run chose alpha with cross" in printed
    assert [line for line in printed.splitlines() if line.startswith("wrote")] == [
        f"wrote {picture}"
    ]
    # On test data it measures what the folded model does.
    evaluation = evaluate(run, "auto", data=recipe.data, out=tmp_path / "results")
    assert evaluation.chosen_alpha == choice.alpha
    assert evaluation.choice_read == run.folder / "alpha.json"
    assert evaluation.choice_read not in evaluation.files
    rows = {row.alpha: row.metrics["acc1"] for row in evaluation.rows}
    assert rows.keys() == {0.0, choice.alpha, choice.best}
    base = load_base(recipe.architecture)
    images, _ = by_open_clip(recipe.architecture, Path(recipe.data.partition(":")[2]))
    state = base.model.state_dict()
    base.model.load_state_dict(fold(state, adapter, choice.alpha))
    with torch.no_grad():
        prompts = [f"a photo of a {name}." for name in ("blue", "green", "red")]
        texts = encode_text(base.model, base.tokenizer(prompts))
    right = (images @ texts.T).argmax(dim=1) == torch.arange(24) // 8
    assert rows[choice.alpha] == pytest.approx(float(right.float().mean()))
    assert rows[choice.alpha] == 1.0


@pytest.mark.parametrize("adapt", ["text-projection", "projections"])
@pytest.mark.parametrize("siglip", [False, True])
def test_training_is_as_by_hand(
    adapt: str,
    siglip: bool,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All images and words in each step, so that no draw matters."""
    words = ("chair", "lamp", "river")
    monkeypatch.setattr(embedding, "vocabulary", lambda classes: words)
    name = recipe.architecture
    if siglip:  # its image tower has no linear last layer
        name = make_base("siglip", tmp_path / "base")
    fields: dict[str, Any] = {"steps": 9, "warmup_steps": 2, "momentum": 0.6, "delta": 0.1}
    fields |= {"epsilon": 0.1, "grad_clip": 0.5, "preserve": 2.0, "preserve_words": 3.0}
    fields |= {"batch_size": 24, "weight_decay": 0.1, "partial": True}
    recipe = dataclasses.replace(recipe, architecture=name, adapt=adapt, **fields)  # type: ignore[arg-type]
    adapter = load_adapter(train(recipe))

    f, g = by_open_clip(name, Path(recipe.data.partition(":")[2]))
    model, _, _ = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        w = model.eval().encode_text(open_clip.get_tokenizer(name)(list(words)), normalize=True)
    scale = float(model.logit_scale.detach().exp())
    right = torch.arange(24)[:, None] // 8 == torch.arange(3)
    sides = ["text"] if adapt == "text-projection" or siglip else ["text", "image"]
    width = f.shape[1]
    maps = {side: torch.zeros(width, width, requires_grad=True) for side in sides}
    averages = {side: torch.zeros(width, width) for side in sides}

    def move(side: str, v: Tensor) -> Tensor:
        return F.normalize(v + v @ maps[side].T, dim=1) if side in maps else v

    optimizer = torch.optim.AdamW(maps.values(), weight_decay=0.1)
    for step in range(9):
        rate = 1e-2 * (step + 1) / 2
        if step >= 2:
            rate = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * (step - 2) / 7)) / 2
        optimizer.param_groups[0]["lr"] = rate
        x, t, n = move("image", f), move("text", g), move("text", w)
        if siglip:
            bias = float(model.logit_bias.detach())
            loss = pairwise_by_hand(x, t, right, scale, bias, 0.1, 0.1)
        else:
            loss = mpm_nce_by_hand(x, t, right, scale, 0.1, 0.1)
        p = torch.softmax(scale * f @ w.T, dim=1)
        q = torch.softmax(scale * x @ n.T, dim=1)
        loss = loss + 3 * (p * (p.log() - q.log())).sum(dim=1).mean()
        if "image" in maps:
            loss = loss + 2 * (1 - (x * f).sum(dim=1)).mean()
        loss = loss + 2 * (1 - (n * w).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(maps.values(), 0.5)
        optimizer.step()
        with torch.no_grad():
            for side in sides:
                averages[side] = 0.6 * averages[side] + 0.4 * maps[side]
    keys = {"text": "text.text_projection" if siglip else "text_projection", "image": "visual.proj"}
    assert adapter.keys == sorted(keys[side] for side in sides)
    for side in sides:
        torch.testing.assert_close(adapter.matrix(keys[side]), averages[side], rtol=1e-3, atol=2e-5)


def test_images_are_embedded_once_and_again_if_they_change(
    recipe: Recipe, images: Path, tmp_path: Path, counted: list[int]
) -> None:
    first = load_adapter(train(recipe))
    assert sum(counted) == 24
    counted.clear()
    second_recipe = dataclasses.replace(recipe, out=tmp_path / "runs" / "second")
    assert load_adapter(train(second_recipe)).digest == first.digest
    assert counted == []
    # Another image, another precision, and a part that is damaged.
    Image.new("RGB", (9, 9), "white").save(images / "red" / "0.png")
    train(dataclasses.replace(recipe, out=tmp_path / "runs" / "third"))
    assert sum(counted) == 1
    counted.clear()
    train(dataclasses.replace(recipe, out=tmp_path / "runs" / "fifth", precision="bf16"))
    assert sum(counted) == 24
    counted.clear()
    for part in tmp_path.glob("runs/*/embeddings/*.npz"):
        part.write_bytes(part.read_bytes()[:100])
    train(dataclasses.replace(recipe, out=tmp_path / "runs" / "sixth"))
    assert sum(counted) == 24


def test_an_interrupted_run_goes_on_where_it_stopped(
    recipe: Recipe, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_IMAGES", 5)
    count = towers.encode_image

    def stopped(model: Any, pixels: Tensor) -> Tensor:
        if len(counted) == 2:
            raise KeyboardInterrupt
        embeds: Tensor = count(model, pixels)
        return embeds

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(towers, "encode_image", stopped)
        train(recipe)
    assert counted == [5, 5]
    assert recipe.out is not None and not (recipe.out / "adapter.safetensors").exists()
    run = train(resume=recipe.out)
    assert sum(counted) == 24
    assert load_adapter(run).metadata.classes == ["blue", "green", "red"]


@pytest.fixture
def table(tiny_clip_dir: str, images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The embeddings of the images, of any length, and their rows."""
    vectors, _ = by_open_clip(tiny_clip_dir, images)
    np.save(tmp_path / "vectors.npy", 3 * vectors.numpy())
    labels = [name for name in ("blue", "green", "red") for _ in range(8)]
    names = [f"{number}.png" for number in range(24)]
    pd.DataFrame({"image": names, "label": labels}).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "vectors.npy", tmp_path / "rows.parquet"


def test_embeddings_of_ones_own_train_the_same_without_images(
    recipe: Recipe, table: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_adapter(train(recipe))
    monkeypatch.setattr(towers, "encode_image", None)
    out = tmp_path / "other"
    run = train(dataclasses.replace(recipe, data="", embeddings=table[0], rows=table[1], out=out))
    adapter = load_adapter(run)
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name], rtol=1e-3, atol=1e-4)
    assert chosen(run).alpha == chosen(recipe.out or "").alpha
    for field in ("classes", "base_digest", "text_tower"):
        assert getattr(adapter.metadata, field) == getattr(expected.metadata, field)


def spoiled(kind: str, vectors: NDArray[Any]) -> NDArray[Any]:
    """The vectors with something wrong."""
    if kind == "narrow":
        return vectors[:, :-1]
    if kind == "few":
        return vectors[:-1]
    if kind == "whole numbers":
        return vectors.astype(int)
    if kind == "objects":
        return vectors.astype(object)
    vectors[5] = {"zero": 0, "nan": np.nan, "infinite": np.inf}[kind]
    return vectors


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "narrow",
            r"vectors\.npy have the width 31, and the embeddings of .* have 32; name .* --base",
        ),
        (
            "few",
            r"rows\.parquet has 24 rows, and .*vectors\.npy 23 vectors; allowed: .* with --rows",
        ),
        (
            "whole numbers",
            r"vectors\.npy are int64 \[24, 32\]; allowed: .* floats \[N, D\], as numpy",
        ),
        (
            "objects",
            r"vectors\.npy: it holds Python objects, .* never unpickled; allowed: .* as numpy",
        ),
        ("gone", r"vectors\.npy: No such file or directory; allowed: .* as numpy"),
        ("zero", r"vectors\.npy, row 5: .* its length is 0; allowed: .* embed this image again"),
        ("nan", r"vectors\.npy, row 5: .* its length is nan; allowed: .* embed this image again"),
        (
            "infinite",
            r"vectors\.npy, row 5: .* its length is inf; allowed: .* embed this image again",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    kind: str, words: str, recipe: Recipe, table: tuple[Path, Path]
) -> None:
    vectors = np.load(table[0])
    table[0].unlink()
    if kind != "gone":
        np.save(table[0], spoiled(kind, vectors), allow_pickle=True)
    with pytest.raises(RAdapterError, match=words) as error:
        train(dataclasses.replace(recipe, data="", embeddings=table[0], rows=table[1]))
    assert "\n" not in str(error.value)
    assert recipe.out is not None and not recipe.out.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows": Path("rows.parquet")}, "embeddings and rows belong together"),
        ({"embeddings": Path("v.npy")}, "embeddings and rows belong together"),
        ({"learning_rate": "auto"}, "learning_rate is 'auto'; it should be a valid number"),
        ({"adapt": "towers", "data": "index:x"}, "data is index:x; it is for adapters on a proj"),
        ({"data": "index:x", "val_fraction": 0.2}, "val_fraction is 0.2; embeddings are judged"),
        ({"negative_classes": 5}, "negative_classes is 5; adapt text-projection has in each step"),
        ({"accumulate": 2}, "accumulate is 2; adapt text-projection has in each step all classes"),
        ({"precision": "fp16"}, "precision is fp16; .* embeds with auto, no or bf16"),
        (
            {"embeddings": Path("v.npy"), "rows": Path("r.csv"), "data": "imagefolder:photos"},
            "data is imagefolder:photos; --rows r.csv names the data already; leave --data out",
        ),
        ({"task": "segmentation"}, "task is segmentation; adapt text-projection is trained with"),
        ({"adapt": "text"}, "adapt is 'text'; it should be 'towers', 'image-tower'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(
    fields: dict[str, Any], words: str, recipe: Recipe
) -> None:
    with pytest.raises(RAdapterError, match=words):
        dataclasses.replace(recipe, **fields).check()


def test_an_index_trains_for_the_model_that_made_it_alone(
    recipe: Recipe, images: Path, exported_tiny_clip: Path, tmp_path: Path
) -> None:
    """Two releases of one adapter, at two alphas."""
    loaded = load_release(exported_tiny_clip / "model_repository", 1)
    labels = [path.parent.name for path in sorted(images.glob("*/*.png"))]
    paths = [str(path) for path in sorted(images.glob("*/*.png"))]
    pd.DataFrame({"image": paths, "label": labels}).to_csv(tmp_path / "rows.csv", index=False)
    build(f"csv:{tmp_path}/rows.csv", tmp_path / "index", loaded)
    merged = {
        alpha: f"local-dir:{exported_tiny_clip / 'merged' / f'alpha-{alpha:g}'}"
        for alpha in (0.3, 0.8)
    }
    of_index = dataclasses.replace(recipe, data=f"index:{tmp_path}/index")
    run = train(dataclasses.replace(of_index, architecture=merged[0.3]))
    adapter = load_adapter(run)
    expected = load_adapter(
        train(dataclasses.replace(recipe, architecture=merged[0.3], out=tmp_path / "by-images"))
    )
    for name, tensor in adapter.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name], rtol=0.05, atol=2e-3)
    for other in (merged[0.8], recipe.architecture):
        out = tmp_path / "refused"
        with pytest.raises(RAdapterError, match="made by another model: release 1 of .* alpha 0.3"):
            train(dataclasses.replace(of_index, architecture=other, out=out))
    facts = index_facts(tmp_path / "index")
    mapped = {"release": facts["plan"]["release"], "sample": 100, "by_image": 1, "by_text": 1}
    write_index_facts(tmp_path / "index", {**facts, "mapped": mapped})
    with pytest.raises(
        RAdapterError, match="is mapped, .*; embed its images: radapter-index build"
    ):
        train(dataclasses.replace(of_index, out=tmp_path / "refused"))
    write_index_facts(tmp_path / "index", facts)
    words = "has no column 'colour'; its columns: .*, label; see --label-column"
    with pytest.raises(RAdapterError, match=words):
        train(dataclasses.replace(of_index, label_column="colour", out=tmp_path / "refused"))
    # Without the release nothing can be compared, and the run says so.
    build_of_nowhere(loaded, tmp_path)
    of_nowhere = dataclasses.replace(
        of_index,
        data=f"index:{tmp_path}/moved",
        architecture=merged[0.3],
        out=tmp_path / "moved-run",
    )
    notes = train(of_nowhere).notes
    words = "can't be loaded .* so nothing says that its embeddings are of"
    assert any(re.search(words, note) for note in notes)


def test_an_index_of_another_image_tower_is_refused_though_its_texts_are_the_same(
    recipe: Recipe,
    images: Path,
    random_adapter: Callable[..., Adapter],
    common: Path,
    tmp_path: Path,
) -> None:
    """Release 1 is the base, and release 2 has another projection of the images."""
    adapter = random_adapter(scale=0.5, adapt="image-projection")
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    export_into(tmp_path, common, tmp_path / "adapter.safetensors", (0.0, 0.5))
    merged = f"local-dir:{tmp_path / 'merged' / 'alpha-0.5'}"
    pd.DataFrame(
        [{"image": str(path), "label": path.parent.name} for path in images.glob("*/*.png")]
    ).to_csv(tmp_path / "rows.csv", index=False)
    settings = []
    for version in (1, 2):
        loaded = load_release(tmp_path / "model_repository", version)
        build(f"csv:{tmp_path}/rows.csv", tmp_path / f"index-{version}", loaded)
        data = f"index:{tmp_path}/index-{version}"
        settings.append(dataclasses.replace(recipe, data=data, steps=2))
    of_base, of_merged = settings

    for other in (dataclasses.replace(of_base, architecture=merged), of_merged):
        words = "made by another model: .* whose images are not those of"
        with pytest.raises(RAdapterError, match=words):
            train(dataclasses.replace(other, out=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    train(dataclasses.replace(of_base, out=tmp_path / "runs" / "base"))
    train(dataclasses.replace(of_merged, architecture=merged, out=tmp_path / "runs" / "merged"))

    # The checkpoint may have been exported again, as a base; here that release is not at hand.
    facts = index_facts(tmp_path / "index-2")
    tower = towers_of(load_base(merged).model, {})["image_tower"]
    facts["plan"]["origin"] = {"model_repository": str(tmp_path / "gone")}
    facts["plan"]["release"] |= {"image_tower": dataclasses.asdict(tower), "alpha": 0.0}
    write_index_facts(tmp_path / "index-2", facts)
    again = dataclasses.replace(of_merged, architecture=merged, out=tmp_path / "runs" / "again")
    assert any("can't be loaded" in note for note in train(again).notes)


def build_of_nowhere(loaded: Any, folder: Path) -> None:
    """An index of embeddings, by a release whose folder is gone."""
    generator = np.random.default_rng(0)
    np.save(folder / "v.npy", generator.standard_normal((12, 32)))
    names = [f"{number}.png" for number in range(12)]
    rows = pd.DataFrame({"image": names, "label": ["a", "b", "c"] * 4})
    rows.to_parquet(folder / "r.parquet")
    loaded.origin = {"model_repository": str(folder / "gone")}
    build_from_embeddings(folder / "v.npy", folder / "r.parquet", folder / "moved", loaded)


def test_captions_and_several_labels(recipe: Recipe, tmp_path: Path) -> None:
    data, pairs = captioned(tmp_path / "captions", 12, 3)
    run = train(dataclasses.replace(recipe, data=data, task="retrieval", out=tmp_path / "a"))
    best = max(run.metrics.values())
    assert run.metrics["image_retrieval_recall@1@alpha=0"] <= best <= 1
    assert load_adapter(run).metadata.classes is None
    count = sum(len(pair.texts) for pair in pairs)
    assert chosen(run).sets["cross-validation"].n == count
    two = dataclasses.replace(
        recipe, data=data, task="retrieval", captions_per_image=2, out=tmp_path / "b"
    )
    assert load_adapter(train(two)).keys == ["text_projection"]
    labels, _ = several(tmp_path / "several", "text")
    run = train(dataclasses.replace(recipe, data=labels, label_separator=";", out=tmp_path / "c"))
    assert set(run.metrics) == {f"acc1@alpha={alpha:g}" for alpha in ALPHAS}


def test_one_image_a_class_has_no_folds(
    recipe: Recipe, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in images.glob("*/[1-9].png"):
        path.unlink()
    run = train(recipe, progress=True)
    assert "none are held out: alpha 0.5 was not chosen" in capsys.readouterr().out
    assert any("too few images share their class" in note for note in run.notes)
    assert load_adapter(run).metadata.alpha == 0.5 and run.metrics == {}
    assert not (run.folder / "alpha.json").exists()


def test_the_only_image_of_a_class_is_trained_with_and_the_run_says_so(
    recipe: Recipe, images: Path
) -> None:
    for path in images.glob("red/[1-9].png"):
        path.unlink()
    run = train(recipe)
    assert chosen(run).sets["cross-validation"].n == 16
    assert any(
        note.startswith("note: 1 images, such as the only one of a class") for note in run.notes
    )


def test_held_out_images_are_not_trained_with(recipe: Recipe) -> None:
    run = train(dataclasses.replace(recipe, val_fraction=0.25))
    metadata = load_adapter(run).metadata
    assert metadata.held_out is not None
    assert run.metrics.keys() == {f"acc1@alpha={alpha:g}" for alpha in {chosen(run).alpha, 1.0}}
    assert chosen(run).sets["cross-validation"].n == 18


def vectors_of(labels: list[int], width: int = 8, noise: float = 0.0) -> Vectors:
    """Images near the axis of their class, whose texts are other axes."""
    generator = torch.Generator().manual_seed(0)
    count = max(labels) + 1
    images = torch.eye(width)[torch.tensor(labels)]
    images = F.normalize(images + noise * torch.randn(images.shape, generator=generator), dim=1)
    texts = torch.eye(width)
    texts[:count] = texts[:count].roll(1, dims=0)
    return Vectors(
        images=images,
        owners=torch.tensor(labels)[:, None],
        texts=texts,
        texts_of=[[number] for number in range(count)],
        names=[[number] for number in range(count)],
        words=texts[-2:],
        nouns=texts[-3:],
        of_classes=True,
    )


def test_scores_are_calibrated_by_images_that_were_not_trained_with(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least score of a search keeps 95 % of the images, each scored by a run without it, which
    is the run that cross-validation judged.
    """
    trained: list[int] = []

    def counted_learn(vectors: Vectors, parts: Any, *args: Any, **fields: Any) -> Any:
        trained.extend(map(len, parts))
        return learn(vectors, parts, *args, **fields)

    monkeypatch.setattr(projection, "learn", counted_learn)
    folder = tmp_path / "many"
    dice = np.random.default_rng(5)
    for number in range(120):
        path = folder / ("red", "blue")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = dice.integers(0, 120, (8, 8, 3), dtype=np.uint8)
        pixels[..., 0 if number % 2 == 0 else 2] += 100
        Image.fromarray(pixels).save(path)
    run = train(dataclasses.replace(recipe, data=f"imagefolder:{folder}"))
    assert trained == [80] * FOLDS + [120]
    adapter = load_adapter(run)
    confidence = adapter.metadata.confidence
    assert confidence is not None
    assert (confidence["n"], confidence["classes"]) == (120, 2)
    assert confidence["dataset"] == "cross-validation"

    # By hand, with the adapter of all images, which scores an image about as the runs without it.
    images, texts = by_open_clip(recipe.architecture, folder)
    matrix = adapter.matrix("text_projection")
    moved = F.normalize(texts + adapter.metadata.alpha * texts @ matrix.T, dim=-1)
    class_scores = (images @ moved.T)[torch.arange(120), torch.arange(120) // 60]
    assert confidence["min_score"] == pytest.approx(class_scores.quantile(0.05).item(), abs=0.05)
    assert average_adapters([adapter, adapter]).metadata.confidence is None

    few = train(dataclasses.replace(recipe, out=tmp_path / "runs" / "few"))
    assert load_adapter(few).metadata.confidence is None
    assert any("100 images are needed" in note for note in few.notes)


def test_folds_have_a_share_of_each_class() -> None:
    labels = [0] * 9 + [1] * 6 + [2] * 2 + [3]
    folds = folds_of(vectors_of(labels), 0)
    for label, size in ((0, 3), (1, 2)):
        counts = np.bincount(folds[np.array(labels) == label], minlength=FOLDS)
        assert counts.tolist() == [size] * FOLDS
    assert len(set(folds[15:17])) == 2 and folds[17] == -1
    captions = dataclasses.replace(vectors_of(list(range(7))), of_classes=False)
    assert sorted(folds_of(captions, 0)) == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("of_classes", [True, False])
def test_each_fold_is_judged_by_a_run_without_it(recipe: Recipe, of_classes: bool) -> None:
    """And the runs of all folds at once have the steps that each would have alone."""
    vectors = vectors_of([0, 1, 2] * 9 if of_classes else list(range(8)), width=12, noise=0.2)
    vectors = dataclasses.replace(vectors, of_classes=of_classes)
    recipe = dataclasses.replace(recipe, batch_size=4, grad_clip=0.1, preserve=1.0)
    if of_classes:  # of all images of a run, no order matters
        recipe = dataclasses.replace(recipe, batch_size=64)
    train = partial(learn, sides=["text", "image"], scale=10.0, loss=partial(mpm_nce, delta=0.1))
    folds = cross_validate(vectors, recipe, train)
    number_of = folds_of(vectors, recipe.seed)
    assert sorted(np.concatenate([each.held_out for each in folds])) == [*range(len(number_of))]
    for number, each in enumerate(folds):
        assert set(each.held_out) == set(np.flatnonzero(number_of == number))
        if of_classes:
            [alone] = train(vectors, [np.flatnonzero(number_of != number)], recipe)
            for side, rows in (("text", vectors.texts[:3]), ("image", vectors.images)):
                expected = moved(alone, side, rows)
                torch.testing.assert_close(
                    moved(each.maps, side, rows), expected, rtol=0, atol=2e-3
                )
                assert (expected - rows).abs().max() > 0.1
    choice = choose(vectors, folds, 1.0, "sha256:1")
    assert choice is not None and choice.sets["cross-validation"].n == len(number_of)
    if of_classes:  # the base takes each class for another
        assert choice.curve[0].score == 0.0 and choice.curve[-1].score > 0.6
    by_fold = [judge(vectors, each, 1.0) for each in folds]
    right, same = (np.concatenate(both).mean() for both in zip(*by_fold, strict=True))
    assert (choice.curve[-1].score, choice.curve[-1].kept) == pytest.approx((right, same))


def test_the_command_trains_by_the_recipe_quick(
    tiny_clip_dir: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "quick"
    command = ["--recipe", "quick", "--data", str(images), "--base", tiny_clip_dir]
    assert main([*command, "--out", str(out), "--steps", "10"]) == 0
    adapter = load_adapter(out)
    assert adapter.keys == ["text_projection"]
    assert adapter.metadata.recipe["adapt"] == "text-projection"
    assert main([*command, "--out", str(out)]) == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_base_near_chance_is_told_to_train_its_towers(
    recipe: Recipe, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images are noise in two classes, of which the base has about half right."""
    draw = np.random.default_rng(0)
    for number in range(24):
        place = tmp_path / "noise" / ("a" if number % 2 else "b") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(place)
    advice = "an adapter on a projection learns no features"
    data = f"imagefolder:{tmp_path / 'noise'}"
    run = train(dataclasses.replace(recipe, data=data), progress=True)
    assert advice in capsys.readouterr().out.replace("\n", " ")
    for evaluation in (
        evaluate(run, "auto", out=tmp_path / "choice"),
        evaluate(run, [0, 0.5], data=data, out=tmp_path / "results"),
    ):
        assert str(evaluation).count(advice) == 1
    # The bound is .625 for two classes, .5 for three, 2 / C for many.
    for accuracy, classes in ((0.63, 2), (0.5, 3), (0.02, 100)):
        assert hardly_known({0.0: accuracy, 0.5: accuracy}, classes) == []
        assert "guesses have" in hardly_known({0.0: accuracy - 0.01, 0.5: accuracy}, classes)[0]
    # Where the gain is a quarter of what the base lacks, the projection is of use; a base or an
    # adapter alone says nothing.
    assert len(hardly_known({0.0: 0.1, 0.5: 0.32, 1.0: 0.3}, 10)) == 1
    assert len(hardly_known({0.0: 0.1, 0.5: 0.3, 1.0: 0.33}, 10)) == 0
    assert hardly_known({0.0: 0.1}, 10) == hardly_known({0.5: 0.1}, 10) == []


def test_low_rank_on_both_sides(recipe: Recipe) -> None:
    run = train(dataclasses.replace(recipe, adapt="projections", rank=4))
    adapter = load_adapter(run)
    assert {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()} == {
        "text_projection.up": (32, 4),
        "text_projection.down": (4, 32),
        "visual.proj.up": (32, 4),
        "visual.proj.down": (4, 32),
    }
    assert run.metrics[f"acc1@alpha={run.recipe.alpha:g}"] > run.metrics["acc1@alpha=0"]
    wide = dataclasses.replace(recipe, rank=32, out=(recipe.out or Path()).with_name("wide"))
    with pytest.raises(RAdapterError, match="rank is 32; allowed: less than the width 32"):
        train(wide)


def test_broken_images_are_refused_or_left_out(recipe: Recipe, images: Path) -> None:
    data = (images / "red" / "0.png").read_bytes()
    (images / "red" / "0.png").write_bytes(data[:-30])
    with pytest.raises(RAdapterError, match=r"red/0\.png.*--on-broken skip"):
        train(recipe)
    run = train(dataclasses.replace(recipe, on_broken="skip"))
    assert chosen(run).sets["cross-validation"].n == 23
    assert any("left out 1 broken images" in note for note in run.notes)
