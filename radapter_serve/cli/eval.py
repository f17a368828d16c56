"""`radapter-eval`: evaluate a run, a merged checkpoint, a release or a live server on a suite."""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from radapter_serve.cli import run
from radapter_serve.cli.export import ADAPTER, newest_run
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.results import Results
from radapter_serve.threads import limit_threads

if TYPE_CHECKING:
    from radapter_serve.evaluation.alpha_choice import Choice
    from radapter_serve.evaluation.embedder import Embedder
    from radapter_serve.evaluation.row import Row
    from radapter_serve.evaluation.suite import Suite

FIRST = (
    "suite",
    "alpha",
    "data_root",
    "out",
    "limit",
    "adapter",
    "merged",
    "release",
    "url",
    "device",
)
GRID = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True)
class Model:
    """The model that is evaluated: a run, unless one of the others is named.

    Args:
        adapter: folder of a run or adapter file; the newest run in ./runs if nothing else is given.
        merged: folder of a merged checkpoint, instead of a run.
        release: model repository, instead of a run; its own runtime runs it. PATH@N for release N,
            else the newest.
        url: a live server, instead of a run, such as grpc://localhost:8001.
        finetuned: checkpoint of the base fine-tuned as a whole, for WiSE-FT at the same alphas
            beside the run.
        base: open_clip model, local-dir:PATH or hf-hub:NAME; what the adapter was trained on if
            none is given.
        pretrained: open_clip tag or path of a checkpoint; what the adapter was trained on if none
            is given.
        precision: of torch; releases and servers have their own.
        device: of torch, such as cpu or cuda:1; a GPU if there is one.
    """

    adapter: str | None = None
    merged: str | None = None
    release: str | None = None
    url: str | None = None
    finetuned: str | None = None
    base: str | None = None
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str | None = None

    @property
    def is_a_run(self) -> bool:
        """Whether it is none of the others."""
        return not (self.merged or self.release or self.url)

    def check(self, alpha: Sequence[str]) -> None:
        """Refuse flags of several models, and flags of a run beside another model."""
        given = [name for name in ("merged", "release", "url") if getattr(self, name)]
        also = [
            name for name in ("adapter", "finetuned", "base", "pretrained") if getattr(self, name)
        ]
        if alpha and (
            self.merged or "auto" in alpha
        ):  # which release has which alpha is seen when it is read
            also.append("alpha auto" if "auto" in alpha else "alpha")
        if len(given) > 1 or (given and also):
            flags = ", ".join(f"--{flag}" for flag in given + also)
            raise RAdapterError(
                f"{flags} don't go together: evaluate one thing a call; one --out takes all their"
                " rows"
            )

    def name(self, path: Path) -> str:
        """What to call its results: the folder of the run, checkpoint or release, or the address of
        the server.

        Args:
            path: of the run, where it is one.
        """
        if self.url:
            return self.url.partition("://")[2] or self.url
        whole = Path(self.merged or self.release or path).absolute()
        return (whole.parent if whole.name == ADAPTER else whole).name

    def load(self, path: Path, alphas: Sequence[float]) -> Embedder:
        """Load it, at these alphas; of a run from its path."""
        from radapter_serve.evaluation.release_embedder import ReleaseEmbedder, ServerEmbedder
        from radapter_serve.evaluation.torch_embedder import from_adapter, from_merged

        if self.merged:
            return from_merged(self.merged, precision=self.precision, device=self.device)
        if self.release:
            return ReleaseEmbedder(self.release, alphas)
        if self.url:
            return ServerEmbedder(self.url, alphas)
        return from_adapter(
            path,
            alphas or None,
            base=self.base,
            pretrained=self.pretrained,
            finetuned=self.finetuned,
            precision=self.precision,
            device=self.device,
        )


