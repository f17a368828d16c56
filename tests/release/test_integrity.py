"""A release is what was exported, file by file and config by config; sha256sum is the reference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format

from radapter_serve.cli.release import main
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import (
    ServedEncoder,
    check,
    check_configs,
    configure,
    encoders_of,
    name_releases,
    named_releases,
    parsed,
    read_config,
)
from radapter_serve.release.integrity import SUMS, renew_sums, sums_of, verify
from radapter_serve.release.repository import CONFIG, ENCODERS, MODELS, Served
from tests.helpers.asking import tritonserver
from tests.helpers.small_release import seal


def files(repository: Path, version: int) -> list[str]:
    return [
        str(path.relative_to(repository))
        for path in repository.glob(f"*/{version}/**/*")
        if path.is_file()
    ]


def test_sha256sum_agrees_with_the_list_and_nothing_is_left_out(sealed: Path) -> None:
    for version in (1, 2):
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", f"classify/{version}/{SUMS}"],
            cwd=sealed,
            capture_output=True,
            text=True,
            check=True,
        )
        named = {line.rpartition(": ")[0] for line in done.stdout.splitlines()}
        assert named == set(files(sealed, version)) - {f"classify/{version}/{SUMS}"}
        verify(sealed, version)
    said: list[str] = []
    check(sealed, [1, 2], said.append)
    for version in (1, 2):
        shares = [line for line in said if f"the files of release {version}: " in line]
        assert shares[-1] == f"checking the files of release {version}: 100 %"
        assert len(shares) > 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, "differs"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "differs"),
    "emptied": (lambda path: os.truncate(path, 0), "is empty"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_happens_to_any_file_is_said_by_its_name(sealed: Path, harm: str) -> None:
    spoil, word = HARMS[harm]
    names = files(sealed, 2)
    assert len(names) > 20
    for name in names:  # none so large that reading it again and again takes long
        os.truncate(sealed / name, min((sealed / name).stat().st_size, 20_000))
    seal(sealed, 2)
    for name in names:
        data = (sealed / name).read_bytes()
        spoil(sealed / name)
        with pytest.raises(RAdapterError) as error:
            check(sealed, [2])
        if not name.endswith(SUMS):  # a digest that is wrong or gone speaks against its file
            assert f"{name} {word}" in str(error.value)
            assert str(error.value).count(";") == 1  # one file, one problem
        (sealed / name).write_bytes(data)
    check(sealed, [1, 2])


def test_a_file_that_nobody_exported_is_refused_but_for_what_python_and_editors_leave(
    sealed: Path,
) -> None:
    (sealed / "classify/2/__pycache__").mkdir()
    (sealed / "classify/2/__pycache__/model.pyc").touch()
    (sealed / "classify/2/.model.py.swp").touch()
    verify(sealed, 2)
    folder = sealed / "classify/2/label_sets"
    shutil.copy(folder / "colours.npz", folder / "mine.npz")
    with pytest.raises(RAdapterError, match=r"label_sets/mine\.npz does not belong to it"):
        verify(sealed, 2)


def test_the_list_itself_may_be_broken(sealed: Path) -> None:
    path = sums_of(sealed, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    with pytest.raises(RAdapterError, match="does not belong to it"):
        verify(sealed, 2)
    path.write_bytes(b"\xff\x00" * 99)
    with pytest.raises(RAdapterError, match=r"SHA256SUMS, line 1, is not a digest"):
        verify(sealed, 2)
    path.unlink()
    with pytest.raises(RAdapterError, match="SHA256SUMS, the list of its digests, is missing"):
        check(sealed, [1, 2])


def test_an_engine_that_is_built_later_gets_its_digest(sealed: Path) -> None:
    plan = sealed / "image_encoder/2/model.plan"
    plan.write_bytes(b"an engine")
    with pytest.raises(
        RAdapterError, match=r"image_encoder/2/model\.plan .*; build it again with radapter-build"
    ):
        verify(sealed, 2)
    renew_sums(sealed, 2, ["image_encoder/2/model.plan", "image_encoder/2/model.plan.json"])
    verify(sealed, 2)
    plan.unlink()
    renew_sums(sealed, 2, ["image_encoder/2/model.plan"])
    verify(sealed, 2)


# The configs that Triton reads may be changed by their owner, so they have no digests.


def test_owners_may_change_how_a_model_runs(sealed: Path) -> None:
    path = sealed / "image_encoder" / CONFIG
    config = read_config(path)
    config.instance_group[0].count = 3
    config.max_batch_size = 16
    config.dynamic_batching.max_queue_delay_microseconds = 500
    path.write_text(text_format.MessageToString(config))
    check_configs(sealed, 2)
    configure(config, "openvino", "fp32", 16)  # its tensors have the batch's dimension themselves
    path.write_text(text_format.MessageToString(config))
    check_configs(sealed, 2)


def test_models_of_others_are_left_alone_and_a_broken_config_is_named(sealed: Path) -> None:
    encoders = {encoder.name: encoder for encoder in encoders_of(sealed)}
    assert set(encoders) == {"image_encoder", "patch_encoder", "text_encoder"}
    assert encoders["image_encoder"].versions == [1, 2]
    (sealed / "other").mkdir()
    (sealed / "other" / CONFIG).write_text('backend: "onnxruntime" of_tomorrow: 1')
    assert len(encoders_of(sealed)) == 3
    (sealed / "other" / CONFIG).write_text("backend {")
    with pytest.raises(RAdapterError, match=r"other/config\.pbtxt is not a Triton model config: "):
        encoders_of(sealed)


def test_encoders_of_a_release_have_its_facts_and_no_other_version(sealed: Path) -> None:
    for version, names in ((1, ["image_encoder", "text_encoder"]), (2, list(ENCODERS))):
        encoders = encoders_of(sealed, [version])
        assert [encoder.folder for encoder in encoders] == [sealed / name for name in names]
        for encoder in encoders:
            assert encoder.versions == [version]
            assert encoder.facts.adapter_digest == f"sha256:{version}"
    with pytest.raises(RAdapterError, match=r"image_encoder lacks the releases that .* \(3\)"):
        encoders_of(sealed, [3])


def test_a_config_names_the_releases_that_it_is_given_and_no_other(sealed: Path) -> None:
    config = read_config(sealed / "classify" / CONFIG)
    both = named_releases(config)
    assert set(both) == {1, 2}
    name_releases(config, {1: both[1]})
    assert named_releases(config) == {1: both[1]}
    assert json.loads(config.parameters["release"].string_value) == both[1].to_dict()


def test_configs_of_each_runtime_and_the_way_back(repository: Path) -> None:
    [exported] = [encoder for encoder in encoders_of(repository) if encoder.name == "image_encoder"]
    openvino = parsed(exported.configured("openvino", 3))
    assert (openvino.backend, openvino.default_model_filename) == ("openvino", "model.onnx")
    # Its official backend would pad each batch to max_batch_size rows.
    assert (openvino.max_batch_size, openvino.HasField("dynamic_batching")) == (0, False)
    dims = list(openvino.input[0].dims), list(openvino.output[0].dims)
    assert dims == ([-1, 16, 16, 3], [-1, 8])
    assert openvino.parameters["INFERENCE_NUM_THREADS"].string_value == "3"
    configure(openvino, "openvino", "bf16", 64)
    assert openvino.parameters["HINT_BF16"].string_value == "YES"

    plan = parsed(exported.configured("tensorrt", 3))
    assert (plan.backend, plan.default_model_filename) == ("tensorrt", "model.plan")
    # Triton would put an instance on every GPU; the engine was built and checked on one.
    assert list(plan.instance_group[0].gpus) == [0]

    for other in (openvino, plan):
        assert not other.optimization.execution_accelerators.gpu_execution_accelerator
        encoder = ServedEncoder(exported.folder, other, exported.facts)
        back = parsed(encoder.configured("onnxruntime", None))
        assert back == exported.config
    [cuda] = back.optimization.execution_accelerators.gpu_execution_accelerator
    # fp32 is fp32, as it was checked
    assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("embed_text", "sha256:2", "sha256:3", "it is of another release 2 than"),
        ("image_encoder", "dims: 8", "dims: 9", "the output image_embeds is not the one"),
        ("image_encoder", "image_encoder", "patch_encoder", "it is the config of patch_encoder"),
        ("image_encoder", 'name: "image_encoder"', "", "it is the config of no model; to mend it"),
    ],
)
def test_a_config_that_does_not_belong_to_its_release_is_named(
    sealed: Path, model: str, old: str, new: str, message: str
) -> None:
    path = sealed / model / CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RAdapterError, match=rf"{model}/config\.pbtxt: {message}"):
        check_configs(sealed, 2)


def test_models_whose_configs_are_of_another_release_are_named(sealed: Path) -> None:
    for model in ("embed_text", "segment"):
        shutil.copy(sealed / model / "1" / CONFIG, sealed / model / CONFIG)
    check_configs(sealed, 1)  # which all of them name
    (sealed / "classify" / CONFIG).unlink()
    lacking = r"not in embed_text \(of release 1\), segment \(of release 1\), classify \(missing\);"
    with pytest.raises(RAdapterError, match=lacking):
        check_configs(sealed, 2)


def test_a_release_of_an_earlier_export_has_configs_of_its_own(sealed: Path) -> None:
    for model in MODELS:
        if (sealed / model / "2" / CONFIG).exists():
            shutil.copy(sealed / model / "2" / CONFIG, sealed / model / CONFIG)
    assert Served.load(sealed).releases == (2,)
    check_configs(sealed, 1)
    (sealed / "classify" / "1" / CONFIG).unlink()
    with pytest.raises(RAdapterError, match=r"it has no config of classify; export it again"):
        check_configs(sealed, 1)


def test_a_server_refuses_what_is_broken_before_it_starts_anything(
    sealed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "radapter_serve.server.triton_server.find_tritonserver",
        lambda *_: pytest.fail("looked for a tritonserver"),
    )
    flip(sealed / "text_encoder/1/model.onnx")
    with pytest.raises(RAdapterError, match=r"text_encoder/1/model\.onnx differs"):
        tritonserver(sealed).start()
    for version, status, text in (
        (["1"], 2, "text_encoder/1/model.onnx differs"),
        (["2"], 0, "release 2: as it was exported\n"),
        (["3"], 2, "it holds 1, 2"),
    ):
        assert main(["verify", *version, "--model-repository", str(sealed)]) == status
        assert text in "".join(capsys.readouterr())
