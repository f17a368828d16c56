"""What came after the paper: layers count as their schedule says, and both sides are equal in
distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from radapter_serve.adapter import Adapter, fold, load_adapter
from radapter_serve.errors import RAdapterError
from radapter_serve.training import train
from rivals.benchmark import load_benchmark
from rivals.beyond import (
    REFERENCE,
    SCHEDULES,
    TRAININGS,
    Scheduled,
    candidates,
    compare,
    equal_alpha,
    main,
)
from rivals.cells import Cells, read_lines
from rivals.layout import T95, with_interval
from rivals.method import learned
from rivals.methods import METHODS
from rivals.radapter import RAdapter
from rivals.run import Run
from rivals.schedule import AlphaSchedule
from rivals.variants import Variant
from tests.rivals.test_table import benchmark_file as benchmark_file
from tests.rivals.test_table import here as here


@pytest.mark.parametrize(
    "schedule", [AlphaSchedule(depth=0.25), AlphaSchedule(image=0.5), AlphaSchedule(text=0.0)]
)
def test_a_schedule_is_that_of_the_fold(
    make_run: Callable[..., Run], tmp_path: Path, schedule: AlphaSchedule
) -> None:
    settings = {
        "learning_rate": 0.01,
        "out": tmp_path / "run",
        "save_every": None,
        "tracker": "none",
    }
    run = make_run(**settings)
    base = {name: value.clone() for name, value in run.base.model.state_dict().items()}
    adapter = load_adapter(train(run.recipe))
    found = learned(Scheduled({}, schedule=schedule), run).at(0.5).state_dict()
    factors = schedule.factors(adapter.keys)
    scaled = {key: value * factors[key] for key, value in adapter.tensors.items()}
    expected = fold(base, Adapter(scaled, adapter.metadata), 0.5)
    assert any(not torch.equal(base[name], value) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=1e-5, atol=1e-6)


def test_candidates_differ_from_r_adapter_in_one_thing() -> None:
    reference = METHODS["r-adapter"]
    assert isinstance(reference, RAdapter)
    found = candidates(reference)
    assert list(found) == [REFERENCE, *TRAININGS, *SCHEDULES]
    for name, method in found.items():
        changed = {
            key: value
            for key, value in method.settings.items()
            if value != reference.settings.get(key)
        }
        assert (method.variant, changed) == TRAININGS.get(name, (Variant(), {}))


def test_factors_rise_evenly_with_the_block() -> None:
    keys = [f"visual.transformer.resblocks.{block}.mlp.c_proj" for block in range(12)]
    texts = [f"text.transformer.encoder.layer.{block}.output.dense" for block in range(3)]
    factors = AlphaSchedule(depth=0.1, text=0.5).factors([*keys, *texts])
    assert [factors[key] for key in keys] == pytest.approx(
        [0.1 + 0.9 * block / 11 for block in range(12)]
    )
    assert [factors[key] for key in texts] == pytest.approx([0.05, 0.275, 0.5])
    assert set(AlphaSchedule().factors(keys).values()) == {1.0}
    with pytest.raises(RAdapterError, match="alpha-text is 2; allowed: 0 to 1"):
        AlphaSchedule(text=2)


@pytest.mark.parametrize(
    ("scores", "target", "alpha", "expected"),
    [
        ([10, 20, 30], 25, 0.5, 0.75),
        ([10, 30, 10], 20, 0.6, 0.75),  # both 0.25 and 0.75 have it
        ([10, 30, 10], 20, 0.3, 0.25),
        ([10, 20, 30], 31, 0.5, None),
        ([20, 20, 30], 20, 0.3, 0.3),
        ([20, 20, 30], 20, 0.9, 0.5),
    ],
)
def test_alpha_of_equal_accuracy(
    scores: list[float], target: float, alpha: float, expected: float | None
) -> None:
    found = equal_alpha(dict(zip((0.0, 0.5, 1.0), scores, strict=True)), target, alpha)
    assert found == (None if expected is None else pytest.approx(expected))


def test_interval_is_students() -> None:
    assert with_interval([1.0]) == "1.0"
    assert with_interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 · 1 / √3
    assert with_interval([1.0, 2.0, 3.0], "+") == "+2.0 ± 2.5"


def test_interval_is_students_for_any_number_of_seeds() -> None:
    for count in range(2, len(T95) + 2):
        values = [1000 * float(value) for value in range(count)]
        low, high = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
        middle, _, half = with_interval(values).partition(" ± ")
        assert float(middle) == np.mean(values), count
        assert float(half) == pytest.approx((high - low) / 2, rel=2.5e-3), count
    assert count == 10


@pytest.mark.slow
def test_the_table(benchmark_file: Path, here: list[str], tmp_path: Path) -> None:
    reference = METHODS["r-adapter"]
    assert isinstance(reference, RAdapter)
    every = candidates(reference)
    names = (REFERENCE, "learned scale", "α of depth × 0")
    cells = Cells(load_benchmark(benchmark_file), tmp_path / "out", "beyond")
    methods = {name: every[name] for name in names}
    text = compare(cells, methods, (0, 1), 0.5)
    assert here == ["RAdapter"] * 4 + ["Scheduled"] * 2
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == [
        "| candidate",
        "α",
        "in distribution",
        "mean of the shifts",
        "other",
        "third |",
    ]
    assert [row[0] for row in rows[2:]] == ["| R-Adapter", "| learned scale", "| α of depth × 0"]
    lines = list(read_lines(tmp_path / "out" / "beyond.jsonl"))
    tested = [line for line in lines if (line.name, line.split) == (REFERENCE, "test")]
    same = [
        100 * row.metrics["acc1"] for line in tested for row in line.rows if row.dataset == "same"
    ]
    assert len(same) == 2 and rows[2][2] == with_interval(same)
    here.clear()
    again = Cells(cells.benchmark, tmp_path / "out", "beyond")
    assert compare(again, methods, (0, 1), 0.5) == text and here == []


@pytest.mark.slow
def test_the_table_of_a_suite_without_shifts(
    benchmark_file: Path, here: list[str], tmp_path: Path
) -> None:
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    suite["sets"] = suite["sets"][:2]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert (
        main(["--data", str(benchmark_file), "--out", str(tmp_path / "out"), "--seeds", "0"]) == 0
    )
    text = (tmp_path / "out" / "beyond.md").read_text()
    assert "| candidate | α | in distribution |\n" in text
    assert all(f"\n| {name} | " in text for name in (REFERENCE, *TRAININGS, *SCHEDULES))


def test_refuses_a_suite_that_makes_nothing_equal(
    benchmark_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    suite["sets"][0]["shift"] = "ood"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert main(["--data", str(benchmark_file), "--out", str(tmp_path / "out")]) == 2
    assert "the suite colours has no set with split: validation and shift: id" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "0.45"], "--alpha is 0.45; allowed: 0, 0.1"),
        (["--seeds", *map(str, range(11))], "allowed: 1 to 10"),
    ],
)
def test_refuses(
    flags: list[str], message: str, benchmark_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(benchmark_file), *flags]) == 2
    assert message in capsys.readouterr().err
