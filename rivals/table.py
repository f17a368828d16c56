"""`python -m rivals.table`: a table of the paper on any benchmark. Each method's rate, settings
and α are chosen with validation data over several seeds; results become Markdown and a picture.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import tyro

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.plots import plot_alpha_curve
from radapter_serve.evaluation.rows import by_shift
from radapter_serve.evaluation.suite import load_suite
from radapter_serve.files import file_name
from rivals.benchmark import Benchmark, Flags, TableName, check_seeds
from rivals.cells import ALPHAS, Cells, Judged, score
from rivals.full import of_members
from rivals.layout import (
    COST,
    cost_of,
    dots,
    markdown,
    origin,
    publish,
    say,
    spread,
)
from rivals.method import Method, at_rate, with_rate
from rivals.statistics import Images, corrected, lead_over
from rivals.tables import TABLES, Table, figures, images_of

CHOICES = (0.25, 0.5, 0.75, 1.0)  # few α suffice, as curves are smooth, and each is an evaluation
WIDENINGS = 3  # most steps by which the grid of rates grows


@dataclass(frozen=True)
class Tried:
    """A trial: a method with its rate, settings and α, and its validation score in %, by seed."""

    method: Method
    scores: tuple[float, ...]

    @property
    def rate(self) -> float:
        return float(self.method.settings.get("learning_rate", 0.0))


@dataclass(frozen=True)
class Choice:
    """The chosen method, and all trials in order, each at its best α.

    `at_edge` is set if the rate is the lowest or highest of all trials, although the grid grew.
    """

    method: Method
    tried: tuple[Tried, ...] = ()
    at_edge: bool = False


def choose(
    cells: Cells,
    name: str,
    methods: Sequence[Method],
    seeds: Sequence[int],
    factors: Sequence[float],
    alphas: Sequence[float] = (),
) -> Choice:
    """Choose among rates, settings and α on the validation sets.

    Among the trials that do not differ significantly from the best, the one with the lowest rate is
    chosen, as a lower rate keeps more of the base. The grid of rates starts with the factors, and
    grows until the best rate and the chosen one are inside; a single factor is applied without a
    choice. `methods` is a method with each of its settings; without `alphas` it keeps its own α.
    """
    first = methods[0]
    rates = sorted(set(factors)) if "learning_rate" in first.settings else [1.0]
    if set(rates) != {1.0} and "learning_rate" in cells.benchmark.fields:
        raise RAdapterError(
            "the benchmark sets learning_rate for every method; take it out, or leave out --rates"
        )
    choosing = bool(alphas) and first.alpha is not None
    if len(methods) == len(rates) == 1 and not choosing:
        return Choice(at_rate(first, rates[0]))
    tried: list[Tried] = []

    def add_trials(factor: float) -> None:
        for method in methods:
            tried.append(_tried(cells, name, at_rate(method, factor), seeds, alphas))

    for factor in rates:
        add_trials(factor)
    low = rates[0]
    high = rates[-1]
    step = (high / low) ** (1 / max(1, len(rates) - 1))
    for _ in range(WIDENINGS if len(rates) > 1 else 0):
        if _best(tried).rate == max(trial.rate for trial in tried):
            high = high * step
            add_trials(high)
        elif _lowest(tried).rate == min(trial.rate for trial in tried):
            low = low / step
            add_trials(low)
        else:
            break
    chosen = _lowest(tried)
    edges = {min(trial.rate for trial in tried), max(trial.rate for trial in tried)}
    at_edge = len(rates) > 1 and bool({_best(tried).rate, chosen.rate} & edges)
    return Choice(chosen.method, tuple(tried), at_edge)


def differing(methods: Sequence[Method], method: Method) -> str:
    """Format the settings of a method in which the methods differ, besides rate and α."""

    def facts(method: Method) -> dict[str, object]:
        values = {
            field.name: getattr(method, field.name)
            for field in dataclasses.fields(method)
            if field.name not in ("settings", "alpha")
        }
        settings = {
            name: value for name, value in method.settings.items() if name != "learning_rate"
        }
        return {**values, **settings}

    mine = facts(method)
    others = [facts(other) for other in methods]
    names = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
    return ", ".join(f"{name} {mine[name]}" for name in names) or "-"


def _tried(
    cells: Cells, name: str, method: Method, seeds: Sequence[int], alphas: Sequence[float]
) -> Tried:
    """Evaluate a method at its best α; of equals the smallest."""
    points = [1.0] if method.alpha is None else sorted(alphas) or [method.alpha]
    of_seeds = [cells.cell(name, method, seed, points, "validation").rows for seed in seeds]
    scores = {
        alpha: tuple(score([row for row in rows if row.alpha == alpha]) for rows in of_seeds)
        for alpha in points
    }
    best = max(points, key=lambda alpha: (round(mean(scores[alpha]), 6), -alpha))
    if method.alpha is not None:
        method = dataclasses.replace(method, alpha=best)
    return Tried(method, scores[best])


def _best(tried: Sequence[Tried]) -> Tried:
    """Find the trial with the highest mean; of equals the lowest rate."""
    return max(tried, key=lambda trial: (round(mean(trial.scores), 6), -trial.rate))


def _lowest(tried: Sequence[Tried]) -> Tried:
    """Find the lowest rate among the best trial and its equals; of equal rates the better trial."""
    best = _best(tried)
    equals = [trial for trial in tried if not _worse(trial, best)]
    return min(equals, key=lambda trial: (trial.rate, -mean(trial.scores)))


def _worse(trial: Tried, best: Tried) -> bool:
    """True if a trial is worse by more than one standard error of the seeds' paired differences."""
    leads = [a - b for a, b in zip(best.scores, trial.scores, strict=True)]
    if len(leads) < 2:
        return mean(leads) > 0
    return bool(mean(leads) > stdev(leads) / len(leads) ** 0.5)


