"""Evaluating: each α against open_clip, and the same numbers whichever way a model runs."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch
from PIL import Image
from safetensors.torch import save_file

from radapter_serve.adapter import fold, load_adapter
from radapter_serve.clip.base import load_base
from radapter_serve.encoders.loaded import LoadedRelease, load_release, served_release
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import common_nouns
from radapter_serve.evaluation.models import Candidate, from_adapter, from_merged, from_release
from radapter_serve.evaluation.rows import Results, Row
from radapter_serve.evaluation.run import evaluate_suite
from radapter_serve.evaluation.start import EvaluationSettings, evaluate
from radapter_serve.evaluation.suite import load_suite
from radapter_serve.release.adapters import AdapterFacts
from radapter_serve.release.adapters import add as add_adapter
from tests.evaluation.conftest import CLASSES
from tests.helpers.ways import in_process

ALPHAS = [0.0, 0.4, 1.0]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}"]
SAME = ("dataset", "alpha", "n", "set_digest", "base_digest", "adapter_digest", "precision")


def measured(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of `by_open_clip`, taken from the rows of one model."""
    figures = {}
    for row in rows:
        figures[row.dataset] = row.metrics[row.metric]
        if "ece" in row.metrics:
            figures[f"{row.dataset} ece"] = row.metrics["ece"]
    return figures


def evaluated(models: Sequence[Candidate], world: Path, out: Path) -> list[Row]:
    suite = load_suite(world / "suite.yaml", world)
    rows = evaluate_suite(models, suite, Results(out), batch_size=7)
    models[0].close()
    return rows


def by_open_clip(model: torch.nn.Module, name: str, world: Path) -> dict[str, float]:
    """First metric of each test set, and calibration errors, by open_clip and loops."""
    _, _, transform = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    metrics = {}

    def embed(files: list[Path]) -> np.ndarray:
        pixels = torch.stack([transform(Image.open(file)) for file in files])
        return model.encode_image(pixels, normalize=True).numpy()  # type: ignore[operator]

    def embed_texts(texts: list[str]) -> np.ndarray:
        return model.encode_text(tokenize(texts), normalize=True).numpy()  # type: ignore[operator]

    names = {"plain": {name: [name] for name in CLASSES}}
    names["shifted"] = {"cat": ["cat", "kitty"], "house": ["a house"], "tree": ["tree"]}
    for data, classes in names.items():
        rows = []
        files = []
        labels = []
        for label, (name, synonyms) in enumerate(classes.items()):
            prompts = [text.replace("{}", of) for of in synonyms for text in TEMPLATES]
            mean = embed_texts(prompts).mean(0)
            rows.append(mean / np.linalg.norm(mean))
            of_class = sorted((world / data / name).iterdir())
            files += of_class
            labels += [label] * len(of_class)
        cosines = torch.from_numpy(embed(files) @ np.stack(rows).T)
        sure, best = (model.logit_scale.exp() * cosines).softmax(1).max(1)  # type: ignore[operator]
        right = (best == torch.tensor(labels)).float()
        metrics[data] = float(right.mean())
        bins = torch.bucketize(sure, torch.linspace(0, 1, 16))
        gaps = [(right[bins == b] - sure[bins == b]).sum().abs() for b in bins.unique()]
        metrics[f"{data} ece"] = float(sum(gaps)) / len(files)
    with (world / "captions.csv").open(encoding="utf-8") as file:
        pairs = list(csv.DictReader(file))
    images = sorted({pair["image"] for pair in pairs})
    texts = embed_texts([pair["caption"] for pair in pairs])
    best_images = (texts @ embed([world / name for name in images]).T).argmax(axis=1)
    hits = [images[of] == pair["image"] for of, pair in zip(best_images, pairs, strict=True)]
    metrics["captioned"] = float(np.mean(hits))
    return metrics


