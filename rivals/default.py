"""`python -m rivals.default`: the recipe `small` on half of the classes, as a user trains it, and
what the α of `auto`, the best, 0.5 and 1 change elsewhere.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from radapter_serve import evaluate, train
from radapter_serve.adapter import fold, load_adapter
from radapter_serve.cli import run as run_command
from radapter_serve.clip.base import load_base
from radapter_serve.demo.data import BASE
from radapter_serve.process import limit_threads
from radapter_serve.sources import LOCAL
from rivals.benchmark import check_seeds
from rivals.cells import keep_cell, read_cells
from rivals.layout import markdown, origin, publish, say
from rivals.method import System
from rivals.others import (
    INTERVALS,
    OTHER_DATA,
    Collection,
    Images,
    Judged,
    averaged,
    collection,
    half_of,
    judge,
    judged_rows,
    names_of,
    read_tests,
    table,
)

CANDIDATES: dict[str, dict[str, Any]] = {
    "small": {},
}
ELSEWHERE: dict[str, Literal["drawings", "pacs"]] = {"drawings": "pacs", "pacs": "drawings"}


@dataclass(frozen=True)
class Outcome:
    """A run, its choices, and its values on the test sets at each α that was chosen."""

    candidate: str
    split: str
    seed: int
    rate: float
    alphas: dict[str, float]  # by what chose it: auto, best, or fixed
    kept: float  # share of the base's answers among nouns at the α of auto
    seconds: float  # of training, including the search for the rate
    rows: list[Judged]

    def at(self, choice: str) -> list[Judged]:
        """Find the values at an α of `alphas`."""
        return [row for row in self.rows if row.alpha == self.alphas[choice]]


@dataclass(frozen=True)
class Tests:
    """The images to learn from and the other data, each with its test sets."""

    images: Collection
    sets: Mapping[str, Images]
    other: Collection
    other_sets: Mapping[str, Images]

    def judged(
        self, system: System, name: str, split: str, seed: int, alpha: float
    ) -> list[Judged]:
        """Evaluate a system on all three kinds: styles, classes, and the other data."""
        values = judge(system, self.images, split, self.sets)
        elsewhere = judge(system, self.other, split, self.other_sets)
        for style in self.other_sets:
            # The two halves together are all images of the other data.
            halves = [elsewhere[f"{half}, all labels", style] for half in ("trained", "others")]
            values[OTHER_DATA, style] = np.concatenate(halves)
        return judged_rows(values, name, "", split, seed, alpha)

    def names(self) -> dict[tuple[str, str, str], NDArray[Any]]:
        """Name each of the values, as `names_of` does."""
        names = names_of(self.images, self.sets)
        elsewhere = names_of(self.other, self.other_sets)
        for split, style in product(self.images.splits, self.other_sets):
            halves = [elsewhere[split, half, style] for half in ("trained", "others")]
            names[split, OTHER_DATA, style] = np.concatenate(halves)
        return names


def measure(
    tests: Tests, base: str, candidate: str, split: str, seed: int, threads: int | None
) -> Outcome:
    """Train on the half of the classes, choose α on the held-out images, and evaluate."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        run = train(
            "small",
            architecture=base,
            pretrained=None,
            workers=0,
            threads=threads,
            tracker="none",
            save_every=None,
            seed=seed,
            out=Path(place) / "run",
            **half_of(tests.images, split, Path(place)),
            **CANDIDATES[candidate],
        )
        seconds = time.monotonic() - began
        choice = evaluate(run, "auto", out=Path(place) / "choice", threads=threads).choice
        adapter = load_adapter(run)
    assert choice is not None and choice.kept is not None
    alphas = {"auto": choice.alpha, "best": choice.best, "0.5": 0.5, "1": 1.0}
    system = System(load_base(base)).eval()
    start = {name: value.clone() for name, value in system.model.state_dict().items()}
    rows = []
    for alpha in sorted(set(alphas.values())):
        system.model.load_state_dict(fold(start, adapter, alpha))
        rows += tests.judged(system, candidate, split, seed, alpha)
    rate = run.recipe.learning_rate
    return Outcome(candidate, split, seed, rate, alphas, choice.kept, seconds, rows)


