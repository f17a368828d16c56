"""Engines of a repository: built, checked, kept, served; on a fake of TensorRT and the GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from radapter_serve.cli.build_engine import main
from radapter_serve.encoders.plans import PLAN, SIDECAR, Sidecar, build_engines, check_plan
from radapter_serve.encoders.tensorrt import find_gpu
from radapter_serve.errors import RAdapterError
from radapter_serve.release.config import read_config
from tests.helpers.fake_tensorrt import install
from tests.helpers.small_release import seal

ENGINES = [
    ("image_encoder", 1),
    ("image_encoder", 2),
    ("patch_encoder", 2),
    ("text_encoder", 1),
    ("text_encoder", 2),
]
ENCODERS = sorted({model for model, _ in ENGINES})


@pytest.fixture
def mine(repository: Path, tmp_path: Path) -> Path:
    """The encoders and `classify` of two releases, of which the second alone has patches."""
    folder = tmp_path / "repository"
    for model in (*ENCODERS, "classify"):
        shutil.copytree(repository / model, folder / model)
    seal(folder, 1, 2)
    return folder


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def configs(repository: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in repository.glob("*/config.pbtxt")}


def how(mine: Path, **options: Any) -> list[str]:
    return [engine.how for engine in build_engines(mine, **options)]


def test_every_encoder_gets_an_engine_that_agrees_and_tensorrt_serves_it(
    trt: None, mine: Path
) -> None:
    before = {model: read_config(mine / model / "config.pbtxt") for model in ENCODERS}
    built = build_engines(mine)
    assert [(plan.model, plan.version, plan.how) for plan in built] == [
        (*e, "built") for e in ENGINES
    ]
    for plan in built:
        folder = mine / plan.model / str(plan.version)
        assert plan.agreement.max_error < 1e-6
        sidecar = check_plan(folder)
        assert (sidecar.version, sidecar.gpu) == ("11.4.0.106", "NVIDIA H100")
        assert (sidecar.compute_capability, sidecar.agreement) == ("9.0", plan.agreement)
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.pbtxt", "model.onnx", "samples.npz", PLAN, SIDECAR}
    for model in ENCODERS:
        now = read_config(mine / model / "config.pbtxt")
        assert (now.backend, now.default_model_filename) == ("tensorrt", PLAN)
        assert [group.kind for group in now.instance_group] == [
            model_config_pb2.ModelInstanceGroup.KIND_GPU
        ]
        same = ("name", "version_policy", "max_batch_size", "input", "output", "dynamic_batching")
        for field in same[:2] if model == "text_encoder" else same:
            assert getattr(now, field) == getattr(before[model], field)
        # The tasks make the batches of texts; an empty text would be lost in Triton's.
        if model == "text_encoder":
            assert (now.max_batch_size, list(now.input[0].dims)) == (0, [-1, -1])
        # Nothing is left of ONNX Runtime's.
        assert [name for name in now.parameters if not name.startswith("release")] == []

    # Those that fit stay.
    stamps = {path: path.stat().st_mtime_ns for path in mine.glob(f"*/*/{PLAN}")}
    assert how(mine) == ["kept"] * 5
    assert {path: path.stat().st_mtime_ns for path in mine.glob(f"*/*/{PLAN}")} == stamps
    assert how(mine, opt_batch_size=16) == ["built"] * 5


def test_an_engine_that_differs_from_torch_is_not_served(trt: None, mine: Path) -> None:
    folder = mine / "text_encoder" / "2"
    samples = dict(np.load(folder / "samples.npz"))
    right = samples["reference_1"]
    np.savez(folder / "samples.npz", **samples | {"reference_1": np.roll(right, 1, axis=0)})
    before = configs(mine)
    for tolerance, message in (
        (None, "text_encoder differs from torch by up to .*--tolerance"),
        (2, "no --tolerance allows a cosine below 0.9"),  # no component can differ by more
    ):
        with pytest.raises(RAdapterError, match=message):
            build_engines(mine, tolerance=tolerance)
    assert configs(mine) == before
    assert not (folder / PLAN).exists()
    np.savez(folder / "samples.npz", **samples)
    assert how(mine) == ["kept"] * 4 + ["built"]


def damage(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        facts = json.loads((folder / SIDECAR).read_text())
        (folder / SIDECAR).write_text(json.dumps(facts | fields))

    return write


def test_a_plan_that_does_not_fit_is_one_line_that_says_what_to_run(trt: None, mine: Path) -> None:
    build_engines(mine)
    folder = mine / "image_encoder" / "1"
    sidecar = Sidecar.load(folder)
    graph = (folder / "model.onnx").read_bytes()
    changes: list[tuple[Callable[[Path], Any], str]] = [
        (damage(version="11.4.0.105"), "built with TensorRT 11.4.0.105, this is 11.4.0.106"),
        (
            damage(gpu="NVIDIA L4", compute_capability="8.9"),
            r"for compute capability 8.9 \(NVIDIA L4\), this GPU \(NVIDIA H100\) has 9.0",
        ),
        (lambda folder: (folder / "model.onnx").write_bytes(b"other"), "from another model.onnx"),
        (lambda folder: (folder / SIDECAR).unlink(), "is not finished, model.plan.json is missing"),
        (lambda folder: os.truncate(folder / SIDECAR, 40), "model.plan.json is damaged"),
        (damage(colour="red"), "model.plan.json is damaged"),
        (lambda folder: (folder / PLAN).unlink(), "model.plan does not exist"),
    ]
    for change, message in changes:
        change(folder)
        again = f"run: radapter-build-engine {mine}"
        with pytest.raises(RAdapterError, match=rf"{message}.*; {again}$") as error:
            check_plan(folder)
        assert "\n" not in str(error.value)
        sidecar.save(folder)
        (folder / "model.onnx").write_bytes(graph)
    check_plan(mine / "image_encoder" / "2")


def test_a_plan_is_built_again_when_only_the_weights_beside_the_graph_changed(
    trt: None, mine: Path
) -> None:
    weights = mine / "image_encoder" / "1" / "model.onnx.data"
    weights.write_bytes(b"weights")
    build_engines(mine)
    check_plan(weights.parent)
    weights.write_bytes(b"others!")
    with pytest.raises(RAdapterError, match=r"from another model\.onnx"):
        check_plan(weights.parent)


def test_without_a_gpu_or_tensorrt_nothing_is_touched(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = configs(mine)
    for missing, message in (({"gpu": None}, "no GPU"), ({"version": None}, "not installed")):
        install(monkeypatch, **missing)  # type: ignore[arg-type]
        with pytest.raises(RAdapterError, match=message):
            build_engines(mine)
    assert configs(mine) == before


def test_the_command(trt: None, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mine)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (*ENCODERS, "built", "min cosine", f"Next:   radapter-serve {mine}"):
        assert word in out
    for flag, value in (("opt-batch-size", "0"), ("tolerance", "nan")):
        assert main([str(mine), f"--{flag}", value]) == 2
        assert f"--{flag} is {value}; allowed: " in capsys.readouterr().err


def test_a_machine_without_a_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radapter_serve.encoders.tensorrt._DRIVER", "libnothing.so.1")
    with pytest.raises(RAdapterError, match=r"no GPU: .* no NVIDIA driver .*--runtime onnxruntime"):
        find_gpu()
