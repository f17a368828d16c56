"""A tiny CLIP, an adapter for it, and one export of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from radapter_export import ExportedRelease, ExportSettings, export_release
from radapter_export.graph import Graph, image_graph, patch_graph, text_graph
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.clip.base import Base, load_base

ALPHAS = (0.3, 0.8)
ANIMALS = "cat, kitty\ndog\n# a comment\n\nguinea pig\n"


@pytest.fixture(scope="session")
def tiny_base(tiny_clip_dir: str) -> Base:
    return load_base(tiny_clip_dir)


@pytest.fixture(scope="session")
def adapter_path(random_adapter: Callable[..., Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny" / "adapter.safetensors"
    path.parent.mkdir()
    save_adapter(random_adapter(scale=0.05, templates=["a photo of a {}.", "a drawing of a {}."]), path)
    return path


@pytest.fixture(scope="session")
def labels_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "animals.txt"
    path.write_text(ANIMALS, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Exported:
    """One call of `export_release` on the tiny CLIP: its folder, with `repository` and `merged`, and what it made."""

    folder: Path
    releases: list[ExportedRelease]
    graphs: dict[str, Graph]


@pytest.fixture(scope="session")
def export_once(adapter_path: Path, labels_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    graphs: list[Graph] = []

    def recorded(make: Callable[..., Graph]) -> Callable[..., Graph]:
        def call(base: Base, *arguments: Any) -> Graph:
            graphs.append(make(base, *arguments))
            return graphs[-1]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radapter_export.release.image_graph", recorded(image_graph))
        patch.setattr("radapter_export.release.patch_graph", recorded(patch_graph))
        patch.setattr("radapter_export.release.text_graph", recorded(text_graph))
        releases = export_release(
            adapter_path,
            ALPHAS,
            ExportSettings(
                model_repository=folder / "repository",
                merged=folder / "merged",
                label_sets={"animals": labels_path},
                dense="naclip",
            ),
        )
    return Exported(folder, releases, {graph.name: graph for graph in graphs})


@pytest.fixture(scope="session")
def exported(export_once: Exported) -> tuple[Path, list[ExportedRelease]]:
    """A folder with `repository` and `merged`, and the two releases that were exported into it. Not to be changed."""
    return export_once.folder, export_once.releases


@pytest.fixture(scope="session")
def graphs(export_once: Exported) -> dict[str, Graph]:
    """The graphs of the tiny CLIP by name."""
    return export_once.graphs


@pytest.fixture
def quick(graphs: dict[str, Graph], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare `export_release` of the tiny CLIP the seconds that torch's exporter takes: graphs hold no weights."""

    def known(name: str, dynamic: Adapter | None) -> Graph:
        return graphs[name] if dynamic is None else request.getfixturevalue("dynamic_graphs")[name]

    monkeypatch.setattr("radapter_export.release.image_graph", lambda base, dynamic: known("image_encoder", dynamic))
    monkeypatch.setattr("radapter_export.release.patch_graph", lambda base, way, a: known("patch_encoder", a))
    monkeypatch.setattr("radapter_export.release.text_graph", lambda base, dynamic: known("text_encoder", dynamic))


@pytest.fixture(scope="session")
def dynamic_graphs(tiny_base: Base, adapter_path: Path) -> dict[str, Graph]:
    """The graphs of the tiny CLIP and its adapter, of full rank, with α as an input."""
    adapter = load_adapter(adapter_path)
    made = (image_graph(tiny_base, adapter), patch_graph(tiny_base, "naclip", adapter), text_graph(tiny_base, adapter))
    return {graph.name: graph for graph in made}
