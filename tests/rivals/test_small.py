"""The recipe `small` by its parts, on a few images in the layout of PACS."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from radapter_serve import Evaluation, evaluate
from rivals.pacs import main as pacs
from rivals.small import CANDIDATES, Outcome, main, row_of, set_of


@pytest.fixture
def data_root(images: Path, tmp_path: Path) -> Path:
    """DATA/pacs of coloured images; each style has others."""
    for start, style in enumerate(("photo", "art_painting", "cartoon", "sketch")):
        for path in sorted(images.glob("*/*"))[start:]:
            place = tmp_path / "styles" / style / path.parent.name / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    assert pacs([str(tmp_path / "styles"), str(tmp_path / "DATA" / "pacs")]) == 0
    return tmp_path / "DATA"


def test_a_draw_is_of_its_seed_and_takes_so_many_of_each_class(data_root: Path, tmp_path: Path):
    of = set_of("pacs", data_root, tmp_path)
    drawn = []
    for seed in (0, 0, 1):
        text = Path(of.draw(seed, tmp_path).removeprefix("csv:")).read_text(encoding="utf-8")
        rows = csv.DictReader(text.splitlines())
        drawn.append({(row["image"], row["label"]) for row in rows})
    known = {(str(image), label) for label, images in of.images.items() for image in images}
    assert drawn[0] == drawn[1] <= known
    assert len(drawn[0]) == sum(min(of.shots, len(images)) for images in of.images.values())


def test_leads_are_paired_and_validation_is_the_mean_of_what_chooses() -> None:
    def found(candidate: str, seed: int, own: float, held_out: float) -> Outcome:
        return Outcome(candidate, seed, 5e-4, 0.5, held_out, 40.0, own, 30.0, 7.0)

    first = [found("a", 0, 50.0, 60.0), found("a", 1, 60.0, 70.0)]
    other = [found("b", 0, 51.0, 64.0), found("b", 1, 63.0, 78.0)]
    assert row_of("a", first, first)[-4:] == ["", "", "", "7"]
    *_, validation, own, shifts, _ = row_of("b", other, first)
    # t of one degree of freedom is 12.71, and the error of the mean of two is half their difference
    assert validation == f"+3.0 ± {12.71 * 1.0:.1f}"
    assert own == f"+2.0 ± {12.71 * 1.0:.1f}"
    assert shifts == "+0.0 ± 0.0"


@pytest.mark.slow
def test_every_candidate_learns_once_and_is_judged(
    data_root: Path, tiny_clip_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rivals.small.BASE", tiny_clip_dir.removeprefix("local-dir:"))
    candidates = {name: CANDIDATES[name] for name in ("5e-4", "auto")}
    monkeypatch.setattr("rivals.small.CANDIDATES", candidates)
    found: list[Evaluation] = []

    def heard(*arguments: Any, **named: Any) -> Evaluation:
        found.append(evaluate(*arguments, **named))
        return found[-1]

    monkeypatch.setattr("rivals.small.evaluate", heard)
    out = tmp_path / "out"
    flags = ["--set-name", "pacs", "--data-root", str(data_root), "--seeds", "3", "--out", str(out)]
    assert main(flags) == 0
    text = (out / "small.md").read_text()
    made = (out / "small.json").read_text()
    runs = {run["candidate"]: run for run in json.loads(made)}
    assert list(runs) == list(candidates) and runs["5e-4"]["rate"] == 5e-4
    for number, (candidate, run) in enumerate(runs.items()):
        chosen, tested = found[2 * number : 2 * number + 2]
        assert chosen.choice is not None
        best = chosen.choice.best
        assert chosen.suite is None and run["alpha"] == best  # by the run's own images
        assert {row.alpha for row in tested.rows} == {best}
        of = {row.dataset: 100 * row.metrics["acc1"] for row in tested.rows}
        scores = {point["alpha"]: point["score"] for point in chosen.choice.curve}
        figures = {
            "held_out": 100 * scores[best],
            "style": of["sketch, validation"],
            "own": of["photo"],
            "shifts": (of["art_painting"] + of["cartoon"]) / 2,
        }
        assert {name: run[name] for name in figures} == pytest.approx(figures)
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {candidate} |")]
        assert f"{run['own']:.1f}" in row and f"{run['held_out']:.1f}" in row
    assert main(flags) == 0
    assert (out / "small.json").read_text() == made
