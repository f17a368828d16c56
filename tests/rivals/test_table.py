"""Tables: what is done is kept, nothing is chosen on test data, and the figures are those of the
cells.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from radapter_serve.data.labelled import Labelled
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.rows import packed
from radapter_serve.training import Recipe
from rivals.benchmark import load_benchmark
from rivals.cells import ALPHAS, Cell, Cells, Judged, read_cells, score
from rivals.layout import spread, with_interval
from rivals.method import Cost, Run, at_rate, with_rate
from rivals.pacs import main as pacs
from rivals.radapter import r_adapter
from rivals.table import CHOICES, choose, differing, leads, main
from rivals.tables import METHODS, figures, images_of
from tests.helpers.a_row import a_row

BENCHMARKS = Path(__file__).parents[2] / "rivals" / "benchmarks"
SMALL = ["--only", "Zero-shot", "FT", "WiSE-FT"]
FT = with_rate(METHODS["ft"], 1e-5)


@pytest.mark.slow
def test_table_is_written_and_not_made_twice(
    benchmark_file: Path, here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    call = ["1", "--data", str(benchmark_file), "--out", str(out), "--seeds", "0", "1", *SMALL]
    assert main(call) == 0
    # WiSE-FT is another place of the line of FT.
    assert sorted(here) == ["FullFineTuning"] * 2 + ["ZeroShot"] * 2
    text = (tmp_path / "out" / "table-1.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    shown, _, ahead = text.partition("What each method leads Zero-shot")
    head, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    sets = ["same (n 24)", "mean of 2 shifts", "other (n 24)", "third (n 24) |"]
    assert head.split(" | ")[4:] == ["α", *sets]
    assert [row.split(" | ")[0] for row in rows] == ["| Zero-shot", "| FT", "| WiSE-FT"]
    assert [row.split(" | ")[4] for row in rows] == ["-", "-", "0.5"]
    assert (tmp_path / "out" / "table-1.png").stat().st_size > 1000
    lines = list(read_cells(tmp_path / "out" / "table-1.jsonl"))
    assert [(line.name, line.seed) for line in lines] == [
        (name, seed) for name in ("Zero-shot", "FT", "WiSE-FT") for seed in (0, 1)
    ]

    def of_the_same(name: str) -> list[float]:
        return [
            100 * row.metrics["acc1"]
            for line in lines
            for row in line.rows
            if line.name == name and row.dataset == "same"
        ]

    values = of_the_same("FT")
    assert rows[1].split(" | ")[5] == spread(values)
    (base,) = set(of_the_same("Zero-shot"))
    head, _, *rows = [line for line in ahead.splitlines() if line.startswith("|")]
    assert head == "| method | same | mean of 2 shifts | other | third |"
    assert [row.split(" | ")[0] for row in rows] == ["| FT", "| WiSE-FT"]
    assert rows[0].split(" | ")[1] == with_interval([value - base for value in values], "+")
    here.clear()
    assert main(call) == 0
    assert here == []
    shutil.rmtree(tmp_path / "out" / "learned")
    assert main(["all", *call[1:7], "--only", "ft"]) == 0  # another table reads the same cells
    assert here == [] and not (tmp_path / "out" / "table-all.jsonl").exists()
    assert main([*call[:7], "--only", "FT", "--steps", "3"]) == 0  # another run
    assert here == ["FullFineTuning"]


@pytest.mark.slow
def test_what_is_done_counts_where_the_data_has_moved(
    benchmark_file: Path, here: list[str], tmp_path: Path
):
    out = ["--out", str(tmp_path / "out"), "--only", "FT"]
    other = tmp_path / "other"
    other.mkdir()
    assert main(["1", "--data", str(benchmark_file), *out]) == 0
    for name in ("benchmark.yaml", "suite.yaml", "templates.txt"):
        shutil.copy(tmp_path / name, other)
    shutil.copytree(tmp_path / "images", other / "images")
    call = ["1", "--data", str(other / "benchmark.yaml"), *out]
    assert main(call) == 0
    assert here == ["FullFineTuning"]
    (other / "templates.txt").write_text("a drawing of {}.\n")  # but not with other prompts
    assert main(call) == 0
    assert here == ["FullFineTuning"] * 2


@pytest.mark.slow
def test_fig3_shows_every_alpha(benchmark_file: Path, here: list[str], tmp_path: Path):
    assert main(["fig3", "--data", str(benchmark_file), "--out", str(tmp_path / "out")]) == 0
    rows = [
        line.split(" | ")
        for line in (tmp_path / "out" / "table-fig3.md").read_text().splitlines()[5:]
        if "|" in line
    ]
    shown = [(row[0].strip("| "), row[1]) for row in rows if row[1][0].isdigit()]
    assert shown == [(name, f"{alpha:g}") for name in ("R-Adapter", "WiSE-FT") for alpha in ALPHAS]
    assert (tmp_path / "out" / "table-fig3.png").exists()


@dataclass(frozen=True)
class Asked:
    """Cells whose validation scores a function gives; what was asked for."""

    cells: Cells  # of a benchmark
    splits: list[str]  # that a cell was asked for


@pytest.fixture
def cells_of(
    benchmark_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Any, int, float], float]], Asked]:
    """Cells by a function of method, seed and α."""

    def made(value: Callable[[Any, int, float], float]) -> Asked:
        asked = Asked(Cells(load_benchmark(benchmark_file), tmp_path), [])

        def cell(name: str, method: Any, seed: int, alphas: Any, split: str = "test") -> Cell:
            asked.splits.append(split)
            rows = [row("x", "id", value(method, seed, a) / 100, alpha=a) for a in alphas]
            return Cell("", name, seed, split, repr(method), Cost(), rows)

        monkeypatch.setattr(asked.cells, "cell", cell)
        return asked

    return made


def rate_of(method: Any) -> float:
    return float(method.settings["learning_rate"])


def test_the_rate_is_chosen_by_the_mean_of_all_seeds_and_the_grid_grows(cells_of: Any):
    """The first seed likes 1e-5 best, the mean 9e-4, which is outside the grid."""

    def value(method: Any, seed: int, alpha: float) -> float:
        away = abs(math.log10(rate_of(method) / 9e-4))
        return 60 - 10 * away - (30 * (rate_of(method) > 2e-5) if seed == 0 else 0) + seed

    asked = cells_of(value)
    found = choose(asked.cells, "ft", [FT], [1, 2, 3], [1, 3, 9])
    assert rate_of(found.method) == pytest.approx(8.1e-4)
    assert not found.at_edge
    assert [round(one.rate / 1e-5, 1) for one in found.tried] == [1, 3, 9, 27, 81, 243]
    assert set(asked.splits) == {"validation"}
    first = choose(asked.cells, "ft", [FT], [0], [1, 3, 9])
    assert rate_of(first.method) == pytest.approx(1e-5)
    assert [round(one.rate / 1e-5, 2) for one in first.tried] == [1, 3, 9, 0.33]
    endless = cells_of(lambda method, seed, alpha: 50 + 1e3 * rate_of(method) + seed)
    assert choose(endless.cells, "ft", [FT], [1, 2], [1, 3]).at_edge


def test_some_of_the_seeds_choose_and_all_are_tested(
    benchmark_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first two like the paper's rate best, and the other three, and so the mean, three times
    that.
    """
    asked: dict[str, set[int]] = {"validation": set(), "test": set()}

    def cell(
        cells: Cells, name: str, method: Any, seed: int, alphas: Any, split: str = "test"
    ) -> Cell:
        asked[split].add(seed)
        times = math.log(rate_of(method) / rate_of(METHODS["r-adapter"]), 3)
        value = 0.5 - 0.1 * abs(times) if seed < 2 else 0.5 - 0.3 * abs(times - 1)
        rows = [row("x", "id", value, alpha=a) for a in alphas]
        return Cell("", name, seed, split, repr(method), Cost(), rows)

    monkeypatch.setattr(Cells, "cell", cell)
    flags = "--only r-adapter --alpha validation --rates 1 3 --seeds 0 1 2 3 4"
    out = str(tmp_path / "out")
    call = ["all", "--data", str(benchmark_file), "--out", out, *flags.split()]
    assert main([*call, "--validation-seeds", "0", "1"]) == 0
    text = (tmp_path / "out" / "table-all.md").read_text(encoding="utf-8")
    assert "Validation chose the learning rate, by the mean of seeds 0, 1," in text
    assert "Validation chose α, by the mean of seeds 0, 1." in text
    assert f"r-adapter at {rate_of(METHODS['r-adapter']):.2g}." in text
    assert asked == {"validation": {0, 1}, "test": {0, 1, 2, 3, 4}}
    asked["validation"].clear()
    assert main(call) == 0
    assert asked["validation"] == {0, 1, 2, 3, 4}
    text = (tmp_path / "out" / "table-all.md").read_text(encoding="utf-8")
    assert "Validation chose the learning rate, by the mean of all seeds," in text
    assert f"r-adapter at {3 * rate_of(METHODS['r-adapter']):.2g}" in text


