"""Evaluation of a model on a suite: what can be refused is refused before torch is loaded."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from radapter_serve.checkpoints import check_base_is_named
from radapter_serve.errors import RAdapterError, all_of, one_line
from radapter_serve.evaluation.progress import status
from radapter_serve.evaluation.results import Results, table, warnings
from radapter_serve.evaluation.row import Row
from radapter_serve.runs import ADAPTER, newest_run
from radapter_serve.threads import limit_threads

if TYPE_CHECKING:
    from radapter_serve.evaluation.alpha_choice import Choice
    from radapter_serve.evaluation.doubtful import Doubtful
    from radapter_serve.evaluation.embedder import Embedder
    from radapter_serve.evaluation.suite import Suite

AUTO = "auto"
GRID = tuple(round(0.1 * step, 1) for step in range(11))  # of auto
Place = str | PathLike[str]
_INSTEAD = ("merged", "release", "url", "checkpoint", "lora")  # of a run
_OF_RUNS = ("adapter", "finetuned", "base", "pretrained")


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured; printed, it is the tables and notes that the command shows.

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
    def alpha(self) -> float | None:
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
        out = io.StringIO()
        console = Console(file=out, force_terminal=False, force_jupyter=False)
        if self.choice is not None and self.rows:
            console.print(self.choice.table())
        console.print(self.table())
        for note in self.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        return out.getvalue()


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated: a run, unless one of the others is named.

    Args:
        adapter: folder of a run or adapter file; the newest run in ./runs if nothing else is given.
        merged: folder of a merged checkpoint, instead of a run.
        release: model repository, instead of a run; its own runtime runs it. PATH@N for release N,
            else the newest.
        url: a live server, instead of a run, such as http://localhost:8000.
        finetuned: checkpoint of the base fine-tuned as a whole, for WiSE-FT at the same alphas
            beside the run.
        checkpoint: a model that was tuned elsewhere, instead of a run: a .pt or .safetensors file,
            a model's folder, hf-hub:NAME or NAME:TAG; at any alpha on the line from --base.
        lora: folder of a LoRA of peft for a CLIPModel, instead of a run.
        base: what was tuned: an open_clip model with its weights, such as ViT-B-32:openai,
            local-dir:PATH or hf-hub:NAME; what the adapter or the LoRA says if none is given.
        pretrained: open_clip tag or path of a checkpoint, where the base is named without; what the
            adapter says if none is given.
        precision: of torch; releases and servers have their own.
        device: of torch, such as cpu or cuda:1; a GPU if there is one.
    """

    adapter: str | None = None
    merged: str | None = None
    release: str | None = None
    url: str | None = None
    finetuned: str | None = None
    checkpoint: str | None = None
    lora: str | None = None
    base: str | None = None
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str | None = None

    @property
    def is_a_run(self) -> bool:
        """Whether it is none of the others."""
        return not any(getattr(self, name) for name in _INSTEAD)

    def check(self, alphas: Sequence[float], *, auto: bool) -> None:
        """Refuse several models, what only a run has beside another model, and a checkpoint whose
        base is not named.
        """
        given = [name for name in _INSTEAD if getattr(self, name)]
        has_base = bool(self.checkpoint or self.lora)
        of_runs = ("adapter", "finetuned") if has_base else _OF_RUNS
        also = [name for name in of_runs if getattr(self, name)]
        if auto:
            also.append("alpha auto")
        elif alphas and self.merged:  # which release has which α is seen when it is read
            also.append("alpha")
        if len(given) > 1 or (given and also):
            raise RAdapterError(
                f"{', '.join(given + also)} don't go together: evaluate one thing a call; one out"
                " takes all their rows"
            )
        if self.checkpoint:
            check_base_is_named(self.checkpoint, self.base, self.pretrained, alphas)

    def name(self, path: Path) -> str:
        """What to call its results: the folder of the run, checkpoint or release, or the address of
        the server.

        Args:
            path: of the run, where it is one.
        """
        if self.url:
            return self.url.partition("://")[2] or self.url
        if self.checkpoint:
            return Path(self.checkpoint).name
        whole = Path(self.merged or self.release or self.lora or path).absolute()
        return (whole.parent if whole.name == ADAPTER else whole).name

    def load(self, path: Path, alphas: Sequence[float]) -> Embedder:
        """Load it, at these alphas; of a run from its path."""
        from radapter_serve.adapter.checkpoint import load_checkpoint
        from radapter_serve.adapter.lora import load_lora
        from radapter_serve.encoders.loaded import load_release
        from radapter_serve.evaluation.release_embedder import ReleaseEmbedder, ServerEmbedder
        from radapter_serve.evaluation.torch_embedder import from_adapter, from_line, from_merged

        if self.checkpoint or self.lora:
            if self.checkpoint:
                tuned = load_checkpoint(self.checkpoint, self.base, self.pretrained)
            else:
                tuned = load_lora(str(self.lora), self.base, self.pretrained)
            return from_line(tuned, alphas, precision=self.precision, device=self.device)
        if self.merged:
            return from_merged(self.merged, precision=self.precision, device=self.device)
        if self.release:
            return ReleaseEmbedder(load_release(self.release), alphas)
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


