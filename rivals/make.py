"""Making a table: cells first, then Markdown and a picture of them."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.plots import plot_alpha_curve, plot_bars
from radapter_serve.evaluation.rows import by_shift
from rivals.benchmark import Benchmark
from rivals.cells import ALPHAS, Cells, Judged
from rivals.choice import CHOICES, Choice, choose, differing
from rivals.layout import (
    COST,
    corrected,
    cost_of,
    dots,
    lead_of,
    markdown,
    spread,
    with_interval,
)
from rivals.method import Method
from rivals.soup import of_members
from rivals.tables import TABLES, figures, images_of

# What the others are held against.
LED = ("zero-shot", "r-adapter", "r-adapter, preserve", "r-adapter, preserve, all classes")

Methods = Mapping[str, Method]  # by the names that a table prints


@dataclass(frozen=True)
class Choices:
    """How the cells of a table are made; the fields are flags of the command.

    Attributes:
        seeds, validation_seeds, only, rates, soup, limit: the flags of these names.
        alpha: whether validation chooses α.
    """

    seeds: Sequence[int] = (0,)
    validation_seeds: Sequence[int] | None = None
    only: Sequence[str] = ()
    alpha: bool = False
    rates: Sequence[float] = (1.0,)
    soup: int = 72
    limit: int | None = None

    def grid(self, start: float) -> list[float]:
        """The factors of a row's rate, from `start` on; one factor is taken as it is."""
        return [start * rate for rate in self.rates] if len(self.rates) > 1 else list(self.rates)


def make_table(number: str, benchmark: Benchmark, out: Path, choices: Choices) -> str:
    """Make what is missing, and write `table-NUMBER.md` and `.png`.

    Args:
        number: of the table, as `TABLES` has it.
        benchmark: from `Flags.benchmark`; what it gives comes before what the table gives.
        out: folder.
        choices: the rest.

    Returns:
        The Markdown.

    Raises:
        RAdapterError: there is no such row, or the benchmark or a method won't do.
    """
    chosen = TABLES[number]
    if unknown := [name for name in choices.only if name not in chosen.rows]:
        raise RAdapterError(
            f"table {number} has no row {unknown[0]!r}; allowed: {', '.join(chosen.rows)}"
        )
    benchmark = benchmark.filled(chosen.given)
    cells = Cells(benchmark, out, f"table-{number}", choices.limit, say)
    methods = {
        name: of_members(method, choices.soup)
        for name, method in chosen.rows.items()
        if not choices.only or name in choices.only
    }
    chosen_by = {
        name: choose(
            cells,
            name,
            [method, *chosen.others.get(name, ())] if len(choices.rates) > 1 else [method],
            choices.validation_seeds or choices.seeds,
            choices.grid(chosen.starts.get(name, 1.0)),
            CHOICES if choices.alpha else (),
        )
        for name, method in methods.items()
    }
    methods = {name: choice.method for name, choice in chosen_by.items()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"table-{number}.md"
    maker = _curves if chosen.curves else _rows
    shown = maker(cells, methods, choices, path.with_suffix(".png"))
    parts = [
        f"# {chosen.title}",
        _how(benchmark, methods, choices, chosen.starts),
        *cells.warnings(),
        shown,
        *_choices(chosen_by),
    ]
    text = "\n\n".join(parts) + "\n"
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path} and {path.with_suffix('.png')}")
    return text