def test_an_interval_of_five_seeds_by_hand() -> None:
    # The standard deviation is √2.5, and Student's t for five seeds is 2.776: 2.776 √2.5 / √5.
    assert with_interval([1, 2, 3, 4, 5], "+") == "+3.0 ± 2.0"
    assert with_interval([0, 20]) == "10.0 ± 127.1"
    assert with_interval([7]) == "7.0"


def test_of_rates_that_cannot_be_told_apart_the_lowest_is_taken(cells_of: Any):
    """3e-5 leads 1e-5 by 0.5 on the mean, with a standard error of 0.87; 1e-6 is 9 worse."""
    leads = {1: -1.0, 2: 0.5, 3: 2.0}  # standard deviation 1.5, by √3

    def value(method: Any, seed: int, alpha: float) -> float:
        rate = round(rate_of(method), 7)
        return {3e-5: 60.0, 1e-5: 60.0 - leads[seed]}.get(rate, 50.0)

    asked = cells_of(value)
    rates = [0.1, 1, 3, 9]
    assert rate_of(choose(asked.cells, "ft", [FT], [1, 2, 3], rates).method) == 1e-5
    leads.update({1: 0.0, 3: 1.0})  # 0.29
    found = choose(asked.cells, "ft", [FT], [1, 2, 3], rates)
    assert rate_of(found.method) == pytest.approx(3e-5)


