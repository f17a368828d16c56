"""A tiny CLIP, an adapter for it, and one export of both."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_export import ExportedRelease, ExportSettings, export_release
from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.clip.base import Base
from radapter_serve.evaluation.metrics import MIN_IMAGES
from tests.conftest import export_into
from tests.helpers.shared import shared

ALPHAS = (0.3, 0.8)
CLASSES = ("cat", "dog", "guinea pig", "horse", "old wall")
GRAPHS = ("image_encoder", "patch_encoder", "text_encoder")

Export = Callable[..., list[ExportedRelease]]
Exported = tuple[Path, list[ExportedRelease]]


@pytest.fixture(scope="session")
def adapter_path(
    random_adapter: Callable[..., Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny" / "adapter.safetensors"
    path.parent.mkdir()
    save_adapter(
        random_adapter(scale=0.05, templates=["a photo of a {}.", "a drawing of a {}."]), path
    )
    return path


@pytest.fixture(scope="session")
def photos(common: Path) -> Path:
    """A folder of 30 images, one folder a class."""
    return shared(common, "photos", lambda folder: _write_photos(folder, 30))


@pytest.fixture(scope="session")
def many_photos(common: Path) -> Path:
    """A folder with as many images as calibrated scores need."""
    return shared(common, "many-photos", lambda folder: _write_photos(folder, MIN_IMAGES))


def _write_photos(folder: Path, count: int) -> None:
    random = np.random.default_rng(3)
    for number in range(count):
        colours = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        path = folder / CLASSES[number % len(CLASSES)] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours).resize((40, 36), Image.Resampling.NEAREST).save(path)


def exported_once(common: Path, name: str, adapter: Any, alphas: Any, **settings: Any) -> Exported:
    """A folder with `repository` and `merged`, and its releases, exported once for all workers."""

    def make(folder: Path) -> None:
        place = folder / "repository"
        releases = export_into(folder, common, adapter, alphas, model_repository=place, **settings)
        (folder / "releases").write_bytes(pickle.dumps(releases))

    folder = shared(common, name, make)
    return folder, pickle.loads((folder / "releases").read_bytes())


@pytest.fixture(scope="session")
def exported(common: Path, adapter_path: Path, tmp_path_factory: Any) -> Exported:
    """The adapter at two α, with patches and a label set."""
    sets = {"animals": tmp_path_factory.mktemp("labels") / "animals.txt"}
    sets["animals"].write_text("cat, kitty\ndog\n# a comment\n\nguinea pig\n", encoding="utf-8")
    return exported_once(common, "two", adapter_path, ALPHAS, label_sets=sets, dense="naclip")


@pytest.fixture(scope="session")
def dynamic(common: Path, adapter_path: Path) -> Exported:
    """One release that takes any α, in the form of `transformers`, too."""
    form = common / "any-form"
    return exported_once(common, "any", adapter_path, "dynamic", dense="naclip", transformers=form)


@pytest.fixture
def export(quick: None, adapter_path: Path, tmp_path: Path) -> Export:
    """Exports the tiny adapter into `tmp_path`; the settings are keywords."""

    def call(
        alphas: Any = (0.5,), *, adapter: Any = adapter_path, progress: Any = None, **settings: Any
    ) -> list[ExportedRelease]:
        places = {"model_repository": tmp_path / "repository", "merged": tmp_path / "merged"}
        chosen = ExportSettings(**{**places, **settings})
        return export_release(adapter, alphas, chosen, progress=progress)

    return call


@pytest.fixture(scope="session")
def graphs(tiny_base: Base) -> dict[str, Graph]:
    """The graphs of the tiny CLIP by name."""
    graphs = [image_graph(tiny_base), text_graph(tiny_base)]
    graphs.append(patch_graph(tiny_base, "naclip"))
    return {graph.name: graph for graph in graphs}