def _rows(cells: Cells, methods: Methods, choices: Choices, picture: Path) -> str:
    """A row a method."""
    lines = []
    found = {}
    images: dict[str, list[dict[str, list[NDArray[np.float64]]]]] = {}
    ns = {}
    for name, method in methods.items():
        values = []
        costs = []
        images[name] = []
        for seed in choices.seeds:
            cell = cells.cell(name, method, seed, [1.0 if method.alpha is None else method.alpha])
            values.append(figures(cell.rows))
            images[name].append(images_of(cell.rows))
            costs.append(cell.cost)
            ns = {row.dataset: row.n for row in cell.rows}
        found[name] = values
        alpha = "-" if method.alpha is None else f"{method.alpha:g}"
        lines.append([name, *cost_of(costs), alpha, *_spreads(values)])
    heads = list(next(iter(found.values()))[0])
    if len(heads) == 1:
        plot_bars(
            {
                name: {heads[0]: mean(of[heads[0]] for of in values)}
                for name, values in found.items()
            },
            picture,
        )
    else:
        x = heads[0]
        y = next((head for head in heads if head.startswith("mean of")), heads[-1])
        points = {
            name: ([of[x] for of in values], [of[y] for of in values])
            for name, values in found.items()
        }
        dots(points, (x, y), picture)
    return markdown(["method", *COST, "α", *_counted(heads, ns)], lines) + leads(found, images)


def leads(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    images: Mapping[str, Sequence[Mapping[str, list[NDArray[np.float64]]]]],
) -> str:
    """A table each of what the methods lead zero-shot and R-Adapter by, this as in the paper and
    with our additions, where these have a row; nothing without several seeds.

    Args:
        found: by method, the figures of each seed, in per cent by the heads of their columns.
        images: by method, what each image adds to them, of each seed, as `images_of` gives it.
    """
    seeds = len(next(iter(found.values())))
    if len(found) == 1 or seeds < 2:
        return ""
    bases = [name for name in found if name.lower() in LED]
    heads = list(next(iter(found.values()))[0])
    paired = {
        head: all(head in of for of_seeds in images.values() for of in of_seeds) for head in heads
    }
    shown: dict[tuple[str, str, str], str] = {}
    over_images: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for base in bases:
        for name in (name for name in found if name != base):
            for head in heads:
                place = (base, name, head)
                if not paired[head]:
                    values = zip(found[name], found[base], strict=True)
                    shown[place] = with_interval([a[head] - b[head] for a, b in values], "+")
                    continue
                seeds_of = list(zip(images[name], images[base], strict=True))
                differences = [
                    np.stack([own[head][number] - led[head][number] for own, led in seeds_of])
                    for number in range(len(seeds_of[0][0][head]))
                ]
                over_images[place] = lead_of(differences)
    shown |= corrected(over_images)
    tables = []
    for base in bases:
        lines = [
            [name, *(shown[base, name, head] for head in heads)] for name in found if name != base
        ]
        tables.append(
            f"What each method leads {base} by, in points: the mean over the seeds of the paired"
            " differences with its interval of 95 %."
        )
        tables.append(markdown(["method", *heads], lines))
    over = [head for head in heads if paired[head]]
    if over:
        tables.append(
            f"± is over images and seeds, of {', '.join(over)}"
            f"{'' if len(over) == len(heads) else ', and over seeds alone of the others'}. **Bold**"
            " survives Holm's correction over these tables."
        )
    return "".join(f"\n\n{part}" for part in tables)


def _curves(cells: Cells, methods: Methods, choices: Choices, picture: Path) -> str:
    """A row a method and α; all α are shown, so that none is chosen."""
    lines: list[list[str]] = []
    curves: dict[str, list[dict[str, float]]] = {}
    sets: dict[str, Judged] = {}
    for name, method in methods.items():
        of_seeds = [cells.cell(name, method, seed, ALPHAS) for seed in choices.seeds]
        sets = {row.dataset: row for row in of_seeds[0].rows}
        curves[name] = []
        for alpha in ALPHAS:
            values = [
                figures([row for row in cell.rows if row.alpha == alpha]) for cell in of_seeds
            ]
            lines.append([name, f"{alpha:g}", *_spreads(values)])
            curves[name].append(
                {"alpha": alpha, **{head: mean(of[head] for of in values) for head in values[0]}}
            )
    first, *others = curves
    ids, shifted = by_shift(sets)
    beside = {name: curves[name] for name in others}
    plot_alpha_curve(
        curves[first], ids, shifted, picture, title=cells.benchmark.name, beside=beside
    )
    heads = list(curves[first][0])[1:]
    return markdown(
        ["method", "α", *_counted(heads, {name: row.n for name, row in sets.items()})], lines
    )


