"""The walk of an image on the page is the one that it takes."""

from __future__ import annotations

from pathlib import Path

from radapter_serve import train
from tests.helpers.small_release import png
from tests.helpers.walks import check_walk


def test_an_image_takes_the_way_that_the_page_describes(tiny_clip_dir: str, tmp_path: Path) -> None:
    for number in range(8):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(number))

    def run() -> None:
        train(
            "small",
            data=f"imagefolder:{tmp_path / 'photos'}",
            architecture=tiny_clip_dir,
            pretrained=None,
            steps=2,
            batch_size=4,
            workers=0,
            val_fraction=0.0,
            out=tmp_path / "run",
            tracker="none",
        )

    check_walk("Follow one image", run)
