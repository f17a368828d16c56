"""What a photo of 12 megapixels costs: whole, and made small by the client."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import tyro
from common import RESULTS, Report, alternate, ratio
from PIL import Image

from radapter_client import list_images
from radapter_client._images import encode_small
from radapter_serve.contract.preprocess import Preprocess, decode_pixels
from radapter_serve.encoders.loaded import LoadedRelease, release_at
from radapter_serve.encoders.needs import complete
from radapter_serve.tasks.embed import EmbedImagesRequest, embed_images

SIZE = 224
# pixels
LONG = 4000
SHORT = 3000


def large(path: Path) -> bytes:
    """A photo of 12 megapixels that is made of a smaller one."""
    with Image.open(path) as image:
        photo = image.convert("RGB")
    side = (LONG, SHORT) if photo.width >= photo.height else (SHORT, LONG)
    file = io.BytesIO()
    photo.resize(side, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoding(photo: bytes) -> Mapping[str, Callable[[], float]]:
    """Processor seconds of decoding and resizing, in each way."""
    small = encode_small(photo, 2 * SIZE)
    ways = {
        "exact": (photo, Preprocess((SIZE, SIZE))),
        f"shrink_to={2 * SIZE}": (small, Preprocess((SIZE, SIZE))),
    }
    return {name: partial(_processor, partial(decode_pixels, *way)) for name, way in ways.items()}


def embedding(photo: bytes, loaded: LoadedRelease) -> Mapping[str, Callable[[], float]]:
    """Seconds of a call that embeds a photo, in each way; the encoder is the same."""
    small = encode_small(photo, 2 * SIZE)

    def call(data: bytes) -> float:
        start = time.perf_counter()
        complete(embed_images(loaded, EmbedImagesRequest([data])))
        return time.perf_counter() - start

    return {"exact": partial(call, photo), f"shrink_to={2 * SIZE}": partial(call, small)}


def _processor(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(photos: Path, repository: Path, repeats: int = 9, out: Path = RESULTS) -> None:
    """Measure large photos.

    Args:
        photos: folder; the first of them is made large.
        repository: a model repository with a release of ViT-B-32.
        repeats: rounds.
        out: folder of the table.
    """
    report = Report(
        "photos",
        "Photos of 12 megapixels",
        f"{LONG} x {SHORT} pixels, made of smaller photos; JPEG of quality 90. Decoding with"
        " resizing is processor time; a call embeds one photo in this process, encoder included."
        " shrink_to: the client made the photo small before.",
    )
    photo = large(Path(next(iter(list_images(photos)))))
    loaded = release_at({"model_repository": str(repository)})
    rows = []
    decoded = alternate(decoding(photo), repeats)
    called = alternate(embedding(photo, loaded), repeats)
    for name in decoded:
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(decoded[name]):.1f}",
                f"{ratio(decoded[name], decoded['exact']):.2f}",
                f"{1e3 * statistics.median(called[name]):.1f}",
                f"{ratio(called[name], called['exact']):.2f}",
            ]
        )
    report.table(
        f"a photo, {loaded.release.precision}",
        ["way", "decoding, ms", "ratio to exact", "a call, ms", "ratio to exact"],
        rows,
    )
    loaded.close()
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
