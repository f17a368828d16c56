"""One call from an adapter to releases: what is written, and that a failure writes nothing."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx_ir
import onnxruntime
import pytest

from radapter_export import ExportSettings
from radapter_export.source import read_source
from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.adapter.tuned import towers_of
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
    towers = towers_of(tiny_base.model, adapter.tensors)
    assert [(release.version, release.alpha) for release in releases] == [(1, 0.3), (2, 0.8)]
    for release in releases:
        facts = release.facts
        for model in TASKS:
            path = folder / "repository" / model / str(release.version) / "release.json"
            assert json.loads(path.read_text(encoding="utf-8")) == facts
        expected = {
            "base_digest": adapter.metadata.base_digest,
            "adapter_digest": adapter.digest,
            **{name: asdict(tower) for name, tower in towers.items()},
            "dense": {"method": "naclip", "grid": 2},
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


def test_versions_count_up_and_other_models_stay(
    export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "repository" / "mine" / "77"
    foreign.mkdir(parents=True)
    (first,) = export(None)
    assert (first.version, first.alpha, first.merged) == (1, 0.5, tmp_path / "merged")
    before = tree(tmp_path / "repository" / "classify" / "1")
    for model in ("image_encoder", "classify"):
        (tmp_path / "repository" / model / "9").mkdir()
    assert [release.version for release in export((0, 1))] == [10, 11]
    assert tree(tmp_path / "repository" / "classify" / "1") == before
    assert names(tmp_path) == {"merged", "repository"} and foreign.is_dir()
    assert capfd.readouterr() == ("", "")


def test_the_recipe_says_how_patches_are_embedded_segments_cropped_and_photos_turned(
    export: Export, random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    recipe = {"dense": "naclip", "mask_padding": 0.25, "mask_square": False}
    recipe["exif_orientation"] = False
    path = tmp_path / "dense.safetensors"
    save_adapter(random_adapter(scale=0.05, recipe=recipe), path)
    (release,) = export(adapter=path)
    assert release.facts["preprocess"]["exif_orientation"] is False
    assert release.facts["dense"] == {"method": "naclip", "grid": 2}
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


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.helpers.graphs import quick_exports
from radapter_export import ExportSettings, export_release
def progress(line):
    if "text_encoder at alpha 0.3" in line:
        os.kill(os.getpid(), signal.SIGKILL)
settings = ExportSettings(model_repository=Path("repository"), merged=Path("merged"))
with quick_exports():
    export_release(sys.argv[1], [0.2, 0.3], settings, progress=progress)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_what_is_served_and_the_next_one_tidies(
    export: Export, adapter_path: Path, tmp_path: Path
) -> None:
    export()
    before = tree(tmp_path)
    arguments = [str(path) for path in (adapter_path, Path(__file__).parents[2])]
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, cwd=tmp_path, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    after = tree(tmp_path)
    rest = after.keys() - before.keys()
    assert rest
    assert all("/.export-" in f"/{path}" or path.startswith(".merged.new") for path in rest)
    assert {path: after[path] for path in before} == before
    (release,) = export()
    assert release.version == 2
    assert not [path for path in tree(tmp_path) if ".export-" in path or ".new" in path]
