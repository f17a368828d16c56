"""One call from an adapter to releases: what is written, and that a failure writes nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_export import repository as repository_module
from radapter_serve.adapter import Adapter, fold, load_adapter, save_adapter
from radapter_serve.clip.base import Base, load_base
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import check
from radapter_serve.release.release import TASKS
from radapter_serve.release.repository import MODELS, PATCH_ENCODER
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
WITHOUT_PATCHES = [model for model in MODELS if model != PATCH_ENCODER]


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


@torch.no_grad()
def test_a_label_set_is_what_torch_gives(
    exported: Exported, adapter_path: Path, tiny_clip_dir: str
) -> None:
    """Mean over synonyms and templates of unit-length embeddings, at unit length again, from the
    folded weights.
    """
    folder, releases = exported
    path = folder / "repository" / "classify" / "2" / "label_sets" / "animals.npz"
    facts = releases[1].facts["label_sets"]["animals"]
    assert facts["labels"] == 3
    assert facts["digest"] == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    base = load_base(tiny_clip_dir)
    model: Any = base.model
    model.load_state_dict(fold(model.state_dict(), load_adapter(adapter_path), 0.8))
    expected = []
    for synonyms in (["cat", "kitty"], ["dog"], ["guinea pig"]):
        templates = releases[1].facts["templates"]
        prompts = [template.replace("{}", name) for name in synonyms for template in templates]
        mean = model.encode_text(base.tokenizer(prompts), normalize=True).mean(0)
        expected.append((mean / mean.norm()).numpy())
    with np.load(path) as saved:
        assert saved["labels"].tolist() == ["cat", "dog", "guinea pig"]
        assert saved["embeds"].dtype == np.float32
        np.testing.assert_allclose(saved["embeds"], np.stack(expected), atol=2e-6)


def test_versions_count_up_and_other_models_stay(
    export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "repository" / "mine" / "77"
    foreign.mkdir(parents=True)
    (first,) = export()
    assert (first.version, first.merged) == (1, tmp_path / "merged")
    before = tree(tmp_path / "repository" / "classify" / "1")
    assert [release.version for release in export((0, 1))] == [2, 3]
    assert tree(tmp_path / "repository" / "classify" / "1") == before
    (tmp_path / "repository" / "image_encoder" / "9").mkdir()
    (tmp_path / "repository" / "classify" / "9").mkdir()
    (default,) = export(None)
    assert (default.version, default.alpha) == (10, 0.5)
    assert names(tmp_path) == {"merged", "repository"} and foreign.is_dir()
    assert capfd.readouterr() == ("", "")


def test_the_recipe_says_how_patches_are_embedded_segments_cropped_and_photos_turned(
    export: Export, adapter_path: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(adapter_path)
    recipe = {"dense": "naclip", "mask_padding": 0.25, "mask_square": False}
    recipe["exif_orientation"] = False
    path = tmp_path / "dense.safetensors"
    metadata = dataclasses.replace(adapter.metadata, recipe=recipe)
    save_adapter(Adapter(adapter.tensors, metadata), path)
    (release,) = export(adapter=path)
    assert release.facts["preprocess"]["exif_orientation"] is False
    assert release.facts["dense"] == {"way": "naclip", "grid": 2}
    assert release.facts["crop"] == {"padding": 0.25, "square": False, "fill": [122, 117, 105]}
    assert sorted(graph.name for graph in release.graphs) == sorted(GRAPHS)
    (without,) = export(adapter=path, dense="none")
    assert without.facts["dense"] is None
    assert [graph.name for graph in without.graphs] == ["image_encoder", "text_encoder"]
    assert names(tmp_path / "repository" / PATCH_ENCODER) == {"1"}


@pytest.mark.parametrize("fault", ["disk full", "another result", "Ctrl-C"])
def test_a_failure_leaves_everything_as_it_was(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    export()
    before = tree(tmp_path)

    def full(model: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half a graph")
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(line: str) -> None:
        if fault == "Ctrl-C" and "text_encoder at alpha 0.3" in line:
            raise KeyboardInterrupt

    if fault == "disk full":
        monkeypatch.setattr(onnx_ir, "save", full)
    messages = {
        "disk full": "No space left on device.*run radapter-export again",
        "another result": "image_encoder in fp32 differs from torch",
        "Ctrl-C": "^$",
    }
    tolerance = 1e-12 if fault == "another result" else None
    with pytest.raises((RAdapterError, KeyboardInterrupt), match=messages[fault]) as error:
        export((0.2, 0.3), progress=interrupt, tolerance=tolerance)
    assert "\n" not in str(error.value)
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
with quick_exports(Path(sys.argv[3])):
    export_release(sys.argv[1], [0.2, 0.3], settings, progress=progress)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_what_is_served_and_the_next_one_tidies(
    export: Export, adapter_path: Path, common: Path, tmp_path: Path
) -> None:
    export()
    before = tree(tmp_path)
    arguments = [str(path) for path in (adapter_path, Path(__file__).parents[2], common)]
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


class Killed(BaseException):
    """As SIGKILL, which no handler sees."""


@pytest.mark.parametrize("renames", [7, 13])  # seven versions, then seven configs
def test_an_export_killed_while_it_puts_versions_in_place_serves_no_half_release(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Versions come first, so until the configs follow nothing that is served has changed."""
    export()
    folder = tmp_path / "repository"
    moves: list[Path] = []

    def counted(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(self: Path, target: Path) -> Path:
            if folder in self.parents and ".export-" not in str(target):
                moves.append(target)
                if len(moves) > renames:
                    raise Killed
            return move(self, target)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "replace", counted(Path.replace))
        repository = repository_module.Repository
        patch.setattr(repository, "__exit__", lambda self, *_: self._held.close())
        with pytest.raises(Killed):
            export()
    served = set()
    for model in WITHOUT_PATCHES:
        text = (folder / model / CONFIG).read_text(encoding="utf-8")
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        (version,) = config.version_policy.specific.versions
        assert set(tree(folder / model / str(version))) >= FILES[model] - {"label_sets/animals.npz"}
        served.add(version)
    if renames <= len(WITHOUT_PATCHES):
        assert served == {1}
    (release,) = export()
    assert release.version == (2 if renames < len(WITHOUT_PATCHES) else 3)
    assert not [path for path in tree(tmp_path) if ".export-" in path]
    kept = [{name for name in names(folder / model) if name.isdecimal()} for model in MODELS[:1]]
    for model in WITHOUT_PATCHES:
        assert {name for name in names(folder / model) if name.isdecimal()} == kept[0]
