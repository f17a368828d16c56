"""Whole runs on a tiny model: they learn, stop and go on to the same result, and say what is
wrong.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from radapter_serve.adapter import attach, load_adapter
from radapter_serve.cli.train import main
from radapter_serve.clip.base import Base, load_base
from radapter_serve.data.labelled import load_labelled
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, choose_form, setup, train
from radapter_serve.training.setup import start_accelerator
from radapter_serve.training.validation import answers, validate
from tests.helpers.by_hand import assert_same
from tests.helpers.short_run import rows, short_run


@pytest.fixture
def recipe(tiny_clip_dir: str, images: Path, tmp_path: Path) -> Recipe:
    data = f"imagefolder:{images}"
    return short_run(tiny_clip_dir, tmp_path, data=data, val_data=data)


def test_a_run_learns_and_leaves_what_it_says(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(recipe, steps=30, validate_every=10, tracker="tensorboard")
    out = train(recipe, progress=True).folder
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    accuracies = [row["acc1@alpha=1"] for row in rows(out) if "acc1@alpha=1" in row]
    assert len(accuracies) == 3 and accuracies[-1] == 1.0  # three plain colours
    adapter = load_adapter(out)
    assert adapter.metadata.metrics["acc1@alpha=1"] == 1.0
    assert adapter.metadata.classes == ["blue", "green", "red"]
    assert (
        adapter.metadata.recipe
        == yaml.safe_load((out / "recipe.yaml").read_text())
        == recipe.to_dict()
    )
    assert {p.name for p in out.iterdir()} == {
        "adapter.safetensors",
        "checkpoint.pt",
        "metrics.jsonl",
        "recipe.yaml",
        "radapter",
    }
    assert list((out / "radapter").rglob("events*"))
    printed = capsys.readouterr().out
    assert (
        "% of the base's" in printed
        and "images/s" in printed
        and "s left" in printed
        and "the first two steps say: the rest of training takes about" in printed
        and "next: radapter-eval" in printed
    )


@pytest.mark.parametrize("change", [{}, {"rank": 2, "bias_correction": True}])
def test_a_killed_run_resumes_to_the_same_result(
    recipe: Recipe, assert_resumes: Callable[[Recipe, int], None], change: dict[str, Any]
) -> None:
    assert_resumes(dataclasses.replace(recipe, accumulate=2, flip=True, **change), 6)


def test_both_forms_train_to_the_same_adapter(recipe: Recipe, tmp_path: Path) -> None:
    found = [
        load_adapter(
            train(dataclasses.replace(recipe, form=form, out=tmp_path / form, val_data=None))
        ).tensors
        for form in ("activation", "weight")
    ]
    assert_same(found[1], found[0])


@pytest.mark.slow
def test_two_processes_train_to_the_same_adapter_as_one(
    recipe: Recipe, images: Path, tmp_path: Path, train_in_two_processes: Any
) -> None:
    (images / "red" / "7.png").unlink()  # 23 images: no multiple of the batch nor of the processes
    one = load_adapter(train(recipe))
    train_in_two_processes(recipe, tmp_path / "two")
    two = load_adapter(tmp_path / "two")
    assert_same(two.tensors, one.tensors)


@pytest.mark.slow
def test_two_processes_share_the_classes_that_a_batch_lacks(
    recipe: Recipe, images: Path, tmp_path: Path, train_in_two_processes: Any
) -> None:
    for name in ("cyan", "pink", "teal", "white"):  # of one image, so most batches lack them
        (images / name).mkdir()
        shutil.copy(images / "red" / "6.png", images / name)
    recipe = dataclasses.replace(recipe, negative_classes=3)  # not always even
    one = load_adapter(train(recipe))
    train_in_two_processes(recipe, tmp_path / "two")
    two = load_adapter(tmp_path / "two")
    assert_same(two.tensors, one.tensors)


def test_bf16_trains_to_nearly_the_same(recipe: Recipe, tmp_path: Path) -> None:
    plain, half = (
        load_adapter(
            train(
                dataclasses.replace(
                    recipe, precision=precision, val_data=None, out=tmp_path / precision
                )
            )
        )
        for precision in ("no", "bf16")
    )
    assert all(value.dtype == torch.float32 for value in half.tensors.values())
    for name, value in plain.tensors.items():
        assert F.cosine_similarity(half.tensors[name].flatten(), value.flatten(), dim=0) > 0.9
    assert any(not torch.equal(half.tensors[name], value) for name, value in plain.tensors.items())


def test_the_base_is_loaded_with_the_weights_that_the_recipe_names(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(architecture: str, pretrained: str | None) -> Base:
        raise RAdapterError(f"{architecture} with {pretrained}")

    monkeypatch.setattr(setup, "load_base", stop)
    with pytest.raises(RAdapterError, match=r"^ViT-B-32 with openai$"):
        train(dataclasses.replace(recipe, architecture="ViT-B-32", pretrained="openai"))


def test_schedule_warms_up_and_falls_as_a_cosine() -> None:
    recipe = Recipe(steps=110, learning_rate=1.0, min_learning_rate=0.0, warmup_steps=10)
    plan = recipe.resolved(None)
    rates = [plan.learning_rate(step) for step in range(110)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[109] < 0.001


def test_form_follows_the_batch(tiny_clip_dir: str) -> None:
    model = load_base(tiny_clip_dir).model
    assert choose_form(model, None, 4) == "activation"
    assert choose_form(model, None, 4096) == "weight"
    assert choose_form(model, 4, 4096) == "activation"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("radapter-train: error: ") and error.count("\n") == 1
    return error


def test_bad_input_is_one_line(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    known = ("--recipe", str(path))
    assert "no training data" in run(capsys)
    assert "unknown model 'ViT-X-1'" in run(capsys, *known, "--architecture", "ViT-X-1")
    assert "no weights for ViT-B-32" in run(capsys, *known, "--architecture", "ViT-B-32")
    assert "is not a model folder" in run(capsys, *known, "--architecture", "local-dir:/nowhere")
    assert "alpha is 1.5" in run(capsys, *known, "--alpha", "1.5")
    assert "there is no recipe /nowhere.yaml; allowed: a file, or one of base-to-novel" in run(
        capsys, "--recipe", "/nowhere.yaml"
    )
    assert "--resume needs --out" in run(capsys, *known, "--resume")
    assert "no checkpoint" in run(capsys, *known, "--resume", "--out", str(tmp_path / "run"))
    assert "warmup_steps is 8" in run(capsys, *known, "--warmup-steps", "8")
    assert "workers is -1" in run(capsys, *known, "--workers", "-1")
    (tmp_path / "file").touch()
    assert "Not a directory" in run(capsys, *known, "--out", str(tmp_path / "file" / "run"))
    assert "tracker 'wanbd'" in run(capsys, *known, "--tracker", "wanbd")
    path.write_text("learning_rat: 1\n")
    assert "unknown fields learning_rat" in run(capsys, *known)
    for line, word in (
        ("learning_rate: fast", "learning_rate is 'fast'"),
        ("batch_size: many", "batch_size is 'many'"),
        ("drop: null", "drop is None"),
        ("on_broken: maybe", "on_broken is 'maybe'"),
        ("templates: ['a {}']", "templates is ['a {}']"),
    ):
        path.write_text(f"{line}\n")
        assert word in run(capsys, *known)
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_one_line_with_workers_too(
    recipe: Recipe, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "red" / "0.png").write_bytes(b"no image")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe.to_dict(), "val_data": None, "workers": 2}))
    assert "red/0.png can't be read" in run(
        capsys, "--recipe", str(path), "--out", str(tmp_path / "refused")
    )
    assert (
        main(["--recipe", str(path), "--out", str(tmp_path / "skipped"), "--on-broken", "skip"])
        == 0
    )
    assert "left out 1 broken image" in capsys.readouterr().out
    assert "red/0.png" in (tmp_path / "skipped" / "broken.txt").read_text()


def test_an_image_that_breaks_before_validation(
    recipe: Recipe, images: Path, tiny_clip_dir: str
) -> None:
    base = load_base(tiny_clip_dir)
    adapters = attach(base.model)
    data = load_labelled(f"imagefolder:{images}")
    accelerator = start_accelerator(recipe, images)
    (images / "red" / "0.png").write_bytes(b"no image")
    refusing = dataclasses.replace(recipe, on_broken="refuse")
    with pytest.raises(RAdapterError, match=r"red/0\.png can't be read"):
        validate(base, adapters, data, refusing, accelerator)
    skipping = dataclasses.replace(recipe, on_broken="skip")
    answered, right = answers(base, adapters, data, [0.0, 1.0], skipping, accelerator)
    assert answered.shape == right.shape == (2, 23)


def test_flags_go_before_the_recipe_file(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()) + "precision: no\n")
    out = tmp_path / "flags"
    assert (
        main(
            [
                "--recipe",
                str(path),
                "--out",
                str(out),
                "--steps",
                "3",
                "--learning-rate",
                "2e-3",
                "--rank",
                "2",
            ]
        )
        == 0
    )
    metadata = load_adapter(out).metadata
    assert (
        metadata.rank == 2
        and metadata.recipe["learning_rate"] == 2e-3
        and metadata.recipe["batch_size"] == 8
    )
    assert len([row for row in rows(out) if "loss" in row]) == 3


def test_the_base_stays_to_the_bit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = []

    def load(*arguments: Any) -> Base:
        bases.append(load_base(*arguments))
        return bases[-1]

    monkeypatch.setattr("radapter_serve.training.setup.load_base", load)
    train(recipe)
    after = bases[0].model.state_dict()
    for name, value in load_base(recipe.architecture).model.state_dict().items():
        assert torch.equal(after[name], value), name


def test_a_resumed_finished_run_keeps_its_metrics_and_says_that_it_was_finished(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_adapter(train(recipe, progress=True))
    assert "finished already" not in capsys.readouterr().out
    again = load_adapter(train(dataclasses.replace(recipe, resume=True), progress=True))
    printed = capsys.readouterr().out
    assert f"{recipe.out} was finished already, after step 8 of 8; this trains nothing" in printed
    assert "steps of 8 images" not in printed and "images/s" not in printed
    assert again.metadata.metrics == before.metadata.metrics and before.metadata.metrics
    assert again.digest == before.digest
    assert recipe.out is not None and len([row for row in rows(recipe.out) if "loss" in row]) == 8


def test_a_stream_resumes_behind_broken_images(
    recipe: Recipe, images: Path, tmp_path: Path, assert_resumes: Callable[[Recipe, int], None]
) -> None:
    files = sorted(images.rglob("*.png"))
    table = [f"{file},{file.parent.name}" for file in files]
    (tmp_path / "table.csv").write_text("image,label\n" + "\n".join(table))
    (tmp_path / "classes.txt").write_text("blue\ngreen\nred\n")
    files[3].write_bytes(b"no image")
    recipe = dataclasses.replace(
        recipe,
        data=f"csv:{tmp_path}/table.csv",
        classes=tmp_path / "classes.txt",
        streaming=True,
        val_data=None,
        on_broken="skip",
        save_every=1,
        steps=6,
    )
    assert_resumes(recipe, 4)


def test_a_damaged_checkpoint(recipe: Recipe) -> None:
    out = train(dataclasses.replace(recipe, val_data=None)).folder
    (out / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(RAdapterError, match="is not a whole checkpoint"):
        train(dataclasses.replace(recipe, resume=True))


def test_a_full_disk_in_the_middle_of_a_run(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert "No space left on device" in run(capsys, "--recipe", str(path), "--out", str(recipe.out))
    assert {p.name for p in recipe.out.iterdir()} == {"recipe.yaml", "metrics.jsonl"}  # type: ignore[union-attr]


def test_a_run_is_not_overwritten_nor_resumed_by_another_recipe(recipe: Recipe) -> None:
    train(dataclasses.replace(recipe, val_data=None))
    with pytest.raises(RAdapterError, match="holds a run; go on with it by --resume"):
        train(recipe)
    with pytest.raises(RAdapterError, match="delta was 0.05, is 0.1"):
        train(dataclasses.replace(recipe, resume=True, delta=0.1))


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(
    recipe: Recipe, images: Path
) -> None:
    broken = next(images.rglob("*.png"))
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    recipe = dataclasses.replace(recipe, val_data=None, on_broken="refuse")
    with pytest.raises(RAdapterError, match="can't be read"):
        train(recipe)
    broken.write_bytes(whole)
    load_adapter(train(recipe))
    assert recipe.out is not None and len(rows(recipe.out)) == recipe.steps


def test_few_images_are_one_batch_and_notes_come_before_the_first_step(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(
        dataclasses.replace(recipe, batch_size=100, val_data=None, steps=3, momentum=0.99),
        progress=True,
    )
    assert load_adapter(out).metadata.recipe["batch_size"] == 24
    printed = capsys.readouterr().out
    assert (
        printed.index("a batch is 24 images")
        < printed.index("momentum 0.99 keeps 3.0%")
        < printed.index("step 1/3")
    )
