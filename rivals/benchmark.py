"""Benchmarks, each with training data for every method and a suite for choice and test, and the
flags of the commands.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from radapter_serve.demo.data import BASE
from radapter_serve.errors import RAdapterError
from radapter_serve.evaluation.image_sets import EvaluationSet
from radapter_serve.evaluation.run import open_set
from radapter_serve.evaluation.suite import Suite, load_suite
from radapter_serve.files import read_yaml
from radapter_serve.process import limit_threads
from radapter_serve.sources import LOCAL
from radapter_serve.training.recipe import recipe_of


@dataclass(frozen=True)
class Benchmark:
    """A suite, whose sets with `split: validation` are for the choice and the others for the test,
    and fields of `Recipe` for every method, the data and the base among them.
    """

    name: str
    fields: Mapping[str, Any]
    suite: Suite
    judge: Suite | None = None  # its test sets take the place of the suite's

    def filled(self, fields: Mapping[str, Any]) -> Benchmark:
        """Add fields of `Recipe` that the benchmark lacks."""
        return dataclasses.replace(self, fields={**fields, **self.fields})

    def sets(self, split: str, limit: int | None = None) -> list[EvaluationSet]:
        """Open the sets of a split, `test` or `validation`, with `limit` images at most."""
        suite = self.judge if self.judge and split == "test" else self.suite
        entries = suite.of_split(split)
        if not entries:
            raise RAdapterError(
                f"the suite {suite.name} has no set with split: {split}, by which this is decided"
            )
        return [open_set(suite, entry, limit=limit) for entry in entries]


def load_benchmark(path: Path, data_root: Path | None = None) -> Benchmark:
    """Read a benchmark file.

    The file has `suite`, a suite file; `train`, fields of a recipe: `data`, and the fields that are
    not taken from each method's paper; and `data_root`, the folder of the data's paths, which the
    argument overrides. Paths are relative to the file. Without `architecture` the base is that of
    the demo.
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
    # Classes and templates may also be names of the package's lists; types are those of `Recipe`.
    for name in ("images", "classes", "templates"):
        value = fields.get(name)
        if value and (name == "images" or (root / value).is_file()):
            fields[name] = type(value)(root / value)
    fields.setdefault("architecture", f"{LOCAL}{BASE}")
    suite = load_suite(path.parent / document["suite"], root)
    return Benchmark(suite.name, fields, suite)


def write_benchmark(path: Path, suite: Mapping[str, Any], train: Mapping[str, Any]) -> None:
    """Write a benchmark file and, next to it, its suite."""
    name = "suite.yaml" if path.stem == "benchmark" else f"{path.stem}-suite.yaml"
    documents = {name: suite, path.name: {"suite": name, "train": train}}
    for file, document in documents.items():
        text = yaml.safe_dump(document, sort_keys=False)
        (path.parent / file).write_text(text, encoding="utf-8")


def table_of(images: Mapping[str, Iterable[Path]], folder: Path) -> str:
    """Write images by class as a table in a folder; returns the table as `data` takes it.

    Paths in a table are relative to its folder, so these become absolute.
    """
    path = folder / "images.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label"])
        table.writerows(
            [image.absolute(), label] for label, paths in images.items() for image in paths
        )
    return f"csv:{path}"


TableName = Literal["main", "1", "2", "3", "4", "5", "why", "fig3", "all"]


@dataclass(frozen=True)
class Flags:
    """Settings of every method.

    Args:
        data: benchmark file, such as one of rivals/benchmarks; rivals/README.md says how to write
            one.
        data_root: folder of the benchmark's data; by default the one that the file names.
        out: folder of the results and of finished runs, which are not repeated.
        architecture: base; by default the benchmark's.
        pretrained: open_clip tag or checkpoint of the base.
        epochs: passes over the data, for every method.
        steps: optimizer steps, for every method, instead of epochs.
        batch_size: images a step, for every method.
        precision: bf16 computes products in bfloat16 in training, which is faster on machines that
            support it.
        limit: most images of a set, drawn by a fixed seed.
        threads: threads to compute with; by default one a core.
    """

    data: Path
    data_root: Path | None = None
    out: Path = Path("runs/rivals")
    architecture: str | None = None
    pretrained: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    precision: Literal["no", "bf16"] | None = None
    limit: int | None = None
    threads: int | None = None

    def benchmark(self) -> Benchmark:
        """Load the benchmark, override its fields by flags, and limit the threads."""
        if self.limit is not None and self.limit < 1:
            raise RAdapterError(f"--limit is {self.limit}; allowed: 1 image or more")
        limit_threads(self.threads)
        benchmark = load_benchmark(self.data, self.data_root)
        others = ("data", "data_root", "out", "limit")
        flags = {
            name: value
            for name, value in vars(self).items()
            if name not in others and value is not None
        }
        return dataclasses.replace(benchmark, fields={**benchmark.fields, **flags})


def check_seeds(seeds: Sequence[int], flag: str = "--seeds") -> None:
    """Refuse an empty list of seeds, and a seed that is given twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        shown = " ".join(map(str, seeds)) or "empty"
        raise RAdapterError(f"{flag} is {shown}; allowed: one or more, each named once")
