"""Benchmarks: the data that every method learns from, and a suite to choose and to judge by, in a
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
from radapter_serve.evaluation.suite import Suite, load_suite
from radapter_serve.files import read_yaml
from radapter_serve.sources import LOCAL
from radapter_serve.training.recipe import recipe_of


@dataclass(frozen=True)
class Benchmark:
    """A suite, whose sets with `split: validation` choose and the others judge, and the fields of
    `Recipe` for every method, the data and the base among them.
    """

    name: str
    fields: Mapping[str, Any]
    suite: Suite

    def filled(self, fields: Mapping[str, Any]) -> Benchmark:
        """Add fields of `Recipe` that the benchmark lacks."""
        return dataclasses.replace(self, fields={**fields, **self.fields})

    def sets(self, split: str, limit: int | None = None) -> list[EvaluationSet]:
        """Open the sets of a split, `test` or `validation`, with `limit` images at most."""
        entries = self.suite.of_split(split)
        if not entries:
            raise RAdapterError(
                f"the suite {self.name} has no set with split: {split}, by which this is decided"
            )
        return [open_set(self.suite, entry, limit=limit) for entry in entries]


def load_benchmark(path: Path, data_root: Path | None = None) -> Benchmark:
    """Read a benchmark file.

    It has `suite`, a suite file; `train`, fields of a recipe: `data` and what is not left to the
    methods' papers; and `data_root`, the folder of the data's paths, which the argument overrides.
    Paths are relative to the file. Without `architecture` the base is that of the demo.
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
    fields = {name: getattr(recipe, name) for name in document["train"]}
    reader, colon, place = str(fields.get("data", "")).partition(":")
    if colon:
        fields["data"] = f"{reader}:{root / place}"
    # Classes and templates may be names of the package's lists; types are those of `Recipe`.
    for name in ("images", "classes", "templates"):
        value = fields.get(name)
        if value and (name == "images" or (root / value).is_file()):
            fields[name] = type(value)(root / value)
    fields.setdefault("architecture", f"{LOCAL}{BASE}")
    suite = load_suite(path.parent / document["suite"], root)
    return Benchmark(suite.name, fields, suite)
