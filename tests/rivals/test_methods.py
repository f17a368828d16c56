"""What holds for every method: it learns, is kept, and is judged like the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from radapter_serve.evaluation.image_sets import EvaluationSet
from rivals.judge import judge
from rivals.method import Method, learned
from rivals.methods import METHODS
from rivals.run import Run
from rivals.soup import UniformSoup


def small(name: str) -> Method:
    """A method with no more parts than it needs."""
    method = METHODS[name]
    return dataclasses.replace(method, members=2) if isinstance(method, UniformSoup) else method


ALWAYS = ("zero-shot", "ft", "r-adapter")  # the others take half a minute together


@pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_learns_is_kept_and_judged(
    name: str,
    make_run: Callable[..., Run],
    sets: list[EvaluationSet],
    monkeypatch: pytest.MonkeyPatch,
):
    method = small(name)
    run = make_run()
    first = learned(method, run)
    monkeypatch.setattr(type(method), "learn", None)  # a second time it is read
    again = learned(method, run)
    assert again.cost == first.cost
    assert first.end.keys() == again.end.keys()
    assert bool(first.end) == (name != "zero-shot")
    alphas = [1.0] if method.alpha is None else [0.0, method.alpha]
    rows = [judge(found, run.of(method.settings), sets, alphas) for found in (first, again)]
    assert [row.metrics for row in rows[0]] == [row.metrics for row in rows[1]]
    assert rows[0][0].n == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wise-ft", "wise-flyp", "r-adapter"])
def test_start_of_the_line_is_zero_shot(name: str, make_run: Callable[..., Run]):
    run = make_run()
    pixels = torch.randn(5, 3, 32, 32)
    zero = learned(METHODS["zero-shot"], run).system
    method = small(name)
    found = learned(method, run)
    end = {key: value.clone() for key, value in found.at(1.0).state_dict().items()}
    ends = learned(dataclasses.replace(method, alpha=None), run).at(1.0).state_dict()
    torch.testing.assert_close(end, dict(ends), rtol=0, atol=0)
    classes = run.data.classes  # type: ignore[union-attr]
    templates = ["a photo of a {}."]

    def scores(system):
        with torch.no_grad():
            return system.embed_images(pixels) @ system.embed_classes(classes, templates).T

    start = scores(found.at(0.0))
    expected = scores(zero)
    torch.testing.assert_close(start / start.norm(), expected / expected.norm())