def test_a_grid_grows_until_the_rate_that_is_chosen_is_inside(cells_of: Any):
    """The best is in the middle, but the lowest can't be told from it until 1e-6."""

    def value(method: Any, seed: int, alpha: float) -> float:
        lead = seed - 1.0  # 0.33 on the mean, with a standard error of 0.88
        return {3e-5: 60.0, 1e-5: 60.0 - lead}.get(round(rate_of(method), 7), 51.0)

    asked = cells_of(value)
    found = choose(asked.cells, "ft", [FT], [0, 3, 1], [1, 3, 9])
    assert rate_of(found.method) == 1e-5
    assert [round(one.rate / 1e-5, 2) for one in found.tried] == [1, 3, 9, 0.33]
    assert not found.at_edge


@pytest.mark.parametrize("alphas", [CHOICES, CHOICES[::-1]])
def test_of_alphas_that_are_equally_good_the_smallest_is_taken(
    cells_of: Any, alphas: tuple[float, ...]
):
    """0.5 and 0.75 have 53.8 on the mean, which the sum of floats puts an ulp higher at 0.75; the
    first seed likes 0.25 best, and the others 1.
    """
    scores = {0.25: (80, 20, 20), 0.5: (43.6, 70.5, 47.3), 0.75: (50.6, 40.1, 70.7)}

    def value(method: Any, seed: int, alpha: float) -> float:
        return scores.get(alpha, (1, 73, 73))[seed]

    method = r_adapter("imagenet")
    found = choose(cells_of(value).cells, "r-adapter", [method], [0, 1, 2], [1], alphas)
    assert found.method == dataclasses.replace(method, alpha=0.5)
    assert [one.scores for one in found.tried] == [pytest.approx(scores[0.5])]


