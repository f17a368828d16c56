"""The figures of the demo, of rows of results."""

from __future__ import annotations

import numpy as np
import pytest

from radapter_serve.demo.data import FINE_TUNED
from radapter_serve.demo.run import gains
from radapter_serve.evaluation.rows import Row, packed


def row(style: str, alpha: float, right: int) -> Row:
    hits = np.arange(100) < right
    return Row(
        dataset=style,
        task="zeroshot_classification",
        source="adapter",
        alpha=alpha,
        shift="id" if style == FINE_TUNED else "ood",
        split="test",
        metric="acc1",
        n=100,
        set_digest="",
        metrics={"acc1": hits.mean()},
        right=packed(hits),
        runtime=0.0,
    )


def test_gains_are_paired_and_have_intervals() -> None:
    right = {FINE_TUNED: (50, 60), "line": (40, 45), "pixel": (42, 41)}
    rows = [row(style, 0.0, before) for style, (before, _) in right.items()]
    rows += [row(style, 0.5, after) for style, (_, after) in right.items()]
    colour, line, pixel, mean = gains(rows, 0.5)
    assert colour["interval"] == pytest.approx(196 * np.sqrt(0.1 * 0.9 / 99), rel=1e-3)
    gained = [figures["gain"] for figures in (colour, line, pixel, mean)]
    assert gained == pytest.approx([10, 5, -1, 2])
    assert (mean["before"], mean["after"], mean["n"]) == pytest.approx((41, 43, 200))
