"""Images with captions: the same by every road, several captions an image, and clear words for what
can't be used.
"""

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and their captions as rows of a table, not sorted by image."""
    for value, name in enumerate(TEXTS):
        Image.new("RGB", (8, 8), (60 * value,) * 3).save(tmp_path / name)
    rows = [(name, text) for name, texts in TEXTS.items() for text in texts]
    rows = [rows[index] for index in (0, 2, 1, 5, 3, 4)]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path


def found(data: Captioned) -> dict[int, list[str]]:
    """Captions by the brightness of their image."""
    return {
        np.asarray(data.image(data.table[image.row]))[0, 0, 0].item() // 60: sorted(image.captions)
        for image in data.images
    }


def test_every_reader_gives_the_same_captions(folder: Path) -> None:
    expected = {number: sorted(texts) for number, texts in enumerate(TEXTS.values())}
    assert found(load_captioned(f"csv:{folder}/rows.csv")) == expected
    lists = [{"image": name, "caption": texts} for name, texts in TEXTS.items()]
    (folder / "lists.json").write_text("\n".join(json.dumps(row) for row in lists))
    assert found(load_captioned(f"json:{folder}/lists.json")) == expected
    stored = [
        {"picture": {"bytes": (folder / name).read_bytes(), "path": None}, "text": text}
        for name, texts in TEXTS.items()
        for text in texts
    ]
    pd.DataFrame(stored).to_parquet(folder / "stored.parquet")  # the same bytes are the same image
    assert (
        found(
            load_captioned(
                f"parquet:{folder}/stored.parquet", image_column="picture", caption_column="text"
            )
        )
        == expected
    )
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, (name, text) in enumerate(
            (name, text) for name, texts in TEXTS.items() for text in texts
        ):
            about = json.dumps({"caption": text, "source": "test"}).encode()
            for ending, content in (
                ("png", (folder / name).read_bytes()),
                ("txt", text.encode()),
                ("json", about),
            ):
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for column in ("txt", "json.caption"):
        data = load_captioned(
            f"webdataset:{folder}/shard.tar", image_column="png", caption_column=column
        )
        assert found(data) == expected, column
        stream = load_captioned(
            f"webdataset:{folder}/shard.tar",
            image_column="png",
            caption_column=column,
            streaming=True,
        )
        seen: dict[int, list[str]] = {}
        for row in stream.rows:
            image, label, caption = stream.pair(row, random.Random(0))
            seen.setdefault(label, []).append(f"{np.asarray(image)[0, 0, 0] // 60} {caption}")
        assert sorted(map(sorted, seen.values())) == [
            sorted(f"{number} {text}" for text in texts) for number, texts in expected.items()
        ]


def loaded(data: Captioned, size: int, **options: Any) -> list[dict[str, Any]]:
    examples = Examples(data, lambda image: pil_to_tensor(image).float(), 0)
    common = {"epoch": 0, "start": 0, "rank": 0, "world": 1, "workers": 0} | options
    return list(batches(examples, size, **common))


def test_an_epoch_has_every_caption_once(folder: Path) -> None:
    data = load_captioned(f"csv:{folder}/rows.csv")
    (batch,) = loaded(data, 6)
    pairs = {
        (int(pixels[0, 0, 0]) // 60, text)
        for pixels, text in zip(batch["pixels"], batch["texts"], strict=True)
    }
    assert pairs == {
        (number, text) for number, texts in enumerate(TEXTS.values()) for text in texts
    }
    of_image: dict[int, set[int]] = {}
    for pixels, label in zip(batch["pixels"], batch["labels"].tolist(), strict=True):
        of_image.setdefault(int(pixels[0, 0, 0]), set()).add(label)
    assert (
        sorted(map(len, of_image.values())) == [1, 1, 1] and len(set.union(*of_image.values())) == 3
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_several_captions_share_one_image(folder: Path, workers: int) -> None:
    data = load_captioned(f"csv:{folder}/rows.csv", captions_per_image=2)
    (batch,) = loaded(data, 3, workers=workers)
    assert (
        batch["pixels"].shape == (3, 3, 8, 8)
        and len(batch["labels"]) == 3
        and len(batch["texts"]) == 6
    )
    for index, pixels in enumerate(batch["pixels"]):
        texts = batch["texts"][2 * index : 2 * index + 2]
        own = list(TEXTS.values())[int(pixels[0, 0, 0]) // 60]
        assert set(texts) <= set(own) and len(set(texts)) == min(2, len(own))
    assert loaded(data, 3)[0]["texts"] == batch["texts"]
    assert any(loaded(data, 3, epoch=epoch)[0]["texts"] != batch["texts"] for epoch in range(1, 4))


def test_a_stream_of_lists_gives_several_captions(folder: Path) -> None:
    lists = [{"image": name, "caption": texts} for name, texts in TEXTS.items()]
    (folder / "lists.json").write_text("\n".join(json.dumps(row) for row in lists))
    data = load_captioned(f"json:{folder}/lists.json", captions_per_image=2, streaming=True)
    (batch,) = loaded(data, 3)
    assert len(batch["texts"]) == 6 and len(set(batch["labels"].tolist())) == 3
    rows = load_captioned(f"csv:{folder}/rows.csv", captions_per_image=2, streaming=True)
    assert "has one caption" in loaded(rows, 3)[0]["error"]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_a_row_without_a_caption(folder: Path, empty: str | None) -> None:
    rows = [{"image": "a.png", "caption": "night"}, {"image": "b.png", "caption": empty}]
    (folder / "t.json").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(
        RAdapterError, match=r"row 2 of .* has no text in 'caption': .*--on-broken skip"
    ):
        load_captioned(f"json:{folder}/t.json")
    broken: list[str] = []
    data = load_captioned(f"json:{folder}/t.json", broken=broken)
    assert len(data.images) == 1 and len(broken) == 1 and broken[0].startswith("row 2 of")
    errors = [
        b["error"]
        for b in loaded(load_captioned(f"json:{folder}/t.json", streaming=True), 1)
        if "error" in b
    ]
    assert (
        len(errors) == 1
        and "image b.png has no text" in errors[0]
        and "--on-broken skip" in errors[0]
    )


def test_what_can_not_be_used(folder: Path) -> None:
    with pytest.raises(
        RAdapterError, match="no column 'text'; its columns: image, caption; see --caption-column"
    ):
        load_captioned(f"csv:{folder}/rows.csv", caption_column="text")
    with pytest.raises(RAdapterError, match="no column 'picture'.*--image-column"):
        load_captioned(f"csv:{folder}/rows.csv", image_column="picture")
    with pytest.raises(
        RAdapterError, match="captions_per_image is 4 but no image of .* has more than 3"
    ):
        load_captioned(f"csv:{folder}/rows.csv", captions_per_image=4)
    (folder / "a.png").unlink()
    (batch,) = loaded(load_captioned(f"csv:{folder}/rows.csv"), 6)
    assert "a.png can't be read" in batch["error"]


def test_a_stream_that_breaks_off_is_told(folder: Path) -> None:
    data = load_captioned(f"csv:{folder}/rows.csv", streaming=True)

    def rows() -> Any:
        yield {"image": "a.png", "caption": "night"}
        raise OSError("connection lost")

    data.table = datasets.IterableDataset.from_generator(rows)
    assert any(
        "the stream broke off: connection lost" in batch.get("error", "")
        for batch in loaded(data, 1)
    )
