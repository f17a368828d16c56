"""A table's cells, Markdown and picture."""

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

import torch

from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.plots import plot_alpha_curve, plot_bars
from radapter_serve.evaluation.rows import by_shift
from rivals.benchmark import Benchmark
from rivals.cells import ALPHAS, Cells, Judged
from rivals.choice import CHOICES, Choice, choose, differing
from rivals.layout import (
    COST,
    Images,
    corrected,
    cost_of,
    dots,
    lead_over,
    markdown,
    spread,
    with_interval,
)
from rivals.method import Method
from rivals.soup import of_members
from rivals.tables import TABLES, figures, images_of

# The rows over which the leads of the others are shown.
BASES = ("zero-shot", "r-adapter", "r-adapter, preserve", "r-adapter, preserve, all classes")

Methods = Mapping[str, Method]  # by name in the table


@dataclass(frozen=True)
class Choices:
    """Flags of the command; `alpha` is set if validation chooses α."""

    seeds: Sequence[int] = (0,)
    validation_seeds: Sequence[int] | None = None
    only: Sequence[str] = ()
    alpha: bool = False
    rates: Sequence[float] = (1.0,)
    soup: int = 72
    limit: int | None = None

    def grid(self, start: float) -> list[float]:
        """List the factors of a row's rate, from `start` on; a single factor has no start."""
        return [start * rate for rate in self.rates] if len(self.rates) > 1 else list(self.rates)


def make_table(number: str, benchmark: Benchmark, out: Path, choices: Choices) -> None:
    """Learn and judge missing cells, write `table-NUMBER.md` and `.png`, print the table."""
    table = TABLES[number]
    if unknown := [name for name in choices.only if name not in table.rows]:
        raise RAdapterError(
            f"table {number} has no row {unknown[0]!r}; allowed: {', '.join(table.rows)}"
        )
    benchmark = benchmark.filled(table.fields)
    cells = Cells(benchmark, out, f"table-{number}", choices.limit, say)
    chosen: dict[str, Choice] = {}
    for name, row in table.rows.items():
        if choices.only and name not in choices.only:
            continue
        method = of_members(row, choices.soup)
        others = table.others.get(name, ()) if len(choices.rates) > 1 else ()
        chosen[name] = choose(
            cells,
            name,
            [method, *others],
            choices.validation_seeds or choices.seeds,
            choices.grid(table.starts.get(name, 1.0)),
            CHOICES if choices.alpha else (),
        )
    methods = {name: choice.method for name, choice in chosen.items()}
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"table-{number}.png"
    body = (_curves if table.curves else _rows)(cells, methods, choices, picture)
    say(f"wrote {picture}")
    parts = [
        f"# {table.title}",
        _conditions(benchmark, methods, choices, table.starts),
        *cells.warnings(),
        body,
        *_trials(chosen),
    ]
    publish(parts, picture.with_suffix(".md"))


def _rows(cells: Cells, methods: Methods, choices: Choices, picture: Path) -> str:
    """Make a table with a row a method."""
    lines = []
    values: dict[str, list[dict[str, float]]] = {}
    images: dict[str, list[dict[str, Images]]] = {}
    ns = {}
    for name, method in methods.items():
        place = 1.0 if method.alpha is None else method.alpha
        of_seeds = [cells.cell(name, method, seed, [place]) for seed in choices.seeds]
        values[name] = [figures(cell.rows) for cell in of_seeds]
        images[name] = [images_of(cell.rows) for cell in of_seeds]
        ns = {row.dataset: row.n for row in of_seeds[-1].rows}
        costs = cost_of([cell.cost for cell in of_seeds])
        lines.append([name, *costs, _shown_alpha(method), *_spreads(values[name])])
    heads = list(next(iter(values.values()))[0])
    x = heads[0]
    if len(heads) == 1:
        means = {name: {x: mean(row[x] for row in rows)} for name, rows in values.items()}
        plot_bars(means, picture)
    else:
        y = next((head for head in heads if head.startswith("mean of")), heads[-1])
        points = {
            name: ([row[x] for row in rows], [row[y] for row in rows])
            for name, rows in values.items()
        }
        dots(points, (x, y), picture)
    return markdown(["method", *COST, "α", *_counted(heads, ns)], lines) + leads(values, images)


def leads(
    values: Mapping[str, Sequence[Mapping[str, float]]],
    images: Mapping[str, Sequence[Mapping[str, Images]]],
) -> str:
    """Make a table of the leads over each row of `BASES`, if there are several seeds.

    Args:
        values: by method and seed, the figures in % by column.
        images: by method and seed, each image's part of them, from `images_of`.
    """
    seeds = len(next(iter(values.values())))
    if len(values) == 1 or seeds < 2:
        return ""
    bases = [name for name in values if name.lower() in BASES]
    heads = list(next(iter(values.values()))[0])
    # Columns whose cells all have the images; of the others, leads are over seeds alone.
    paired = [
        head for head in heads if all(head in row for rows in images.values() for row in rows)
    ]
    shown: dict[tuple[str, str, str], str] = {}
    over_images: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for base in bases:
        for name in values:
            for head in heads if name != base else ():
                place = (base, name, head)
                if head in paired:
                    over_images[place] = lead_over(images[name], images[base], head)
                else:
                    pairs = zip(values[name], values[base], strict=True)
                    shown[place] = with_interval([a[head] - b[head] for a, b in pairs], "+")
    shown |= corrected(over_images)
    parts = []
    for base in bases:
        lines = [
            [name, *(shown[base, name, head] for head in heads)] for name in values if name != base
        ]
        parts += [
            f"What each method leads {base} by, in points: the mean over the seeds of the paired"
            " differences with its interval of 95 %.",
            markdown(["method", *heads], lines),
        ]
    if paired:
        rest = "" if len(paired) == len(heads) else ", and over seeds alone of the others'"
        parts.append(
            f"± is over images and seeds, of {', '.join(paired)}{rest}. **Bold** survives Holm's"
            " correction over these tables."
        )
    return "".join(f"\n\n{part}" for part in parts)


