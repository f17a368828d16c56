"""The export as a function, which refuses wrong input before it imports torch, where it can."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from radapter_export.settings import AUTO, BEST, DYNAMIC, ExportSettings, checked
from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.evaluation.start import status
from radapter_serve.process import limit_threads
from radapter_serve.release.adapters import (
    AdapterFacts,
    Factors,
    add_beside,
    check_name,
    read_list,
    read_run,
)
from radapter_serve.release.agreement import Agreement
from radapter_serve.sources import check_base_is_named, newest_run

if TYPE_CHECKING:
    from radapter_export.release import ExportedRelease
    from radapter_export.source import Source
    from radapter_serve.evaluation.alpha_choice import Choice

Place = str | PathLike[str]


@dataclass(frozen=True, repr=False)
class Export:
    """Result of an export.

    Attributes:
        releases: in the order of the α.
        model_repository: folder that holds the releases, for `radapter-serve`.
        merged: folder of the merged checkpoint, or of one folder for each of several α.
        transformers: the same in the form of transformers; None if it was not asked for.
        immich: the same in the layout of immich; None if it was not asked for.
        made_of: the adapters, the checkpoint or the LoRA.
        choice: the result of `radapter-eval --alpha auto`, if the export used it; else None.
        notes: information for the user, one line each.
    """

    releases: tuple[ExportedRelease, ...]
    model_repository: Path
    merged: Path
    transformers: Path | None
    immich: Path | None
    made_of: tuple[str, ...]
    choice: Choice | None
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"Export(version={self.version}, alpha={self.alpha:g},"
            f" model_repository={str(self.model_repository)!r}, merged={str(self.merged)!r})"
        )

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
        """Agreement of each encoder of the newest release with torch, by the encoder's name."""
        return {graph.name: graph.agreement for graph in self.releases[-1].graphs}