# Rows over which the table shows the leads of the others.
BASES = (
    "zero-shot",
    "r-adapter",
    "r-adapter, preserve",
    "r-adapter, preserve, all classes",
    "r-adapter, small",
)

Methods = Mapping[str, Method]  # by their names in the table


def _rows(cells: Cells, methods: Methods, seeds: Sequence[int], picture: Path) -> str:
    """Make a table with one row for each method."""
    lines = []
    values: dict[str, list[dict[str, float]]] = {}
    images: dict[str, list[dict[str, Images]]] = {}
    ns = {}
    for name, method in methods.items():
        place = 1.0 if method.alpha is None else method.alpha
        of_seeds = [cells.cell(name, method, seed, [place]) for seed in seeds]
        values[name] = [figures(cell.rows) for cell in of_seeds]
        images[name] = [images_of(cell.rows) for cell in of_seeds]
        ns = {row.dataset: row.n for row in of_seeds[-1].rows}
        costs = cost_of([cell.cost for cell in of_seeds])
        lines.append([name, *costs, _shown_alpha(method), *_spreads(values[name])])
    heads = list(next(iter(values.values()))[0])
    others = [head for head in heads if head.startswith("mean of")] or heads[1:]
    dots(values, [*heads[:1], *others[-1:]], picture)
    return markdown(["method", *COST, "α", *_counted(heads, ns)], lines) + leads(heads, images)


def leads(
    heads: Sequence[str],
    images: Mapping[str, Sequence[Mapping[str, Images]]],
    over: Literal["seeds", "bases"] = "seeds",
) -> str:
    """Make a table of the leads over each row of `BASES`, if there are several seeds. `images` has
    each image's part, as from `images_of`, by method and seed; or by method and base, each the mean
    of its seeds.
    """
    # A column without the images' parts, as of old cells and of mIoU, has no interval and no lead.
    heads = [head for head in heads if all(head in row for rows in images.values() for row in rows)]
    bases = [name for name in images if name.lower() in BASES]
    shown = corrected(
        {
            (base, name, head): lead_over(images[name], images[base], head)
            for base, name, head in product(bases, images, heads)
            if name != base
        }
    )
    if not shown or len(images[bases[0]]) < 2:
        return ""
    parts = []
    for base in bases:
        lines = [
            [name, *(shown[base, name, head] for head in heads)] for name in images if name != base
        ]
        parts += [
            f"What each method leads {base} by, in points: the mean over the {over} of the paired"
            " differences with its interval of 95 %.",
            markdown(["method", *heads], lines),
        ]
    parts.append(
        f"± is over images and {over}. **Bold** survives Holm's correction over these tables, where"
        " a copied row or a lead seen from the other system counts once."
    )
    return "".join(f"\n\n{part}" for part in parts)


