"""The page over bases, by hand from cells of two."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np

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
