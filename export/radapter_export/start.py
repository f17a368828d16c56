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

from radapter_export.settings import AUTO, BEST, DYNAMIC, checked
from radapter_serve.errors import RAdapterError, one_line
from radapter_serve.evaluation.start import status
from radapter_serve.process import limit_threads
from radapter_serve.release.adapters import add_beside, check_name, read_list, read_run
from radapter_serve.release.agreement import Agreement
from radapter_serve.sources import check_base_is_named, newest_run

if TYPE_CHECKING:
    from radapter_export.release import ExportedRelease
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
    chosen = checked(settings)
    if format == "tensorrt":
        if chosen.runtime == "openvino":
            raise RAdapterError(
                "--format tensorrt is served with --runtime tensorrt, and not with openvino; leave"
                " one out"
            )
        chosen = dataclasses.replace(chosen, runtime="tensorrt")
    elif format != "onnx":
        raise RAdapterError(f"format is {format!r}; allowed: onnx, tensorrt")

    # Read the adapters that are to lie beside the release, before anything is exported.
    runs = {name: Path(place) for name, place in (adapters or {}).items()}
    beside = {}
    for name, run in runs.items():
        check_name(name)
        beside[name] = read_run(run)
    known = read_list(chosen.model_repository) if runs else {}
    for name, run in runs.items():
        if name in known:
            raise RAdapterError(
                f"there is an adapter {name!r} already; leave it out, or replace it with:"
                f" radapter-release add-adapter {shlex.quote(name)} {shlex.quote(str(run))}"
                " --replace"
            )

    # Find the adapters or the checkpoint, and parse the α.
    tuned = chosen.checkpoint or chosen.lora
    if adapter is None and adapters and not tuned:
        # The release is the base of the first one, and must be that of all.
        first, *others = runs
        for name in others:
            if beside[name][0].text_tower != beside[first][0].text_tower:
                raise RAdapterError(
                    f"the adapters {first!r} and {name!r} were trained with different text towers,"
                    " so they can't lie beside one release; export them one after the other:"
                    f" radapter-export --adapters {shlex.quote(f'{name}={runs[name]}')}"
                )
        adapter = runs[first]
        alpha = 0.0 if alpha is None else alpha
    if adapter is None:
        paths = [] if tuned else [newest_run()]
    else:
        places = [adapter] if isinstance(adapter, str | PathLike) else adapter
        paths = [Path(place) for place in places]
    values: list[float | str] = []
    if alpha is None:
        alpha = []
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
    by_choice = [value for value in values if value in (AUTO, BEST)]
    if by_choice and (tuned is not None or len(paths) > 1):
        raise RAdapterError(
            f"--alpha {by_choice[0]} is chosen for one run, on its validation data, and for no"
            " average, checkpoint or LoRA; give a number"
        )
    if chosen.checkpoint and not (paths or chosen.lora):
        alphas = [value for value in values if not isinstance(value, str)]
        check_base_is_named(str(chosen.checkpoint), chosen.base, alphas)

    with status(Console(stderr=True), show=progress) as say:
        # Imported here: torch and onnx take seconds, which --help should not wait for.
        from radapter_export.release import export_source
        from radapter_export.source import read_source

        source = read_source(paths, DYNAMIC if DYNAMIC in values else values or None, chosen)
        facts_of = {name: facts for name, (facts, _) in beside.items()}
        releases = export_source(source, chosen, say, facts_of)
        for name, (facts, factors) in beside.items():
            add_beside(chosen.model_repository, name, facts, factors, runs[name])

    # Write notes on the α and on the releases.
    notes = []
    is_default = not values or DYNAMIC in values
    choice = source.choice if by_choice or is_default else None
    if choice is not None:
        by_auto = f"radapter-eval --alpha auto chose alpha {choice.alpha:g}"
        if choice.best == choice.alpha:
            notes.append(f"{by_auto}, which is also the best on the validation data")
        elif choice.alpha in source.alphas:
            best = f"the best on the validation data is {choice.best:g} (--alpha best)"
            notes.append(f"{by_auto}; {best}")
        else:
            notes.append(f"alpha {choice.best:g} is the best on the validation data; {by_auto}")
    elif is_default and paths:
        kind = "run" if source.no_choice else "average"
        reason = f": {source.no_choice}" if source.no_choice else ""
        notes.append(f"alpha {source.alphas[0]:g} is the {kind}'s own{reason}")
    warnings = [warning for release in releases for warning in release.warnings]
    return Export(
        releases=tuple(releases),
        model_repository=chosen.model_repository,
        merged=chosen.merged,
        transformers=chosen.transformers,
        immich=chosen.immich,
        made_of=tuple(map(str, paths)) or (str(tuned),),
        choice=choice,
        notes=(*notes, *dict.fromkeys(warnings)),
    )