def _curves(cells: Cells, methods: Methods, seeds: Sequence[int], picture: Path) -> str:
    """Make a table with one row for each method and α."""
    lines: list[list[str]] = []
    curves: dict[str, list[dict[str, float]]] = {}
    sets: dict[str, Judged] = {}
    for name, method in methods.items():
        of_seeds = [cells.cell(name, method, seed, ALPHAS) for seed in seeds]
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
    plot_alpha_curve(
        curves[first],
        ids,
        shifted,
        picture,
        title=cells.benchmark.name,
        other_methods={name: curves[name] for name in others},
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
    benchmark: Benchmark,
    methods: Methods,
    seeds: Sequence[int],
    choosing: Sequence[int],
    factors: Sequence[float],
    spec: Table,
    *,
    alpha: bool,
) -> str:
    """Describe the command, the machine, and the choices with the seeds `choosing`; `alpha` is set
    if α was chosen.
    """
    hidden = {"data", "images", "classes", "templates"}
    if "steps" in benchmark.fields:
        hidden.add("epochs")
    values = {**benchmark.fields, "architecture": Path(benchmark.fields["architecture"]).name}
    shown = ", ".join(f"{key} {value}" for key, value in values.items() if key not in hidden)
    mean_of = "with the mean of all seeds"
    if choosing != seeds:
        mean_of = f"with the mean of seeds {', '.join(map(str, choosing))}"
    parts = [
        origin("rivals.table"),
        f"Benchmark {benchmark.name}, seeds {', '.join(map(str, seeds))}: per cent, mean ± standard"
        " deviation over the seeds.",
        f"Every method learned with {shown}; the rest is its own paper's.",
        f"α is chosen on validation images, {mean_of}." if alpha else "α is each paper's own.",
    ]
    if benchmark.judge is not None:
        parts.append(f"The test sets are those of the suite {benchmark.judge.name}.")
    if fixed := [name for name in spec.fixed if name in methods]:
        parts.append(f"Nothing was chosen for {'; '.join(fixed)}.")
    if set(factors) - {1}:
        several = len(factors) > 1
        rates = [
            f"{name} at {method.settings['learning_rate']:.2g}"
            for name, method in methods.items()
            if method.settings and (name not in spec.fixed or name in spec.rate_of)
        ]
        grid = ", ".join(f"{factor:g}" for factor in factors)
        further = [f"{name} {start:g}" for name, start in spec.starts.items() if name in methods]
        if further and several:
            grid += f", and these times {', '.join(further)}"
        chosen = f" chosen on validation images, {mean_of}, among" if several else ""
        parts.append(
            f"The learning rate is{chosen} each paper's own times {grid}: {'; '.join(rates)}."
        )
        if several:
            validation = ", ".join(entry.name for entry in benchmark.suite.of_split("validation"))
            parts.append(
                f"The validation sets are {validation}. Of the rates within one standard error of"
                " the best, the lowest was taken. A grid grew until both were inside."
            )
    return "\n".join(parts)


def _trials(chosen: Mapping[str, Choice]) -> list[str]:
    """Make a table of all trials; empty if there are none."""
    lines = []
    for name, choice in chosen.items():
        methods = [trial.method for trial in choice.tried]
        for trial in choice.tried:
            marks = ["chosen"] if trial.method == choice.method else []
            if marks and choice.at_edge:
                marks.append("the best is at the edge of the grid")
            setting = differing(methods, trial.method)
            shown = spread(trial.scores)
            facts = (f"{trial.rate:.2g}", setting, _shown_alpha(trial.method), shown)
            lines.append([name, *facts, ", ".join(marks)])
    if not lines:
        return []
    head = ["method", "rate", "setting", "α", "validation, % ± SD", ""]
    title = "What was tried: the score is the mean of the two means, in distribution and shifted."
    return [title, markdown(head, lines)]