def test_alpha_and_settings_are_chosen_together_with_the_rate(cells_of: Any):
    """At the higher weight a higher rate and α are best."""

    def value(method: Any, seed: int, alpha: float) -> float:
        heavy = method.settings.get("preserve", 0) > 0
        best = {(True, 5e-3): 70.0, (False, 5e-4): 60.0}
        found = best.get((heavy, round(rate_of(method), 6)), 20.0)
        return found - 10 * abs(alpha - (0.75 if heavy else 0.5)) + seed

    asked = cells_of(value)
    methods = [r_adapter("imagenet"), r_adapter("imagenet", preserve=10.0)]
    found = choose(asked.cells, "r-adapter", methods, [1, 2], [0.1, 1, 10, 100], CHOICES)
    assert found.method == at_rate(dataclasses.replace(methods[1], alpha=0.75), 10)
    kept = choose(asked.cells, "r-adapter", methods[:1], [1, 2], [0.1, 1, 10])
    assert kept.method == methods[0]  # at its own α
    shown = differing([one.method for one in found.tried], found.method)
    assert shown == "preserve 10.0"
    none = METHODS["zero-shot"]
    assert choose(asked.cells, "zero-shot", [none], [1], [1, 3]).method == none
    slow = METHODS["ft"]
    (taken,) = {rate_of(choose(asked.cells, "ft", [slow], [0], [7]).method)}
    assert taken == pytest.approx(7 * rate_of(slow))
    assert choose(asked.cells, "ft", [slow], [0], [1]).method == slow


def test_leads_are_paired_over_seeds() -> None:
    found = {
        "Zero-shot": [{"id": 40.0}, {"id": 40.0}],
        "FT": [{"id": 50.0}, {"id": 60.0}],
        "R-Adapter": [{"id": 51.0}, {"id": 62.0}],
    }
    none: dict[str, Any] = {name: [{}, {}] for name in found}
    _, over_zero_shot, _, over_ours = leads(found, none).strip().split("\n\n")
    assert with_interval([10, 20], "+") in over_zero_shot.splitlines()[2]
    assert over_ours.splitlines()[3] == f"| FT | {with_interval([-1, -2], '+')} |"
    assert "R-Adapter" not in over_ours
    assert leads({name: of[:1] for name, of in found.items()}, none) == ""
    own = "R-Adapter, preserve, all classes"
    kept = leads({**found, own: [{"id": 50.0}, {"id": 63.0}]}, {**none, own: [{}, {}]})
    assert kept.splitlines()[-2] == f"| FT | {with_interval([0, -3], '+')} |"


def test_leads_are_paired_over_images_where_these_are_kept() -> None:
    def row(name: str, right: list[int], shift: str = "ood") -> Judged:
        bits = packed(np.array(right, bool))
        acc = {"acc1": sum(right) / len(right)}
        return Judged(
            *(name, "zeroshot_classification", shift, "test", None, len(right)),
            *("acc1", acc, "", None, bits),
        )

    base = [row("own", [0] * 20, "id"), row("a", [1, 0] * 10), row("b", [0, 1] * 10)]
    better = [row("own", [1] * 19 + [0], "id"), row("a", [1, 1] * 10), row("b", [0, 1] * 10)]
    found = {"Zero-shot": [figures(base)] * 2, "FT": [figures(better)] * 2}
    assert images_of(better)["mean of 2 shifts"][1].tolist() == [0, 1] * 10
    images = {"Zero-shot": [images_of(base)] * 2, "FT": [images_of(better)] * 2}
    text = leads(found, images)
    half = 196 * scipy.stats.sem([1] * 19 + [0])
    of_mean = 196 * scipy.stats.sem([0, 1] * 10) / 2  # the other set stays as it was
    (line,) = [line for line in text.splitlines() if line.startswith("| FT |")]
    assert f"**+95.0 ± {half:.1f}**" in line
    assert f"+25.0 ± {of_mean:.1f}" in line
    assert text.count("over images and seeds, of own, mean of 2 shifts, a, b.") == 1
    without = {**images, "FT": [{"own": images["FT"][0]["own"]}] * 2}
    assert "over images and seeds, of own, and over seeds alone" in leads(found, without)