@one_line("train")
def evaluate(
    adapter: Place | None = None,
    alpha: float | str | Sequence[float | str] | None = None,
    *,
    suite: Place | None = None,
    data: str | None = None,
    data_root: Place = ".",
    merged: Place | None = None,
    release: Place | None = None,
    url: str | None = None,
    finetuned: Place | None = None,
    checkpoint: Place | None = None,
    lora: Place | None = None,
    base: str | None = None,
    pretrained: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str | None = None,
    out: Place | None = None,
    resume: bool = True,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    progress: bool = False,
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
        data: one data set in place of a suite, such as `imagefolder:photos/test`; it is opened as
            the run opened its own, with its columns, and among its classes.
        data_root: folder that the suite's paths start from.
        merged: a merged checkpoint, in place of a run.
        release: a model repository, in place of a run.
        url: a server, in place of a run.
        checkpoint: a model that was tuned elsewhere, in place of a run; α goes from 0, its base, to
            1, and is 1 alone where it has no base.
        lora: a LoRA of peft, in place of a run, with α as of a checkpoint.
        finetuned: checkpoint of the base fine-tuned as a whole, for WiSE-FT beside the run.
        base: of a checkpoint, or another than the adapter or the LoRA says.
        pretrained: weights of the base, where its name has none.
        precision: of torch.
        device: of torch.
        out: folder for rows and pictures; results/MODEL/SUITE if none is given.
        resume: keep the rows in `out`, and measure only what is missing or has changed.
        limit: images of a data set at most, drawn by the seed.
        seed: of that draw.
        batch_size: images a pass.
        threads: threads to compute with; one a core if none is given.
        progress: show on stderr what is going on; without it nothing is printed.

    Returns:
        The rows; with `auto`, also the choice.

    Raises:
        RAdapterError: the model, the data or a value won't do.
    """
    limit_threads(threads)
    values = [alpha] if isinstance(alpha, str | int | float) else list(alpha or ())
    auto = values == [AUTO]
    alphas: Sequence[float] = GRID if auto else _numbers(values)

    # Which model, on which data.
    model = Evaluated(
        adapter=_text(adapter),
        merged=_text(merged),
        release=_text(release),
        url=url,
        finetuned=_text(finetuned),
        checkpoint=_text(checkpoint),
        lora=_text(lora),
        base=base,
        pretrained=pretrained,
        precision=precision,
        device=device,
    )
    model.check(alphas, auto=auto)
    _check_counts(limit=limit, batch_size=batch_size)
    tests = _suite(suite, data, Path(data_root), auto=auto)
    path = Path()
    if model.is_a_run:
        path = Path(model.adapter) if model.adapter else newest_run()
        if data is not None:
            tests = _as_trained(path, data)
    folder = Path(out) if out else default_out(model.name(path), tests)
    results = Results(folder, resume=resume)

    # torch takes seconds to load: not before what is refused without it.
    from radapter_serve.adapter import load_adapter
    from radapter_serve.evaluation.overlap import Overlap
    from radapter_serve.evaluation.run import choose_alpha, draw, draw_choice, evaluate_suite
    from radapter_serve.evaluation.sets import open_set

    overlap = Overlap()
    skipped: list[str] = []
    rows: list[Row] = []
    choice: Choice | None = None
    files = [results.path]
    with status(Console(stderr=True), show=progress) as say:
        say("loading the model")
        if auto:  # which may take the run's own
            alphas = sorted({*alphas, load_adapter(path).metadata.alpha})
        how: dict[str, Any] = {"limit": limit, "seed": seed, "batch_size": batch_size, "say": say}
        embedder = model.load(path, alphas)
        try:
            variants = embedder.variants
            if auto:
                choice, file = choose_alpha(
                    embedder, path, tests, results, opened=overlap.chosen_by, **how
                )
                files.append(file)
                chosen = (0.0, choice.alpha, choice.best)
                variants = [variant for variant in variants if variant.alpha in chosen]
            elif tests:  # α was chosen earlier, and perhaps by these
                for entry in tests.of_split("validation"):
                    with contextlib.suppress(RAdapterError):  # they need not be here
                        overlap.chosen_by(open_set(tests, entry, limit=limit, seed=seed))
            if tests:
                rows = evaluate_suite(
                    embedder,
                    tests,
                    results,
                    variants=variants,
                    skip=skipped.append,
                    opened=overlap.tested,
                    **how,
                )
        finally:
            embedder.close()
        if tests and not rows and skipped:
            raise all_of(skipped, f"the data of {tests.name}")
        if tests and rows:
            # After auto there are only a few α on test data: they must not replace a whole curve.
            files += draw(rows, folder, tests.name, curve_too=not auto)
        if choice:
            files.append(draw_choice(choice, folder))
    return Evaluation(
        rows=tuple(rows),
        choice=choice,
        suite=tests,
        notes=(
            *(choice.notes if choice else ()),
            *skipped,
            *overlap.warnings,
            *warnings(rows),
        ),
        files=tuple(files),
        measured=results.measured,
    )


@one_line("train")
def doubtful(
    adapter: Place | None = None,
    count: int = 50,
    *,
    base: str | None = None,
    pretrained: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str | None = None,
    out: Place | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    progress: bool = False,
) -> tuple[list[Doubtful], list[Path]]:
    """Find the training images of a run whose label both the base and the run doubt, as
    `radapter-eval --doubtful` does.

    Args:
        adapter: a run of labelled images, its folder or adapter file; the newest run in ./runs if
            none is given.
        count: images at most, 1 or more.
        base: as of `evaluate`, like all but `out`.
        pretrained: weights of the base.
        precision: to compute in.
        device: to compute on.
        batch_size: images a pass.
        threads: to compute with.
        progress: show how far it is.
        out: folder for `doubtful.csv` and `doubtful.png`; results/RUN/training if none is given.

    Returns:
        The images, the most doubtful first, and the files.

    Raises:
        RAdapterError: a value won't do, the run has no images with one label each, or they can't be
            read.
    """
    if count < 1:
        raise RAdapterError(f"doubtful is {count}; allowed: 1 image or more")
    _check_counts(batch_size=batch_size)
    limit_threads(threads)
    path = Path(adapter) if adapter else newest_run()
    from radapter_serve.evaluation.doubtful import find_doubtful  # torch takes seconds to load

    folder = Path(out) if out else _results_of(Evaluated().name(path), "training")
    with status(Console(stderr=True), show=progress) as say:
        return find_doubtful(
            path,
            count,
            folder,
            base=base,
            pretrained=pretrained,
            precision=precision,
            device=device,
            batch_size=batch_size,
            say=say,
        )


def default_out(model: str, tests: Suite | None) -> Path:
    """The folder of the results of a model on a suite, or on its own validation data."""
    return _results_of(model, tests.name if tests else "validation")


def _results_of(*parts: str) -> Path:
    return Path("results", *(re.sub(r"[^\w.@-]+", "_", part) for part in parts))


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise RAdapterError(f"{name} is {count}; allowed: 1 or more")


def _text(place: Place | None) -> str | None:
    return None if place is None else str(Path(place))


def _numbers(values: Sequence[float | str]) -> tuple[float, ...]:
    if AUTO in values:
        raise RAdapterError("alpha auto takes no other alpha: it tries 0 to 1 in steps of 0.1")
    numbers = tuple(_number(value) for value in values)
    if len(set(numbers)) < len(numbers):
        raise RAdapterError(f"an alpha is given twice: {' '.join(map(str, values))}")
    return numbers


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:  # which is how NaN is refused, too
        raise RAdapterError(
            f"alpha is {value!r}; allowed: numbers from 0 (the base) to 1 (all learned), or auto"
        )
    return number


def _suite(suite: Place | None, data: str | None, data_root: Path, *, auto: bool) -> Suite | None:
    """The test data; None where only α is chosen."""
    from radapter_serve.evaluation.suite import Entry, Suite, load_suite, ready_suites

    if suite is not None and data is not None:
        raise RAdapterError(f"the suite {suite} and the data {data} are both given; leave one out")
    if suite is not None:
        return load_suite(_text(suite) or "", data_root)
    if data is not None:
        return Suite(data, (Entry(data, name=data),))
    if auto:
        return None
    raise RAdapterError(
        "no test data; give a suite with --suite: a file, or one of"
        f" {', '.join(ready_suites())}; or one data set with --data"
    )


def _as_trained(run: Path, data: str) -> Suite:
    from radapter_serve.adapter import load_adapter  # torch takes seconds to load
    from radapter_serve.evaluation.run import as_trained

    return as_trained(load_adapter(run).metadata, data)