def table(
    number: TableName,
    /,
    flags: tyro.conf.OmitArgPrefixes[Flags],
    seeds: tuple[int, ...] = (0,),
    validation_seeds: tuple[int, ...] | None = None,
    only: tuple[str, ...] = (),
    alpha: Literal["paper", "validation"] = "paper",
    rates: tuple[float, ...] = (1.0,),
    soup: int = 72,
    judge: Path | None = None,
) -> None:
    """Make a table of the paper: train and evaluate missing cells; print it, write Markdown and a
    picture.

    Args:
        number: which table; all has every system.
        flags: of all methods.
        seeds: each method is trained once for each seed.
        validation_seeds: seeds among --seeds whose mean validation score decides the choice; by
            default all.
        only: rows to make, by their names in the table; by default all.
        alpha: paper takes each method's own; validation chooses it for each method on the
            validation sets, from 0.25, 0.5, 0.75 and 1.
        rates: factors of each method's own learning rate, of which the validation sets choose one
            for each method; the grid grows until the best is inside. A single factor is applied
            without a choice.
        soup: models of the uniform soup.
        judge: suite whose test sets take the place of the benchmark's, such as of other data: it
            shows what a model forgets. Its paths are below the benchmark's data root, and its
            table is table-NUMBER-SUITE.md. Only systems that can name any class take part.
    """
    check_seeds(seeds)
    if validation_seeds is not None:
        check_seeds(validation_seeds, flag="--validation-seeds")
        if other := sorted(set(validation_seeds) - set(seeds)):
            raise RAdapterError(
                f"--validation-seeds has {other[0]}, which --seeds has not; allowed: any of"
                f" {' '.join(map(str, seeds))}"
            )

    # Choose the settings of each row.
    choosing = validation_seeds or seeds
    spec = TABLES[number]
    if unknown := [name for name in only if name not in spec.rows]:
        raise RAdapterError(
            f"table {number} has no row {unknown[0]!r}; allowed: {', '.join(spec.rows)}"
        )
    benchmark = flags.benchmark().filled(spec.fields)
    title = f"table-{number}"
    if judge is not None:
        suite = load_suite(judge, benchmark.suite.data_root)
        benchmark = dataclasses.replace(benchmark, judge=suite)
        title = f"{title}-{file_name(suite.name)}"
    cells = Cells(benchmark, flags.out, title, flags.limit, say)
    chosen: dict[str, Choice] = {}
    for name, row in spec.rows.items():
        if only and name not in only:
            continue
        method = of_members(row, soup)
        others = spec.others.get(name, ()) if len(rates) > 1 else ()
        start = spec.starts.get(name, 1.0) if len(rates) > 1 else 1.0
        grid = [start * rate for rate in rates]
        alphas = CHOICES if alpha == "validation" else ()
        if name in spec.fixed:
            grid = [1.0]
            alphas = ()
        elif name in spec.rate_of and not alphas:
            continue  # it would be the row whose rate it takes
        if base := spec.rate_of.get(name):
            if base not in chosen:
                raise RAdapterError(
                    f"the row {name!r} takes the rate of {base!r}; add that to --only"
                )
            rate = chosen[base].method.settings["learning_rate"]
            method, *others = [with_rate(setting, rate) for setting in (method, *others)]
            grid = [1.0]
        chosen[name] = choose(cells, name, [method, *others], choosing, grid, alphas)

    # Make the cells, the picture and the page.
    methods = {name: choice.method for name, choice in chosen.items()}
    flags.out.mkdir(parents=True, exist_ok=True)
    picture = flags.out / f"{title}.png"
    body = (_curves if spec.curves else _rows)(cells, methods, seeds, picture)
    say(f"wrote {picture}")
    parts = [
        f"# {spec.title}",
        _conditions(benchmark, methods, seeds, choosing, rates, spec, alpha=alpha == "validation"),
        *cells.warnings(),
        body,
        *_trials(chosen),
    ]
    publish(parts, picture.with_suffix(".md"))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(table, argv, prog="python -m rivals.table")


if __name__ == "__main__":
    sys.exit(main())
