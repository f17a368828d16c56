"""Each table of the paper runs on tiny data of its own task, and a plain CLIP is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radapter_serve.cli.eval import main as radapter_eval
from rivals.benchmark import write_benchmark
from rivals.cells import Cell, read_cells
from rivals.save import main as save
from rivals.table import main
from rivals.tables import TABLES
from tests.training.test_segmentation_training import scenes as scenes


def tiny(folder: Path, suite: dict[str, Any], train: dict[str, Any]) -> Path:
    path = folder / "benchmark.yaml"
    few = {"steps": 2, "batch_size": 4, "workers": 0}
    write_benchmark(path, {"name": "tiny", **suite}, {**few, **train})
    return path


def rows_of(number: str, benchmark: Path, *flags: str) -> dict[str, list[str]]:
    """The cells of each row of a table, by its method."""
    out = benchmark.parent / "out"
    assert main([number, "--data", str(benchmark), "--out", str(out), *flags]) == 0
    text = (out / f"table-{number}.md").read_text(encoding="utf-8")
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert (out / f"table-{number}.png").stat().st_size > 1000
    return {cells[0]: cells[1:] for cells in table if set(cells[0]) != {"-"}}


@pytest.mark.slow
def test_table_3_of_retrieval(
    images: Path, tiny_clip_dir: str, here: list[str], tmp_path: Path
) -> None:
    lines = [
        f"{path},a {path.parent.name} thing {path.stem}" for path in sorted(images.rglob("*.png"))
    ]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    suite = {"sets": [{"name": "captioned", "data": "csv:captions.csv", "task": "retrieval"}]}
    train = {"task": "retrieval", "data": "csv:captions.csv", "architecture": tiny_clip_dir}
    rows = rows_of("3", tiny(tmp_path, suite, train))
    assert list(rows) == ["method", *TABLES["3"].rows]
    recalls = [f"captioned, {way} R@{k}" for way in ("text", "image") for k in (1, 5, 10)]
    assert sorted(cell.partition(" (n")[0] for cell in rows["method"][4:]) == sorted(recalls)


@pytest.mark.slow
def test_table_4_takes_the_output_of_a_proposal_network(
    scenes: Path, tiny_clip_dir: str, here: list[str], tmp_path: Path
) -> None:
    """Right masks with sure scores: where these alone decide, every method is right."""
    (tmp_path / "found").mkdir()
    for file in (scenes / "masks").iterdir():
        truth = np.asarray(Image.open(file))
        masks = np.stack([truth == value for value in (0, 1, 2)])
        np.savez(
            tmp_path / "found" / f"{file.stem}.npz",
            masks=masks.astype(np.float32),
            scores=np.eye(3),
        )
    settings = {"data": f"masks:{scenes}", "dense": "proposals", "proposals": "found"}
    sets = [
        {"name": name, "proposal_weight": weight, **settings}
        for name, weight in (("theirs", 0.0), ("both", 0.7))
    ]
    train = {"task": "segmentation", "data": f"masks:{scenes}", "mask_min_area": 1}
    train["architecture"] = tiny_clip_dir
    rows = rows_of("4", tiny(tmp_path, {"task": "segmentation", "sets": sets}, train))
    assert list(rows) == ["method", *TABLES["4"].rows]
    theirs = {name: float(cells[4]) for name, cells in rows.items() if name != "method"}
    assert set(theirs.values()) == {100.0}
    assert set(here) == {"FineTuneLikePretrain", "RAdapter", "ZeroShot"}


@pytest.mark.slow
def test_save_writes_what_the_table_has_judged(
    benchmark_file: Path, here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(benchmark_file), "--out", str(tmp_path / "out")]
    name = "R-Adapter, rank 4"
    assert main(["2", *flags, "--only", name]) == 0
    assert save([name, str(tmp_path / "merged"), *flags, "--table", "2"]) == 0
    assert here == ["RAdapter"]  # learned once
    capsys.readouterr()
    places = f"--merged {tmp_path}/merged --suite {tmp_path}/suite.yaml --data-root {tmp_path}"
    assert radapter_eval([*places.split(), "--out", str(tmp_path / "results")]) == 0
    results = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in results]
    [cell] = read_cells(tmp_path / "out" / "table-2.jsonl", Cell.of)
    assert [row["metrics"] for row in written] == [pytest.approx(row.metrics) for row in cell.rows]


@pytest.mark.parametrize("name", ["wise-ft", "coop", "clip"])
def test_save_refuses_what_is_no_plain_clip_or_no_row(
    name: str, benchmark_file: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(benchmark_file), "--out", str(tmp_path / "out")]
    assert save([name, str(tmp_path / "merged"), *flags]) == 2
    assert not (tmp_path / "merged").exists()
