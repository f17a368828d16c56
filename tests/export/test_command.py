"""`radapter-export` and `export`, the function: what they write, print and refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import radapter_serve
from radapter_serve.adapter import Adapter, save_adapter
from radapter_serve.cli.export import main
from radapter_serve.encoders.plans import check_plan
from radapter_serve.errors import RAdapterError
from tests.helpers.fake_tensorrt import install


@pytest.fixture
def checkout(
    quick: None,
    random_adapter: Callable[..., Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working folder with two runs, of which `new` is the newest."""
    for name, age, classes in (("old", 100, ["Crane", "dog", "crane"]), ("new", 0, None)):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        save_adapter(random_adapter(scale=0.05, classes=classes), run / "adapter.safetensors")
        stamp = (run / "adapter.safetensors").stat().st_mtime - age
        os.utime(run / "adapter.safetensors", (stamp, stamp))
    (tmp_path / "animals.txt").write_text("cat, kitty\ndog\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_newest_run_is_exported_and_a_table_printed(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = ["--label-set", "animals=animals.txt", "--label-set", "b=animals.txt"]
    assert main(["--alpha", "0.3", "0.5", *sets]) == 0
    out = capfd.readouterr().out
    assert "runs/new/adapter.safetensors: 2 releases in fp32" in out
    assert "text_encoder" in out and "max error" in out
    query = "        radapter-query classify PHOTO.jpg --label-set animals\n"
    assert out.endswith(f"Next:   radapter-serve\n{query}")
    assert {path.name for path in (checkout / "merged").iterdir()} == {"alpha-0.3", "alpha-0.5"}
    folder = checkout / "model_repository" / "classify" / "2" / "label_sets"
    assert {path.name for path in folder.iterdir()} == {"animals.npz", "b.npz"}


def test_the_function_returns_what_it_wrote_and_prints_nothing(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = radapter_serve.export(
        "runs/old", [0.3, 0.8], merged="plain", label_sets={"animals": "animals.txt"}
    )
    assert capfd.readouterr() == ("", "")
    assert (done.version, done.alpha, len(done.releases)) == (2, 0.8, 2)
    assert set(done.agreement) == {"image_encoder", "text_encoder"}
    assert all(0 < agreement.max_error < 1e-4 for agreement in done.agreement.values())
    assert done.merged == Path("plain")
    assert done.releases[0].merged == checkout / "plain" / "alpha-0.3"
    assert (done.model_repository / "classify" / "2" / "label_sets" / "animals.npz").is_file()
    assert (done.transformers, done.choice, done.made_of) == (None, None, ("runs/old",))
    assert "\n" not in repr(done) and len(repr(done)) < 300
    # The tokenizer makes all letters small; both releases say it, and the result once.
    (note,) = done.notes
    assert "'Crane' and 'crane'" in note and "dog" not in note


def test_engines_are_built_with_the_release(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch)
    how = ["--format", "tensorrt", "--precision", "fp16", "--max-batch-size", "4"]
    assert main(["--alpha", "0.3", *how]) == 0
    assert capfd.readouterr().err == ""
    repository = checkout / "model_repository"
    for folder in repository.glob("*_encoder/1"):
        release = json.loads((repository / "classify" / "1" / "release.json").read_text())
        assert (release["runtime"], release["precision"]) == ("tensorrt", "fp16")
        measured = release["agreement"][folder.parent.name]["max_error"]
        assert measured == pytest.approx(check_plan(folder).agreement.max_error)


def test_an_engine_needs_a_gpu_and_nothing_is_begun_without(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, gpu=None)
    monkeypatch.setattr(
        "radapter_export.source.load_base_of", lambda *_: pytest.fail("the base was loaded")
    )
    assert main(["--format", "tensorrt"]) == 2
    assert "no GPU" in capfd.readouterr().err
    assert not (checkout / "model_repository").exists()


CHECKPOINT = "--checkpoint animals.txt --base ViT-B-32:openai"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format tensorrt --runtime openvino", "is served with --runtime tensorrt"),
        ("--format tensorrt --precision int8", "TensorRT takes only int8 with fixed ranges"),
        ("--alpha half", "alpha is 'half'; allowed: a number from 0 to 1"),
        ("--alpha auto", "no alpha was chosen"),
        ("--label-set animals.txt", "write NAME=FILE"),
        ("--alpha auto --adapter runs/none", "no adapter file at runs/none; make one with"),
        ("--adapter runs/none", "no adapter file at runs/none"),
        ("--lora runs", "runs is not a folder of peft"),
        ("--precision bf16", "cannot compute in bf16 on a CPU; add --runtime openvino"),
        ("--precision int8 --calibration none", "none is not a folder"),
        ("--max-drop -1", "max_drop is -1.0: "),
        ("--model-repository animals.txt", "animals.txt is a file"),
        ("--alpha nan", "alpha is nan"),
        ("--alpha 0.5 0.5", "alpha is 0.5 0.5; give one number from 0 to 1, or several that"),
        ("--label-set ../a=animals.txt", "'../a' can't be the name"),
        (
            f"{CHECKPOINT} --alpha dynamic",
            "is for adapters; leave it out with --checkpoint",
        ),
        (f"{CHECKPOINT} --alpha auto", "--alpha auto is chosen for one run"),
        (f"{CHECKPOINT} --adapter runs/old", "--adapter and --checkpoint don't go together"),
        (f"{CHECKPOINT} --validation own", "--validation own is for adapters"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    checkout: Path, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(arguments.split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("radapter-export: error: ")
    assert message in err and err.count("\n") == 1
    assert {path.name for path in checkout.iterdir()} == {"runs", "animals.txt"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharpness": 3}, "sharpness is 3: Unexpected keyword argument"),
        ({"precision": "fp8"}, "precision is 'fp8': Input should be 'fp32', 'fp16'"),
        ({"format": "savedmodel"}, "format is 'savedmodel'; allowed: onnx, tensorrt"),
    ],
)
def test_keywords_that_the_function_does_not_know_are_refused(
    adapter_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RAdapterError, match=message):
        radapter_serve.export(adapter_path, 0.5, **settings)
