"""A benchmark: data that every method learns from, and a suite to choose and to judge by, in one
YAML file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radapter_serve.demo.data import BASE
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.sets import open_set
from radapter_serve.evaluation.suite import Entry, Suite, load_suite
from radapter_serve.files import read_yaml
from radapter_serve.hub import LOCAL
from radapter_serve.training.recipe import recipe_of


@dataclass(frozen=True)
class Benchmark:
    """What a table is made on.

    Attributes:
        name: of the suite.
        given: fields of `Recipe` that hold for every method, the data and the base among them.
        suite: its sets with `split: validation` choose, the others judge.
    """

    name: str
    given: Mapping[str, Any]
    suite: Suite

    def filled(self, given: Mapping[str, Any]) -> Benchmark:
        """The benchmark with further fields of `Recipe`, where it has none of its own."""
        return dataclasses.replace(self, given={**given, **self.given})

    def sets(self, split: str, limit: int | None = None) -> list[EvaluationSet]:
        """The sets of a split.

        Args:
            split: `test` or `validation`.
            limit: images of a set at most.

        Raises:
            RAdapterError: there is none, or it can't be read.
        """
        entries = self.suite.of_split(split)
        if not entries:
            raise RAdapterError(
                f"the suite {self.name} has no set with split: {split}, by which this is decided"
            )
        return [open_set(self.suite, entry, limit=limit) for entry in entries]

    def own_validation(self) -> Entry:
        """The set that chooses and is like the images that the methods learn from.

        Raises:
            RAdapterError: there is none, or there are several.
        """
        found = [one for one in self.suite.of_split("validation") if one.shift == "id"]
        if len(found) != 1:
            raise RAdapterError(
                f"the suite {self.name} has {len(found)} sets with split: validation and shift: id;"
                " this needs one"
            )
        return found[0]


def load_benchmark(path: Path, data_root: Path | None = None) -> Benchmark:
    """Read a benchmark file.

    Args:
        path: YAML with `suite`, a suite file; `train`, fields of a recipe, `data` and what is not
            left to the methods' own papers; and `data_root`, the folder that the paths of data
            start from, which like both files is relative to this one. Without `architecture` the
            base is that of the demo.
        data_root: that folder, in place of the file's own.

    Raises:
        RAdapterError: no such file, or something is missing or unknown.
    """
    document = read_yaml(path, "the benchmark")
    parts = {"suite": str, "train": dict, "data_root": str}
    if not isinstance(document, dict) or not {"suite", "train"} <= set(document) <= set(parts):
        raise RAdapterError(
            f"the benchmark {path} must be a mapping with suite and train, and data_root if need be"
        )
    for name, value in document.items():
        if not isinstance(value, parts[name]):
            raise RAdapterError(
                f"the benchmark {path}: {name} is {value!r}; it should be a {parts[name].__name__}"
            )
    root = (data_root or path.parent / document.get("data_root", ".")).absolute()
    recipe = recipe_of(document["train"], f"train of the benchmark {path}")
    given = {name: getattr(recipe, name) for name in document["train"]}
    reader, colon, place = str(given.get("data", "")).partition(":")
    if colon:
        given["data"] = f"{reader}:{root / place}"
    for name in ("images", "classes", "templates"):
        if given.get(name) and (
            name == "images" or (root / given[name]).is_file()
        ):  # the others may be names
            given[name] = type(given[name])(
                root / given[name]
            )  # a path, or a text that may be a name
    given.setdefault("architecture", f"{LOCAL}{BASE}")
    suite = load_suite(path.parent / document["suite"], root)
    return Benchmark(suite.name, given, suite)
