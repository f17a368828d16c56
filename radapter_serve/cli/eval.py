"""`radapter-eval`: judge a run, a merged checkpoint, a release or a live server by a suite."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.cli.export import newest_run
from radapter_serve.errors import RAdapterError
from radapter_serve.threads import limit_threads

if TYPE_CHECKING:
    from radapter_serve.evaluation.alpha_choice import Choice
    from radapter_serve.evaluation.embedder import Embedder

GRID = tuple(round(0.1 * step, 1) for step in range(11))


def evaluate(
    *,
    suite: str | None = None,
    adapter: str | None = None,
    alpha: Annotated[tuple[str, ...], tyro.conf.arg(metavar="A [A ...]|auto")] = (),
    merged: str | None = None,
    release: str | None = None,
    url: str | None = None,
    finetuned: str | None = None,
    base: str | None = None,
    pretrained: str | None = None,
    data_root: str = ".",
    out: str = "results",
    resume: bool = False,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Judge models by the data sets of a suite: a run at any alpha, a merged checkpoint, a release, or a live server.

    Writes OUT/results.jsonl, a row for each model and data set, with intervals and the figures of each class, and
    pictures; prints a table.

    Args:
        suite: YAML file of data sets; ready ones are in recipes/suites.
        adapter: folder of a run or adapter file; the newest run in ./runs if nothing else is to be judged.
        alpha: re-scalings from 0 (the base) to 1 (all that was learned); 0, the run's own and 1 if none is given. auto
            chooses the best on validation data: the suite's sets with `split: validation`, else the run's own. Of a
            release or a server: one whose requests may bring it (radapter-export --alpha dynamic).
        merged: folder of a merged checkpoint, to be judged instead of a run.
        release: model repository, to be judged by its own runtime instead of a run; PATH@N for release N, else the
            newest.
        url: a live server, to be judged instead of a run, such as grpc://localhost:8001.
        finetuned: checkpoint of the base fine-tuned as a whole, for WiSE-FT at the same alphas beside the run.
        base: open_clip model or local-dir:PATH; what the adapter was trained on if none is given.
        pretrained: open_clip tag or path of a checkpoint; what the adapter was trained on if none is given.
        data_root: folder that the suite's paths start from.
        out: folder for rows and pictures.
        resume: keep the rows in OUT, and judge only what is missing.
        limit: images of a data set at most, drawn by the seed.
        seed: of that draw.
        batch_size: images a pass.
        precision: of torch; releases and servers have their own.
        device: of torch, such as cpu or cuda:1; a GPU if there is one.
        threads: threads to compute with; one a core if none is given. Fewer is faster beside other work.
    """
    limit_threads(threads)
    given = [flag for flag, value in (("merged", merged), ("release", release), ("url", url)) if value]
    of_a_run: dict[str, Any] = {"adapter": adapter, "finetuned": finetuned, "base": base, "pretrained": pretrained}
    if merged or "auto" in alpha:  # which release has which alpha is seen when it is read
        of_a_run["alpha auto" if "auto" in alpha else "alpha"] = alpha
    also = [flag for flag, value in of_a_run.items() if value]
    if len(given) > 1 or (given and also):
        flags = ", ".join(f"--{flag}" for flag in given + also)
        raise RAdapterError(f"{flags} don't go together: judge one thing a call, and add to its rows by --resume")
    auto = "auto" in alpha
    alphas = () if auto else tuple(_number(value) for value in alpha)
    if auto and len(alpha) > 1:
        raise RAdapterError("--alpha auto stands alone: it tries 0 to 1 in steps of 0.1")
    if len(set(alphas)) < len(alphas):
        raise RAdapterError(f"an alpha is given twice: {' '.join(alpha)}")
    if suite is None and not auto:
        raise RAdapterError("no suite; give one with --suite, such as --suite recipes/suites/pacs.yaml")
    for name, count in (("limit", limit), ("batch-size", batch_size)):
        if count is not None and count < 1:
            raise RAdapterError(f"--{name} is {count}; allowed: 1 or more")
    path = Path(adapter) if adapter else newest_run() if not given else Path()
    console, screen = Console(stderr=True), Console()
    with console.status("starting") as status:
        say = _escaped(status.update) if console.is_terminal else _Lines(console)
        # torch takes seconds to load: not for --help
        from radapter_serve.evaluation.release_embedder import ReleaseEmbedder
        from radapter_serve.evaluation.results import Results, prompts, table, warnings
        from radapter_serve.evaluation.run import choose_alpha, draw, draw_choice, evaluate_suite
        from radapter_serve.evaluation.server_embedder import ServerEmbedder
        from radapter_serve.evaluation.suite import load_suite
        from radapter_serve.evaluation.torch_embedder import from_adapter, from_merged

        judged = load_suite(suite, data_root) if suite else None
        results = Results(out, resume=resume)
        say("loading the model")
        if merged:
            embedder: Embedder = from_merged(merged, precision=precision, device=device)
        elif release:
            embedder = ReleaseEmbedder(release, alphas)
        elif url:
            embedder = ServerEmbedder(url, alphas)
        else:
            embedder = from_adapter(
                path,
                GRID if auto else alphas or None,
                base=base,
                pretrained=pretrained,
                finetuned=finetuned,
                precision=precision,
                device=device,
            )
        options: dict[str, Any] = {
            "limit": limit, "seed": seed, "batch_size": batch_size, "say": say,
        }  # fmt: skip
        try:
            variants = embedder.variants
            if auto:
                choice, file = choose_alpha(embedder, path, judged, results, **options)
                screen.print(_choice_table(choice))
                screen.print(f"rule: {choice.rule}", highlight=False, soft_wrap=True)
                screen.print(f"alpha {choice.alpha:g} is written to {file}", highlight=False, soft_wrap=True)
                variants = [v for v in variants if v.alpha in (0.0, choice.alpha)]
            skipped: list[str] = []
            options["skip"] = skipped.append
            rows = evaluate_suite(embedder, judged, results, variants=variants, **options) if judged else []
        finally:
            embedder.close()
        # Of the α that auto judges on test data there are only two: no curve to replace a whole one by.
        pictures = draw(rows, Path(out), judged.name, curve_too=not auto) if judged and rows else []
        if auto:
            pictures.append(draw_choice(choice, Path(out)))
    if judged and rows:
        screen.print(table(rows, f"{judged.name}: per cent", judged.pairs("test")))
        for line in prompts(rows):
            screen.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (*skipped, *warnings(rows)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if judged and not rows and skipped:
        raise RAdapterError(f"nothing was judged: all data sets of {judged.name} are left out")
    for file in (results.path, *pictures):
        screen.print(f"wrote {file}", highlight=False, soft_wrap=True)
    if auto:
        screen.print(
            f"Next:   radapter-export --adapter {shlex.quote(str(path))} --alpha auto", highlight=False, soft_wrap=True
        )


def _choice_table(choice: Choice) -> Table:
    table = Table(title="Validation: per cent")
    sets: Sequence[str] = list(choice.sets)
    for column in ("α", "score", *sets):
        table.add_column(column, justify="right")
    for point in choice.curve:
        style = "bold" if point["alpha"] == choice.alpha else None
        values = (point[name] for name in ("score", *sets))
        table.add_row(f"{point['alpha']:g}", *(f"{value:.2f}" for value in values), style=style)
    return table


class _Lines:
    """Prints what is going on where no terminal shows it: a plain line, and the next one some seconds later."""

    def __init__(self, console: Console, seconds: float = 10) -> None:
        self._console, self._seconds, self._printed = console, seconds, time.monotonic()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._printed >= self._seconds:
            self._printed = now
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _escaped(update: Callable[[str], None]) -> Callable[[str], None]:
    from rich.markup import escape

    return lambda line: update(escape(line))


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:  # which is how NaN is refused, too
        raise RAdapterError(f"alpha is {value!r}; allowed: numbers from 0 (the base) to 1 (all learned), or auto")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `evaluate`."""
    return run(evaluate, argv, prog="radapter-eval")


if __name__ == "__main__":
    raise SystemExit(main())
