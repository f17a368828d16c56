"""Tables: what is done is kept, validation alone chooses, and figures are those of the cells."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.rows import packed
from radapter_serve.evaluation.suite import load_suite
from radapter_serve.training import Recipe
from radapter_serve.training.data import open_run
from rivals import scenes
from rivals.benchmark import load_benchmark
from rivals.cells import ALPHAS, Cell, Cells, Judged, read_cells, score
from rivals.layout import spread
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
    text = (out / "table-1.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert (out / "table-1.png").stat().st_size > 1000

    # Figures are those of the cells, by their columns.
    shown, _, ahead = text.partition("What each method leads Zero-shot")
    head, _, *rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("|")]
    sets = ["same (n 24)", "mean of 2 shifts", "other (n 24)", "third (n 24) |"]
    assert head[4:] == ["α", *sets]
    assert [row[0] for row in rows] == ["| Zero-shot", "| FT", "| WiSE-FT"]
    assert [row[4] for row in rows] == ["-", "-", "0.5"]
    lines = read_cells(out / "table-1.jsonl", Cell.of)
    names = [(name, seed) for name in ("Zero-shot", "FT", "WiSE-FT") for seed in (0, 1)]
    assert [(line.name, line.seed) for line in lines] == names
    same: dict[str, list[float]] = {}
    for line in lines:
        same.setdefault(line.name, []).append(figures(line.rows)["same"])
    assert rows[1][5] == spread(same["FT"])
    assert [line for line in ahead.splitlines() if line.startswith("| FT | ")]

    # Another table reads the same cells; other settings are another run.
    here.clear()
    shutil.rmtree(out / "learned")
    assert main(call) == main(["all", *call[1:7], "--only", "ft"]) == 0
    assert here == [] and not (out / "table-all.jsonl").exists()
    assert main([*call[:7], "--only", "FT", "--steps", "3"]) == 0
    assert here == ["FullFineTuning"]


@pytest.mark.slow
def test_fig3_shows_every_alpha(benchmark_file: Path, here: list[str], tmp_path: Path):
    assert main(["fig3", "--data", str(benchmark_file), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "table-fig3.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    shown = [(row[0].strip("| "), row[1]) for row in rows if row[1][0].isdigit()]
    assert shown == [(name, f"{alpha:g}") for name in ("R-Adapter", "WiSE-FT") for alpha in ALPHAS]
    assert (tmp_path / "out" / "table-fig3.png").exists()


Score = Callable[[Any, int, float], float]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], dict[str, set[int]]]:
    """Cells have the scores of a function of method, seed and α; the seeds by split."""

    def answer(value: Score) -> dict[str, set[int]]:
        seeds: dict[str, set[int]] = {"validation": set(), "test": set()}

        def cell(
            cells: Cells, name: str, method: Any, seed: int, alphas: Any, split: str = "test"
        ) -> Cell:
            seeds[split].add(seed)
            rows = [row("x", "id", value(method, seed, a) / 100, alpha=a) for a in alphas]
            return Cell("", name, seed, split, repr(method), Cost(), rows)

        monkeypatch.setattr(Cells, "cell", cell)
        return seeds

    return answer


@pytest.fixture
def cells(benchmark_file: Path, tmp_path: Path) -> Cells:
    return Cells(load_benchmark(benchmark_file), tmp_path)


def rate_of(method: Any) -> float:
    return round(float(method.settings["learning_rate"]), 7)


def peak(method: Any, seed: int, alpha: float) -> float:
    """The first seed likes 1e-5 best, the mean 9e-4."""
    away = abs(math.log10(rate_of(method) / 9e-4))
    return 60 - 10 * away - (30 * (rate_of(method) > 2e-5) if seed == 0 else 0) + seed


def rising(method: Any, seed: int, alpha: float) -> float:
    return 50 + 1e3 * rate_of(method) + seed


def close(lead: float, rest: float) -> Score:
    """3e-5 leads 1e-5 by this much times the seed less 1; all other rates have the rest."""

    def value(method: Any, seed: int, alpha: float) -> float:
        return {3e-5: 60.0, 1e-5: 60.0 - lead * (seed - 1)}.get(rate_of(method), rest)

    return value


@pytest.mark.parametrize(
    ("value", "seeds", "factors", "rate", "tried", "at_edge"),
    [
        # The mean of all seeds chooses, and the grid grows.
        (peak, [1, 2, 3], [1, 3, 9], 8.1e-4, [1, 3, 9, 27, 81, 243], False),
        (peak, [0], [1, 3, 9], 1e-5, [1, 3, 9, 0.33], False),
        (rising, [1, 2], [1, 3], 8.1e-4, [1, 3, 9, 27, 81], True),
        # Of rates that can't be told apart the lowest is taken: the lead of 1 on the mean has a
        # standard error of 1.15, and of 0.33 one of 0.88, or of 1 one of 0.
        (close(1, 50), [0, 2, 4], [0.1, 1, 3, 9], 1e-5, [0.1, 1, 3, 9], False),
        (close(1, 50), [2, 2, 2], [0.1, 1, 3, 9], 3e-5, [0.1, 1, 3, 9], False),
        # The grid grows until that one is inside, too.
        (close(1, 51), [0, 3, 1], [1, 3, 9], 1e-5, [1, 3, 9, 0.33], False),
    ],
)
def test_the_rate_is_chosen_and_the_grid_grows(
    value: Score,
    seeds: list[int],
    factors: list[float],
    rate: float,
    tried: list[float],
    at_edge: bool,
    asked: Any,
    cells: Cells,
):
    by_split = asked(value)
    choice = choose(cells, "ft", [FT], seeds, factors)
    assert rate_of(choice.method) == pytest.approx(rate)
    assert [round(trial.rate / 1e-5, 2) for trial in choice.tried] == tried
    assert choice.at_edge == at_edge and not by_split["test"]


def test_of_alphas_that_are_equally_good_the_smallest_is_taken(asked: Any, cells: Cells):
    """0.5 and 0.75 have the mean 53.8, though the sum of floats puts 0.75 an ulp higher."""
    scores = {0.25: (80, 20, 20), 0.5: (43.6, 70.5, 47.3), 0.75: (50.6, 40.1, 70.7)}
    asked(lambda method, seed, alpha: scores.get(alpha, (1, 73, 73))[seed])
    method = r_adapter("imagenet")
    choice = choose(cells, "r-adapter", [method], [0, 1, 2], [1], CHOICES[::-1])
    assert choice.method == dataclasses.replace(method, alpha=0.5)
    assert [trial.scores for trial in choice.tried] == [pytest.approx(scores[0.5])]


def test_alpha_and_settings_are_chosen_together_with_the_rate(asked: Any, cells: Cells):
    """At the higher weight a higher rate and α are best."""

    def value(method: Any, seed: int, alpha: float) -> float:
        heavy = method.settings.get("preserve", 0) > 0
        best = {(True, 5e-3): 70.0, (False, 5e-4): 60.0}
        score = best.get((heavy, rate_of(method)), 20.0)
        return score - 10 * abs(alpha - (0.75 if heavy else 0.5)) + seed

    asked(value)
    methods = [r_adapter("imagenet"), r_adapter("imagenet", preserve=10.0)]
    choice = choose(cells, "r-adapter", methods, [1, 2], [0.1, 1, 10, 100], CHOICES)
    assert choice.method == at_rate(dataclasses.replace(methods[1], alpha=0.75), 10)
    kept = choose(cells, "r-adapter", methods[:1], [1, 2], [0.1, 1, 10])
    assert kept.method == methods[0]  # at its own α
    assert differing([trial.method for trial in choice.tried], choice.method) == "preserve 10.0"
    none = METHODS["zero-shot"]
    assert choose(cells, "zero-shot", [none], [1], [1, 3]).method == none


def test_some_of_the_seeds_choose_and_all_are_tested(
    benchmark_file: Path, tmp_path: Path, asked: Any
):
    """The first two like the paper's rate best; the others, and so the mean, three times that."""
    published = rate_of(METHODS["r-adapter"])

    def value(method: Any, seed: int, alpha: float) -> float:
        times = math.log(rate_of(method) / published, 3)
        return 50 - 10 * abs(times) if seed < 2 else 50 - 30 * abs(times - 1)

    flags = "--only r-adapter --alpha validation --rates 1 3 --seeds 0 1 2 3 4"
    call = ["all", "--data", str(benchmark_file), "--out", str(tmp_path / "out"), *flags.split()]
    for choosing, seeds, rate in (
        ([0, 1], "seeds 0, 1", published),
        ([], "all seeds", 3 * published),
    ):
        by_split = asked(value)
        few = ["--validation-seeds", *map(str, choosing)] if choosing else []
        assert main([*call, *few]) == 0
        text = (tmp_path / "out" / "table-all.md").read_text(encoding="utf-8")
        assert (
            f"The learning rate is chosen on validation images, with the mean of {seeds}," in text
        )
        assert f"α is chosen on validation images, with the mean of {seeds}." in text
        assert f"r-adapter at {rate:.2g}" in text
        assert by_split == {"validation": set(choosing or range(5)), "test": set(range(5))}


