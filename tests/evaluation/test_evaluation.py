"""Zero-shot classification and accuracy over α against open_clip's own functions and against folded
models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from radapter_serve.adapter import Adapter, Metadata, attach, base_digest, find_sites, fold
from radapter_serve.clip.base import load_base
from radapter_serve.data import Labelled, load_labelled
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.classification import count_hits, zero_shot_classifier
from radapter_serve.evaluation.evaluate import evaluate
from radapter_serve.evaluation.results import curve
from radapter_serve.evaluation.sets import classification_set
from radapter_serve.evaluation.suite import Entry
from radapter_serve.evaluation.torch_embedder import embedder_of

CLASSES = ["cat", "dog", "tree", "house"]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}"]


@pytest.fixture
def images(tmp_path: Path) -> Labelled:
    generator = np.random.default_rng(0)
    for index in range(40):
        folder = tmp_path / CLASSES[index % 4]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 41), Image.Resampling.BICUBIC).save(
            folder / f"{index}.png"
        )
    return load_labelled(f"imagefolder:{tmp_path}")


def test_classifier_is_open_clips(tiny_clip_dir: str) -> None:
    base = load_base(tiny_clip_dir)
    templates = [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES]
    expected = open_clip.build_zero_shot_classifier(base.model, base.tokenizer, CLASSES, templates)
    found = zero_shot_classifier(base.model, base.tokenizer, CLASSES, TEMPLATES, batch_size=3)
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-6)


def test_synonyms_are_averaged(tiny_clip_dir: str) -> None:
    base = load_base(tiny_clip_dir)
    both = zero_shot_classifier(base.model, base.tokenizer, ["cat, kitty"], ["{}"])
    each = zero_shot_classifier(base.model, base.tokenizer, ["cat", "kitty"], ["{}"])
    torch.testing.assert_close(both[0], torch.nn.functional.normalize(each.mean(dim=0), dim=0))


def test_hits_by_hand(tiny_clip_dir: str) -> None:
    base = load_base(tiny_clip_dir)
    pixels = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        embeds = base.model.encode_image(pixels, normalize=True)  # type: ignore[operator]
    labels = torch.tensor(
        [0, 1, 2, 3, 4, 0]
    )  # each image is its own class; the last label is wrong
    assert count_hits(base.model, embeds, [(pixels[:4], labels[:4]), (pixels[4:], labels[4:])]) == (
        5,
        6,
    )


def test_a_model_of_nan_is_an_error(tiny_clip_dir: str) -> None:
    base = load_base(tiny_clip_dir)
    with torch.no_grad():
        base.model.get_parameter("visual.proj")[0, 0] = torch.nan
    with pytest.raises(RAdapterError, match="not finite"):
        count_hits(
            base.model,
            torch.ones(2, 32),
            [(torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))],
        )


def test_the_curve_equals_folding_each_alpha(tiny_clip_dir: str, images: Labelled) -> None:
    base = load_base(tiny_clip_dir)
    state = {name: value.clone() for name, value in base.model.state_dict().items()}
    sites = find_sites(base.model)
    torch.manual_seed(0)
    tensors = {site.key: torch.randn(64, 64) * 0.3 for site in sites}
    digest = base_digest(state, [site.key for site in sites])
    adapter = Adapter(
        tensors, Metadata(architecture=tiny_clip_dir, base_digest=digest, templates=TEMPLATES)
    )
    embedder = embedder_of(base, adapter, [0.0, 0.5, 1.0])
    rows = curve(evaluate(embedder, classification_set(Entry("all", name="all"), images)))
    embedder.close()
    _, _, preprocess = open_clip.create_model_and_transforms(tiny_clip_dir)
    pixels = torch.stack([preprocess(images.image(row)) for row in images.rows])
    labels = torch.tensor([images.label(row) for row in images.rows])
    for row in rows:
        base.model.load_state_dict(fold(state, adapter, row["alpha"]))
        with torch.no_grad():
            texts = zero_shot_classifier(base.model, base.tokenizer, images.classes, TEMPLATES)
            logits = base.model.encode_image(pixels, normalize=True) @ texts.T  # type: ignore[operator]
        assert row["all"] == pytest.approx(
            100 * (logits.argmax(dim=1) == labels).float().mean().item()
        )
    assert len({row["all"] for row in rows}) > 1
    base.model.load_state_dict(state)
    attach(base.model).remove()  # the evaluation left no adapters behind