@torch.no_grad()
def test_every_alpha_is_the_folded_model_in_open_clip(
    run_folder: Path, tiny_clip_dir: str, world: Path, tmp_path: Path
) -> None:
    rows = evaluated(from_adapter(run_folder, ALPHAS), world, tmp_path)
    base = load_base(tiny_clip_dir)
    adapter = load_adapter(run_folder)
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    nouns = common_nouns(CLASSES)
    _, _, transform = open_clip.create_model_and_transforms(tiny_clip_dir)
    tokens = open_clip.get_tokenizer(tiny_clip_dir)([f"a photo of a {name}." for name in nouns])
    files = [file for name in CLASSES for file in sorted((world / "plain" / name).iterdir())]
    pixels = torch.stack([transform(Image.open(file)) for file in files])
    best = {}
    for alpha in ALPHAS:
        base.model.load_state_dict(fold(weights, adapter, alpha))
        expected = by_open_clip(base.model, tiny_clip_dir, world)
        of_alpha = {row.dataset: row for row in rows if row.alpha == alpha}
        assert measured([*of_alpha.values()]) == pytest.approx(expected, abs=1e-5)

        # The share of images whose best noun is the base's.
        embeds = base.model.encode_image(pixels, normalize=True)  # type: ignore[operator]
        texts = base.model.encode_text(tokens, normalize=True)  # type: ignore[operator]
        best[alpha] = (embeds @ texts.T).argmax(dim=1)
        kept = float((best[alpha] == best[0.0]).float().mean())
        assert of_alpha["plain"].metrics["kept"] == pytest.approx(kept)
        interval = scipy.stats.binomtest(round(24 * kept), 24).proportion_ci(method="wilson")
        assert (of_alpha["plain"].intervals or {})["kept"] == pytest.approx(
            (interval.low, interval.high), abs=1e-6
        )
        assert "kept" not in of_alpha["captioned"].metrics
    assert kept < 1
    assert len({json.dumps(row.metrics) for row in rows if row.dataset == "plain"}) > 1


def test_right_of_each_image_makes_the_metric(
    run_folder: Path, world: Path, tmp_path: Path
) -> None:
    suite = load_suite(world / "suite.yaml", world)
    plain, _, captioned = suite.of_split("test")
    entries = [plain]
    for way, k in (("image", 1), ("text", 1), ("image", 5)):
        metric = f"{way}_retrieval_recall@{k}"
        entries.append(replace(captioned, name=metric, metric=metric))
    models = from_adapter(run_folder, [1.0])
    rows = evaluate_suite(models, replace(suite, entries=tuple(entries)), Results(tmp_path))
    models[0].close()
    for row in rows:
        assert row.per_image is not None and len(row.per_image) == row.n
        assert row.per_image.mean() == pytest.approx(row.metrics[row.metric])
    assert [isinstance(row.right, list) for row in rows] == [False, True, False, True]


def test_torch_merged_release_and_a_server_give_the_same_numbers(
    exported_tiny_clip: Path, dynamic_tiny_clip: Path, world: Path, tmp_path: Path
) -> None:
    folder = exported_tiny_clip
    *_, checkpoint = sorted(folder.glob("merged/**/open_clip_config.json"))
    with in_process(dynamic_tiny_clip, tmp_path) as server:
        ways = {
            "adapter": from_adapter(folder / "adapter.safetensors", [0.8]),
            "merged": from_merged(checkpoint.parent),
            "release": from_release(load_release(folder / "model_repository")),
            "server": from_release(served_release(server.url), [0.8], "server"),
        }
        measured = [evaluated(models, world, tmp_path / name) for name, models in ways.items()]
    for rows in zip(*measured, strict=True):
        assert [row.source for row in rows] == list(ways)
        for row in rows:
            assert row.metrics == pytest.approx(rows[0].metrics, abs=1e-5), row.source
            for name in SAME:
                assert getattr(row, name) == getattr(rows[0], name), (row.source, name)


