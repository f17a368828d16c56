"""`benchmarks/gpu.py` on the CPU: every part runs, and what a machine lacks is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table(text: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, without its head."""
    lines = text.partition(f"**{title}**\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def smoke(flags: str, out: Path) -> str:
    """Run the script on the CPU; returns its page."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", *flags.split()]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=500)
    return (out / "gpu-smoke.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    text = smoke("--minutes 0 --batches 1", tmp_path)
    for left_out in (
        "training smoke",
        "smoke, images, fp16: TensorRT",
        "smoke, texts, fp16: torch.compile",
    ):
        assert f"Left out: {left_out}: TimeoutError: the time was up" in text


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    flags = "--batches 1 3 --compile-batches 3 --train-batch 4 --repeats 2"
    text = smoke(flags, tmp_path)
    assert [row[0] for row in table(text, "Matmul")] == [
        "fp32, 64 x 64",
        "fp16, 64 x 64",
        "bf16, 64 x 64",
    ]
    training = table(text, "A training step of smoke, batch 4, bf16")
    assert len(training) == 4
    for case in ("images", "texts"):
        rows = {row[0]: row for row in table(text, f"smoke, {case}, fp16")}
        compiled = (
            "3, torch.compile" in rows or f"smoke, {case}, fp16, batch 3: torch.compile" in text
        )
        assert compiled  # measured, or no C++ compiler here
        for batch in (1, 3):
            for name in ("torch eager", "torch flash", "ONNX Runtime"):
                row = rows.pop(f"{batch}, {name}")
                milliseconds, rate = map(float, row[1:3])
                assert rate == pytest.approx(1000 * batch / milliseconds, rel=0.1)
            assert (
                f"{batch}, TensorRT" in rows
                or f"Left out: smoke, {case}, fp16: TensorRT: RAdapterError: no GPU" in text
            )