def test_rows_that_keep_their_rate_or_take_that_of_another(
    benchmark_file: Path, tmp_path: Path, asked: Any
):
    """Six times the paper's rate, rank 4 and α = 0.5 are best; of "FT, 9e-5" nothing is chosen."""
    lora = rate_of(METHODS["lora"])

    def value(method: Any, seed: int, alpha: float) -> float:
        rank = abs(getattr(method, "rank", 4) - 4)
        return 60 - 100 * abs(rate_of(method) - 6 * lora) - abs(alpha - 0.5) - rank + seed

    by_split = asked(value)
    call = ["main", "--data", str(benchmark_file), "--out", str(tmp_path / "out")]
    call += ["--seeds", "0", "1", "--alpha", "validation", "--rates", "1", "2", "4", "--only"]
    assert main([*call, "FT, 9e-5"]) == 0 and not by_split["validation"]
    text = (tmp_path / "out" / "table-main.md").read_text(encoding="utf-8")
    assert "Nothing was chosen for FT, 9e-5." in text and "What was tried" not in text
    assert main([*call, "LoRA", "LoRA, rank and α"]) == 0
    text = (tmp_path / "out" / "table-main.md").read_text(encoding="utf-8")
    assert f": LoRA at {6 * lora:.2g}; LoRA, rank and α at {6 * lora:.2g}." in text
    places = [line.split(" | ")[4] for line in text.splitlines() if line.startswith("| LoRA")][:2]
    assert places == ["-", "0.5"]
    assert [line for line in text.splitlines() if "rank 4 | 0.5" in line and "chosen" in line]
    assert main([*call, "LoRA, rank and α"]) == 2  # of which row is its rate?
    assert main([*call, "WiSE-FLYP", "WiSE-FLYP, α = 0.5"]) == 0
    text = (tmp_path / "out" / "table-main.md").read_text(encoding="utf-8")
    rates = text.partition("the learning rate")[2].partition("\n")[0].rpartition(": ")[2]
    assert len({rate.rpartition(" at ")[2].strip(".") for rate in rates.split("; ")}) == 1
    places = [line.split(" | ")[4] for line in text.splitlines() if line.startswith("| WiSE-FLYP,")]
    assert places[0] == "0.5"


