"""One call from an adapter to releases: what is written, and that a failure writes nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from radapter_export import ExportedRelease, ExportSettings, export_release
from radapter_serve.adapter import Adapter, fold, load_adapter, save_adapter
from radapter_serve.clip.base import Base
from radapter_serve.encoders.encoder import EncoderGraph
from radapter_serve.encoders.loaded import load_release
from radapter_serve.errors import RAdapterError
from radapter_serve.release.agreement import Samples
from radapter_serve.release.config import check, encoders_of
from radapter_serve.release.repository import MODELS, PATCH_ENCODER

CONFIG = "config.pbtxt"
TASK = {CONFIG, "model.py", "release.json"}
LABELLED = TASK | {"tokenizer.json", "label_sets", "label_sets/animals.npz"}
FILES = {
    "image_encoder": {CONFIG, "model.onnx", "samples.npz"},
    "patch_encoder": {CONFIG, "model.onnx", "samples.npz"},
    "text_encoder": {CONFIG, "model.onnx", "samples.npz"},
    "embed_image": TASK,
    "embed_text": TASK | {"tokenizer.json"},
    "retrieve": TASK,
    "segment": LABELLED,
    "classify": LABELLED | {"SHA256SUMS"},
}
WITHOUT_PATCHES = [model for model in MODELS if model != PATCH_ENCODER]

Export = Callable[..., list[ExportedRelease]]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the contents of files."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def export(quick: None, adapter_path: Path, tmp_path: Path) -> Export:
    """`export_release` of the tiny adapter into `tmp_path`."""

    def call(alphas: Any = (0.5,), **changes: Any) -> list[ExportedRelease]:
        where = {"model_repository": tmp_path / "repository", "merged": tmp_path / "merged"}
        adapter = changes.pop("adapter", adapter_path)
        progress = changes.pop("progress", None)
        return export_release(
            adapter, alphas, ExportSettings(**{**where, **changes}), progress=progress
        )

    return call


def test_repository_holds_exactly_the_contract(
    exported: tuple[Path, list[ExportedRelease]],
) -> None:
    repository = exported[0] / "repository"
    assert {path.name for path in repository.iterdir()} == set(FILES)
    for model, files in FILES.items():
        assert {path.name for path in (repository / model).iterdir()} == {"config.pbtxt", "1", "2"}
        for version in "12":
            assert set(tree(repository / model / version)) == files
    check(repository, [1, 2])  # all have digests, and the digests are right


def test_release_json(
    exported: tuple[Path, list[ExportedRelease]], adapter_path: Path, tiny_base: Base
) -> None:
    folder, releases = exported
    adapter = load_adapter(adapter_path)
    assert [(release.version, release.alpha) for release in releases] == [(1, 0.3), (2, 0.8)]
    for release in releases:
        facts = release.facts
        for model in ("embed_image", "embed_text", "retrieve", "classify"):
            path = folder / "repository" / model / str(release.version) / "release.json"
            assert json.loads(path.read_text(encoding="utf-8")) == facts
        assert facts["format"] == 1
        assert facts["base_digest"] == adapter.metadata.base_digest
        assert facts["adapter_digest"] == adapter.digest
        assert facts["preprocess"] == {
            "size": 32,
            "mode": "RGB",
            "mean": [0.48, 0.46, 0.41],
            "std": [0.27, 0.26, 0.28],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
            "exif_orientation": True,
        }
        assert facts["tokenizer"]["context_length"] == 77
        assert facts["tokenizer"]["dynamic_length"] is True
        assert facts["embed_dim"] == 32
        assert facts["dense"] == {"way": "naclip", "grid": 2}
        assert facts["crop"] == {
            "padding": 0.0,
            "square": True,
            "fill": [122, 117, 105],
        }  # of the mean below
        assert facts["logit_scale"] == pytest.approx(
            float(tiny_base.model.get_parameter("logit_scale").detach().exp())
        )
        assert facts["logit_bias"] is None
        assert facts["templates"] == ["a photo of a {}.", "a drawing of a {}."]
        assert facts["tools"]["torch"] == importlib.metadata.version("torch")
        assert facts["tools"]["onnxruntime"] == onnxruntime.__version__
        for graph in release.graphs:
            measured = facts["agreement"][graph.name]
            assert 0 <= measured["max_error"] <= facts["agreement"]["tolerance"] == 1e-4
            assert measured["min_cosine"] > 0.999999
        assert facts["agreement"]["batches"] == [1, 2, 7]


def test_label_set_is_what_torch_gives(
    exported: tuple[Path, list[ExportedRelease]], adapter_path: Path, tiny_base: Base
) -> None:
    """Mean over synonyms and templates of unit-length embeddings, at unit length again, from the
    folded weights.
    """
    folder, releases = exported
    state = fold(tiny_base.model.state_dict(), load_adapter(adapter_path), 0.8)
    path = folder / "repository" / "classify" / "2" / "label_sets" / "animals.npz"
    facts = releases[1].facts["label_sets"]["animals"]
    assert facts["labels"] == 3
    assert facts["digest"] == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    expected = []
    for names in (["cat", "kitty"], ["dog"], ["guinea pig"]):
        prompts = [
            template.replace("{}", name)
            for name in names
            for template in releases[1].facts["templates"]
        ]
        with torch.no_grad():
            tokens = tiny_base.tokenizer(prompts)
            embeds = torch.func.functional_call(
                _TextOnly(tiny_base.model), _prefixed(state), (tokens,)
            )
        mean = torch.nn.functional.normalize(embeds, dim=-1).mean(0)
        expected.append((mean / mean.norm()).numpy())
    with np.load(path) as saved:
        assert saved["labels"].tolist() == ["cat", "dog", "guinea pig"]
        assert saved["embeds"].dtype == np.float32
        np.testing.assert_allclose(saved["embeds"], np.stack(expected), atol=2e-6)


class _TextOnly(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens)


def _prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{key}": value for key, value in state.items()}


def test_versions_count_up_and_one_alpha_stands_in_merged_itself(
    export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (first,) = export()
    assert (first.version, first.merged) == (1, tmp_path / "merged")
    before = tree(tmp_path / "repository" / "classify" / "1")
    again = export((0, 1))
    assert [release.version for release in again] == [2, 3]
    assert tree(tmp_path / "repository" / "classify" / "1") == before
    (tmp_path / "repository" / "image_encoder" / "9").mkdir()
    (tmp_path / "repository" / "classify" / "9").mkdir()
    (default,) = export(None)
    assert (default.version, default.alpha) == (10, 0.5)
    assert names(tmp_path) == {"merged", "repository"}
    assert capfd.readouterr() == ("", "")


def with_recipe(adapter_path: Path, target: Path, **recipe: Any) -> Path:
    adapter = load_adapter(adapter_path)
    save_adapter(
        Adapter(adapter.tensors, dataclasses.replace(adapter.metadata, recipe=recipe)), target
    )
    return target


def test_the_recipe_says_how_patches_are_embedded_and_segments_cropped(
    export: Export, adapter_path: Path, tmp_path: Path
) -> None:
    recipe = {"dense": "naclip", "mask_padding": 0.25, "mask_square": False}
    trained = with_recipe(adapter_path, tmp_path / "dense.safetensors", **recipe)
    (release,) = export(adapter=trained)
    assert release.facts["dense"] == {"way": "naclip", "grid": 2}
    assert release.facts["crop"] == {"padding": 0.25, "square": False, "fill": [122, 117, 105]}
    assert [graph.name for graph in release.graphs] == [
        "image_encoder",
        "patch_encoder",
        "text_encoder",
    ]
    assert set(release.facts["agreement"]) == {*FILES.keys() - WITHOUT_PATCHES} | {
        *("image_encoder", "text_encoder", "batches", "tolerance", "min_cosine")
    }
    (without,) = export(adapter=trained, dense="none")
    assert without.facts["dense"] is None
    assert [graph.name for graph in without.graphs] == ["image_encoder", "text_encoder"]
    assert names(tmp_path / "repository" / PATCH_ENCODER) == {"1"}
    (plain,) = export()
    assert plain.facts["dense"] is None
    served = {path.parent.name for path in (tmp_path / "repository").glob("*/config.pbtxt")}
    assert served == set(WITHOUT_PATCHES)


def test_a_release_for_another_runtime_says_so_and_is_checked_with_it(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Mock(wraps=EncoderGraph)
    monkeypatch.setattr("radapter_export.release.EncoderGraph", used)
    (made,) = export(runtime="openvino")
    assert [call.args[1] for call in used.call_args_list] == ["openvino"] * 2
    encoders = {encoder.name: encoder for encoder in encoders_of(tmp_path / "repository")}
    assert {name: encoder.runtime for name, encoder in encoders.items()} == dict.fromkeys(
        encoders, "openvino"
    )
    assert made.facts["runtime"] == "openvino"
    # The batch is a dimension of its own for this runtime.
    assert list(encoders["image_encoder"].config.input[0].dims) == [-1, 32, 32, 3]
    local = load_release(tmp_path / "repository")
    samples = Samples.load(tmp_path / "repository" / "image_encoder" / "1")
    np.testing.assert_allclose(
        local.embed_pixels(list(samples.inputs[1])), samples.references[1], atol=1e-5
    )


def test_repository_may_hold_models_of_others(export: Export, tmp_path: Path) -> None:
    other = tmp_path / "repository" / "mine" / "7"
    other.mkdir(parents=True)
    (release,) = export()
    assert release.version == 1
    assert other.is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": [0.5, float("nan")]}, "alpha is nan"),
        ({"alphas": []}, "no alpha.*--alpha 0.5"),
        ({"alphas": [0.5, 0.5]}, "twice"),
        ({"runtime": "torch"}, "--runtime is torch; allowed are onnxruntime, openvino"),
        ({"label_sets": {"a": "nothing.txt"}}, "nothing.txt"),
        ({"label_sets": {"../a": "nothing.txt"}}, "'../a' can't be the name of a label set"),
        ({"tolerance": 1e-12}, "image_encoder in fp32 differs from torch"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    export: Export, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RAdapterError, match=message) as error:
        export(changes.pop("alphas", [0.5]), **changes)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_adapter_of_another_base_is_refused_with_both_digests(
    export: Export, adapter_path: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(adapter_path)
    other = {**vars(adapter.metadata), "base_digest": "sha256:0123"}
    save_adapter(
        Adapter(adapter.tensors, type(adapter.metadata)(**other)), tmp_path / "other.safetensors"
    )
    with pytest.raises(RAdapterError, match=f"sha256:0123.*{adapter.metadata.base_digest}"):
        export(adapter=tmp_path / "other.safetensors")
    assert names(tmp_path) == {"other.safetensors"}


@pytest.mark.parametrize("where", ["graph", "tokenizer"])
def test_full_disk_leaves_everything_as_it_was(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    export()
    before = tree(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        if where == "graph":
            args[1].write_bytes(b"half a graph")
        raise OSError(errno.ENOSPC, "No space left on device")

    target: tuple[Any, str] = (onnx_ir, "save") if where == "graph" else (Path, "replace")
    monkeypatch.setattr(*target, full)
    with pytest.raises(
        RAdapterError, match=r"no space left on the disk of .*run radapter-export again"
    ) as error:
        export((0.2, 0.3))
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_interrupt_leaves_everything_as_it_was(export: Export, tmp_path: Path) -> None:
    export()
    before = tree(tmp_path)

    def interrupt(line: str) -> None:
        if "text_encoder at alpha 0.3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export((0.2, 0.3), progress=interrupt)
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
def test_killed_export_leaves_what_is_served_and_the_next_one_tidies(
    export: Export, adapter_path: Path, common: Path, tmp_path: Path
) -> None:
    export()
    before = tree(tmp_path)
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(adapter_path),
        str(Path(__file__).parents[2]),
        str(common),
    ]
    killed = subprocess.run(command, cwd=tmp_path, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    after = tree(tmp_path)
    assert len(after) > len(before)
    assert all(
        "/.export-" in f"/{path}" or path.startswith(".merged.new")
        for path in after.keys() - before.keys()
    )
    assert {path: after[path] for path in before} == before
    (release,) = export()
    assert release.version == 2
    assert not [path for path in tree(tmp_path) if ".export-" in path or ".new" in path]


@pytest.mark.parametrize("renames", [1, 7, 13])  # seven versions, then seven configs
def test_export_killed_while_it_puts_versions_in_place_serves_no_half_release(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Versions come first, so until the configs follow nothing that is served has changed."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    from radapter_export import repository

    export()
    folder = tmp_path / "repository"
    done = 0
    rename = Path.rename
    replace = Path.replace

    def counted(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(self: Path, target: Path) -> Path:
            nonlocal done
            if folder in self.parents and ".export-" not in str(target):
                done += 1
                if done > renames:
                    raise Killed
            return move(self, target)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(rename))
        patch.setattr(Path, "replace", counted(replace))
        patch.setattr(repository.Repository, "__exit__", lambda self, *_: self._held.close())
        with pytest.raises(Killed):
            export()
    served = set()
    for model in WITHOUT_PATCHES:
        text = (folder / model / "config.pbtxt").read_text(encoding="utf-8")
        (version,) = text_format.Parse(
            text, model_config_pb2.ModelConfig()
        ).version_policy.specific.versions
        assert set(tree(folder / model / str(version))) >= FILES[model] - {"label_sets/animals.npz"}
        served.add(version)
    if renames <= len(WITHOUT_PATCHES):
        assert served == {1}
    (release,) = export()
    assert release.version == (2 if renames < len(WITHOUT_PATCHES) else 3)
    assert not [path for path in tree(tmp_path) if ".export-" in path]
    versions = [
        {name for name in names(folder / model) if name.isdecimal()} for model in WITHOUT_PATCHES
    ]
    assert all(each == versions[0] for each in versions)


class Killed(BaseException):
    """Stands for SIGKILL, which no handler sees."""
