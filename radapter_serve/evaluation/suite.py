"""Suites: YAML files of the data sets to evaluate a model on, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from radapter_serve.contract.errors import TaskError
from radapter_serve.data.source import Count, DataSource, For, read_fields, users
from radapter_serve.errors import RAdapterError
from radapter_serve.files import read_yaml, shipped
from radapter_serve.tasks.dense import SegmentOptions

if TYPE_CHECKING:
    from radapter_serve.adapter import Metadata

PROPOSALS = "proposals"  # instead of a dense method: classify crops of given masks
SEVERAL_METRIC = "mean_average_precision"
METRICS = {
    "classification": ("acc1", "acc5", "mean_per_class_recall", SEVERAL_METRIC),
    "retrieval": tuple(
        f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)
    ),
    "segmentation": ("miou", "pixel_accuracy", "mean_class_accuracy"),
}
_PIXELS = For("segmentation")


def _templates(value: Any) -> Any:
    lines = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(line, str) for line in lines):
        return value
    raise ValueError(
        "allowed: openai, vild, ovseg, simple, a file, a template, or a list of templates"
    )


@dataclass(frozen=True, kw_only=True)
class Entry(DataSource):
    """One data set of a suite: a data source, whose paths are below the data root, and settings of
    its evaluation. docs/choose-alpha.md describes the fields.
    """

    name: str
    shift: Literal["id", "ood"] = "id"
    split: Literal["test", "validation"] = "test"
    metric: str = ""  # by default the task's first
    templates: Annotated[Any, BeforeValidator(_templates)] = None  # by default the model's
    border: Annotated[int, Field(ge=0), For("classification", "retrieval")] = 0
    max_captions: Annotated[Count | None, For("retrieval")] = None
    dense: Annotated[str | None, _PIXELS] = None  # by default the model's
    short_side: Annotated[int | None, _PIXELS] = None
    stride: Annotated[int | None, _PIXELS] = None
    refine: Annotated[int, _PIXELS] = 0
    threshold: Annotated[float | None, _PIXELS] = None
    background: Annotated[str | None, _PIXELS] = None
    proposals: Annotated[str | None, _PIXELS] = None  # by default the true masks
    proposal_weight: Annotated[float | None, _PIXELS] = None

    def __post_init__(self) -> None:
        allowed = METRICS[self.task]
        if not self.metric:
            object.__setattr__(self, "metric", allowed[0])
        problem = ""
        if self.metric not in allowed:
            problem = f"metric is {self.metric!r}; allowed: {', '.join(allowed)}"
        elif self.background is not None and self.threshold is None and self.dense != PROPOSALS:
            problem = f"background is {self.background!r}, which needs a threshold, such as 0.1"
        elif self.proposals is not None and self.dense != PROPOSALS:
            problem = f"proposals is {self.proposals!r}, which needs dense: proposals"
        elif self.proposal_weight is not None and self.proposals is None:
            problem = (
                f"proposal_weight is {self.proposal_weight}, which needs proposals with scores"
            )
        elif self.dense not in (None, PROPOSALS):
            from radapter_serve.clip.towers import METHODS  # torch takes seconds to load

            if self.dense not in METHODS:
                names = ", ".join((*METHODS, PROPOSALS))
                problem = f"dense is {self.dense!r}; allowed: {names}"
        try:
            SegmentOptions(
                self.short_side,
                self.stride,
                self.refine,
                self.threshold,
                self.proposal_weight or 0.0,
            )
        except TaskError as error:
            problem = problem or error.message
        if problem:
            raise RAdapterError(f"data set {self.name!r}: {problem}")


def entry_of(values: Mapping[str, Any], where: str) -> Entry:
    """Make an entry from the values of its fields; errors name `where` they come from."""
    for field in ("name", "data"):
        if not isinstance(values.get(field), str):
            raise RAdapterError(f"{where} has no {field}")
    return read_fields(Entry, values, f"{where}, {values['name']!r},")


@dataclass(frozen=True)
class Suite:
    """Data sets to evaluate models on."""

    name: str
    entries: tuple[Entry, ...]
    folder: Path = Path()  # of the suite file; class and template files are relative to it
    data_root: Path = Path()  # data paths are relative to it
    run: Metadata | None = None  # of a run whose validation data is opened as in its training

    def of_split(self, split: str) -> tuple[Entry, ...]:
        """The data sets of one split."""
        return tuple(entry for entry in self.entries if entry.split == split)

    def pairs(self) -> list[tuple[str, str]]:
        """Names of each test set of base classes and of that of the novel classes of its data."""
        entries = self.of_split("test")
        novel = {entry.data: entry.name for entry in entries if entry.class_split == "novel"}
        return [
            (entry.name, novel[entry.data])
            for entry in entries
            if entry.class_split == "base" and entry.data in novel
        ]


def ready_suites() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    return shipped("recipes/suites")


def load_suite(source: str | Path, data_root: str | Path = ".") -> Suite:
    """Read a suite: a file, or one of the package by its name. The YAML has `sets`, a list of
    `Entry`'s fields; a field next to `sets` is the default of all sets.
    """
    ready = ready_suites()
    path = ready.get(str(source), Path(source))
    if not path.exists():
        raise RAdapterError(
            f"there is no suite {source}; allowed: a file, or one of {', '.join(ready)}"
        )
    document = read_yaml(path, "the suite")
    sets = document.pop("sets", None) if isinstance(document, dict) else None
    if not isinstance(sets, list) or not sets or not all(isinstance(item, dict) for item in sets):
        raise RAdapterError(
            f"the suite {path} must have `sets`, a list with name and data for each data set"
        )
    name = str(document.pop("name", path.stem))
    entries: list[Entry] = []
    used_by = users(Entry)
    for number, item in enumerate(sets, 1):
        entry = entry_of({**document, **item}, f"{path}, set {number}")
        # Check only the set's own fields: a default next to `sets` may be for other tasks.
        for field, value in item.items():
            tasks = used_by.get(field, (entry.task,))
            if value is not None and entry.task not in tasks:
                raise RAdapterError(
                    f"{path}, set {number} has {field}, which task {entry.task} has no use for;"
                    f" leave it out (it is for {' and '.join(tasks)})"
                )
        if any(entry.name == other.name for other in entries):
            raise RAdapterError(
                f"{path} names {entry.name!r} twice; each data set needs another name"
            )
        entries.append(entry)
    return Suite(name, tuple(entries), path.absolute().parent, Path(data_root))