def test_the_sets_of_another_suite_judge_what_validation_chose(
    benchmark_file: Path, here: list[str], tmp_path: Path
):
    suite = tmp_path / "other.yaml"
    suite.write_text(
        "name: others\ntemplates: simple\nsets: [{name: elsewhere, data: 'imagefolder:named'}]\n"
    )
    for folder in (tmp_path / "images").iterdir():
        shutil.copytree(folder, tmp_path / "named" / f"no {folder.name}")
    call = ["all", "--data", str(benchmark_file), "--out", str(tmp_path / "out")]
    call += ["--judge", str(suite), "--steps", "1", "--only"]
    assert main([*call, "zero-shot"]) == 0
    text = (tmp_path / "out" / "table-all-others.md").read_text(encoding="utf-8")
    assert "| elsewhere (n 24) |" in text and "those of the suite others." in text
    assert main([*call, "ft"]) == 2  # its head knows no other class
    benchmark = load_benchmark(benchmark_file)
    benchmark = dataclasses.replace(benchmark, judge=load_suite(suite, tmp_path))
    names = {
        split: [data.entry.name for data in benchmark.sets(split)]
        for split in ("test", "validation")
    }
    assert names == {"test": ["elsewhere"], "validation": ["chosen by"]}


def test_leads_are_paired_over_images_and_need_them() -> None:
    def of(name: str, right: list[int], shift: str = "ood") -> Judged:
        return row(name, shift, sum(right) / len(right), right=packed(np.array(right, bool)))

    base = [of("own", [0] * 20, "id"), of("a", [1, 0] * 10), of("b", [0, 1] * 10)]
    better = [of("own", [1] * 19 + [0], "id"), of("a", [1, 1] * 10), of("b", [0, 1] * 10)]
    heads = list(figures(base))
    assert images_of(better)["mean of 2 shifts"][1].tolist() == [0, 1] * 10
    images = {"Zero-shot": [images_of(base)] * 2, "FT": [images_of(better)] * 2}
    text = leads(heads, images)
    # Both seeds are alike, so the interval is that of the images; the other set stays as it was.
    quantile = 100 * scipy.stats.t.isf(0.025, 19)
    half = quantile * scipy.stats.sem([1] * 19 + [0])
    of_mean = quantile * scipy.stats.sem([0, 1] * 10) / 2
    (line,) = [line for line in text.splitlines() if line.startswith("| FT |")]
    assert f"**+95.0 ± {half:.1f}**" in line
    assert f"+25.0 ± {of_mean:.1f}" in line
    assert "| method | own | mean of 2 shifts | a | b |" in text
    without = {**images, "FT": [{"own": images["FT"][0]["own"]}] * 2}
    assert "| method | own |\n" in leads(heads, without)
    assert leads(heads, {name: [{}, {}] for name in images}) == ""
    assert leads(heads, {name: of[:1] for name, of in images.items()}) == ""