def evaluate(
    *,
    suite: str | None = None,
    model: tyro.conf.OmitArgPrefixes[Model] = Model(),  # frozen
    alpha: Annotated[tuple[str, ...], tyro.conf.arg(metavar="A [A ...]|auto")] = (),
    data_root: str = ".",
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    resume: bool = True,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
) -> None:
    """Evaluate a run at any alpha, a merged checkpoint, a release, or a live server on the data
    sets of a suite.

    It prints a table, and writes pictures and OUT/results.jsonl, which has a row for each model and
    data set with intervals and the figures of each class.

    Args:
        suite: data sets to evaluate on: a YAML file, or the name of a suite that comes with the
            package, such as pacs, imagenet or retrieval.
        model: what is evaluated.
        alpha: re-scalings from 0 (the base) to 1 (all that was learned); 0, the run's own and 1 if
            none is given. auto chooses the best on validation data: the suite's sets with `split:
            validation`, else the run's own. Of a release or a server: one whose requests may bring
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
    """
    from radapter_serve.evaluation.suite import (
        load_suite,
        ready_suites,
    )  # pydantic, which a client has not

    limit_threads(threads)
    auto = "auto" in alpha
    model.check(alpha)
    alphas = _alphas(alpha)
    if suite is None and not auto:
        raise RAdapterError(
            f"no suite; give one with --suite: a file, or one of {', '.join(ready_suites())}"
        )
    for name, count in (("limit", limit), ("batch-size", batch_size)):
        if count is not None and count < 1:
            raise RAdapterError(f"--{name} is {count}; allowed: 1 or more")
    path = Path()
    if model.is_a_run:
        path = Path(model.adapter) if model.adapter else newest_run()
    # What can be refused is refused before torch, which takes seconds to load.
    tests = load_suite(suite, data_root) if suite else None
    folder = out or default_out(model.name(path), tests)
    results = Results(folder, resume=resume)
    known = len(results.rows)
    console, screen = Console(stderr=True), Console()
    choice, skipped = None, list[str]()
    rows: list[Row] = []
    with console.status("starting") as status:
        say = _escaped(status.update) if console.is_terminal else _Lines(console)
        # torch takes seconds to load: not for --help
        from radapter_serve.evaluation.overlap import Overlap
        from radapter_serve.evaluation.run import choose_alpha, draw, draw_choice, evaluate_suite
        from radapter_serve.evaluation.sets import open_set

        overlap = Overlap()
        say("loading the model")
        embedder = model.load(path, GRID if auto else alphas)
        options: dict[str, Any] = {
            "limit": limit,
            "seed": seed,
            "batch_size": batch_size,
            "say": say,
        }
        try:
            variants = embedder.variants
            if auto:
                choice, file = choose_alpha(
                    embedder, path, tests, results, opened=overlap.chosen_by, **options
                )
                screen.print(_choice_table(choice))
                told = _beside(choice)
                _print(
                    screen,
                    f"rule: {choice.rule}",
                    f"alpha {choice.alpha:g} is written to {file}",
                    *told,
                )
                variants = [
                    one for one in variants if one.alpha in (0.0, choice.smallest, choice.alpha)
                ]
            elif tests:  # alpha was chosen earlier, and perhaps by these
                for entry in tests.of_split("validation"):
                    with contextlib.suppress(RAdapterError):  # they need not be here
                        overlap.chosen_by(open_set(tests, entry, limit=limit, seed=seed))
            if tests:
                options |= {"variants": variants, "skip": skipped.append, "opened": overlap.tested}
                rows = evaluate_suite(embedder, tests, results, **options)
        finally:
            embedder.close()
        # After auto there are only two α on test data: they must not replace a whole curve.
        pictures = draw(rows, folder, tests.name, curve_too=not auto) if tests and rows else []
        if choice:
            pictures.append(draw_choice(choice, folder))
    if tests:
        _show(tests, rows, [*skipped, *overlap.warnings], screen, console)
    if len(results.rows) == known:
        _print(
            screen,
            "all of this was measured before; --no-resume measures it again and replaces"
            f" {results.path}",
        )
    _print(screen, *(f"wrote {file}" for file in (results.path, *pictures)))
    if auto:
        command = f"radapter-export --adapter {shlex.quote(str(path))} --alpha"
        _print(screen, f"Next:   {command} auto")
        if choice and choice.smaller is not None:
            _print(screen, f"or:     {command} {choice.smaller:g}")


