"""Splits of data sets that others published: CoOp's `split_zhou_NAME.json` and Karpathy's
`dataset_NAME.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from radapter_serve.errors import RAdapterError, reason

_Splits = dict[str, list[dict[str, Any]]]


def open_splits(kind: str, path: Path, names: str | None) -> Any:
    """Open one split, or several as one, as a Hugging Face data set."""
    try:
        content = json.loads(path.read_bytes())
        splits, features = (_coop if kind == "coop" else _karpathy)(content)
    except OSError as error:
        raise RAdapterError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "CoOp's" if kind == "coop" else "Karpathy's"
        raise RAdapterError(
            f"could not read {path} as a file of {what} splits: {type(error).__name__}:"
            f" {reason(error)}"
        ) from None
    wanted = list(dict.fromkeys((names or "").split("+")))
    missing = [name for name in wanted if not splits.get(name)]
    if missing:
        has = ", ".join(sorted(name for name, rows in splits.items() if rows)) or "no images at all"
        lacks = f"has no images of the split {missing[0]!r}" if missing[0] else "needs a split"
        raise RAdapterError(
            f"{path} {lacks}; it has {has}; name one as in {kind}:FILE@test, or several as in"
            " @train+val"
        )
    return datasets.Dataset.from_list([row for name in wanted for row in splits[name]], features)


def _coop(content: Any) -> tuple[_Splits, datasets.Features]:
    """`{"train": [[path, number, name], ...], "val": ..., "test": ...}`; all splits number the
    classes alike.
    """
    splits: _Splits = {}
    classes: dict[int, str] = {}
    for split, rows in content.items():
        splits[split] = []
        for path, number, name in rows:
            _check(
                isinstance(path, str) and type(number) is int and isinstance(name, str),
                [path, number, name],
            )
            if classes.setdefault(number, name) != name:
                raise ValueError(f"the class {number} is both {classes[number]!r} and {name!r}")
            splits[split].append({"image": path, "label": number})
    names = [classes[number] for number in sorted(classes)]
    if sorted(classes) != list(range(len(classes))) or len(set(names)) < len(names):
        raise ValueError("the classes must be numbered from 0 on, each with a name of its own")
    return splits, datasets.Features(
        {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )


def _karpathy(content: Any) -> tuple[_Splits, datasets.Features]:
    """`{"images": [{"filename", perhaps "filepath", "split", "sentences": [{"raw"}, ...]},
    ...]}`.
    """
    splits: _Splits = {}
    for image in content["images"]:
        folder = image.get("filepath", "")
        name = image["filename"]
        captions = [of["raw"] for of in image["sentences"]]
        _check(
            all(isinstance(text, str) for text in (folder, name, image["split"], *captions)), image
        )
        splits.setdefault(image["split"], []).append(
            {"image": str(Path(folder, name)), "caption": captions}
        )
    text = datasets.Value("string")
    return splits, datasets.Features({"image": text, "caption": datasets.List(text)})


def _check(fits: bool, row: Any) -> None:
    if not fits:
        raise TypeError(f"unexpected types in {str(row)[:80]}")
