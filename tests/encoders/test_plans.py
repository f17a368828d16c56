"""Engines of a repository: built, checked, kept, served; on a fake of TensorRT and the GPU."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from radapter_serve.cli.build_engine import main
from radapter_serve.encoders import plans as plan_writer
from radapter_serve.encoders.plans import (
    PLAN,
    SIDECAR,
    Sidecar,
    build_engines,
    check_engines,
    check_plan,
)
from radapter_serve.encoders.tensorrt import Options, find_gpu
from radapter_serve.errors import RAdapterError
from radapter_serve.release.integrity import write_sums
from tests.helpers.fake_tensorrt import install

ENGINES = [
    ("image_encoder", 1),
    ("image_encoder", 2),
    ("patch_encoder", 2),
    ("text_encoder", 1),
    ("text_encoder", 2),
]
ENCODERS = sorted({model for model, _ in ENGINES})


def copy_encoders(source: Path, target: Path) -> Path:
    """The encoders, and the task that has the releases, with the digests of these files alone."""
    for model in (*ENCODERS, "classify"):
        shutil.copytree(source / model, target / model)
    return sealed(target)


def sealed(repository: Path) -> Path:
    """The same, with the digests of the files as they are now."""
    for version in (1, 2):
        write_sums(repository, version)
    return repository


@pytest.fixture
def mine(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The encoders of two releases; patches in the second only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return copy_encoders(repository, tmp_path / "repository")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def config(repository: Path, model: str) -> Any:
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def configs(repository: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in repository.glob("*/config.pbtxt")}


def how(mine: Path, options: Options = Options(), **arguments: Any) -> set[str]:  # noqa: B008
    return {engine.how for engine in build_engines(mine, options, **arguments)}


def test_every_encoder_gets_an_engine_that_agrees_and_tensorrt_serves_it(
    trt: None, mine: Path
) -> None:
    before = {model: config(mine, model) for model in ENCODERS}
    built = build_engines(mine)
    assert [(one.model, one.version) for one in built] == ENGINES
    assert {one.how for one in built} == {"built"}
    for one in built:
        folder = mine / one.model / str(one.version)
        assert one.agreement.max_error < 1e-6
        sidecar = Sidecar.load(folder)
        assert (sidecar.version, sidecar.gpu) == ("11.4.0.106", "NVIDIA H100")
        assert (sidecar.compute_capability, sidecar.agreement) == ("9.0", one.agreement)
        names = {path.name for path in folder.iterdir()}
        assert names == {"model.onnx", "samples.npz", PLAN, SIDECAR}
    assert Sidecar.load(mine / "text_encoder" / "1").profile == {
        "tokens": ((1, 1), (8, 16), (64, 77))
    }
    for model in ENCODERS:
        now = config(mine, model)
        then = before[model]
        assert (now.backend, now.default_model_filename) == ("tensorrt", PLAN)
        assert [group.kind for group in now.instance_group] == [
            model_config_pb2.ModelInstanceGroup.KIND_GPU
        ]
        same = ("name", "version_policy", "max_batch_size", "input", "output", "dynamic_batching")
        for field in same[:2] if model == "text_encoder" else same:
            assert getattr(now, field) == getattr(then, field)
        # The tasks make the batches of texts; an empty text would be lost in Triton's.
        if model == "text_encoder":
            assert (now.max_batch_size, list(now.input[0].dims)) == (0, [-1, -1])
        # Nothing is left of ONNX Runtime's.
        assert [name for name in now.parameters if not name.startswith("release")] == []
    assert list(check_engines(mine)) == [mine / model / str(version) for model, version in ENGINES]
    [cache] = (mine.parent / "cache" / "radapter-serve").iterdir()
    assert cache.name == "tensorrt-11.4.0.106-NVIDIA-H100.timing"


def test_engines_that_fit_stay(trt: None, mine: Path) -> None:
    assert how(mine) == {"built"}
    stamps = {path: path.stat().st_mtime_ns for path in mine.glob(f"*/*/{PLAN}")}
    assert how(mine) == {"kept"}
    assert {path: path.stat().st_mtime_ns for path in mine.glob(f"*/*/{PLAN}")} == stamps
    assert how(mine, Options(version_compatible=True)) == {"built"}
    assert how(mine, Options(version_compatible=True), force=True) == {"built"}


def test_an_engine_that_differs_from_torch_is_not_served(trt: None, mine: Path) -> None:
    samples = dict(np.load(mine / "text_encoder" / "2" / "samples.npz"))
    samples["reference_1"] = np.roll(samples["reference_1"], 1, axis=0)
    np.savez(mine / "text_encoder" / "2" / "samples.npz", **samples)
    before = configs(mine)
    with pytest.raises(
        RAdapterError, match=r"text_encoder differs from torch by up to .*--tolerance"
    ):
        build_engines(mine)
    assert configs(mine) == before
    assert not (mine / "text_encoder" / "2" / PLAN).exists()
    with pytest.raises(
        RAdapterError, match=r"text_encoder differs .*; no --tolerance allows a cosine below 0.9"
    ):
        build_engines(mine, tolerance=2)  # no component can differ by more
    samples["reference_1"] = np.roll(samples["reference_1"], -1, axis=0)
    np.savez(mine / "text_encoder" / "2" / "samples.npz", **samples)
    build_engines(mine)
    assert config(mine, "text_encoder").backend == "tensorrt"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RAdapterError("cannot build")])
def test_a_build_that_stops_leaves_the_repository_served_as_it_was(
    trt: None, mine: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    before = configs(mine)
    real = vars(plan_writer)["build"]
    calls = []

    def third_fails(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise stop
        return real(*arguments, **keywords)

    monkeypatch.setattr(plan_writer, "build", third_fails)
    with pytest.raises(stop if isinstance(stop, type) else RAdapterError):
        build_engines(mine)
    assert configs(mine) == before
    assert not list(mine.rglob("*.new"))
    assert not check_engines(mine)  # ONNX Runtime serves
    assert [one.how for one in build_engines(mine)] == ["kept", "kept", "built", "built", "built"]


def damage(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = json.loads((folder / SIDECAR).read_text())
        (folder / SIDECAR).write_text(json.dumps(found | fields))

    return write


MISMATCHES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "version": (damage(version="11.4.0.105"), "built with TensorRT 11.4.0.105, this is 11.4.0.106"),
    "edition": (damage(edition="tensorrt_rtx"), "an engine of tensorrt_rtx, which Triton"),
    "gpu": (
        damage(gpu="NVIDIA L4", compute_capability="8.9"),
        r"for compute capability 8.9 \(NVIDIA L4\), this GPU \(NVIDIA H100\) has 9.0",
    ),
    "graph": (lambda one: (one / "model.onnx").write_bytes(b"other"), "from another model.onnx"),
    "no sidecar": (lambda one: (one / SIDECAR).unlink(), "is not finished, model.plan.json is mis"),
    "no plan": (lambda folder: (folder / PLAN).unlink(), "model.plan does not exist"),
    "half a sidecar": (lambda one: os.truncate(one / SIDECAR, 40), "model.plan.json is damaged"),
    "no number": (damage(version="new"), "model.plan.json is damaged"),
    "a field too many": (damage(colour="red"), "model.plan.json is damaged"),
}


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders with engines. Not to be changed."""
    folder = copy_encoders(repository, tmp_path_factory.mktemp("built") / "repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent))
        install(patch)
        build_engines(folder)
    return folder


@pytest.mark.parametrize("kind", MISMATCHES)
def test_a_plan_that_does_not_fit_is_one_line_that_says_what_to_run(
    kind: str, built: Path, tmp_path: Path, trt: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = copy_encoders(built, tmp_path / "repository")
    folder = mine / "image_encoder" / "1"
    change, message = MISMATCHES[kind]
    change(folder)
    sealed(mine)
    with pytest.raises(RAdapterError, match=rf"{message}.*; run: radapter-build-engine {mine}$"):
        check_plan(folder)
    assert main(["--check", str(mine)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    check_plan(mine / "image_encoder" / "2")


def test_compatible_plans_fit_where_others_do_not(trt: None, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "image_encoder", tmp_path / "r" / "image_encoder")) / "1"
    sidecar = Sidecar.load(folder)
    later = Options(version_compatible=True)
    other = Options(hardware_compatible=True)
    for version, fits in (("10.13.2", True), ("11.2.1", True), ("11.9.0", False), ("9.3.0", False)):
        replace(sidecar, version=version, options=later).save(folder)
        if fits:
            check_plan(folder)
        else:
            with pytest.raises(RAdapterError, match=f"built with TensorRT {version}"):
                check_plan(folder)
    replace(sidecar, compute_capability="8.0", options=other).save(folder)
    check_plan(folder)
    replace(sidecar, compute_capability="7.5", options=other).save(folder)
    with pytest.raises(RAdapterError, match="compute capability 7.5"):
        check_plan(folder)


def test_without_a_gpu_nothing_is_touched(
    mine: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, gpu=None)
    before = configs(mine)
    with pytest.raises(RAdapterError, match="no GPU"):
        build_engines(mine)
    assert configs(mine) == before
    with pytest.raises(RAdapterError, match="no GPU"):
        check_plan(built / "image_encoder" / "1")
    install(monkeypatch, version=None)
    with pytest.raises(RAdapterError, match="TensorRT is not installed"):
        build_engines(mine)


def test_the_command(trt: None, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(mine)]) == 0
    assert "nothing to check" in capsys.readouterr().out
    assert main([str(mine), "--timing-cache", str(mine.parent / "my.timing")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (*ENCODERS, "built", "min cosine", f"Next:   radapter-serve {mine}"):
        assert word in out
    assert (mine.parent / "my.timing").exists()
    assert main(["--check", str(mine)]) == 0
    assert capsys.readouterr().out.count(": fits") == 5
    assert main([str(mine), "--timing-cache", str(mine)]) == 2
    assert f"the timing cache {mine} is a folder; name a file" in capsys.readouterr().err
    for flag, value in (("workspace", "inf"), ("tolerance", "nan")):
        assert main([str(mine), f"--{flag}", value]) == 2
        assert f"--{flag} is {value}; allowed: " in capsys.readouterr().err


def test_a_machine_without_a_driver_is_told_what_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(
        RAdapterError,
        match=r"no GPU: .* no NVIDIA driver .*; .*--runtime onnxruntime",
    ):
        find_gpu()
