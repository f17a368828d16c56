"""Evaluation of a model on a suite: what can be refused is refused before torch is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.evaluation.rows import Results, Row, table, warnings
from radapter_serve.process import limit_threads
from radapter_serve.sources import ADAPTER, check_base_is_named, newest_run

if TYPE_CHECKING:
    from radapter_serve.evaluation.alpha_choice import Choice
    from radapter_serve.evaluation.image_sets import EvaluationSet
    from radapter_serve.evaluation.models import Candidate
    from radapter_serve.evaluation.suite import Suite

AUTO = "auto"
GRID = tuple(round(0.1 * step, 1) for step in range(11))  # of auto
Place = str | PathLike[str]
Say = Callable[[str], None]
INTERVAL = 10.0  # seconds between two plain lines


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured; `print` shows the tables and notes that the command shows.

    Attributes:
        rows: of each model on each data set: `metrics` in [0, 1], `intervals` that hold the true
            value in 95 % of cases, and more; see `Row`.
        choice: the α that `auto` takes, the best one, and how they were found; None where an α was
            given.
        suite: the test data; None where only an α was chosen.
        notes: what a reader of the figures should know, a line each.
        files: `results.jsonl` with all rows, the choice beside the adapter, and the pictures.
        measured: how many rows this call measured; the others were there.
    """

    rows: tuple[Row, ...]
    choice: Choice | None
    suite: Suite | None
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    measured: int

    @property
    def chosen_alpha(self) -> float | None:
        """The α that `auto` took, or the only one that was evaluated; None where there are
        several.
        """
        if self.choice is not None:
            return self.choice.alpha
        alphas = {row.alpha for row in self.rows}
        return alphas.pop() if len(alphas) == 1 else None

    def table(self) -> Table:
        """Models down, data sets across, in per cent; without test data, how α was chosen. `rich`
        prints it.
        """
        if self.choice is not None and not self.rows:
            return self.choice.table()
        if self.suite is None:
            return table(self.rows, "per cent")
        return table(self.rows, f"{self.suite.name}: per cent", self.suite.pairs("test"))

    def __repr__(self) -> str:
        suite = self.suite.name if self.suite else None
        return (
            f"Evaluation(suite={suite!r}, rows={len(self.rows)}, chosen_alpha={self.chosen_alpha},"
            f" folder={str(self.files[0].parent)!r})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # the last line of a notebook's cell

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=False, force_jupyter=False)
        if self.choice is not None and self.rows:
            console.print(self.choice.table())
        console.print(self.table())
        for note in self.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        return out.getvalue()


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated: a run, unless another is named.

    Attributes:
        adapter: folder of a run or adapter file; the newest run in ./runs if nothing else is given.
        merged: folder of a merged checkpoint, instead of a run.
        model_repository: model repository, instead of a run; its own runtime runs the release.
            PATH@N for release N, else the newest.
        url: a live server, instead of a run, such as http://localhost:8000.
        checkpoint: a model that was tuned elsewhere, instead of a run: a .pt or .safetensors file,
            a model's folder, hf-hub:NAME or NAME:TAG; at any alpha on the line from --base.
        lora: folder of a LoRA of peft for a CLIPModel, instead of a run.
        base: what was tuned: an open_clip model with its weights, such as ViT-B-32:openai,
            local-dir:PATH or hf-hub:NAME; what the adapter or the LoRA says if none is given.
        device: of torch, such as cpu or cuda:1; a GPU if there is one.
    """

    adapter: str | None = None
    merged: str | None = None
    model_repository: str | None = None
    url: str | None = None
    checkpoint: str | None = None
    lora: str | None = None
    base: str | None = None
    device: str | None = None

    @property
    def instead(self) -> list[str]:
        """Names of the fields that are given in place of a run."""
        names = ("merged", "model_repository", "url", "checkpoint", "lora")
        return [name for name in names if getattr(self, name)]

    def check(self, alphas: Sequence[float], *, auto: bool) -> None:
        """Refuse several models, what only a run has beside another model, and a checkpoint whose
        base is not named.
        """
        of_runs = ["adapter"]
        if not (self.checkpoint or self.lora):
            of_runs.append("base")
        also = [name for name in of_runs if getattr(self, name)]
        if auto:
            also.append("alpha auto")
        elif alphas and self.merged:  # a release is asked for its α when it is read
            also.append("alpha")
        if len(self.instead) > 1 or (self.instead and also):
            raise RAdapterError(
                f"{', '.join(self.instead + also)} don't go together: evaluate one thing a call;"
                " one out takes all their rows"
            )
        if self.checkpoint:
            check_base_is_named(self.checkpoint, self.base, alphas)

    def name(self, path: Path) -> str:
        """A name for its results: the folder of the run, which is at `path`, of the checkpoint or
        the release, or the address of the server.
        """
        if self.url:
            return self.url.partition("://")[2] or self.url
        if self.checkpoint:
            return Path(self.checkpoint).name
        whole = Path(self.merged or self.model_repository or self.lora or path).absolute()
        return (whole.parent if whole.name == ADAPTER else whole).name

    def load(self, path: Path, alphas: Sequence[float]) -> list[Candidate]:
        """Load it at these alphas; a run from its path."""
        from radapter_serve.adapter.tuned import load_checkpoint, load_lora
        from radapter_serve.encoders.loaded import load_release, served_release
        from radapter_serve.evaluation import models

        if self.checkpoint:
            tuned = load_checkpoint(self.checkpoint, self.base)
            return models.from_line(tuned, alphas, device=self.device)
        if self.lora:
            tuned = load_lora(self.lora, self.base)
            return models.from_line(tuned, alphas, device=self.device)
        if self.merged:
            return models.from_merged(self.merged, device=self.device)
        if self.model_repository:
            return models.from_release(load_release(self.model_repository), alphas)
        if self.url:
            return models.from_release(served_release(self.url), alphas, "server")
        return models.from_adapter(path, alphas, base=self.base, device=self.device)


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is evaluated, and where its rows go.

    Attributes:
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

    data_root: str = "."
    out: Path | None = None
    resume: bool = True
    limit: int | None = None
    seed: int = 0
    batch_size: int = 64
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise RAdapterError(f"{name} is {count}; allowed: 1 or more")

    def folder(self, model: str, suite: str) -> Path:
        """Where the results of a model on a suite go."""
        if self.out:
            return Path(self.out)
        return Path("results", *(re.sub(r"[^\w.@-]+", "_", part) for part in (model, suite)))


@one_line("train")
def evaluate(
    adapter: Place | None = None,
    alpha: float | str | Sequence[float | str] | None = None,
    *,
    suite: Place | None = None,
    data: str | None = None,
    progress: bool = False,
    **fields: Any,
) -> Evaluation:
    """Evaluate a model on test data, as `radapter-eval` does; it writes the rows and pictures that
    the command writes.

    Args:
        adapter: a run, as `train` gives it, its folder, or an adapter file; the newest run in
            ./runs if nothing else is named.
        alpha: re-scalings in [0, 1]; 0, the run's own and 1 if none is given. `auto` takes the
            smallest that can't be told from the best on validation data, and never more than the
            run's own: the suite's sets with `split: validation`, else those of the run; see
            `Choice`.
        suite: a YAML file, or the name of a suite that comes with the package.
        data: one data set in place of a suite, such as `photos/test` or `csv:test.csv`; it is
            opened as the run opened its own, with its columns, and among its classes.
        progress: show on stderr what is going on; without it nothing is printed.
        fields: any field of `EvaluatedModel`, in place of a run (`checkpoint`, `model_repository`,
            `url`, ...), or of `EvaluationSettings` (`data_root`, `out`, `limit`, ...).

    Returns:
        The rows; with `auto`, also the choice.

    Raises:
        RAdapterError: the model, the data or a value is invalid.
    """
    # The fields of each of the two objects.
    kinds: tuple[Any, Any] = (EvaluatedModel, EvaluationSettings)
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    if unknown := sorted(set(fields).difference(*names)):
        allowed = ", ".join(sorted(set().union(*names)))
        raise RAdapterError(f"there is no argument {unknown[0]!r}; allowed are {allowed}")
    values = {
        name: str(Path(value)) if isinstance(value, PathLike) and name != "out" else value
        for name, value in {"adapter": adapter, **fields}.items()
    }
    model, settings = (
        kind(**{name: value for name, value in values.items() if name in known})
        for kind, known in zip(kinds, names, strict=True)
    )
    alphas = [alpha] if isinstance(alpha, str | int | float) else list(alpha or ())
    return evaluate_model(model, settings, alphas, suite, data, progress=progress)


def evaluate_model(
    model: EvaluatedModel,
    settings: EvaluationSettings,
    alpha: Sequence[float | str],
    suite: Place | None,
    data: str | None,
    *,
    progress: bool,
) -> Evaluation:
    """`evaluate`, for the function and the command."""
    limit_threads(settings.threads)
    auto = list(alpha) == [AUTO]
    alphas: Sequence[float] = GRID if auto else _numbers(alpha)
    model.check(alphas, auto=auto)
    tests = _suite(suite, data, Path(settings.data_root), auto=auto)
    path = Path()
    if not model.instead:
        path = Path(model.adapter) if model.adapter else newest_run()
        if data is not None:
            # torch takes seconds to load: not before what is refused without it.
            from radapter_serve.adapter import load_adapter
            from radapter_serve.evaluation.run import as_trained

            tests = as_trained(load_adapter(path).metadata, data)
    folder = settings.folder(model.name(path), tests.name if tests else "validation")
    results = Results(folder, resume=settings.resume)

    from radapter_serve.adapter import load_adapter
    from radapter_serve.evaluation.alpha_choice import choose, save_choice
    from radapter_serve.evaluation.plots import draw, draw_choice
    from radapter_serve.evaluation.run import (
        evaluate_suite,
        open_set,
        own_validation,
        warn_of_overlap,
    )

    choosing: list[EvaluationSet] = []
    testing: list[EvaluationSet] = []
    rows: list[Row] = []
    choice: Choice | None = None
    files = [results.path]
    draws: dict[str, Any] = {"limit": settings.limit, "seed": settings.seed}
    with status(Console(stderr=True), show=progress) as say:
        how: dict[str, Any] = {**draws, "batch_size": settings.batch_size, "say": say}
        say("loading the model")
        if auto:  # which may take the run's own
            metadata = load_adapter(path).metadata
            alphas = sorted({*alphas, metadata.alpha})
        models = model.load(path, alphas)
        try:
            # α, on validation data.
            tested = models
            if auto:
                chosen_by = tests
                if chosen_by is None or not chosen_by.of_split("validation"):
                    chosen_by = own_validation(metadata)
                validated = evaluate_suite(
                    models, chosen_by, results, split="validation", opened=choosing.append, **how
                )
                choice = choose(validated, metadata.alpha)
                files.append(save_choice(choice, path))
                chosen = (0.0, choice.alpha, choice.best)
                tested = [candidate for candidate in models if candidate.alpha in chosen]
            elif tests:  # α was chosen earlier, and perhaps by these
                for entry in tests.of_split("validation"):
                    with contextlib.suppress(RAdapterError):  # they need not be here
                        choosing.append(open_set(tests, entry, **draws))
            # The model, on test data.
            if tests:
                rows = evaluate_suite(tested, tests, results, opened=testing.append, **how)
        finally:
            models[0].close()
        overlaps = warn_of_overlap(choosing, testing)
        if tests and rows:
            # After auto there are only a few α on test data: they must not replace a whole curve.
            files += draw(rows, folder, tests.name, curve_too=not auto)
        if choice:
            files.append(draw_choice(choice, folder))
    notes = choice.notes if choice else ()
    return Evaluation(
        rows=tuple(rows),
        choice=choice,
        suite=tests,
        notes=(*notes, *overlaps, *warnings(rows)),
        files=tuple(files),
        measured=results.measured,
    )


def _numbers(values: Sequence[float | str]) -> tuple[float, ...]:
    if AUTO in values:
        raise RAdapterError("alpha auto takes no other alpha: it tries 0 to 1 in steps of 0.1")
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number <= 1:  # also of NaN
            raise RAdapterError(
                f"alpha is {value!r}; allowed: numbers from 0 (the base) to 1 (all learned), or"
                " auto"
            )
        numbers.append(number)
    if len(set(numbers)) < len(numbers):
        raise RAdapterError(f"an alpha is given twice: {' '.join(map(str, values))}")
    return tuple(numbers)


def _suite(suite: Place | None, data: str | None, data_root: Path, *, auto: bool) -> Suite | None:
    """The test data; None where only α is chosen."""
    from radapter_serve.evaluation.suite import Entry, Suite, load_suite, ready_suites

    if suite is not None and data is not None:
        raise RAdapterError(f"the suite {suite} and the data {data} are both given; leave one out")
    if suite is not None:
        return load_suite(str(Path(suite)), data_root)
    if data is not None:
        return Suite(data, (Entry(data, name=data),))
    if auto:
        return None
    raise RAdapterError(
        "no test data; give a suite with --suite: a file, or one of"
        f" {', '.join(ready_suites())}; or one data set with --data"
    )


@contextmanager
def status(
    console: Console, *, show: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Say]:
    """Yields a function that shows a line: on a terminal one line that changes, elsewhere a plain
    line every ten seconds of the clock. `show` False shows nothing.
    """
    if not show:
        yield lambda line: None
        return
    if console.is_terminal:
        with console.status("starting") as shown:
            yield lambda line: shown.update(escape(line))
        return
    printed = clock()

    def say(line: str) -> None:
        nonlocal printed
        now = clock()
        if now - printed >= INTERVAL:
            printed = now
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield say
