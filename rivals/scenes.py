"""`python -m rivals.scenes`: benchmarks of retrieval and segmentation of the demo's scenes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from radapter_serve.cli import run
from radapter_serve.demo.data import (
    FINE_TUNED,
    SCENE_SHIFTS,
    TEMPLATES,
    TEST,
    TRAIN,
    compose,
    made_whole,
    prepare_scenes,
    write_scenes,
)

VALIDATION = "validation"


def scenes(out: Path, /) -> None:
    """Compose the scenes, and write the files of both benchmarks.

    Training, validation and test scenes are of different drawings in colour; two other styles are
    for the test, too.

    Args:
        out: folder for the scenes, retrieval.yaml and segmentation.yaml.
    """
    prepare_scenes(out, train=TRAIN, test=TEST)
    if not (out / VALIDATION).is_dir():
        with made_whole(out / VALIDATION, "scenes") as part:
            write_scenes(part, compose("val", FINE_TUNED, TEST, seed=1), seed=1)
    shutil.copy(TEMPLATES, out / TEMPLATES.name)

    dense = {"classes": "classes.txt", "templates": TEMPLATES.name}
    write_benchmark(
        out,
        "retrieval",
        data="csv:{}/captions.csv",
        suite={"metric": "image_retrieval_recall@1"},
        of_set={},
        of_training={},
    )
    write_benchmark(
        out,
        "segmentation",
        data="masks:{}",
        suite=dense,
        of_set={"dense": "proposals", "threshold": 0.0},
        of_training=dense,
    )
    print(
        f"wrote {out}/retrieval.yaml and segmentation.yaml; next: python -m rivals.table 3 --data"
        f" {out}/retrieval.yaml"
    )


def write_benchmark(
    out: Path,
    task: str,
    data: str,
    suite: Mapping[str, Any],
    of_set: Mapping[str, Any],
    of_training: Mapping[str, Any],
) -> None:
    """Write a task's benchmark and its suite; `data` has {} where a folder of scenes goes."""
    places: list[tuple[str, dict[str, str]]] = [
        (VALIDATION, {"shift": "id", "split": "validation"}),
        (f"test-{FINE_TUNED}", {"shift": "id"}),
        *((f"test-{style}", {"shift": "ood"}) for style in SCENE_SHIFTS),
    ]
    sets = [
        {
            "name": f"scenes, {place.removeprefix('test-')}",
            "data": data.format(place),
            **of_set,
            **fields,
        }
        for place, fields in places
    ]
    training = {
        "task": task,
        "data": data.format("train"),
        "batch_size": 64,
        "epochs": 10,
        "crop_scale": 0.9,
        "flip": False,
        "workers": 0,
        **of_training,
    }
    documents = {
        f"{task}-suite": {"name": "scenes", "task": task, **suite, "sets": sets},
        task: {"suite": f"{task}-suite.yaml", "train": training},
    }
    for name, document in documents.items():
        text = yaml.safe_dump(document, sort_keys=False)
        (out / f"{name}.yaml").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(scenes, argv, prog="python -m rivals.scenes")


if __name__ == "__main__":
    sys.exit(main())
