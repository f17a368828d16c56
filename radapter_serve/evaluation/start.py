"""Evaluation of a model on a suite; most errors are found before torch is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.evaluation.rows import (
    Results,
    Row,
    hardly_known,
    kept_notes,
    table,
    warnings,
)
from radapter_serve.files import file_name
from radapter_serve.process import limit_threads
from radapter_serve.sources import ADAPTER, check_base_is_named, newest_run

if TYPE_CHECKING:
    from radapter_serve.adapter import Adapter
    from radapter_serve.evaluation.alpha_choice import Choice
    from radapter_serve.evaluation.image_sets import EvaluationSet
    from radapter_serve.evaluation.models import Candidate
    from radapter_serve.evaluation.suite import Suite

AUTO = "auto"
GRID = tuple(round(0.1 * step, 1) for step in range(11))  # alphas that auto tries
Place = str | PathLike[str]
Say = Callable[[str], None]
INTERVAL = 10.0  # seconds between lines of progress outside a terminal


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Results of an evaluation; `print` shows the tables and notes of the command.

    Attributes:
        rows: one for each model and data set: `metrics` in [0, 1], `intervals` that hold the true
            value in 95 % of cases, and more; see `Row`.
        choice: the α that `auto` takes, the best one, and how they were found; None if an α was
            given.
        suite: the test data; None if only an α was chosen.
        notes: notes for a reader of the figures, one line each.
        files: the files that were written: `results.jsonl` with all rows, the choice next to the
            adapter, and the pictures.
        measured: number of rows that this call measured; the others were in the file already.
        choice_read: the file with the choice if `auto` has only read it, as the run itself chose α
            with cross-validation; else None.
    """

    rows: tuple[Row, ...]
    choice: Choice | None
    suite: Suite | None
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    measured: int
    choice_read: Path | None = None

    @property
    def chosen_alpha(self) -> float | None:
        """The α that `auto` took, or the only α that was evaluated; None if there are several."""
        if self.choice is not None:
            return self.choice.alpha
        alphas = {row.alpha for row in self.rows}
        return alphas.pop() if len(alphas) == 1 else None

    def table(self) -> Table:
        """Table of models by data sets, in per cent; without test data, the scores that α was
        chosen by. `rich` prints it.
        """
        if self.choice is not None and not self.rows:
            return self.choice.table()
        if self.suite is None:
            return table(self.rows, "per cent")
        return table(self.rows, f"{self.suite.name}: per cent", self.suite.pairs())

    def __repr__(self) -> str:
        suite = self.suite.name if self.suite else None
        return (
            f"Evaluation(suite={suite!r}, rows={len(self.rows)}, chosen_alpha={self.chosen_alpha},"
            f" folder={str(self.files[-1].parent)!r})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # for notebooks

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
class EvaluationSettings:
    """The model that is evaluated, a run unless another is named; and settings of the evaluation.

    Attributes:
        adapter: folder of a run or adapter file; the newest run in ./runs if nothing else is given.
            With a model repository or a server, the name of an adapter beside the release.
        merged: folder of a merged checkpoint, instead of a run.
        model_repository: model repository, instead of a run; its own runtime runs the release.
            DIR@N for release N, else the served one.
        url: a live server, instead of a run, such as http://localhost:8000.
        checkpoint: a model that was tuned elsewhere, instead of a run: a .pt or .safetensors file,
            a model's folder, hf-hub:NAME or NAME:TAG; at any alpha on the line from --base.
        lora: folder of a LoRA of peft for a CLIPModel, instead of a run.
        base: the model that was tuned: an open_clip model with its weights, such as
            ViT-B-32:openai, local-dir:PATH or hf-hub:NAME; by default the base that the adapter or
            the LoRA names.
        device: device of torch, such as cpu or cuda:1; a GPU by default if there is one.
        data_root: folder that the suite's paths start from.
        out: folder for rows and pictures; results/MODEL/SUITE if none is given, such as
            results/photos/pacs, and results/photos/validation where there is no suite.
        resume: keep the rows in OUT, and evaluate only what is missing or has changed; --no-resume
            evaluates all again, and replaces them.
        limit: the most images of a data set, drawn with the seed.
        seed: seed of the draw of images.
        batch_size: images in a batch.
        threads: threads to compute with; by default one for each core. Fewer are faster while other
            work runs.
    """

    adapter: str | None = None
    merged: str | None = None
    model_repository: str | None = None
    url: str | None = None
    checkpoint: str | None = None
    lora: str | None = None
    base: str | None = None
    device: str | None = None
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

    @property
    def instead(self) -> list[str]:
        """Names of the given fields that replace a run."""
        names = ("merged", "model_repository", "url", "checkpoint", "lora")
        return [name for name in names if getattr(self, name)]

    @property
    def knows_base(self) -> bool:
        """True if the base can be loaded with its weights, to compare the model with it."""
        if self.checkpoint:
            return ":" in (self.base or "")  # an architecture alone has no weights
        if self.model_repository or self.url:
            return bool(self.adapter)  # the release is the adapter at alpha 0
        return not self.merged

    def check(self, alphas: Sequence[float], *, auto: bool) -> None:
        """Refuse several models, options of a run for another model, and a checkpoint whose base is
        not named.
        """
        run_options = [name for name in ("adapter", "base") if getattr(self, name)]
        if self.adapter and (self.model_repository or self.url):  # the name of one beside it
            run_options.remove("adapter")
        if self.base and (self.checkpoint or self.lora):  # these have a base, too
            run_options.remove("base")
        if auto and self.instead:
            raise RAdapterError(
                f"alpha auto chooses for a run, not for {', '.join(self.instead)}: run"
                " radapter-eval --adapter RUN --alpha auto, whose choice radapter-export and"
                " radapter-release add-adapter NAME RUN --alpha A take; or give values here, such"
                " as --alpha 0 0.5 1"
            )
        if alphas and self.merged:  # a release checks α when it is loaded
            run_options.append("alpha")
        if len(self.instead) > 1 or (self.instead and run_options):
            raise RAdapterError(
                f"{', '.join(self.instead + run_options)} don't go together: evaluate one thing a"
                " call; one out takes all their rows"
            )
        if self.checkpoint:
            check_base_is_named(self.checkpoint, self.base, alphas)

    def folder(self, path: Path, suite: str) -> Path:
        """The folder for the results on a suite, by default with a part for the model: the name of
        the run at `path`, of the checkpoint or of the release's folder, or the server's address.
        """
        if self.out:
            return Path(self.out)
        source = Path(self.merged or self.model_repository or self.lora or path).absolute()
        model = (source.parent if source.name == ADAPTER else source).name
        if self.url:
            model = self.url.partition("://")[2] or self.url
        elif self.checkpoint:
            model = Path(self.checkpoint).name
        if self.instead and self.adapter:
            model += f"-{self.adapter}"
        return Path("results", file_name(model), file_name(suite))

    def load(self, path: Path, alphas: Sequence[float]) -> list[Candidate]:
        """Load the model at each α; `path` is that of a run."""
        from radapter_serve.adapter.tuned import load_checkpoint, load_lora
        from radapter_serve.encoders.loaded import load_release, served_release
        from radapter_serve.evaluation import models

        if self.checkpoint:
            base, line = load_checkpoint(self.checkpoint, self.base)
            return models.from_line(base, line, alphas, device=self.device)
        if self.lora:
            base, line = load_lora(self.lora, self.base)
            return models.from_line(base, line, alphas, device=self.device)
        if self.merged:
            return models.from_merged(self.merged, device=self.device)
        if self.model_repository:
            loaded = load_release(self.model_repository)
            return models.from_release(loaded, alphas, adapter=self.adapter or "")
        if self.url:
            loaded = served_release(self.url)
            return models.from_release(loaded, alphas, "server", self.adapter or "")
        return models.from_adapter(path, alphas, base=self.base, device=self.device)


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
    """Evaluate a model on test data, and write rows and pictures, as `radapter-eval` does.

    Args:
        adapter: a run as `train` returns it, its folder, or an adapter file; the newest run in
            ./runs if no other model is given. With `model_repository` or `url`, the name of an
            adapter beside the release.
        alpha: one α or several in [0, 1]; by default 0, the run's own and 1. `auto` takes the
            smallest α that is statistically as good as the best on validation data, and never more
            than the run's own. The validation data is the suite's sets with `split: validation`,
            else the run's; see `Choice`.
        suite: a YAML file, or the name of a suite that comes with the package.
        data: one data set instead of a suite, such as `photos/test` or `csv:test.csv`; it is
            opened as the run opened its validation data, with the same columns and classes.
        progress: show progress on stderr; otherwise nothing is printed.
        fields: any field of `EvaluationSettings`: another model instead of a run (`checkpoint`,
            `model_repository`, `url`, ...), `data_root`, `out`, `limit`, ...

    Returns:
        The rows; with `auto`, also the choice.

    Raises:
        RAdapterError: the model, the data or a value is invalid.
    """
    settings = _settings({"adapter": adapter, **fields})
    limit_threads(settings.threads)
    values = [alpha] if isinstance(alpha, str | int | float) else list(alpha or ())
    auto = values == [AUTO]
    alphas: Sequence[float] = GRID if auto else _numbers(values)
    settings.check(alphas, auto=auto)
    tests, path = _test_data(settings, suite, data, auto=auto)
    folder = settings.folder(path, tests.name if tests else "validation")
    results = Results(folder, resume=settings.resume)

    from radapter_serve.adapter import load_adapter
    from radapter_serve.evaluation.alpha_choice import choice_file
    from radapter_serve.evaluation.plots import draw, draw_choice

    adapter_file = None if settings.instead else load_adapter(path)
    with status(Console(stderr=True), show=progress) as say:
        say("loading the model")
        call = _Call(settings, path, adapter_file, tests, results, say)
        rows, choice, overlaps = call.measure(alphas, auto=auto)
        files = [results.path]
        if choice and call.choice_read is None:
            files.append(choice_file(path))
        if tests and rows:
            # Auto tests only a few α: their curve must not replace a whole one.
            files += draw(rows, folder, tests.name, curve_too=not auto)
        if choice:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(draw_choice(choice, folder))
    return Evaluation(
        rows=tuple(rows),
        choice=choice,
        suite=tests,
        notes=(*_notes(settings, adapter_file, rows, choice), *overlaps, *warnings(rows)),
        # Nothing was evaluated where cross-validation has chosen and no test is named.
        files=tuple(file for file in files if file.exists()),
        measured=results.measured,
        choice_read=call.choice_read,
    )


def _settings(fields: Mapping[str, Any]) -> EvaluationSettings:
    """Read the settings from the arguments of `evaluate`; a path may be of any kind."""
    known = [field.name for field in dataclasses.fields(EvaluationSettings)]
    if unknown := sorted(set(fields).difference(known)):
        allowed = ", ".join(sorted(known))
        raise RAdapterError(f"there is no argument {unknown[0]!r}; allowed are {allowed}")
    values: dict[str, Any] = {
        name: str(Path(value)) if isinstance(value, PathLike) and name != "out" else value
        for name, value in fields.items()
    }
    return EvaluationSettings(**values)


def _test_data(
    settings: EvaluationSettings, suite: Place | None, data: str | None, *, auto: bool
) -> tuple[Suite | None, Path]:
    """Read the suite, or that of one data set; None if only α is to be chosen. Also returns the
    path of the run.
    """
    from radapter_serve.evaluation.suite import Entry, Suite, load_suite, ready_suites

    tests: Suite | None = None
    if suite is not None and data is not None:
        raise RAdapterError(f"the suite {suite} and the data {data} are both given; leave one out")
    if suite is not None:
        tests = load_suite(str(Path(suite)), Path(settings.data_root))
    elif data is not None:
        tests = Suite(data, (Entry(data, name=data),))
    elif not auto:
        raise RAdapterError(
            "no test data; give a suite with --suite: a file, or one of"
            f" {', '.join(ready_suites())}; or one data set with --data"
        )
    if settings.instead:
        return tests, Path()
    path = Path(settings.adapter) if settings.adapter else newest_run()
    if data is not None:
        # These load torch, which takes seconds: after the checks that need no torch.
        from radapter_serve.adapter import load_adapter
        from radapter_serve.evaluation.run import as_trained

        tests = as_trained(load_adapter(path).metadata, data)
    return tests, path


@dataclass
class _Call:
    """One call of `evaluate`: its model, test data and results."""

    settings: EvaluationSettings
    path: Path  # of the run
    run: Adapter | None
    tests: Suite | None
    results: Results
    say: Say
    choice_read: Path | None = None

    def measure(
        self, alphas: Sequence[float], *, auto: bool
    ) -> tuple[list[Row], Choice | None, list[str]]:
        """Choose α on validation data if `auto`, and evaluate on test data; also returns warnings
        of test images that are validation images.
        """
        from radapter_serve.evaluation.run import evaluate_suite, open_set, warn_of_overlap

        settings = self.settings
        tests = self.tests
        choosing: list[EvaluationSet] = []
        testing: list[EvaluationSet] = []
        rows: list[Row] = []
        choice = None
        if auto:  # the run's own α need not be on the grid
            assert self.run is not None  # EvaluationSettings.check
            alphas = sorted({*alphas, self.run.metadata.alpha})
            choice = self._chosen_by_run(self.run)
        if choice is not None:
            alphas = sorted({0.0, choice.alpha, choice.best})
        # The base is evaluated too, to measure what is kept of its answers.
        base = None
        if settings.knows_base and alphas and 0.0 not in alphas:
            base, *models = settings.load(self.path, (0.0, *alphas))
        else:
            models = settings.load(self.path, alphas)
        try:
            tested = models
            if auto and choice is None:
                choice = self._choose(models, choosing)
                few = (0.0, choice.alpha, choice.best)
                tested = [candidate for candidate in models if candidate.alpha in few]
            elif tests and not auto:  # α may have been chosen earlier on these validation sets
                for entry in tests.of_split("validation"):
                    with contextlib.suppress(RAdapterError):  # their files may be missing
                        choosing.append(
                            open_set(tests, entry, limit=settings.limit, seed=settings.seed)
                        )
            if tests:
                rows = evaluate_suite(
                    tested, tests, self.results, opened=testing.append, base=base, **self._how
                )
        finally:
            models[0].close()
        return rows, choice, warn_of_overlap(choosing, testing)

    @property
    def _how(self) -> dict[str, Any]:
        """Arguments of `evaluate_suite` for validation and for test data."""
        names = ("limit", "seed", "batch_size")
        return {"say": self.say, **{name: getattr(self.settings, name) for name in names}}

    def _chosen_by_run(self, run: Adapter) -> Choice | None:
        """The choice of a run without validation data, which may have made one with
        cross-validation.
        """
        from radapter_serve.evaluation.alpha_choice import choice_file, read_choice

        source = run.metadata.source
        validation = self.tests is not None and self.tests.of_split("validation")
        if validation or source.val_data or source.val_fraction:
            return None
        try:
            choice = read_choice(self.path, run.digest)
        except RAdapterError:
            return None
        self.choice_read = choice_file(self.path)
        return choice

    def _choose(self, models: Sequence[Candidate], opened: list[EvaluationSet]) -> Choice:
        """Choose α on the suite's validation data, else the run's, and write it beside the run."""
        from radapter_serve.evaluation.alpha_choice import choose, save_choice
        from radapter_serve.evaluation.run import evaluate_suite, own_validation

        assert self.run is not None
        metadata = self.run.metadata
        suite = self.tests
        if suite is None or not suite.of_split("validation"):
            suite = own_validation(metadata)
        rows = evaluate_suite(
            models, suite, self.results, split="validation", opened=opened.append, **self._how
        )
        choice = choose(rows, metadata.alpha)
        save_choice(choice, self.path)
        return choice


def _notes(
    settings: EvaluationSettings, run: Adapter | None, rows: Sequence[Row], choice: Choice | None
) -> list[str]:
    """Sentences about what is kept, and about a base that barely knows the images."""
    notes = [*(choice.notes if choice else kept_notes(rows))]
    # An adapter beside a release is one on the text's projection.
    on_projection = bool(settings.instead and settings.adapter)
    classes = None
    if run is not None:
        on_projection = "projection" in run.metadata.recipe.get("adapt", "")
        classes = run.metadata.classes
    if not on_projection:
        return notes
    accuracies: dict[tuple[str, int], dict[float, float]] = {}
    for row in rows:
        if row.alpha is not None and row.metric == "acc1" and row.classes and row.shift == "id":
            of_set = accuracies.setdefault((row.dataset, row.classes), {})
            of_set[row.alpha] = row.metrics["acc1"]
    if choice and classes and {each.metric for each in choice.sets.values()} == {"acc1"}:
        of_alpha = {point.alpha: point.score for point in choice.curve}
        accuracies = accuracies or {("", len(classes)): of_alpha}
    for (_, count), of_alpha in accuracies.items():
        notes += hardly_known(of_alpha, count)
    return notes


def _numbers(values: Sequence[float | str]) -> tuple[float, ...]:
    if AUTO in values:
        raise RAdapterError("alpha auto takes no other alpha: it tries 0 to 1 in steps of 0.1")
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number <= 1:  # NaN fails too
            raise RAdapterError(
                f"alpha is {value!r}; allowed: numbers from 0 (the base) to 1 (all learned), or"
                " auto"
            )
        numbers.append(number)
    if len(set(numbers)) < len(numbers):
        raise RAdapterError(f"an alpha is given twice: {' '.join(map(str, values))}")
    return tuple(numbers)


@contextmanager
def status(
    console: Console, *, show: bool = True, clock: Callable[[], float] = time.monotonic
) -> Iterator[Say]:
    """Yield a function that shows a line of progress: a terminal shows the last line only, other
    outputs get at most one line every ten seconds of the clock. With `show` False it does nothing.
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