def _curves(cells: Cells, methods: Methods, choices: Choices, picture: Path) -> str:
    """Make a table with a row a method and α, for every α."""
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
            means = {head: mean(row[head] for row in values) for head in values[0]}
            curves[name].append({"alpha": alpha, **means})
    first, *others = curves
    ids, shifted = by_shift(sets)
    beside = {name: curves[name] for name in others}
    plot_alpha_curve(
        curves[first], ids, shifted, picture, title=cells.benchmark.name, beside=beside
    )
    heads = list(curves[first][0])[1:]
    ns = {name: row.n for name, row in sets.items()}
    return markdown(["method", "α", *_counted(heads, ns)], lines)


def _spreads(values: Sequence[Mapping[str, float]]) -> list[str]:
    return [spread([row[head] for row in values]) for head in values[0]]


def _counted(heads: Sequence[str], ns: Mapping[str, int]) -> list[str]:
    return [f"{head} (n {ns[head]})" if head in ns else head for head in heads]


def _shown_alpha(method: Method) -> str:
    return "-" if method.alpha is None else f"{method.alpha:g}"


def _conditions(
    benchmark: Benchmark, methods: Methods, choices: Choices, starts: Mapping[str, float]
) -> str:
    """Describe the command, the machine, and all choices."""
    hidden = {"data", "images", "classes", "templates"}
    if "steps" in benchmark.fields:
        hidden.add("epochs")
    values = {**benchmark.fields, "architecture": Path(benchmark.fields["architecture"]).name}
    shown = ", ".join(f"{key} {value}" for key, value in values.items() if key not in hidden)
    seeds = ", ".join(map(str, choices.seeds))
    mean_of = "by the mean of all seeds"
    if choices.validation_seeds:
        mean_of = f"by the mean of seeds {', '.join(map(str, choices.validation_seeds))}"
    parts = [
        origin("rivals.table"),
        f"Benchmark {benchmark.name}, seeds {seeds}: per cent, mean ± standard deviation over the"
        " seeds.",
        f"Every method learned with {shown}; the rest is its own paper's.",
        f"Validation chose α, {mean_of}." if choices.alpha else "α is each paper's own.",
    ]
    if set(choices.rates) - {1}:
        several = len(choices.rates) > 1
        rates = [
            f"{name} at {method.settings['learning_rate']:.2g}"
            for name, method in methods.items()
            if method.settings
        ]
        factors = ", ".join(f"{rate:g}" for rate in choices.rates)
        further = [f"{name} {start:g}" for name, start in starts.items() if name in methods]
        if further and several:
            factors += f", and these times {', '.join(further)}"
        chosen = f"Validation chose the learning rate, {mean_of}," if several else ""
        chosen = chosen or "The learning rate is"
        parts.append(f"{chosen} each paper's own times {factors}: {'; '.join(rates)}.")
        if several:
            validation = ", ".join(entry.name for entry in benchmark.suite.of_split("validation"))
            parts.append(
                f"Validation is {validation}. Of what is within one standard error of the best the"
                " lowest rate was taken, and a grid grew until both were inside."
            )
    return "\n".join(parts)


def _trials(chosen: Mapping[str, Choice]) -> list[str]:
    """Make a table of all trials, if there are any."""
    lines = []
    for name, choice in chosen.items():
        methods = [trial.method for trial in choice.tried]
        for trial in choice.tried:
            marks = ["chosen"] if trial.method == choice.method else []
            if marks and choice.at_edge:
                marks.append("the best is at the edge of the grid")
            lines.append(
                [
                    name,
                    f"{trial.rate:.2g}",
                    differing(methods, trial.method),
                    _shown_alpha(trial.method),
                    with_interval(trial.scores),
                    ", ".join(marks),
                ]
            )
    if not lines:
        return []
    head = ["method", "rate", "setting", "α", "validation, % ± 95 % interval", ""]
    title = "What was tried: the score is the mean of the two means, in distribution and shifted."
    return [title, markdown(head, lines)]


def origin(module: str) -> str:
    """Describe the command of this process, the date, the machine and the versions."""
    command = " ".join([f"python -m {module}", *map(shlex.quote, sys.argv[1:])])
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{len(os.sched_getaffinity(0))} CPU cores"
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"`{command}`, {datetime.date.today()}, {device}, {versions}."


def publish(parts: Sequence[str], path: Path) -> None:
    """Write the parts of a page of results as Markdown, and print it."""
    text = "\n\n".join(parts) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}")
    print(text)


def say(line: str) -> None:
    """Print a line of progress with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