def default(
    set_name: Literal["drawings", "pacs"],
    data_root: Path,
    out: Path,
    base: str = f"{LOCAL}{BASE}",
    seeds: tuple[int, ...] = (0, 1, 2),
    only: tuple[str, ...] = (),
    threads: int | None = None,
) -> None:
    """Train one half of the classes by the recipe `small`, and evaluate it at several α on other
    styles, other classes and other data; print and write Markdown.

    Args:
        set_name: images to learn from; the other of the two is the other data.
        data_root: folder with drawings/ and pacs/.
        out: folder of default.md, and of default.jsonl, which keeps finished runs, so that they are
            not repeated; each base needs a folder of its own.
        base: model to start from; by default the demo's.
        seeds: each row is trained once for each seed and half.
        only: rows to make; by default all.
        threads: to compute with; by default one a core.
    """
    check_seeds(seeds)
    limit_threads(threads)

    # Read the images, and the runs that the file has.
    start = load_base(base)
    images = collection(set_name, data_root)
    other = collection(ELSEWHERE[set_name], data_root)
    tests = Tests(images, read_tests(images, start), other, read_tests(other, start))
    path = out / "default.jsonl"
    kept = read_cells(
        path, lambda cell: Outcome(**{**cell, "rows": [Judged(*row) for row in cell["rows"]]})
    )
    done = {(run.candidate, run.split, run.seed): run for run in kept}

    # Evaluate the base; train and evaluate the rest.
    before = []
    for split in images.splits:
        place = ("base", split, 0)
        if place not in done:
            rows = tests.judged(System(start).eval(), "base", split, 0, 0.0)
            done[place] = Outcome(*place, rate=0.0, alphas={}, kept=1.0, seconds=0.0, rows=rows)
            keep_cell(path, {**vars(done[place]), "rows": [astuple(row) for row in rows]})
        before += done[place].rows
    candidates = [name for name in CANDIDATES if not only or name in only]
    for candidate, seed, split in product(candidates, seeds, images.splits):
        if (candidate, split, seed) in done:
            continue
        say(f"{candidate}, {split}, seed {seed}")
        run = measure(tests, base, candidate, split, seed, threads)
        done[candidate, split, seed] = run
        keep_cell(path, {**vars(run), "rows": [astuple(row) for row in run.rows]})

    # Write the page.
    grouped: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    choices = []
    for candidate in candidates:
        runs = [done[candidate, split, seed] for split, seed in product(images.splits, seeds)]
        for choice in runs[0].alphas:
            grouped[candidate, choice] = [row for run in runs for row in run.at(choice)]
        choices.append(
            [
                candidate,
                ", ".join(f"{run.rate:.2g}" for run in runs),
                *(", ".join(f"{run.alphas[name]:g}" for run in runs) for name in ("auto", "best")),
                ", ".join(f"{100 * run.kept:.0f}" for run in runs),
                f"{median(run.seconds for run in runs):.0f}",
            ]
        )
    home = next(iter(images.tests))
    head = ["fields", "rates", "α of auto", "α of best", "kept at auto, %", "training, s"]
    parts = [
        "# The default path on other styles, other classes and other data",
        f"{origin('rivals.default')}\n"
        f"The demo's base, or that of --base; {len(images.classes)} classes, of which one half is"
        " trained in its own"
        f" style ({home}) with the recipe `small`, a fifth of the images held out, and the other"
        f" half is judged too, then the other way round; seeds {', '.join(map(str, seeds))}. The"
        f" other data are {ELSEWHERE[set_name]}, in {len(other.tests)} styles. The base has"
        " accuracies in %, the others what they lead it by, in points. Splits and styles count"
        " alike.",
        f"{INTERVALS} The held-out images chose the rate of auto, and the α of auto and of best.",
        *table(grouped, before, home, tests.names(), averaged(images, before, home)),
        "The choices, for each half and seed:",
        markdown(head, choices),
    ]
    publish(parts, out / "default.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(default, argv, prog="python -m rivals.default")


if __name__ == "__main__":
    sys.exit(main())
