"""The page over bases, by hand from cells of two."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np

from radapter_serve.evaluation.rows import packed
from rivals import bases
from rivals.cells import keep_cell
from rivals.others import judged_rows
from rivals.statistics import lead_of


def keep(folder: Path, method: str, alpha: float, right: list[list[bool]]) -> None:
    for seed, each in enumerate(right):
        values = {("trained", "photo"): np.array(each)}
        rows = [astuple(row) for row in judged_rows(values, method, "", "all", seed, alpha)]
        if method in ("base", "small"):
            cell = {"candidate": method, "split": "all", "seed": seed, "rate": 0.0, "kept": 1.0}
            cell |= {"alphas": {} if method == "base" else {"auto": alpha}, "seconds": 0.0}
            keep_cell(folder / "default" / "default.jsonl", {**cell, "rows": rows})
        else:
            run = (method, "", "all", seed)
            cell = {"run": run, "rows": [row[4:] for row in rows]}
            keep_cell(folder / "others" / "others.jsonl", cell)


def test_leads_over_bases_of_the_rows_that_all_bases_have(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        keep(folder, "base", 0.0, [[False] * 4])
    keep(first, "small", 0.3, [[True] * 4, [True, True, False, False]])
    keep(second, "small", 0.7, [[True, False, False, False]])
    keep(first, "preserve, words", 0.5, [[True, False, False, False]])
    keep(second, "preserve, words", 0.5, [[True, True, False, False]])
    for folder in (first, second):
        keep(folder, "R-Adapter", 0.5, [[True, True, True, False]])
    keep(first, "FLYP", 0.5, [[True] * 4])
    call = ["--folder", str(first), str(second), "--out", str(tmp_path)]
    assert bases.main(call) == 0
    page = (tmp_path / "bases.md").read_text(encoding="utf-8").replace("**", "")
    auto = lead_of([np.array([[1, 1, 0.5, 0.5], [1, 0, 0, 0]])])
    assert f"| small, α auto | {auto} |" in page
    ahead = lead_of([np.array([[0.0, 1, 1, 0], [0, 0, 1, 0]])])
    assert f"| R-Adapter, α 0.5, ahead of preserve, words, α 0.5 | {ahead} |" in page
    assert "FLYP" not in page
    assert "Base 0, seeds 0, 1\n" in page


def keep_main(folder: Path, name: str, split: str, right: list[list[bool]]) -> None:
    for seed, each in enumerate(right):
        row = {"dataset": "photo", "task": "zeroshot_classification", "shift": "id", "alpha": 1.0}
        row |= {"split": split, "n": len(each), "metric": "top1", "set_digest": ""}
        row |= {"metrics": {"top1": float(np.mean(each))}, "right": packed(np.array(each))}
        cell = {"digest": f"{name}{seed}", "name": name, "seed": seed, "split": split, "method": ""}
        cost = {"parameters": 1, "seconds": 1.0, "memory": 1}
        keep_cell(folder / "table-main.jsonl", {**cell, "cost": cost, "rows": [row]})


def test_leads_with_all_classes_are_over_the_means_of_each_base(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        keep(folder, "base", 0.0, [[False] * 4])
        keep_main(folder, "Zero-shot", "test", [[False, False, False, True]])
        keep_main(folder, "FT", "validation", [[False] * 4])
    keep_main(first, "FT", "test", [[True] * 4, [True, True, False, False]])
    keep_main(second, "FT", "test", [[True, True, True, False]])
    keep_main(first, "Mask-Fill", "test", [[True] * 4])
    call = ["--folder", str(first), str(second), "--out", str(tmp_path)]
    assert bases.main(call) == 0
    page = (tmp_path / "bases.md").read_text(encoding="utf-8").replace("**", "")
    assert "| FT | 75.0 75.0 |" in page
    assert f"| FT | {lead_of([np.array([[1, 1, 0.5, -0.5], [1, 1, 1, -1]])])} |" in page
    assert "Mask-Fill" not in page

    # Without the cells of a base, the page has the halves alone.
    (second / "table-main.jsonl").unlink()
    assert bases.main(call) == 0
    assert "Zero-shot" not in (tmp_path / "bases.md").read_text(encoding="utf-8")
