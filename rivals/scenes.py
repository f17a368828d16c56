"""`python -m rivals.scenes`: benchmarks of retrieval and segmentation from the demo's scenes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radapter_serve.cli import run
from radapter_serve.demo.data import (
    FINE_TUNED,
    SCENE_SHIFTS,
    TEMPLATES,
    TEST,
    TRAIN,
    compose,
    prepare_scenes,
    write_scenes,
)
from radapter_serve.files import staged_folder
from rivals.benchmark import write_benchmark

VALIDATION = "validation"


def scenes(out: Path, /) -> None:
    """Compose the scenes, and write the files of both benchmarks.

    Training, validation and test scenes have different drawings in colour; test scenes in two other
    styles are added.

    Args:
        out: folder for the scenes, retrieval.yaml and segmentation.yaml.
    """
    prepare_scenes(out, train=TRAIN, test=TEST)
    if not (out / VALIDATION).is_dir():
        with staged_folder(out / VALIDATION, "rivals.scenes") as part:
            write_scenes(part, compose("val", FINE_TUNED, TEST, seed=1), seed=1)
    shutil.copy(TEMPLATES, out / TEMPLATES.name)

    dense = {"classes": "classes.txt", "templates": TEMPLATES.name}
    places: list[tuple[str, dict[str, str]]] = [
        (VALIDATION, {"shift": "id", "split": "validation"}),
        (f"test-{FINE_TUNED}", {"shift": "id"}),
        *((f"test-{style}", {"shift": "ood"}) for style in SCENE_SHIFTS),
    ]
    # By task: the data of a folder; extra fields of the suite, of its sets, and of training.
    tasks: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "retrieval": ("csv:{}/captions.csv", {"metric": "image_retrieval_recall@1"}, {}, {}),
        "segmentation": ("masks:{}", dense, {"dense": "proposals", "threshold": 0.0}, dense),
    }
    for task, (data, of_suite, of_set, of_training) in tasks.items():
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
        suite = {"name": "scenes", "task": task, **of_suite, "sets": sets}
        write_benchmark(out / f"{task}.yaml", suite, training)
    print(
        f"wrote {out}/retrieval.yaml and segmentation.yaml; next: python -m rivals.table 3 --data"
        f" {out}/retrieval.yaml"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run(scenes, argv, prog="python -m rivals.scenes")


if __name__ == "__main__":
    sys.exit(main())