@one_line("export")
def export(
    adapter: Place | Sequence[Place] | None = None,
    alpha: float | str | Sequence[float | str] | None = None,
    *,
    adapters: Mapping[str, Place] | None = None,
    format: Literal["onnx", "tensorrt"] = "onnx",
    threads: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> Export:
    """Fold, export and check, as `radapter-export` does.

    Args:
        adapter: a run, as `train` returns it, its folder, or an adapter file; several are averaged.
            The newest run in ./runs if no adapter, `checkpoint` or `lora` is given.
        alpha: α in [0, 1], each another release. If not given, the one that
            `evaluate(..., alpha="auto")` chose for this very adapter, or else the run's own, and 1
            for a checkpoint or a LoRA; the notes say which. `auto` requires that choice, `best`
            takes the one with the highest score; `dynamic` makes one release that takes any α with
            each request.
        adapters: runs of adapters on the text's projection, by the names under which they lie
            beside the release: `radapter-release add-adapter`. Without `adapter`, `checkpoint` and
            `lora`, their base is exported.
        format: `tensorrt` also builds engines for this machine's GPU, which serve the release.
        threads: threads to compute with; one a core if not given.
        progress: show each step on stderr; otherwise nothing is printed.
        settings: any field of `ExportSettings`: `checkpoint`, `lora`, `base`, `precision`,
            `label_sets`, `model_repository`, ...

    Returns:
        The releases, the written folders, and the agreement of the encoders with torch.

    Raises:
        RAdapterError: bad input, encoders that differ from torch, a full disk; nothing was written
            then.
    """
    limit_threads(threads)
    request = _read_request(adapter, alpha, adapters or {}, format, checked(settings))
    chosen = request.settings
    with status(Console(stderr=True), show=progress) as say:
        # Imported here: torch and onnx take seconds, which --help should not wait for.
        from radapter_export.release import export_source
        from radapter_export.source import read_source

        dynamic = DYNAMIC in request.alphas
        source = read_source(request.paths, DYNAMIC if dynamic else request.alphas or None, chosen)
        facts_of = {name: beside.facts for name, beside in request.beside.items()}
        releases = export_source(source, chosen, say, facts_of)
        for name, beside in request.beside.items():
            add_beside(chosen.model_repository, name, beside.facts, beside.factors, beside.run)
    return _result(request, source, releases)


@dataclass(frozen=True)
class _Beside:
    """An adapter that is to lie beside the release."""

    run: Path
    facts: AdapterFacts
    factors: Factors


@dataclass(frozen=True)
class _Request:
    """What an export is asked for: its arguments, checked as far as that needs no torch."""

    paths: Sequence[Path]  # of adapters; empty for a checkpoint or a LoRA
    alphas: Sequence[float | str]  # numbers and names; empty if none was given
    beside: Mapping[str, _Beside]
    settings: ExportSettings


def _read_request(
    adapter: Place | Sequence[Place] | None,
    alpha: float | str | Sequence[float | str] | None,
    adapters: Mapping[str, Place],
    format: str,
    settings: ExportSettings,
) -> _Request:
    """Check the arguments of an export together, and find the run if none is named."""
    if format == "tensorrt":
        if settings.runtime == "openvino":
            raise RAdapterError(
                "--format tensorrt is served with --runtime tensorrt, and not with openvino; leave"
                " one out"
            )
        settings = dataclasses.replace(settings, runtime="tensorrt")
    elif format != "onnx":
        raise RAdapterError(f"format is {format!r}; allowed: onnx, tensorrt")
    beside = _read_beside(adapters, settings.model_repository)

    # Find the adapters, unless a checkpoint or a LoRA is exported.
    tuned = settings.checkpoint or settings.lora
    if adapter is None and beside and not tuned:
        adapter = _run_of_their_base(beside)
        alpha = 0.0 if alpha is None else alpha
    if adapter is None:
        paths = [] if tuned else [newest_run()]
    else:
        places = [adapter] if isinstance(adapter, str | PathLike) else adapter
        paths = [Path(place) for place in places]

    # Check that these have the α that are asked for.
    alphas = _parsed(alpha)
    by_choice = [value for value in alphas if value in (AUTO, BEST)]
    if by_choice and (tuned is not None or len(paths) > 1):
        raise RAdapterError(
            f"--alpha {by_choice[0]} is chosen for one run, on its validation data, and for no"
            " average, checkpoint or LoRA; give a number"
        )
    if settings.checkpoint and not (paths or settings.lora):
        numbers = [value for value in alphas if not isinstance(value, str)]
        check_base_is_named(str(settings.checkpoint), settings.base, numbers)
    return _Request(paths, alphas, beside, settings)


def _read_beside(adapters: Mapping[str, Place], repository: Path) -> dict[str, _Beside]:
    """Read the adapters that are to lie beside the release; their names must be free."""
    beside = {}
    for name, place in adapters.items():
        check_name(name)
        beside[name] = _Beside(Path(place), *read_run(Path(place)))
    known = read_list(repository) if beside else {}
    for name in beside:
        if name in known:
            raise RAdapterError(
                f"there is an adapter {name!r} already; leave it out, or replace it with:"
                f" radapter-release add-adapter {shlex.quote(name)}"
                f" {shlex.quote(str(beside[name].run))} --replace"
            )
    return beside


def _run_of_their_base(beside: Mapping[str, _Beside]) -> Path:
    """The first run, whose base is exported if only adapters beside it are named; it must be the
    base of all.
    """
    first, *others = beside
    for name in others:
        if beside[name].facts.text_tower != beside[first].facts.text_tower:
            raise RAdapterError(
                f"the adapters {first!r} and {name!r} were trained with different text towers,"
                " so they can't lie beside one release; export them one after the other:"
                f" radapter-export --adapters {shlex.quote(f'{name}={beside[name].run}')}"
            )
    return beside[first].run


def _parsed(alpha: float | str | Sequence[float | str] | None) -> list[float | str]:
    """Parse numbers and names of α."""
    if alpha is None:
        return []
    values: list[float | str] = []
    for value in [alpha] if isinstance(alpha, str | int | float) else alpha:
        try:
            values.append(value if value in (AUTO, BEST, DYNAMIC) else float(value))
        except (TypeError, ValueError):
            raise RAdapterError(
                f"alpha is {value!r}; allowed: a number from 0 to 1, such as 0.5, auto, best or"
                " dynamic"
            ) from None
    if DYNAMIC in values and len(values) > 1:
        raise RAdapterError(
            "--alpha dynamic takes no other alpha: its one release takes any from 0 to 1"
        )
    return values


def _result(request: _Request, source: Source, releases: Sequence[ExportedRelease]) -> Export:
    """Describe what was exported, with notes on the α and on the releases."""
    settings = request.settings
    alphas = request.alphas
    notes = []
    is_default = not alphas or DYNAMIC in alphas
    choice = source.choice if is_default or AUTO in alphas or BEST in alphas else None
    if choice is not None:
        by_auto = f"radapter-eval --alpha auto chose alpha {choice.alpha:g}"
        if choice.best == choice.alpha:
            notes.append(f"{by_auto}, which is also the best on the validation data")
        elif choice.alpha in source.alphas:
            best = f"the best on the validation data is {choice.best:g} (--alpha best)"
            notes.append(f"{by_auto}; {best}")
        else:
            notes.append(f"alpha {choice.best:g} is the best on the validation data; {by_auto}")
    elif is_default and request.paths:
        kind = "run" if source.no_choice else "average"
        reason = f": {source.no_choice}" if source.no_choice else ""
        notes.append(f"alpha {source.alphas[0]:g} is the {kind}'s own{reason}")
    warnings = [warning for release in releases for warning in release.warnings]
    return Export(
        releases=tuple(releases),
        model_repository=settings.model_repository,
        merged=settings.merged,
        transformers=settings.transformers,
        immich=settings.immich,
        made_of=tuple(map(str, request.paths)) or (str(settings.checkpoint or settings.lora),),
        choice=choice,
        notes=(*notes, *dict.fromkeys(warnings)),
    )
