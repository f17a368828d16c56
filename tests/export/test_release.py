"""One call from an adapter to releases: what is written, and that a failure writes nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir
import onnxruntime
import pytest

from radapter_export import ExportSettings
from radapter_export.source import read_source
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.clip.base import Base
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import check
from radapter_serve.release.release import TASKS
from tests.export.conftest import GRAPHS, Export, Exported

CONFIG = "config.pbtxt"
TASK = {CONFIG, "model.py", "release.json"}
LABELLED = TASK | {"tokenizer.json", "label_sets", "label_sets/animals.npz"}
FILES = {
    **{name: {CONFIG, "model.onnx", "samples.npz"} for name in GRAPHS},
    "embed_image": TASK,
    "embed_text": TASK | {"tokenizer.json"},
    "retrieve": TASK,
    "segment": LABELLED,
    "classify": LABELLED | {"SHA256SUMS"},
}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the contents of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_repository_holds_exactly_the_contract(exported: Exported) -> None:
    repository = exported[0] / "repository"
    assert names(repository) == set(FILES)
    for model, files in FILES.items():
        assert names(repository / model) == {CONFIG, "1", "2"}
        for version in "12":
            assert set(tree(repository / model / version)) == files
    check(repository, [1, 2])  # all have digests, and the digests are right


def test_release_json(exported: Exported, adapter_path: Path, tiny_base: Base) -> None:
    folder, releases = exported
    adapter = load_adapter(adapter_path)
    assert [(release.version, release.alpha) for release in releases] == [(1, 0.3), (2, 0.8)]
    for release in releases:
        facts = release.facts
        for model in TASKS:
            path = folder / "repository" / model / str(release.version) / "release.json"
            assert json.loads(path.read_text(encoding="utf-8")) == facts
        expected = {
            "base_digest": adapter.metadata.base_digest,
            "adapter_digest": adapter.digest,
            "dense": {"way": "naclip", "grid": 2},
            "logit_scale": pytest.approx(tiny_base.model.get_parameter("logit_scale").exp().item()),
            "templates": ["a photo of a {}.", "a drawing of a {}."],
        }
        assert {name: facts[name] for name in expected} == expected
        preprocess = facts["preprocess"]
        assert (preprocess["size"], preprocess["mean"]) == (32, [0.48, 0.46, 0.41])
        tokenizer = facts["tokenizer"]
        assert (tokenizer["context_length"], tokenizer["dynamic_length"]) == (77, True)
        assert facts["tools"]["onnxruntime"] == onnxruntime.__version__
        agreement = facts["agreement"]
        assert (agreement["batches"], agreement["tolerance"]) == ([1, 2, 7], 1e-4)
        for name in GRAPHS:
            assert 0 <= agreement[name]["max_error"] <= 1e-4
            assert agreement[name]["min_cosine"] > 0.999999


def test_the_recipe_says_how_patches_are_embedded_segments_cropped_and_photos_turned(
    export: Export, random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    recipe = {"dense": "naclip", "mask_padding": 0.25, "mask_square": False}
    recipe["exif_orientation"] = False
    path = tmp_path / "dense.safetensors"
    save_adapter(random_adapter(scale=0.05, recipe=recipe), path)
    (release,) = export(adapter=path)
    assert release.facts["preprocess"]["exif_orientation"] is False
    assert release.facts["dense"] == {"way": "naclip", "grid": 2}
    assert release.facts["crop"] == {"padding": 0.25, "square": False, "fill": [122, 117, 105]}
    assert sorted(graph.name for graph in release.graphs) == sorted(GRAPHS)
    assert read_source([path], None, ExportSettings(dense="none")).dense is None


def test_a_failure_leaves_everything_as_it_was(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    before = tree(tmp_path)

    def full(model: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half a graph")
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(line: str) -> None:
        if "text_encoder at alpha 0.3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export((0.2, 0.3), progress=interrupt)
    assert tree(tmp_path) == before
    with pytest.raises(RAdapterError, match="image_encoder in fp32 differs from torch"):
        export((0.2, 0.3), tolerance=1e-12)
    assert tree(tmp_path) == before
    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(RAdapterError, match="No space left on device.*run radapter-export again"):
        export()
    assert tree(tmp_path) == before
