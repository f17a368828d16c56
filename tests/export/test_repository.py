"""The model repository: configs that Triton takes, and one writer at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_export import repository as module
from radapter_export.repository import Repository, config
from radapter_serve.errors import RAdapterError
from radapter_serve.release.repository import MODELS, PATCH_ENCODER
from tests.export.conftest import Exported
from tests.helpers.small_models import release


def parse(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("model", MODELS)
def test_a_config_parses_and_holds_the_releases(exported: Exported, model: str) -> None:
    folder, (first, second) = exported
    parsed = parse((folder / "repository" / model / "config.pbtxt").read_text(encoding="utf-8"))
    assert parsed.name == model
    assert parsed.backend == ("onnxruntime" if model.endswith("encoder") else "python")
    assert parsed.max_batch_size == (0 if model in ("retrieve", "segment") else 64)
    assert list(parsed.version_policy.specific.versions) == [1, 2]
    named = {key: value.string_value for key, value in parsed.parameters.items()}
    facts = {key: json.loads(text) for key, text in named.items() if key.startswith("release")}
    assert facts == {"release": second.facts, "release.1": first.facts, "release.2": second.facts}


def test_encoder_configs_have_the_shapes_of_the_graphs(exported: Exported) -> None:
    for model, expected in {
        "image_encoder": ("image", [32, 32, 3], "image_embeds", [32]),
        "patch_encoder": ("image", [32, 32, 3], "patch_embeds", [2, 2, 32]),
        "text_encoder": ("tokens", [-1], "text_embeds", [32]),
        "embed_image": ("image", [1], "image_embeds", [32]),
        "embed_text": ("text", [1], "text_embeds", [32]),
    }.items():
        path = exported[0] / "repository" / model / "config.pbtxt"
        parsed = parse(path.read_text(encoding="utf-8"))
        source, *optional = parsed.input
        (result,) = parsed.output
        assert (source.name, list(source.dims), result.name, list(result.dims)) == expected
        alpha = [("alpha", True)] if "embed_" in model else []
        assert [(tensor.name, tensor.optional) for tensor in optional] == alpha


def test_a_template_is_filled_in(tmp_path: Path) -> None:
    template = tmp_path / "config.template.pbtxt"
    batching = "dynamic_batching { preferred_batch_size: [4, 8, 64] }"
    template.write_text(f'name: "x" max_batch_size: 64 {batching}', encoding="utf-8")
    parsed = parse(config(template, "embed_text", [replace(release(3), max_batch_size=8)]))
    assert list(parsed.dynamic_batching.preferred_batch_size) == [4, 8]
    assert (parsed.name, parsed.max_batch_size) == ("embed_text", 8)


def test_two_exports_at_a_time_are_refused_and_an_empty_one_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with Repository(folder) as repository:
        assert repository.next_version() == 1 and folder.is_dir()
        with pytest.raises(RAdapterError, match="another radapter-export"), Repository(folder):
            pass
    assert not list(tmp_path.iterdir())


def test_an_installation_without_its_own_models_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a checkout's `model_repository` was removed, with the releases in it."""
    monkeypatch.setattr(module, "sources", lambda: tmp_path / "parts")
    with pytest.raises(RAdapterError, match=f"git checkout -- {tmp_path / 'parts'},"):
        Repository(tmp_path / "whole")


def test_a_model_of_another_maker_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "image_encoder" / "1" / "model.onnx"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"somebody's")
    (tmp_path / "image_encoder" / "config.pbtxt").write_text('backend: "onnxruntime"')
    with (
        pytest.raises(RAdapterError, match="image_encoder holds a model that radapter-export did"),
        Repository(tmp_path),
    ):
        pass
    assert foreign.read_bytes() == b"somebody's"


def put(folder: Path, models: Sequence[str], killed: bool = False) -> int:
    """Commit a release of these models, each a version with nothing in it, or be killed just
    before.
    """
    repository = Repository(folder, models).__enter__()
    version = repository.next_version()
    for model in models:
        repository.staged(model, version).mkdir()
        text = f'parameters {{ key: "release" }} # {version}'
        (repository.staged(model) / "config.pbtxt").write_text(text)
    if killed:
        repository._held.close()
    else:
        repository.commit([version])
        repository.__exit__()
    return version


def test_a_model_that_the_new_release_lacks_is_served_no_more_and_its_old_versions_stay(
    tmp_path: Path,
) -> None:
    without = [model for model in MODELS if model != PATCH_ENCODER]
    for number, models in enumerate([MODELS, without, without] * 2, 1):
        before = {path: path.read_text() for path in tmp_path.glob("*/config.pbtxt")}
        assert put(tmp_path, models, killed=True) == number
        assert {path: path.read_text() for path in tmp_path.glob("*/config.pbtxt")} == before
        assert put(tmp_path, models) == number
        served = {path.parent.name for path in tmp_path.glob("*/config.pbtxt")}
        assert served == set(models)
        assert not list(tmp_path.glob("*/.export-*"))
    assert {path.name for path in (tmp_path / PATCH_ENCODER).iterdir()} == {"1", "4"}
    assert {path.name for path in (tmp_path / "classify").iterdir()} == {"config.pbtxt", *"123456"}