@torch.no_grad()
def test_an_adapter_beside_a_release_and_on_a_server_is_its_fold_in_open_clip(
    exported_tiny_clip: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(exported_tiny_clip / "model_repository", repository)
    release = load_release(repository).release
    change = np.random.default_rng(0).normal(size=(release.embed_dim,) * 2).astype(np.float32)
    digest = release.text_tower.digest(release.alpha)
    add_adapter(repository, "anna", AdapterFacts(digest, release.embed_dim, 0.5), (change,))
    images: list[int] = []
    embed = LoadedRelease.embed_pixels

    def counted(loaded: LoadedRelease, pixels: Sequence[Any]) -> Any:
        images.append(len(pixels))
        return embed(loaded, pixels)

    monkeypatch.setattr(LoadedRelease, "embed_pixels", counted)
    suite: dict[str, Any] = {"suite": world / "suite.yaml", "data_root": world, "adapter": "anna"}
    with in_process(repository, tmp_path / "indexes") as server:
        evaluations = [
            evaluate(model_repository=repository, out=tmp_path / "release", **suite),
            evaluate(url=server.url, out=tmp_path / "server", **suite),
            evaluate(url=server.url, alpha=0.25, out=tmp_path / "other", **suite),
        ]
        with pytest.raises(RAdapterError, match="nearest are: anna"):
            evaluate(url=server.url, **{**suite, "adapter": "ana"})
    with pytest.raises(RAdapterError, match="nearest are: anna"):
        evaluate(model_repository=repository, **{**suite, "adapter": "ana"})

    # Each α is the base with the map folded into its projection.
    checkpoint = f"local-dir:{exported_tiny_clip / 'merged' / 'alpha-0.8'}"
    model = load_base(checkpoint).model
    weights = model.state_dict()["text_projection"].clone()
    by_hand = {}
    for alpha in (0.0, 0.25, 0.5, 1.0):
        folded = weights + alpha * weights @ torch.from_numpy(change).T
        model.state_dict()["text_projection"].copy_(folded)
        by_hand[alpha] = by_open_clip(model, checkpoint, world)
    for evaluation, alphas in zip(evaluations, ([0, 0.5, 1], [0, 0.5, 1], [0.25]), strict=True):
        assert sorted({row.alpha or 0.0 for row in evaluation.rows}) == alphas
        for alpha in alphas:
            rows = [row for row in evaluation.rows if row.alpha == alpha]
            assert measured(rows) == pytest.approx(by_hand[alpha], abs=1e-5)
            assert {row.adapter for row in rows} == {"anna"}
            assert len({row.adapter_digest for row in evaluations[0].rows + tuple(rows)}) == 1
            [kept] = [row.metrics["kept"] for row in rows if row.dataset == "plain"]
            said = f"alpha {alpha:g} keeps {100 * kept:.1f} % of"
            assert any(note.startswith(said) for note in evaluation.notes) == (kept < 0.8)
    # The random base knows none of these classes, and the map teaches it none.
    for evaluation, expected in zip(evaluations, (True, True, False), strict=True):
        advice = any("learns no features" in note for note in evaluation.notes)
        assert advice == expected
    # All α have the embeddings of one look at the images.
    count = sum(row.n for row in evaluations[0].rows if row.alpha == 0)
    assert sum(images) == 3 * count


def test_closing_leaves_the_base_as_it_was(run_folder: Path, tiny_clip_dir: str) -> None:
    before = load_base(tiny_clip_dir).model.state_dict()
    (model,) = from_adapter(run_folder, [1.0])
    model.embed_classes(["cat"], ["{}"])
    state = model.loaded.encoder.model.state_dict()  # type: ignore[attr-defined]
    assert any(not torch.equal(before[name], state[name]) for name in before)
    model.close()
    assert all(torch.equal(before[name], state[name]) for name in before)


@pytest.mark.parametrize(
    ("fields", "loaded"),
    [
        ({"checkpoint": "tuned.pt", "base": "ViT-B-32"}, (1.0,)),  # an architecture alone
        ({"checkpoint": "tuned.pt", "base": "ViT-B-32:openai"}, (0.0, 1.0)),
        ({"lora": "lora"}, (0.0, 1.0)),
        ({"model_repository": "models"}, (1.0,)),
    ],
)
def test_the_base_is_evaluated_where_it_is_known(
    fields: dict[str, Any],
    loaded: tuple[float, ...],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(settings: EvaluationSettings, path: Path, alphas: Sequence[float]) -> list[Candidate]:
        raise RAdapterError(f"asked for {alphas}")

    monkeypatch.chdir(tmp_path)
    Path("tuned.pt").touch()
    monkeypatch.setattr(EvaluationSettings, "load", load)
    with pytest.raises(RAdapterError) as caught:
        evaluate(alpha=1.0, suite=world / "suite.yaml", out=tmp_path / "results", **fields)
    assert str(caught.value) == f"asked for {loaded}"


def test_a_checkpoint_is_on_the_line_from_its_base_as_in_wise_ft(
    tiny_clip_dir: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.evaluation.plots.draw", lambda *_, **__: [])
    base = load_base(tiny_clip_dir)
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    torch.manual_seed(3)
    tuned = {
        k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v
        for k, v in weights.items()
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    rows = evaluate(
        checkpoint=tmp_path / "tuned.safetensors",
        base=tiny_clip_dir,
        alpha=[0, 0.5],
        suite=world / "suite.yaml",
        data_root=world,
        out=tmp_path / "results",
    ).rows
    assert {(row.source, row.alpha) for row in rows} == {("checkpoint", 0.0), ("checkpoint", 0.5)}
    middle = {
        k: torch.lerp(v, tuned[k], 0.5) if v.is_floating_point() else v for k, v in weights.items()
    }
    base.model.load_state_dict(middle)
    with torch.no_grad():
        by_hand = by_open_clip(base.model, tiny_clip_dir, world)
    assert measured([row for row in rows if row.alpha == 0.5]) == pytest.approx(by_hand, abs=1e-5)
