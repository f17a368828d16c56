"""Recipes: what is read, what is refused in one line, and what follows the length of a run."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radapter_serve.cli.train import main
from radapter_serve.errors import RAdapterError
from radapter_serve.training import Recipe, load_recipe
from radapter_serve.training.recipe import ready_recipes, recipe_from

FIELDS = [field.name for field in dataclasses.fields(Recipe)]
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats()),
    *(st.text(max_size=20), st.dates(), st.binary()),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3)
)


DOCUMENTS = VALUES | st.dictionaries(
    st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=6
)
TEXT = st.text() | st.text(alphabet="{}[]:&*!|>-?%@\n \"'ab1")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@given(content=st.binary() | TEXT.map(str.encode) | DOCUMENTS.map(yaml.dump).map(str.encode))
@settings(max_examples=20, deadline=None)
@example(content=b"\xff\xfe alpha")
@example(content=b"a: 2001-99-99")
@example(content=b"[" * 1500)
@example(content=b"? [1]\n: 2\n1: 2\nb: 3")
@example(content=b"alpha: !!int ''")
@example(content=b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\ntemplates: [*b, *b, *b]")
def test_any_bytes_give_a_recipe_or_one_line(path: Path, content: bytes) -> None:
    """A file is a valid recipe that can become YAML again, or is refused in one line."""
    path.write_bytes(content)
    try:
        recipe = load_recipe(path)
    except RAdapterError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        return
    assert load_recipe(path) == recipe
    yaml.safe_dump(recipe.to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shots": True}, "shots is True; it should be a valid integer"),
        ({"drop": True}, "drop is True; it should be a number"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": "auto"}, "learning_rate is 'auto'; it should be a valid number"),
        ({"seed": 2147483648}, "seed is 2147483648"),
        ({"task": "sing"}, "task is 'sing'; it should be 'classification', 'retrieval' or"),
        # each of which is fine by itself
        ({"batch_size": 6, "accumulate": 4}, "accumulate is 4; allowed: divisors of batch_size 6"),
        ({"min_learning_rate": 1.0}, "min_learning_rate is 1.0; allowed: 0 to learning_rate"),
        ({"val_fraction": 0.1, "val_data": "csv:v.csv"}, "val_data names validation data"),
        ({"task": "retrieval", "shots": 4}, "which task retrieval does not use"),
        ({"task": "classification", "captions_per_image": 2}, "captions_per_image is 2, which"),
    ],
)
def test_values_that_are_refused(path: Path, fields: dict[str, Any], message: str) -> None:
    path.write_text(yaml.safe_dump({"data": "csv:t.csv", **fields}))
    with pytest.raises(RAdapterError, match=message):
        load_recipe(path).check()
    with pytest.raises(RAdapterError, match=message):
        Recipe(data="csv:t.csv", **fields).check()


def test_recipes_are_read_by_name_and_from_yaml(path: Path) -> None:
    path.write_text("learning_rate: 5e-4\nprecision: no\nclasses: c.txt\ndrop: 0\n")
    recipe = load_recipe(path)
    assert (recipe.learning_rate, recipe.precision) == (5e-4, "no")
    assert (recipe.classes, recipe.drop) == (Path("c.txt"), 0.0)
    for content, words in (
        (b"alpha: 0.5\ndelta: [0.1\nepsilon: 0", "could not read .*line 3"),
        ("tracker: grün".encode("latin-1"), "could not read .*utf-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(RAdapterError, match=words):
            load_recipe(path)
    root = Path(__file__).parents[2] / "recipes"
    names = {path.stem for path in root.glob("*.yaml")}
    assert set(ready_recipes()) == names >= {"small", "imagenet", "few-shot"}
    assert load_recipe("small") == load_recipe(root / "small.yaml")
    for name in ready_recipes():
        dataclasses.replace(load_recipe(name), data="imagefolder:x").check()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that the command would train by."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(
        "radapter_serve.training.start.train", lambda recipe, **_: recipes.append(recipe)
    )
    return recipes


def test_other_names_of_fields(path: Path, trained: list[Recipe]) -> None:
    fields: dict[str, Any] = {
        "label_smoothing": 0.3,
        "margin": 0.2,
        "ema_decay": 0.4,
        "adapter_dropout": 0.1,
    }
    expected = load_recipe("small")
    expected = dataclasses.replace(expected, epsilon=0.3, delta=0.2, momentum=0.4, drop=0.1)
    expected = dataclasses.replace(expected, architecture="ViT-B-16", pretrained="openai")
    assert recipe_from("small", base="ViT-B-16:openai", **fields) == expected
    path.write_text(yaml.safe_dump({**fields, "base": "ViT-B-16:openai"}))
    assert load_recipe(path).epsilon == 0.3 and load_recipe(path).pretrained == "openai"
    path.write_text("epsilon: 0.1\nlabel_smoothing: 0.2\n")
    with pytest.raises(RAdapterError, match="epsilon is set twice"):
        load_recipe(path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    assert main([*flags, "--base", "ViT-B-16:openai", "--data", str(path.parent)]) == 0
    assert trained == [dataclasses.replace(expected, data=f"imagefolder:{path.parent}")]


def test_the_default_recipe_follows_the_task(trained: list[Recipe]) -> None:
    cases: list[tuple[list[str], str, dict[str, Any]]] = [
        ([], "small", {}),
        (["--task", "retrieval"], "retrieval", {}),
        (["--val-data", "csv:v.csv"], "small", {"val_data": "csv:v.csv", "val_fraction": 0.0}),
    ]
    for flags, name, changes in cases:
        assert main(["--data", "csv:t.csv", *flags]) == 0
        expected = dataclasses.replace(load_recipe(name), data="csv:t.csv", **changes)
        assert trained.pop() == expected


def test_a_run_is_resumed_by_its_own_recipe(tmp_path: Path) -> None:
    with pytest.raises(RAdapterError, match="no run to resume in .*: it has no recipe.yaml"):
        recipe_from(resume=tmp_path)
    (tmp_path / "recipe.yaml").write_text("data: csv:t.csv\ndelta: 0.2\n")
    recipe = Recipe(data="csv:t.csv", delta=0.2, out=tmp_path, resume=True)
    assert recipe_from(resume=tmp_path) == recipe
    assert recipe_from(resume=str(tmp_path), workers=0) == dataclasses.replace(recipe, workers=0)


@pytest.mark.parametrize(
    ("steps", "warmup", "momentum"), [(4, 0, 0.0), (180, 36, 1 - 5 / 180), (10_000, 500, 0.999)]
)
def test_warm_up_and_averaging_follow_the_length(steps: int, warmup: int, momentum: float) -> None:
    plan = dataclasses.replace(load_recipe("small"), steps=steps).resolved(None)
    assert (plan.steps, plan.warmup_steps, plan.notes) == (steps, warmup, ())
    assert plan.momentum == pytest.approx(momentum)
    with pytest.raises(RAdapterError, match=f"warmup_steps is {steps} but .*--warmup-steps none"):
        Recipe(steps=steps, warmup_steps=steps).resolved(None)


@pytest.mark.parametrize(("momentum", "steps", "share"), [(0.999, 105, 10), (0.99, 229, 90)])
def test_an_average_that_keeps_little_of_a_run_is_warned_of(
    momentum: float, steps: int, share: int
) -> None:
    recipe = Recipe(steps=steps, momentum=momentum)
    (note,) = recipe.resolved(None).notes
    assert f"keeps {share}.0% of what a run of {steps} steps learns" in note
    assert not dataclasses.replace(recipe, bias_correction=True).resolved(None).notes


@pytest.mark.parametrize(
    ("batch_size", "images", "parts", "fitted"),
    [(32, 300, 1, 32), (32, 19, 1, 19), (32, 19, 2, 18), (512, 2, 2, 2), (512, None, 2, 512)],
)
def test_a_batch_is_all_images_at_most(
    batch_size: int, images: int | None, parts: int, fitted: int
) -> None:
    for accumulate in {1, parts}:
        recipe = Recipe(steps=9, batch_size=batch_size, accumulate=accumulate)
        plan = recipe.resolved(images, parts // accumulate)
        assert plan.recipe == dataclasses.replace(recipe, batch_size=fitted)
        assert plan.part == fitted // parts
        assert any(f"a batch is {fitted} images" in note for note in plan.notes) == (
            fitted < batch_size
        )
    with pytest.raises(RAdapterError, match="is not a multiple of 3 parts"):
        Recipe(batch_size=32).resolved(300, 3)
    for few, of_batch, least in ((1, 1, 2), (0, 1, 2), (3, 4, 4)):
        with pytest.raises(RAdapterError, match=f"holds {few} images .* needs {least} at least"):
            Recipe(batch_size=32).resolved(few, of_batch)


@pytest.mark.slow
def test_help_refusals_and_threads_come_before_torch() -> None:
    code = (
        "import sys, contextlib\n"
        "from radapter_serve.cli.train import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert main(['--alpha', '2', '--data', 'csv:t.csv']) == 2\n"
        "assert not {'torch', 'open_clip', 'datasets'} & set(sys.modules)\n"
        "assert main(['--data', 'imagefolder:/nowhere']) == 2\n"
        "assert not {'torch', 'open_clip'} & set(sys.modules)\n"
        "from radapter_serve.process import limit_threads\n"
        "limit_threads(1)\n"
        "import torch\n"
        "assert torch.get_num_threads() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--val-fraction" in done.stdout and "alpha is 2.0" in done.stderr
