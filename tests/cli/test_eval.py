"""`radapter-eval`, from the command line to files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from radapter_serve.adapter import Adapter, load_adapter, save_adapter
from radapter_serve.cli.eval import main
from radapter_serve.evaluation.alpha_choice import read_choice
from tests.evaluation.conftest import picture
from tests.helpers.ways import in_process

CLASSES = ["cat", "dog", "house"]
SUITE = """
templates: simple
sets:
  - {name: plain, data: "imagefolder:plain"}
  - {name: shifted, data: "imagefolder:shifted", shift: ood}
  - {name: held-out, data: "imagefolder:held-out", split: validation}
"""


@pytest.fixture(scope="module")
def sources(
    random_adapter: Callable[..., Adapter], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`data` with three small image folders, `suite.yaml`, `runs/tiny`."""
    root = tmp_path_factory.mktemp("eval")
    generator = np.random.default_rng(0)
    for name in ("plain", "shifted", "held-out"):
        for index in range(12):
            folder = root / "data" / name / CLASSES[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            picture(generator).save(folder / f"{index}.png")
    (root / "suite.yaml").write_text(SUITE, encoding="utf-8")
    run = root / "runs" / "tiny"
    run.mkdir(parents=True)
    recipe = {"val_data": f"imagefolder:{root / 'data' / 'held-out'}"}
    save_adapter(random_adapter(alpha=0.5, recipe=recipe), run / "adapter.safetensors")
    return root


@pytest.fixture
def here(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `sources` to work in, where nouns are few and no pictures are drawn."""
    shutil.copytree(sources / "runs", tmp_path / "runs")
    shutil.copy(sources / "suite.yaml", tmp_path)
    (tmp_path / "data").symlink_to(sources / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("radapter_serve.evaluation.image_sets._NOUN_STEP", 100)
    monkeypatch.setattr(Figure, "savefig", lambda self, path: path.touch())
    return tmp_path


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def points(folder: Path) -> list[tuple[str, float]]:
    return [(row["dataset"], row["alpha"]) for row in rows(folder)]


COMMON = ["--suite", "suite.yaml", "--data-root", "data", "--out", "results"]


def test_a_sweep_writes_rows_a_table_and_pictures(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMON, "--alpha", "0", "0.5", "1"]) == 0
    out, err = capfd.readouterr()
    # This adapter is of random values.
    assert [line.partition(" keeps ")[0] for line in err.splitlines()] == ["alpha 0.5", "alpha 1"]
    assert err.count("much is lost of labels and searches that you did not train") == 2
    assert {path.name for path in (here / "results").iterdir()} == {
        "results.jsonl", "alpha.png", "confusion-plain.png", "confusion-shifted.png",
    }  # fmt: skip
    assert "n 12" in out and "prompts of plain, shifted: 'a photo of a {}.'" in out
    assert points(here / "results") == [(s, a) for s in ("plain", "shifted") for a in (0, 0.5, 1)]
    for row in rows(here / "results"):
        metrics = row["metrics"]
        low, high = row["intervals"]["acc1"]
        assert set(metrics) == {"acc1", "mean_per_class_recall", "ece", "kept"}
        assert low < metrics["acc1"] < high and f"{100 * low:.1f} – {100 * high:.1f}" in out
        assert [of["class"] for of in row["per_class"]] == CLASSES
        recall = np.mean([of["recall"] for of in row["per_class"]])
        assert np.trace(row["confusion"]) / 12 == pytest.approx(metrics["acc1"])
        assert recall == pytest.approx(metrics["acc1"])


def test_resume_evaluates_only_what_is_missing(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*COMMON, "--alpha", "0", "0.5"]) == 0
    before = rows(here / "results")
    assert main([*COMMON, "--alpha", "0.5", "1"]) == 0
    after = rows(here / "results")
    assert after[:4] == before
    assert points(here / "results")[4:] == [("plain", 1), ("shifted", 1)]

    # The share that alpha 1 keeps needs no row of the base, and is the same with one.
    kept = [row["metrics"]["kept"] for row in after]
    assert main([*COMMON, "--alpha", "1", "--out", "alone"]) == 0
    alone = rows(here / "alone")
    assert [row["alpha"] for row in alone] == [1.0, 1.0]
    assert [row["metrics"]["kept"] for row in alone] == kept[4:]
    assert main([*COMMON, "--alpha", "1", "0", "--out", "both"]) == 0
    assert [r["metrics"]["kept"] for r in rows(here / "both") if r["alpha"] == 1] == kept[4:]

    # A row of an older file, without it, is measured again.
    old = [{**row, "metrics": {**row["metrics"]}} for row in alone]
    del old[0]["metrics"]["kept"]
    (here / "alone" / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in old))
    assert main([*COMMON, "--alpha", "1", "--out", "alone"]) == 0
    assert {row["metrics"]["kept"] for row in rows(here / "alone")} == set(kept[4:])

    # Nothing is missing.
    assert "measured before" not in capfd.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr("radapter_serve.evaluation.run.evaluate_set", None)
        assert main([*COMMON, "--alpha", "0.5", "1", "0"]) == 0
    assert rows(here / "results") == after
    assert "all of this was measured before; --no-resume" in capfd.readouterr().out

    # Other data in the same folder; and all of it again.
    data = f"imagefolder:{here / 'data' / 'held-out'}"
    assert main(["--data", data, "--alpha", "0.5", "--out", "results"]) == 0
    assert points(here / "results")[6:] == [(data, 0.5)]
    assert main([*COMMON, "--alpha", "0.5", "--no-resume"]) == 0
    assert points(here / "results") == [("plain", 0.5), ("shifted", 0.5)]


def test_labels_that_are_alike_are_named(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "names.yaml").write_text("cat: a cat\ndog: a dog\nhouse: A  CAT\n", encoding="utf-8")
    suite = 'sets: [{name: plain, data: "imagefolder:plain", classes: names.yaml}]'
    (here / "suite.yaml").write_text(suite, encoding="utf-8")
    run = ["--adapter", "runs/tiny/adapter.safetensors", "--alpha", "0.5"]
    for _ in range(2):  # and where the row is there already
        assert main([*run, *COMMON[:4]]) == 0
        warning = "plain: warning: adapter at alpha 0.5 can't tell apart 'a cat' and 'A  CAT' ("
        assert warning in capfd.readouterr().err
    assert points(here / "results/tiny/suite") == [("plain", 0.5)]


def test_interrupted_rows_are_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from radapter_serve.evaluation import run

    real: Any = run.evaluate_set
    calls: list[int] = []

    def once(*arguments: object, **options: object) -> object:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(run, "evaluate_set", once)
    assert main([*COMMON, "--alpha", "0.5"]) == 130
    assert [row["dataset"] for row in rows(here / "results")] == ["plain"]
    assert {path.name for path in (here / "results").iterdir()} == {"results.jsonl"}


def test_auto_chooses_on_validation_data(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radapter_serve.evaluation.start.GRID", (0.0, 0.01, 0.7, 1.0))
    (here / "results").mkdir()
    (here / "results" / "alpha.png").write_bytes(b"the curve of an earlier call")
    assert main([*COMMON, "--alpha", "auto"]) == 0
    out, err = capfd.readouterr()
    assert (here / "results" / "alpha.png").read_bytes() == b"the curve of an earlier call"
    assert (here / "results" / "validation.png").exists()
    assert (
        "rule: auto is the smallest alpha above 0 that is not significantly different from the best"
        in out
    )
    choice = read_choice("runs/tiny", load_adapter("runs/tiny").digest)
    # Lines of progress come before the notes on a slow machine.
    assert choice.notes and err.splitlines()[-len(choice.notes) :] == list(choice.notes)
    command = "radapter-export --adapter runs/tiny --alpha"
    assert choice.best != choice.alpha and "behind the best" in out and "kept" in out
    assert out.endswith(f"Next:   {command} auto\nor:     {command} best\n")
    assert [point.alpha for point in choice.curve] == [0.0, 0.01, 0.5, 0.7, 1.0]
    tested = {point for point in points(here / "results") if point[0] != "held-out"}
    alphas = (0, choice.alpha, choice.best)
    assert tested == {(name, alpha) for name in ("plain", "shifted") for alpha in alphas}


def test_test_images_that_are_validation_images_are_named_in_a_warning(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMON, "--alpha", "0.5", "--out", "apart"]) == 0
    assert "warning" not in capfd.readouterr().err
    shutil.copytree((here / "data").resolve(), here / "copy")
    for number in (0, 3):
        image = here / "copy" / "held-out" / "cat" / f"{number}.png"
        shutil.copy(image, here / "copy" / "plain" / "dog" / f"x{number}.png")
    # Those may have chosen α earlier.
    assert main(["--suite", "suite.yaml", "--data-root", "copy", "--alpha", "0.5"]) == 0
    warning = "plain: warning: 2 of its 14 images are validation images of held-out too; "
    assert warning in capfd.readouterr().err


def test_a_checkpoint_a_release_and_a_server_are_evaluated_at_their_alpha_or_the_one_asked_for(
    here: Path, exported_tiny_clip: Path, dynamic_tiny_clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    *_, checkpoint = sorted(exported_tiny_clip.glob("merged/**/open_clip_config.json"))
    fixed = str(exported_tiny_clip / "model_repository")
    assert main([*COMMON, "--merged", str(checkpoint.parent)]) == 0
    assert main([*COMMON, "--model-repository", f"{fixed}@1"]) == 0
    measured = rows(here / "results")
    assert [(row["source"], row["alpha"]) for row in measured] == [
        *[("merged", 0.8)] * 2,
        *[("release", 0.3)] * 2,
    ]
    expected = [pytest.approx(row["metrics"], abs=1e-5) for row in measured[2:]]
    with in_process(dynamic_tiny_clip, here / "indexes") as server:
        for model in ("--model-repository", str(dynamic_tiny_clip)), ("--url", server.url):
            assert main([*COMMON, *model, "--alpha", "0.3", "--no-resume"]) == 0
            assert [row["metrics"] for row in rows(here / "results")] == expected
    capfd.readouterr()
    release = ["--model-repository", fixed, "--alpha", "0.5", "--out", "none"]
    assert main([*COMMON, *release]) == 2
    assert "exported at alpha 0.8; radapter-export --alpha dynamic" in capfd.readouterr().err
    assert not (here / "none").exists()


# The first are refused before torch is loaded, which takes seconds.
EARLY = [
    ([], "no test data; give a suite with --suite: a file, or one of base-to-novel, coco200, "),
    (["--suite", "none"], "there is no suite none; allowed: a file, or one of base-to-novel, "),
    ([*COMMON[:4], "--out", "suite.yaml/a/b"], "suite.yaml is not a folder"),
    ([*COMMON[:4], "--out", "broken"], "broken/results.jsonl, line 1 is not a row of results"),
    (["--alpha", "auto", "--out", "broken"], "line 1 is not a row of results"),
    ([*COMMON, "--alpha", "nan"], "alpha is 'nan'; allowed"),
    ([*COMMON, "--alpha", "0.5", "0.5"], "given twice"),
    ([*COMMON, "--alpha", "auto", "0.5"], "takes no other alpha"),
    ([*COMMON, "--merged", "a", "--alpha", "0.5"], "merged, alpha don't go together"),
    (
        [*COMMON, "--model-repository", "a", "--adapter", "anna", "--alpha", "auto"],
        "not for model_repository: run radapter-eval --adapter RUN --alpha auto,",
    ),
    ([*COMMON, "--limit", "0"], "limit is 0; allowed: 1 or more"),
]
LATE = [
    ([*COMMON, "--merged", "none"], "is not a model folder"),
    ([*COMMON, "--adapter", "none"], "no adapter file at none"),
    ([*COMMON, "--model-repository", "none"], "no release in the model repository none"),
    ([*COMMON, "--url", "grpc://127.0.0.1:1"], "grpc://127.0.0.1:1: "),
    ([*COMMON, "--lora", "runs"], "runs is not a folder of peft"),
    ([*COMMON, "--device", "abacus"], "abacus"),
    (["--suite", "suite.yaml", "--data-root", "runs"], "'plain': no folder runs/plain"),
]


@pytest.mark.parametrize(("arguments", "message"), [*EARLY, *LATE])
def test_bad_input_is_one_line_and_status_2(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (here / "broken").mkdir()
    (here / "broken" / "results.jsonl").write_text("{\n", encoding="utf-8")
    if (arguments, message) in EARLY:
        for module in ("torch", "radapter_serve.evaluation.run"):
            monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("radapter-eval: error: ") and err.count("\n") == 1
    assert message in err
    assert {path.name for path in here.iterdir()} == {"runs", "data", "suite.yaml", "broken"}
