"""An export as a function: what can be refused is refused before torch is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from radapter_export.settings import ExportSettings
from radapter_serve.checkpoints import check_base_is_named
from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.evaluation.progress import status
from radapter_serve.runs import newest_run
from radapter_serve.threads import limit_threads
from radapter_serve.typed import checker

if TYPE_CHECKING:
    from radapter_export.exported import ExportedRelease
    from radapter_serve.evaluation.alpha_choice import Choice
    from radapter_serve.release.agreement import Agreement

AUTO = "auto"
BEST = "best"
DYNAMIC = "dynamic"
Place = str | PathLike[str]


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        releases: in the order of the α.
        model_repository: folder that holds them, for `radapter-serve`.
        merged: folder of the merged checkpoint, or of a folder for each of several α.
        transformers: the same in the form of transformers; None where it was not asked for.
        made_of: the adapters, the checkpoint or the LoRA.
        choice: what `radapter-eval --alpha auto` found, where the export followed it; else None.
        notes: what a user should know, a line each.
    """

    releases: tuple[ExportedRelease, ...]
    model_repository: Path
    merged: Path
    transformers: Path | None
    made_of: tuple[str, ...]
    choice: Choice | None
    notes: tuple[str, ...]

    @property
    def version(self) -> int:
        """Number of the newest release, which clients get by default."""
        return self.releases[-1].version

    @property
    def alpha(self) -> float:
        """The re-scaling of the newest release."""
        return self.releases[-1].alpha

    @property
    def agreement(self) -> Mapping[str, Agreement]:
        """How far each encoder of the newest release is from torch, by its name."""
        return {graph.name: graph.agreement for graph in self.releases[-1].graphs}


