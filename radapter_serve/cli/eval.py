"""`radapter-eval`: evaluate a run, a merged checkpoint, a release or a live server on a suite."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation import start
from radapter_serve.evaluation.results import prompts

FIRST = (
    "suite",
    "data",
    "alpha",
    "data_root",
    "out",
    "limit",
    "adapter",
    "checkpoint",
    "lora",
    "base",
    "merged",
    "release",
    "url",
    "device",
)
MODEL = start.Evaluated()


def evaluate(
    *,
    suite: str | None = None,
    data: str | None = None,
    model: tyro.conf.OmitArgPrefixes[start.Evaluated] = MODEL,
    alpha: Annotated[tuple[str, ...], tyro.conf.arg(metavar="A [A ...]|auto")] = (),
    data_root: str = ".",
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    resume: bool = True,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    doubtful: int | None = None,
) -> None:
    """Evaluate a run at any alpha, a merged checkpoint, a release, or a live server on the data
    sets of a suite.

    It prints a table, and writes pictures and OUT/results.jsonl, which has a row for each model and
    data set with intervals and the figures of each class. Beside alpha 0, it also measures how much
    is kept of what the base answers among common nouns on the same images.

    Args:
        suite: data sets to evaluate on: a YAML file, or the name of a suite that comes with the
            package, such as pacs, imagenet or retrieval.
        data: one data set in place of a suite, such as imagefolder:photos/test; it is opened as the
            run opened its own, with its columns, and among its classes.
        model: what is evaluated.
        alpha: re-scalings from 0 (the base) to 1 (all that was learned); 0, the run's own and 1 if
            none is given. auto takes the smallest that can't be told from the best on validation
            data, and never more than the run's own: the suite's sets with `split: validation`, else
            those of the run. Of a release or a server: one whose requests may bring
            it (radapter-export --alpha dynamic).
        data_root: folder that the suite's paths start from.
        out: folder for rows and pictures; results/MODEL/SUITE if none is given, such as
            results/photos/pacs, and results/photos/validation where there is no suite.
        resume: keep the rows in OUT, and evaluate only what is missing or has changed; --no-resume
            evaluates all again, and replaces them.
        limit: images of a data set at most, drawn by the seed.
        seed: of that draw.
        batch_size: images a pass.
        threads: threads to compute with; one a core if none is given. Fewer is faster beside other
            work.
        doubtful: in place of an evaluation: list so many training images of the run whose label
            both the base and the run doubt, to look for wrong labels; writes OUT/doubtful.csv and
            OUT/doubtful.png.
    """
    if doubtful is not None:
        given = {"suite": suite, "data": data, "alpha": alpha, "limit": limit, "seed": seed}
        names = [name for name, value in given.items() if value]
        _list_doubtful(doubtful, model, names, out, batch_size, threads)
        return
    found = start.evaluate(
        alpha=alpha,
        suite=suite,
        data=data,
        data_root=data_root,
        out=out,
        resume=resume,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        threads=threads,
        progress=True,
        **vars(model),
    )
    screen = Console()
    if found.choice is not None:
        screen.print(found.choice.table())
        _print(screen, f"rule: {found.choice.rule}")
    if found.rows:
        screen.print(found.table())
        _print(screen, *prompts(found.rows))
    _print(Console(stderr=True), *found.notes)
    if not found.measured:
        _print(
            screen,
            "all of this was measured before; --no-resume measures it again and replaces"
            f" {found.files[0]}",
        )
    _print(screen, *(f"wrote {file}" for file in found.files))
    if found.choice is not None:
        adapter = found.files[1].parent
        command = f"radapter-export --adapter {shlex.quote(str(adapter))} --alpha"
        choice = found.choice
        _print(screen, f"auto is alpha {choice.alpha:g}, best is alpha {choice.best:g}")
        _print(screen, f"Next:   {command} auto")
        if choice.best != choice.alpha:
            _print(screen, f"or:     {command} best")


def _list_doubtful(
    count: int,
    model: start.Evaluated,
    given: list[str],
    out: Path | None,
    batch_size: int,
    threads: int | None,
) -> None:
    others = ("merged", "release", "url", "finetuned", "checkpoint", "lora")
    given += [name for name in others if getattr(model, name)]
    if given:
        raise RAdapterError(
            f"doubtful and {', '.join(given)} don't go together: it looks at the training images of"
            " a run"
        )
    found, files = start.doubtful(
        model.adapter,
        count,
        base=model.base,
        pretrained=model.pretrained,
        precision=model.precision,
        device=model.device,
        out=out,
        batch_size=batch_size,
        threads=threads,
        progress=True,
    )
    table = Table(title="Labels in doubt, the most doubtful first")
    for column in ("image", "label", "the base says", "the run says"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(*map(escape, (one.image, one.label, one.base_says, one.run_says)))
    screen = Console()
    screen.print(table)
    _print(screen, *(f"wrote {file}" for file in files))


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `evaluate`."""
    return run(evaluate, argv, prog="radapter-eval", first=FIRST)


if __name__ == "__main__":
    raise SystemExit(main())