def test_one_rate_is_taken_as_it_is(benchmark_file: Path, here: list[str], tmp_path: Path):
    flags = ["--out", str(tmp_path / "out"), "--rates", "10", "--only", "FT"]
    assert main(["1", "--data", str(benchmark_file), *flags]) == 0
    text = (tmp_path / "out" / "table-1.md").read_text()
    assert "The learning rate is each paper's own times 10: FT at 0.0003." in text
    assert here == ["FullFineTuning"]  # and nothing was chosen


def row(dataset: str, shift: str, value: float, **fields: Any) -> Judged:
    return Judged.of(a_row(dataset, shift=shift, metrics={"acc1": value, "acc5": 1.0}, **fields))


def test_score_is_a_mean_of_means():
    rows = [row("a", "id", 0.9), row("b", "ood", 0.5), row("c", "ood", 0.3)]
    assert score(rows) == pytest.approx((90 + (50 + 30) / 2) / 2)
    assert score(rows[:1]) == pytest.approx(90)
    assert score(rows[1:]) == pytest.approx(40)


def test_figures_of_each_task():
    rows = [row("b", "ood", 0.5), row("a", "id", 0.9), row("c", "ood", 0.3)]
    assert list(figures(rows).items()) == [
        ("a", 90.0),
        ("mean of 2 shifts", 40.0),
        ("b", 50.0),
        ("c", 30.0),
    ]
    recalls = {"image_retrieval_recall@1": 0.25, "text_retrieval_recall@10": 0.5}
    found = figures(
        [dataclasses.replace(row("f", "id", 0, task="zeroshot_retrieval"), metrics=recalls)]
    )
    assert found == {"f, image R@1": 25.0, "f, text R@10": 50.0}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be a mapping with suite and train"),
        ({"suite": "suite.yaml"}, "must be a mapping with suite and train"),
        ({"suite": "suite.yaml", "train": {}, "more": 1}, "must be a mapping with suite and train"),
        ({"suite": "suite.yaml", "train": []}, "train is []; it should be a dict"),
        ({"suite": "suite.yaml", "train": {"speed": 3}}, "has unknown fields speed; allowed: data"),
        ({"suite": "suite.yaml", "train": {"images": 5}}, "train of the benchmark .*images is 5"),
        ({"suite": "suite.yaml", "train": {"weight_decay": "much"}}, "weight_decay is 'much'"),
    ],
)
def test_refuses_what_is_no_benchmark(document: Any, message: str, benchmark_file: Path):
    benchmark_file.write_text(yaml.safe_dump(document))
    with pytest.raises(RAdapterError, match=message.replace("[", r"\[")):
        load_benchmark(benchmark_file)