def row(dataset: str, shift: str, value: float, **fields: Any) -> Judged:
    return Judged.of(a_row(dataset, shift=shift, metrics={"acc1": value, "acc5": 1.0}, **fields))


def test_score_is_a_mean_of_means():
    rows = [row("a", "id", 0.9), row("b", "ood", 0.5), row("c", "ood", 0.3)]
    assert score(rows) == pytest.approx((90 + (50 + 30) / 2) / 2)
    assert score(rows[:1]) == pytest.approx(90)
    assert score(rows[1:]) == pytest.approx(40)


def test_figures_of_each_task():
    rows = [row("b", "ood", 0.5), row("a", "id", 0.9), row("c", "ood", 0.3)]
    expected = {"a": 90.0, "mean of 2 shifts": 40.0, "b": 50.0, "c": 30.0}
    assert list(figures(rows).items()) == list(expected.items())
    recalls = {"image_retrieval_recall@1": 0.25, "text_retrieval_recall@10": 0.5}
    retrieval = dataclasses.replace(row("f", "id", 0, task="zeroshot_retrieval"), metrics=recalls)
    assert figures([retrieval]) == {"f, image R@1": 25.0, "f, text R@10": 50.0}
    # Each image's part is of one recall: of 4 images with 8 captions, 2 captions find theirs.
    recall: dict[str, Any] = {"metric": "image_retrieval_recall@1", "n": 4, "captions": 8}
    parts = dataclasses.replace(retrieval, right=[0, 2, 0, 0], **recall)
    [(column, [values])] = images_of([parts]).items()
    assert column == "f, image R@1" and values.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"suite": "suite.yaml", "train": {}, "more": 1},
        {"suite": "suite.yaml", "train": {"speed": 3}},
        {"suite": "suite.yaml", "train": {"weight_decay": "much"}},
    ],
)
def test_refuses_what_is_no_benchmark(document: Any, benchmark_file: Path):
    benchmark_file.write_text(yaml.safe_dump(document))
    with pytest.raises(RAdapterError):
        load_benchmark(benchmark_file)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_benchmarks_hold_what_a_run_needs(path: Path, tmp_path: Path):
    place = yaml.safe_load(path.read_text())["train"]["data"].partition(":")[2].partition("@")[0]
    (tmp_path / place).mkdir(parents=True)
    benchmark = load_benchmark(path, tmp_path)
    recipe = Recipe(**benchmark.fields)
    recipe.check()
    # imagenet is a name, and a folder of the data
    assert recipe.classes is None or not Path(recipe.classes).is_dir()
    assert recipe.data.partition(":")[2].startswith(str(tmp_path))
    assert {entry.task for entry in benchmark.suite.entries} == {recipe.task}