def default_out(model: str, tests: Suite | None) -> Path:
    """The folder of the results of a model on a suite, or on its own validation data."""
    parts = (model, tests.name if tests else "validation")
    return Path("results", *(re.sub(r"[^\w.@-]+", "_", part) for part in parts))


def _show(
    tests: Suite, rows: Sequence[Row], notes: Sequence[str], screen: Console, console: Console
) -> None:
    """Print what was measured, and on the other console what a user should know beside it."""
    from radapter_serve.evaluation.results import prompts, table, warnings

    if rows:
        screen.print(table(rows, f"{tests.name}: per cent", tests.pairs("test")))
        _print(screen, *prompts(rows))
    _print(console, *notes, *warnings(rows))
    if not rows and notes:
        raise RAdapterError(f"nothing was evaluated: all data sets of {tests.name} are left out")


def _alphas(values: Sequence[str]) -> tuple[float, ...]:
    """The values of `--alpha` as numbers; none for auto."""
    if "auto" in values:
        if len(values) > 1:
            raise RAdapterError(
                "--alpha auto takes no other alpha: it tries 0 to 1 in steps of 0.1"
            )
        return ()
    numbers = tuple(_number(value) for value in values)
    if len(set(numbers)) < len(numbers):
        raise RAdapterError(f"an alpha is given twice: {' '.join(values)}")
    return numbers


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _choice_table(choice: Choice) -> Table:
    table = Table(title="Validation: per cent")
    columns = ("score", *choice.sets)
    for column in ("α", *columns):
        table.add_column(column, justify="right")
    for point in choice.curve:
        style = "bold" if point["alpha"] == choice.alpha else None
        table.add_row(
            f"{point['alpha']:g}", *(f"{point[name]:.2f}" for name in columns), style=style
        )
    return table


def _beside(choice: Choice) -> list[str]:
    """What a user should know beside a choice that no shifted set was asked for."""
    if choice.shifted:
        return []
    lines = [
        "No validation set is shifted, so this choice tells nothing of other images than yours; on"
        " those, a smaller alpha usually loses less."
    ]
    if choice.smaller is not None:
        lines.append(
            f"alpha {choice.smaller:g} is the smallest within the 95 % interval of the best: on"
            " your images it may be as good, and it keeps more of the base."
        )
    elif choice.smallest == 0 < choice.alpha:
        lines.append(
            "alpha 0, the base as it was, is within the 95 % interval of the best: these images are"
            " too few to tell that training helped. The run's own alpha, which an export takes if"
            " none is given, is a good start."
        )
    return lines


class _Lines:
    """Prints what is going on where no terminal shows it: a plain line, and the next one some
    seconds later.
    """

    def __init__(self, console: Console, seconds: float = 10) -> None:
        self._console, self._seconds, self._printed = console, seconds, time.monotonic()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._printed >= self._seconds:
            self._printed = now
            _print(self._console, line)


def _escaped(update: Callable[[str], None]) -> Callable[[str], None]:
    from rich.markup import escape

    return lambda line: update(escape(line))


def _number(value: str, name: str = "alpha") -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:  # which is how NaN is refused, too
        raise RAdapterError(
            f"{name} is {value!r}; allowed: numbers from 0 (the base) to 1 (all learned), or auto"
        )
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `evaluate`."""
    return run(evaluate, argv, prog="radapter-eval", first=FIRST)


if __name__ == "__main__":
    raise SystemExit(main())
