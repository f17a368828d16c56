"""Images with captions: the same from every reader, several captions an image, and refusals."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from radapter_serve.data.captions import Captioned, load_captioned
from radapter_serve.errors import RAdapterError
from radapter_serve.training.batches import Examples, batches

TEXTS = {
    "a.png": ["a dark square", "night"],
    "b.png": ["a grey square", "fog", "an overcast sky"],
    "c.png": ["a bright square"],
}
BY_BRIGHTNESS = dict(enumerate(TEXTS.values()))
PAIRS = [(name, text) for name, texts in TEXTS.items() for text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and their captions as rows of a table, not sorted by image, and as lists."""
    for value, name in enumerate(TEXTS):
        Image.new("RGB", (8, 8), (60 * value,) * 3).save(tmp_path / name)
    rows = [PAIRS[index] for index in (0, 2, 1, 5, 3, 4)]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "rows.csv", index=False)
    lists = [{"image": name, "caption": texts} for name, texts in TEXTS.items()]
    (tmp_path / "lists.json").write_text("\n".join(json.dumps(row) for row in lists))
    return tmp_path


def captions_of(data: Captioned) -> dict[int, list[str]]:
    """Captions by the brightness of their image."""
    captions: dict[int, list[str]] = {}
    if isinstance(data.table, datasets.IterableDataset):
        for row in data.rows:
            image, _, caption = data.pair(row, random.Random(0))
            captions.setdefault(np.asarray(image)[0, 0, 0] // 60, []).append(str(caption))
    else:
        for row in data.images:
            image = data.image(data.table[row.row])
            captions[np.asarray(image)[0, 0, 0] // 60] = list(row.captions)
    return {number: sorted(texts) for number, texts in captions.items()}


def test_every_reader_gives_the_same_captions(folder: Path) -> None:
    expected = {number: sorted(texts) for number, texts in BY_BRIGHTNESS.items()}
    assert captions_of(load_captioned(f"csv:{folder}/rows.csv")) == expected
    assert captions_of(load_captioned(f"json:{folder}/lists.json")) == expected
    stored = []  # the same bytes are the same image
    for name, text in PAIRS:
        picture = {"bytes": (folder / name).read_bytes(), "path": None}
        stored.append({"picture": picture, "text": text})
    pd.DataFrame(stored).to_parquet(folder / "stored.parquet")
    columns: Any = {"image_column": "picture", "caption_column": "text"}
    assert captions_of(load_captioned(f"parquet:{folder}/stored.parquet", **columns)) == expected
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, (name, text) in enumerate(PAIRS):
            about = json.dumps({"caption": text, "source": "test"}).encode()
            image = (folder / name).read_bytes()
            for ending, content in (("png", image), ("txt", text.encode()), ("json", about)):
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for column in ("txt", "json.caption"):
        for streaming in (False, True):
            data = load_captioned(
                f"webdataset:{folder}/shard.tar",
                image_column="png",
                caption_column=column,
                streaming=streaming,
            )
            assert captions_of(data) == expected, column


def loaded(data: Captioned, size: int, **options: Any) -> list[dict[str, Any]]:
    examples = Examples(data, lambda image: pil_to_tensor(image).float(), 0)
    common = {"epoch": 0, "start": 0, "rank": 0, "world": 1, "workers": 0} | options
    return list(batches(examples, size, **common))


def test_a_stream_of_lists_gives_several_captions(folder: Path) -> None:
    options: dict[str, Any] = {"captions_per_image": 2, "streaming": True}
    (batch,) = loaded(load_captioned(f"json:{folder}/lists.json", **options), 3)
    assert len(batch["texts"]) == 6 and len(set(batch["labels"].tolist())) == 3
    rows = load_captioned(f"csv:{folder}/rows.csv", **options)
    assert "has one caption" in loaded(rows, 3)[0]["error"]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_a_row_without_a_caption(folder: Path, empty: str | None) -> None:
    rows = [{"image": "a.png", "caption": "night"}, {"image": "b.png", "caption": empty}]
    (folder / "t.json").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(RAdapterError, match=r"row 2 of .* has no text in 'caption': .*--on-broken"):
        load_captioned(f"json:{folder}/t.json")
    broken: list[str] = []
    data = load_captioned(f"json:{folder}/t.json", broken=broken)
    assert len(data.images) == 1 and len(broken) == 1 and broken[0].startswith("row 2 of")
    stream = load_captioned(f"json:{folder}/t.json", streaming=True)
    [error] = [batch["error"] for batch in loaded(stream, 1) if "error" in batch]
    assert "image b.png has no text" in error and "--on-broken skip" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": "text"}, "no column 'text'; its columns: image, caption; see --cap"),
        ({"image_column": "picture"}, "no column 'picture'.*--image-column"),
        ({"captions_per_image": 4}, "captions_per_image is 4 but no image of .* has more than 3"),
    ],
)
def test_options_that_the_table_does_not_have(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RAdapterError, match=message):
        load_captioned(f"csv:{folder}/rows.csv", **options)


def test_a_missing_image_and_a_stream_that_breaks_off_are_errors(folder: Path) -> None:
    (folder / "a.png").unlink()
    (batch,) = loaded(load_captioned(f"csv:{folder}/rows.csv"), 6)
    assert "a.png can't be read" in batch["error"]
    data = load_captioned(f"csv:{folder}/rows.csv", streaming=True)

    def rows() -> Any:
        yield {"image": "b.png", "caption": "fog"}
        raise OSError("connection lost")

    data.table = datasets.IterableDataset.from_generator(rows)
    errors = [batch.get("error", "") for batch in loaded(data, 1)]
    assert any("the stream broke off: connection lost" in error for error in errors)