@one_line("export")
def export(
    adapter: Place | Sequence[Place] | None = None,
    alpha: float | str | Sequence[float | str] | None = None,
    *,
    format: Literal["onnx", "tensorrt"] = "onnx",
    threads: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Export:
    """Fold, export and check, as `radapter-export` does.

    Args:
        adapter: a run, as `train` gives it, its folder, or an adapter file; several are averaged.
            The newest run in ./runs if none is given, nor a `checkpoint` or a `lora`.
        alpha: re-scalings in [0, 1], each another release. If none is given, what
            `evaluate(..., alpha="auto")` chose for this very adapter, or else the run's own, and 1
            of a checkpoint or a LoRA; the notes say which. `auto` insists on that choice, `best`
            takes the one of the highest score; `dynamic` makes one release that takes any α from
            each request.
        format: `tensorrt` also builds engines for this machine's GPU, which serve the release.
        threads: threads to compute with; one a core if none is given.
        progress: show on stderr what is going on; without it nothing is printed.
        settings: any field of `ExportSettings`: `checkpoint`, `lora`, `base`, `precision`,
            `label_sets`, `model_repository`, ...

    Returns:
        The releases, the folders that were written, and how far the encoders are from torch.

    Raises:
        RAdapterError: bad input, encoders that differ from torch, a full disk; nothing was written
            then.
    """
    limit_threads(threads)
    chosen = _settings(settings, format)
    alphas = _alphas(alpha)
    paths = _paths(adapter)
    tuned = chosen.checkpoint or chosen.lora
    if not paths and tuned is None:
        paths = [newest_run()]
    by_choice = [value for value in alphas if value in (AUTO, BEST)]
    if by_choice and tuned is not None:
        raise RAdapterError(
            f"--alpha {by_choice[0]} is for runs, whose validation data it is chosen by; give a"
            " number, or compare several by radapter-eval"
        )
    if by_choice and len(paths) > 1:
        raise RAdapterError(
            f"--alpha {by_choice[0]} was chosen for one adapter, not for an average; give a number,"
            " or dynamic"
        )
    if chosen.checkpoint and not (paths or chosen.lora):
        numbers = [value for value in alphas if not isinstance(value, str)]
        check_base_is_named(str(chosen.checkpoint), chosen.base, chosen.pretrained, numbers)
    with status(Console(stderr=True), show=progress) as say:
        # torch and onnx take seconds to load: not for --help
        from radapter_export.release import export_release
        from radapter_serve.evaluation import alpha_choice

        choice = None
        missing = ""
        unsaid = not alphas or DYNAMIC in alphas
        if by_choice or (unsaid and len(paths) == 1):
            try:
                choice = alpha_choice.chosen(paths[0])
            except RAdapterError as error:
                if by_choice:
                    raise
                missing = str(error)
        releases = export_release(paths, _numbers(alphas, choice), chosen, progress=say)
    notes = []
    if choice is not None:
        notes.append(_which(choice, [release.alpha for release in releases]))
    elif unsaid and paths:
        own = f"alpha {releases[0].alpha:g} is the {'run' if missing else 'average'}'s own"
        notes.append(f"{own}: {missing}" if missing else own)
    warnings = [warning for release in releases for warning in release.warnings]
    return Export(
        releases=tuple(releases),
        model_repository=chosen.model_repository,
        merged=chosen.merged,
        transformers=chosen.transformers,
        made_of=tuple(map(str, paths)) or (str(tuned),),
        choice=choice,
        notes=(*notes, *dict.fromkeys(warnings)),
    )


def _settings(values: Mapping[str, Any], format: str) -> ExportSettings:
    """The settings of a call, its values checked and made of the right kind.

    Raises:
        RAdapterError: there is no such setting, or a value won't do.
    """
    import pydantic

    names = [field.name for field in dataclasses.fields(ExportSettings)]
    if unknown := [name for name in values if name not in names]:
        raise RAdapterError(f"there is no setting {unknown[0]!r}; allowed are {', '.join(names)}")
    try:
        settings = checker(ExportSettings).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise RAdapterError(f"{name} is {first['input']!r:.80}: {first['msg']}") from None
    if format not in ("onnx", "tensorrt"):
        raise RAdapterError(f"format is {format!r}; allowed: onnx, tensorrt")
    if format == "onnx":
        return settings
    if settings.runtime not in (None, "tensorrt"):
        raise RAdapterError(
            f"--format tensorrt is served by --runtime tensorrt, and not by {settings.runtime};"
            " leave one out"
        )
    return dataclasses.replace(settings, runtime="tensorrt")


def _paths(adapter: Place | Sequence[Place] | None) -> list[Path]:
    if adapter is None:
        return []
    places = [adapter] if isinstance(adapter, str | PathLike) else adapter
    return [Path(place) for place in places]


def _alphas(alpha: float | str | Sequence[float | str] | None) -> list[float | str]:
    """The values of α: numbers, `auto`, `best` and `dynamic`."""
    if alpha is None:
        return []
    given = [alpha] if isinstance(alpha, str | int | float) else list(alpha)
    if DYNAMIC in given and len(given) > 1:
        raise RAdapterError(
            "--alpha dynamic takes no other alpha: its one release takes any from 0 to 1"
        )
    return [value if value in (AUTO, BEST, DYNAMIC) else _number(value) for value in given]


def _number(value: float | str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RAdapterError(
            f"alpha is {value!r}; allowed: a number from 0 to 1, such as 0.5, auto, best or dynamic"
        ) from None


def _numbers(
    alphas: Sequence[float | str], choice: Choice | None
) -> list[float] | Literal["dynamic"] | None:
    if DYNAMIC in alphas:
        return "dynamic"
    numbers = []
    for value in alphas:
        if not isinstance(value, str):
            numbers.append(value)
        elif choice is not None:
            numbers.append(choice.best if value == BEST else choice.alpha)
    return numbers or None


def _which(choice: Choice, alphas: Sequence[float]) -> str:
    """A note that says where an α of a choice stands."""
    found = f"radapter-eval --alpha auto chose alpha {choice.alpha:g}"
    if choice.best == choice.alpha:
        return f"{found}, which is also the best on the validation data"
    if choice.alpha in alphas:
        return f"{found}; the best on the validation data is {choice.best:g} (--alpha best)"
    return f"alpha {choice.best:g} is the best on the validation data; {found}"
