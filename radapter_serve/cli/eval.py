"""`radapter-eval`: evaluate a run, a merged checkpoint, a release or a live server on a suite."""

from __future__ import annotations

import shlex
from typing import Annotated

import tyro
from rich.console import Console

from radapter_serve.cli import run
from radapter_serve.evaluation import start
from radapter_serve.evaluation.rows import prompts

FIRST = (
    *("suite", "data", "alpha", "data_root", "out", "limit", "adapter", "checkpoint", "lora"),
    *("base", "merged", "model_repository", "url", "device"),
)
SETTINGS = start.EvaluationSettings()


def evaluate(
    *,
    suite: str | None = None,
    data: str | None = None,
    alpha: Annotated[tuple[str, ...], tyro.conf.arg(metavar="A [A ...]|auto")] = (),
    settings: tyro.conf.OmitArgPrefixes[start.EvaluationSettings] = SETTINGS,
) -> None:
    """Evaluate a run at any alpha, a merged checkpoint, a release, or a live server on the data
    sets of a suite.

    The command prints a table, and writes pictures and OUT/results.jsonl, which has one row for
    each model and data set, with intervals and the figures of each class. If the base is known,
    which it is for a run, the command also measures how many of its answers among common nouns, on
    the same images, are kept.

    Args:
        suite: data sets to evaluate on: a YAML file, or the name of a suite that comes with the
            package, such as pacs, imagenet or retrieval.
        data: one data set instead of a suite, such as photos/test or csv:test.csv; it is
            opened as the run opened its own, with its columns, and among its classes.
        alpha: α, one or several, from 0 (the base) to 1 (all that was learned); if not
            given, 0, the run's own and 1. auto takes the smallest that is statistically as good as
            the best on validation data, and at most the run's own; where the images are too few to
            show that training helped, one that keeps what the base knows. That data is the suite's
            sets with `split: validation`, else the run's. A release or a server takes
            other alphas than its own only if requests may give them (radapter-export --alpha
            dynamic).
        settings: the model to evaluate, and settings of the evaluation.
    """
    screen = Console()
    result = start.evaluate(alpha=alpha, suite=suite, data=data, progress=True, **vars(settings))
    choice = result.choice
    if choice is not None:
        screen.print(choice.table())
        _print(screen, f"rule: {choice.rule}")
    if result.rows:
        screen.print(result.table())
        _print(screen, *prompts(result.rows))
    _print(Console(stderr=True), *result.notes)
    rows = [file for file in result.files if file.suffix == ".jsonl"]
    if rows and not result.measured:
        _print(
            screen,
            "all of this was measured before; --no-resume measures it again and replaces"
            f" {rows[0]}",
        )
    _print(screen, *(f"wrote {file}" for file in result.files))
    if choice is not None:
        alpha_file = result.choice_read
        if alpha_file is not None:
            _print(screen, f"read {alpha_file}: the run chose alpha with cross-validation")
        else:
            [alpha_file] = [file for file in result.files if file.name == "alpha.json"]
        adapter = alpha_file.parent
        command = f"radapter-export --adapter {shlex.quote(str(adapter))} --alpha"
        _print(screen, f"auto is alpha {choice.alpha:g}, best is alpha {choice.best:g}")
        _print(screen, f"Next:   {command} auto")
        if choice.best != choice.alpha:
            _print(screen, f"or:     {command} best")


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    return run(evaluate, argv, prog="radapter-eval", first={"": FIRST})