def _spreads(values: Sequence[Mapping[str, float]]) -> list[str]:
    return [spread([of[head] for of in values]) for head in values[0]]


def _counted(heads: Sequence[str], ns: Mapping[str, int]) -> list[str]:
    return [f"{head} (n {ns[head]})" if head in ns else head for head in heads]


def _how(
    benchmark: Benchmark, methods: Methods, choices: Choices, starts: Mapping[str, float]
) -> str:
    """The command, the machine, and all that was chosen."""
    values = {**benchmark.given, "architecture": Path(benchmark.given["architecture"]).name}
    hidden = {"data", "images", "classes", "templates"} | (
        {"epochs"} if "steps" in values else set()
    )
    values = {key: value for key, value in values.items() if key not in hidden}
    shown = ", ".join(f"{key} {value}" for key, value in values.items())
    seeds = ", ".join(map(str, choices.seeds))
    mean_of = (
        f"by the mean of seeds {', '.join(map(str, choices.validation_seeds))}"
        if choices.validation_seeds
        else "by the mean of all seeds"
    )
    parts = [
        f"`{command_line('rivals.table')}`, {datetime.date.today()}, {machine()}.",
        (
            f"Benchmark {benchmark.name}, seeds {seeds}: per cent, mean ± standard deviation over"
            " the seeds."
        ),
        f"Every method learned with {shown}; the rest is its own paper's.",
        f"Validation chose α, {mean_of}." if choices.alpha else "α is each paper's own.",
    ]
    if set(choices.rates) - {1}:
        rates = [
            f"{key} at {of.settings['learning_rate']:.2g}"
            for key, of in methods.items()
            if of.settings
        ]
        factors = ", ".join(f"{rate:g}" for rate in choices.rates)
        further = [f"{name} {start:g}" for name, start in starts.items() if name in methods]
        if further and len(choices.rates) > 1:
            factors += f", and these times {', '.join(further)}"
        how = (
            f"Validation chose the learning rate, {mean_of},"
            if len(choices.rates) > 1
            else "The learning rate is"
        )
        parts.append(f"{how} each paper's own times {factors}: {'; '.join(rates)}.")
        validation = ", ".join(entry.name for entry in benchmark.suite.of_split("validation"))
        if len(choices.rates) > 1:
            parts.append(
                f"Validation is {validation}. Of what is within one standard error of the best the"
                " lowest rate was taken, and a grid grew until both were inside."
            )
    return "\n".join(parts)


def _choices(chosen_by: Mapping[str, Choice]) -> list[str]:
    """What was tried for each method; nothing where there was nothing to choose."""
    lines = []
    for name, choice in chosen_by.items():
        for one in choice.tried:
            alpha = "-" if one.method.alpha is None else f"{one.method.alpha:g}"
            own = differing([trial.method for trial in choice.tried], one.method)
            marks = ["chosen"] if one.method == choice.method else []
            if marks and choice.at_edge:
                marks.append("the best is at the edge of the grid")
            lines.append(
                [name, f"{one.rate:.2g}", own, alpha, with_interval(one.scores), ", ".join(marks)]
            )
    if not lines:
        return []
    head = ["method", "rate", "setting", "α", "validation, % ± 95 % interval", ""]
    how = "What was tried: the score is the mean of the two means, in distribution and shifted."
    return [how, markdown(head, lines)]


def command_line(module: str) -> str:
    """How this process was started, as one would type it."""
    return " ".join([f"python -m {module}", *map(shlex.quote, sys.argv[1:])])


def machine() -> str:
    """What computes, and by which versions."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{len(os.sched_getaffinity(0))} CPU cores"
    )
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def publish(parts: Sequence[str], path: Path) -> None:
    """Write the parts of a page of results as Markdown, and print it.

    Args:
        parts: of Markdown, a blank line between them.
        path: of the page; its folder is made.
    """
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}")
    print(text)


def say(line: str) -> None:
    """Tell what is done next, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
