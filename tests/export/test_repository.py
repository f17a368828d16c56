"""The model repository: configs that Triton takes, and one writer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_export import repository as module
from radapter_export.repository import Repository, config
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import read_config
from radapter_serve.release.repository import MODELS, PATCH_ENCODER
from tests.export.conftest import Exported
from tests.helpers.small_models import release


@pytest.mark.parametrize("model", MODELS)
def test_a_config_parses_and_holds_the_releases(exported: Exported, model: str) -> None:
    folder, (first, second) = exported
    parsed = read_config(folder / "repository" / model / "config.pbtxt")
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
        parsed = read_config(exported[0] / "repository" / model / "config.pbtxt")
        source, *optional = parsed.input
        result, *receipt = parsed.output
        assert (source.name, list(source.dims), result.name, list(result.dims)) == expected
        is_task = "embed_" in model
        point = [("adapter", True), ("alpha", True)] if is_task else []
        assert [(tensor.name, tensor.optional) for tensor in optional] == point
        assert [tensor.name for tensor in receipt] == ["receipt"] * is_task


def test_a_template_is_filled_in(tmp_path: Path) -> None:
    template = tmp_path / "config.template.pbtxt"
    batching = "dynamic_batching { preferred_batch_size: [4, 8, 64] }"
    template.write_text(f'name: "x" max_batch_size: 64 {batching}', encoding="utf-8")
    text = config(template, "embed_text", [replace(release(3), max_batch_size=8)])
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
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
    """An example is a checkout whose `model_repository` was removed with its releases."""
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


class Killed(BaseException):
    """As SIGKILL, which no handler sees."""


WITHOUT_PATCHES = [model for model in MODELS if model != PATCH_ENCODER]


def put(folder: Path, models: Sequence[str], moves: int | None = None) -> int:
    """Commit a release of these models, empty ones, or be killed after so many moves."""
    repository = Repository(folder, models).__enter__()
    version = repository.next_version()
    for model in models:
        repository.staged(model, version).mkdir()
        text = f'parameters {{ key: "release" value: {{ string_value: "{version}" }} }}'
        (repository.staged(model) / "config.pbtxt").write_text(text)
    done: list[Path] = []

    def counted(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(self: Path, target: Path) -> Path:
            if len(done) == moves:
                raise Killed
            done.append(target)
            return move(self, target)

        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "replace", counted(Path.replace))
        try:
            repository.commit([version])
        except Killed:
            repository._held.close()
            return version
    repository.__exit__()
    return version


def served(folder: Path) -> dict[str, str]:
    """The release that each model's config names."""
    configs = {path.parent.name: read_config(path) for path in folder.glob("*/config.pbtxt")}
    return {name: config.parameters["release"].string_value for name, config in configs.items()}


def test_a_model_that_the_new_release_lacks_loses_its_config_and_keeps_its_versions(
    tmp_path: Path,
) -> None:
    for number, models in enumerate([MODELS, WITHOUT_PATCHES, WITHOUT_PATCHES] * 2, 1):
        before = served(tmp_path)
        assert put(tmp_path, models, moves=0) == number
        assert served(tmp_path) == before
        assert put(tmp_path, models) == number
        assert served(tmp_path) == dict.fromkeys(models, str(number))
        assert not list(tmp_path.glob("*/.export-*"))
    assert {path.name for path in (tmp_path / PATCH_ENCODER).iterdir()} == {"1", "4"}
    assert {path.name for path in (tmp_path / "classify").iterdir()} == {"config.pbtxt", *"123456"}


@pytest.mark.parametrize("moves", range(2 * len(MODELS)))
def test_an_export_killed_while_it_puts_versions_in_place_serves_no_half_release(
    tmp_path: Path, moves: int
) -> None:
    """Versions come first, so until the configs follow nothing that is served has changed."""
    put(tmp_path, MODELS)
    put(tmp_path, MODELS, moves)
    for model, version in served(tmp_path).items():
        assert (tmp_path / model / version).is_dir()
    if moves <= len(MODELS):
        assert served(tmp_path) == dict.fromkeys(MODELS, "1")
    # The next export removes versions that lack a model.
    assert put(tmp_path, MODELS) == (2 if moves < len(MODELS) else 3)
    for model in MODELS:
        names = {path.name for path in (tmp_path / model).iterdir()}
        assert names == {"config.pbtxt", *("12" if moves < len(MODELS) else "123")}