@pytest.mark.parametrize(
    "path",
    sorted(BENCHMARKS.glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_ready_benchmarks_hold_what_a_run_needs(path: Path, tmp_path: Path):
    place = yaml.safe_load(path.read_text())["train"]["data"].partition(":")[2].partition("@")[0]
    (tmp_path / place).mkdir(parents=True)
    benchmark = load_benchmark(path, tmp_path)
    recipe = Recipe(**benchmark.fields)
    recipe.check()
    assert (
        recipe.classes is None or not Path(recipe.classes).is_dir()
    )  # imagenet is a name, and a folder of the data
    assert recipe.data.partition(":")[2].startswith(str(tmp_path))
    assert {entry.task for entry in benchmark.suite.entries} == {recipe.task}


def test_pacs_keeps_apart_what_learns_chooses_and_judges(images: Path, tmp_path: Path):
    root = tmp_path / "pacs"
    root.mkdir()
    for style in ("photo", "art_painting", "cartoon", "sketch"):
        (root / style).symlink_to(images)
    assert pacs([str(root), str(tmp_path / "out")]) == 0
    parts = {
        part: (tmp_path / "out" / f"{part}.csv").read_text().splitlines()[1:]
        for part in ("train", "validation", "test")
    }
    assert {part: len(rows) for part, rows in parts.items()} == {
        "train": 12,
        "validation": 6,
        "test": 6,
    }
    assert len({line for rows in parts.values() for line in rows}) == 24
    benchmark = load_benchmark(tmp_path / "out" / "benchmark.yaml")
    assert [len(data) for data in benchmark.sets("test")] == [6, 24, 24]
    assert [data.entry.name for data in benchmark.sets("validation")] == [
        "photo, validation",
        "sketch, validation",
    ]
    assert "sketch" not in [data.entry.name for data in benchmark.sets("test")]


def test_what_is_learned_from_pacs_counts_wherever_it_lies(
    images: Path, tiny_clip_dir: str, tmp_path: Path
):
    digests = set()
    for name in ("here", "there"):
        root = tmp_path / name
        for style in ("photo", "art_painting", "cartoon", "sketch"):
            shutil.copytree(images, root / style)
        for _ in range(2):  # the second time the link is there
            assert pacs([str(root), str(root / "out")]) == 0
        given = {
            **load_benchmark(root / "out" / "benchmark.yaml").fields,
            "architecture": tiny_clip_dir,
        }
        digests.add(Run(given, tmp_path).digest())
    assert len(digests) == 1
    root.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "out").rename(tmp_path / "out")
    root = tmp_path / "elsewhere"
    assert pacs([str(root), str(tmp_path / "out")]) == 0  # the old link leads nowhere
    assert (tmp_path / "out" / "images").resolve() == root
    (tmp_path / "images").mkdir(exist_ok=True)
    assert pacs([str(root), str(tmp_path)]) == 2  # not into a folder whose images are others


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds"], "--seeds is empty; allowed: one or more"),
        (["--seeds", "0", "1", "0"], "--seeds is 0 1 0; allowed: one or more, each named once"),
        (["--limit", "0"], "--limit is 0; allowed: 1 image or more"),
        (["--only", "E11"], "table 1 has no row 'E11'; allowed: Zero-shot"),
        (
            ["--seeds", "0", "1", "--validation-seeds", "1", "2"],
            "--validation-seeds has 2, which --seeds has not; allowed: any of 0 1",
        ),
    ],
)
def test_refuses_what_makes_no_table(
    flags: list[str], message: str, benchmark_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["1", "--data", str(benchmark_file), *flags]) == 2
    assert message in capsys.readouterr().err


def test_numbers_of_a_benchmark_are_those_that_yaml_writes_as_text(benchmark_file: Path):
    benchmark_file.write_text(
        benchmark_file.read_text() + "  weight_decay: 1e-4\n  precision: no\n"
    )
    given = load_benchmark(benchmark_file).fields
    assert (given["weight_decay"], given["precision"]) == (1e-4, "no")


def test_files_that_a_benchmark_names_are_found_beside_it(benchmark_file: Path, tmp_path: Path):
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    benchmark_file.write_text(benchmark_file.read_text() + "  classes: classes.txt\n")
    given = load_benchmark(benchmark_file).fields
    assert given["classes"] == tmp_path / "classes.txt"  # a path, as Recipe has it
    assert given["templates"] == str(tmp_path / "templates.txt")  # a text, which may be a name
    data = Run(given, tmp_path).data
    assert isinstance(data, Labelled)
    assert sorted(data.classes) == ["blue", "green", "red"]


@pytest.mark.parametrize("change", [{"rows": [{}]}, None])
def test_a_cell_that_is_damaged_is_named(change: dict[str, Any] | None, tmp_path: Path):
    results = BENCHMARKS.parents[1] / "benchmarks" / "results" / "pacs" / "table-5.jsonl"
    whole = results.read_text(encoding="utf-8").splitlines()[0]
    damaged = whole[:-20] if change is None else json.dumps({**json.loads(whole), **change})
    path = tmp_path / "table-1.jsonl"
    path.write_text(f"{whole}\n{damaged}")
    with pytest.raises(RAdapterError, match=f"line 2 of {path} is no cell .* remove it"):
        list(read_cells(path))


@pytest.mark.slow
def test_learns_in_a_process_of_its_own(
    make_run: Callable[..., Run], benchmark_file: Path, tmp_path: Path
):
    held = torch.zeros(50_000_000)  # 200 MB that a process forked from this one would have, too
    cells = Cells(load_benchmark(benchmark_file), tmp_path)
    cell = cells.cell("ft", METHODS["ft"], 0, [1.0])
    own = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    assert 0 < cell.cost.memory < int(own) * 1024
    assert len(held)
