"""A release that decodes large photos at less than their size: what it says of itself, and that
everything that embeds its images does so.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_export import ExportSettings, export_release
from radapter_serve.contract.preprocess import Preprocess
from radapter_serve.model import Model
from radapter_serve.runtimes.local_release import LocalRelease

CLASSES = ("cat", "dog", "horse")


def photo(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def large_and_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine photos, of which four are large enough."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(9):
        path = folder / CLASSES[number % 3] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo(number, *((300, 280) if number < 4 else (100, 90))).save(path)
    return folder


def test_a_release_with_fast_decoding(
    quick: None, adapter_path: Path, large_and_small: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    settings = ExportSettings(
        model_repository=repository,
        merged=tmp_path / "merged",
        dense="naclip",
        fast_decode=True,
        validation=f"imagefolder:{large_and_small}",
        max_drop=100,
    )
    (exported,) = export_release(adapter_path, [0.5], settings)
    release = exported.release
    assert release.preprocess["fast_decode"] is True
    measured: Any = release.fast_decode
    assert 0.5 < measured["min_cosine"] < 0.999999
    assert measured["max_error"] > 1e-4
    assert measured["validation_images"] == 4
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| least cosine of large photos decoded fast | {measured['min_cosine']:.5f} |" in card
    assert "| validation images decoded fast | 4 |" in card

    file = io.BytesIO()
    photo(7, 300, 280).save(file, "JPEG")
    data = file.getvalue()
    smaller = Image.open(io.BytesIO(data))
    smaller.draft(None, (75, 70))
    exactly = Preprocess.from_dict({**release.preprocess, "fast_decode": False})
    local = LocalRelease(str(repository))
    fast, exact = local.encode_images(
        [exactly(image) for image in (smaller, Image.open(io.BytesIO(data)))]
    )
    assert fast @ exact < 0.99999
    np.testing.assert_array_equal(local.prepare(data), exactly(smaller))
    whole = io.BytesIO()
    Image.open(io.BytesIO(data)).save(whole, "PNG")
    with Model(repository) as model, Model(tmp_path / "merged") as in_torch:
        for one in (model, in_torch):
            np.testing.assert_allclose(np.asarray(one.embed_images([data]))[0], fast, atol=1e-4)
        masks = [model.segment(one, ["a", "b"]).mask for one in (data, whole.getvalue())]
    np.testing.assert_array_equal(masks[0], masks[1])  # decoded whole, as the same pixels in a PNG


def test_without_it_nothing_is_said(quick: None, adapter_path: Path, tmp_path: Path) -> None:
    settings = ExportSettings(model_repository=tmp_path / "a", merged=tmp_path / "b")
    (exported,) = export_release(adapter_path, [0.5], settings)
    assert "fast_decode" not in exported.facts
    assert "fast_decode" not in exported.facts["preprocess"]
    assert "decoded fast" not in (tmp_path / "b" / "README.md").read_text()