@pytest.mark.slow
def test_the_scenes_open_as_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "TRAIN", 3)
    monkeypatch.setattr(scenes, "TEST", 2)
    assert scenes.main([str(tmp_path)]) == 0
    for task in ("retrieval", "segmentation"):
        benchmark = load_benchmark(tmp_path / f"{task}.yaml")
        recipe = Recipe(**{**benchmark.fields, "batch_size": 2})
        run = Run({**benchmark.fields, "batch_size": 2}, tmp_path / "learned")
        data, _ = open_run(recipe, images=False).ready(recipe, run.base)
        assert len(data.rows) >= 3
        chosen, judged = (benchmark.sets(split) for split in ("validation", "test"))
        assert [data.entry.name for data in chosen] == ["scenes, validation"]
        names = ["scenes, colour", "scenes, filled", "scenes, emoji-noto"]
        assert [data.entry.name for data in judged] == names
    images = {path.read_bytes() for path in tmp_path.glob("*/images/*.png")}
    assert len(images) == 3 + 2 + 3 * 2  # no scene twice


def test_pacs_keeps_apart_what_learns_chooses_and_judges(
    images: Path, tiny_clip_dir: str, tmp_path: Path
):
    digests = set()
    for name in ("here", "there"):
        root = tmp_path / name
        for style in ("photo", "art_painting", "cartoon", "sketch"):
            shutil.copytree(images, root / style)
        for _ in range(2):  # the second time the link is there
            assert pacs([str(root), str(root / "out")]) == 0
        benchmark = load_benchmark(root / "out" / "benchmark.yaml")
        digests.add(Run({**benchmark.fields, "architecture": tiny_clip_dir}, tmp_path).digest())
    assert len(digests) == 1  # finished runs count wherever the data is
    files = [root / "out" / f"{part}.csv" for part in ("train", "validation", "test")]
    parts = [file.read_text().splitlines()[1:] for file in files]
    assert [len(rows) for rows in parts] == [12, 6, 6]
    assert len({line for rows in parts for line in rows}) == 24
    judged, chosen = (benchmark.sets(split) for split in ("test", "validation"))
    assert [len(data) for data in judged] == [6, 24, 24]
    assert [data.entry.name for data in chosen] == ["photo, validation", "sketch, validation"]
    assert "sketch" not in [data.entry.name for data in judged]
    assert pacs([str(root), str(tmp_path)]) == 2  # not into a folder whose images are others


@pytest.mark.parametrize(
    "flags",
    ["--seeds", "--seeds 0 1 0", "--limit 0", "--only E11", "--seeds 0 1 --validation-seeds 1 2"],
)
def test_refuses_what_makes_no_table(flags: str, benchmark_file: Path):
    assert main(["1", "--data", str(benchmark_file), *flags.split()]) == 2


def test_fields_of_a_benchmark_have_the_types_of_a_recipe(benchmark_file: Path, tmp_path: Path):
    (tmp_path / "classes.txt").touch()
    more = "  weight_decay: 1e-4\n  precision: no\n  classes: classes.txt\n"
    benchmark_file.write_text(benchmark_file.read_text() + more)
    fields = load_benchmark(benchmark_file).fields
    assert (fields["weight_decay"], fields["precision"]) == (1e-4, "no")
    assert fields["classes"] == tmp_path / "classes.txt"  # a path
    assert fields["templates"] == str(tmp_path / "templates.txt")  # a text, which may be a name


def test_a_cell_that_is_damaged_is_named(tmp_path: Path):
    results = BENCHMARKS.parents[1] / "benchmarks" / "results" / "pacs" / "table-5.jsonl"
    whole = results.read_text(encoding="utf-8").splitlines()[0]
    path = tmp_path / "table-1.jsonl"
    for damaged in (whole[:-20], json.dumps({**json.loads(whole), "rows": [{}]})):
        path.write_text(f"{whole}\n{damaged}")
        with pytest.raises(RAdapterError, match=f"line 2 of {path} is not a cell .* remove it"):
            read_cells(path, Cell.of)


@pytest.mark.slow
def test_learns_in_a_process_of_its_own(
    make_run: Callable[..., Run], benchmark_file: Path, tmp_path: Path
):
    held = torch.zeros(50_000_000)  # 200 MB that a process forked from this one would have, too
    cells = Cells(load_benchmark(benchmark_file), tmp_path)
    cell = cells.cell("ft", METHODS["ft"], 0, [1.0])
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    assert 0 < cell.cost.memory < int(peak) * 1024
    assert len(held)
