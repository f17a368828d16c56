"""Suites: YAML files that say which data sets judge a model, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from radapter_serve.errors import RAdapterError

TASKS = ("classification", "retrieval")
SHIFTS = ("id", "ood")
SPLITS = ("test", "validation")
METRICS = {
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
    "retrieval": tuple(f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)),
}


@dataclass(frozen=True)
class Entry:
    """One data set of a suite.

    Attributes:
        name: in rows, tables and pictures.
        data: `imagefolder:DIR`, `csv:FILE`, ... below the data root, or a hub name, as in `load_labelled`.
        task: `classification`, or `retrieval` between images and their captions.
        shift: `id`, as the training data, or `ood`, shifted.
        split: `test`, or `validation`, which `--alpha auto` chooses by.
        metric: what tables, pictures and the choice of α show; every row has all metrics of the task.
        classes: classification: a label file in the order of the labels; a YAML mapping from the data's own class names
            to names for prompts, which leaves out classes that it lacks; `imagenet`, that mapping from WordNet ids or
            numbers to CLIP's names; None takes the data's own names. A file is looked for beside the suite.
        templates: classification: prompt templates, `openai`, `simple`, or a file beside the suite; None takes the
            model's own.
        border: pixels that are cut off each side of an image first (ObjectNet's have a red frame).
        image_column, label_column, caption_column: names of columns.
    """

    name: str
    data: str
    task: str = "classification"
    shift: str = "id"
    split: str = "test"
    metric: str = ""
    classes: str | None = None
    templates: Any = None
    border: int = 0
    image_column: str = "image"
    label_column: str = "label"
    caption_column: str = "caption"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str, ...]] = {"task": TASKS, "shift": SHIFTS, "split": SPLITS}
        if not self.metric and self.task in TASKS:
            object.__setattr__(self, "metric", METRICS[self.task][0])
        allowed["metric"] = METRICS.get(self.task, ())
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise RAdapterError(
                    f"data set {self.name!r}: {field} is {getattr(self, field)!r}; allowed: {', '.join(values)}"
                )


@dataclass(frozen=True)
class Suite:
    """Data sets to judge by.

    Attributes:
        name: of the suite.
        entries: its data sets, in the order of the file.
        folder: the suite file's folder, where its class and template files are.
        data_root: what relative paths of data are relative to.
    """

    name: str
    entries: tuple[Entry, ...]
    folder: Path = Path()
    data_root: Path = Path()

    def of_split(self, split: str) -> tuple[Entry, ...]:
        """The data sets of one split."""
        return tuple(entry for entry in self.entries if entry.split == split)


def load_suite(path: str | Path, data_root: str | Path = ".") -> Suite:
    """Read a suite file.

    Args:
        path: YAML: `sets`, a list of `Entry`'s fields; any of these fields beside it is the default of all sets.
        data_root: folder that the sets' paths start from.

    Raises:
        RAdapterError: no such file, not YAML, unknown fields, or values that are not allowed.
    """
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise RAdapterError(f"could not read the suite {path}: {why}; ready ones are in recipes/suites") from error
    sets = document.pop("sets", None) if isinstance(document, dict) else None
    if not isinstance(sets, list) or not sets or not all(isinstance(item, dict) for item in sets):
        raise RAdapterError(f"the suite {path} must have `sets`, a list with name and data for each data set")
    name = str(document.pop("name", path.stem))
    fields = [field.name for field in dataclasses.fields(Entry)]
    entries = []
    for number, item in enumerate(sets, 1):
        values = {**document, **item}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise RAdapterError(
                f"{path}, set {number} has unknown fields {', '.join(unknown)}; allowed: {', '.join(fields)}"
            )
        for field in ("name", "data"):
            if not isinstance(values.get(field), str):
                raise RAdapterError(f"{path}, set {number} has no {field}")
        entries.append(Entry(**values))
    names = [entry.name for entry in entries]
    double = sorted({n for n in names if names.count(n) > 1})
    if double:
        raise RAdapterError(f"{path} names {double[0]!r} twice; each data set needs a name of its own")
    return Suite(name, tuple(entries), path.absolute().parent, Path(data_root))
