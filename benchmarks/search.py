"""A search of an index from the query's embedding to ids, scores and metadata, with and without a
condition, against the floor of the same run: FAISS or numpy alone on the same vectors.
"""

from __future__ import annotations

import csv
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from common import RESULTS, Report, picture, say, write_adapter
from loop import read_totals
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.contract.facts import PreprocessFacts
from radapter_serve.index.facts import BuildPlan, Index, IndexFacts, MadeBy
from radapter_serve.index.folder import (
    EXACT,
    VECTORS,
    FolderIndex,
    describe_files,
    install,
    vector_column,
    write_table,
)
from radapter_serve.index.neighbours import CODES, write_neighbours
from radapter_serve.release.release import Tower

Array = NDArray[np.float32]
QUERIES = 100
# Random crops of a photo, and its captions; of these, TOGETHER side by side make a vector.
CROPS = 6
CAPTIONS = 5
TOGETHER = 4
BATCH = 10_000
THUMBNAIL = bytes(range(256)) * 16  # as long as a thumbnail of 128 px is
CALLS = 300  # of a server
ROUNDS = 3  # in which all questions are asked again
Numbers = NDArray[np.int64]
# A condition, which of the numbered images meet it, and Arrow's own comparison of its first column.
WHERE: dict[str, tuple[Callable[[Numbers], Any], Callable[[Any], Any]]] = {
    "year >= 2010": (
        lambda n: n // 1000 * 7 % 20 >= 10,
        lambda table: pc.greater_equal(table["year"], 2010),
    ),
    "kind = 'photo'": (lambda n: n % 3 == 0, lambda table: pc.equal(table["kind"], "photo")),
    "year >= 2005 AND kind = 'photo'": (
        lambda n: (n // 1000 * 7 % 20 >= 5) & (n % 3 == 0),
        lambda table: pc.and_(
            pc.greater_equal(table["year"], 2005), pc.equal(table["kind"], "photo")
        ),
    ),
    "path LIKE '%7.jpg'": (
        lambda n: n % 10 == 7,
        lambda table: pc.match_like(table["path"], "%7.jpg"),
    ),
    "year = 2019": (
        lambda n: n // 1000 * 7 % 20 == 19,
        lambda table: pc.equal(table["year"], 2019),
    ),
    "path LIKE '%77.jpg'": (
        lambda n: n % 100 == 77,
        lambda table: pc.match_like(table["path"], "%77.jpg"),
    ),
    "path LIKE '%777.jpg'": (
        lambda n: n % 1000 == 777,
        lambda table: pc.match_like(table["path"], "%777.jpg"),
    ),
}


def export_base(folder: Path) -> Path:
    """A model repository with the demo's base as a release."""
    from radapter_export import ExportSettings, export_release
    from radapter_serve.demo.data import BASE

    adapter = folder / "adapter.safetensors"
    write_adapter(f"local-dir:{BASE}", adapter, std=0.0)
    models = folder / "model_repository"
    settings = ExportSettings(model_repository=models, merged=folder / "merged")
    export_release(adapter, None, settings)
    return models


def embed(photos: list[Path], captions: list[list[str]], folder: Path) -> tuple[Array, Array]:
    """By the demo's base as a release: random crops of photos, half of them mirrored, float32 [N,
    CROPS, D], and their captions, float32 [N, CAPTIONS, D].
    """
    from radapter_serve.encoders.loaded import load_release

    loaded = load_release(export_base(folder))
    random = np.random.default_rng(0)
    embeds = []
    pixels = []
    for number, path in enumerate(photos, 1):
        with Image.open(path) as photo:
            photo.draft("RGB", (192, 192))
            image = photo.convert("RGB")
        for _ in range(CROPS):
            width, height = (int(side * random.uniform(0.5, 1)) for side in image.size)
            left = random.integers(image.width - width + 1)
            top = random.integers(image.height - height + 1)
            crop = image.crop((left, top, left + width, top + height))
            pixels.append(loaded.preprocess(crop)[:, :: random.choice((-1, 1))])
        if len(pixels) >= 512 or number == len(photos):
            embeds.append(loaded.embed_pixels(pixels))
            pixels = []
        if not number % 1000:
            say(f"embedded {CROPS} crops of each of {number} photos")
    texts = loaded.embed_texts([text for five in captions for text in five])
    return np.concatenate(embeds).reshape(len(photos), CROPS, -1), texts.reshape(
        len(photos), CAPTIONS, -1
    )


def collection(embeds: Array, count: int, path: Path) -> None:
    """Write vectors of D times TOGETHER: crops or captions of one photo side by side in a random
    order, jittered.
    """
    random = np.random.default_rng(1)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, embeds.shape[2] * TOGETHER))
    for start in range(0, count, BATCH):
        rows = np.arange(start, min(start + BATCH, count))
        chosen = random.permuted(np.tile(np.arange(embeds.shape[1]), (len(rows), 1)), axis=1)[
            :, :TOGETHER
        ]
        part = embeds[(rows % len(embeds))[:, None], chosen].reshape(len(rows), -1) / TOGETHER**0.5
        part = part + random.standard_normal(part.shape) * (0.1 / part.shape[1] ** 0.5)
        out[rows] = part / np.linalg.norm(part, axis=1, keepdims=True)


def photos_of(tables: tuple[Path, ...], most: int) -> tuple[list[Path], list[list[str]]]:
    """Photos drawn at random, and the first captions of each."""
    captions_of: dict[Path, list[str]] = {}
    for table in tables:
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                captions_of.setdefault(table.parent / row["image"], []).append(row["caption"])
    files = sorted(path for path, captions in captions_of.items() if len(captions) >= CAPTIONS)
    chosen = [files[number] for number in np.random.default_rng(0).permutation(len(files))[:most]]
    return chosen, [captions_of[path][:CAPTIONS] for path in chosen]


def rows_of(vectors: Array) -> Iterator[pa.RecordBatch]:
    """An index's columns: a path, a size, a digest, a year of twenty, one of three kinds, and a
    thumbnail. Year and kind say nothing of the photo; a path does.
    """
    for start in range(0, len(vectors), BATCH):
        part = np.ascontiguousarray(vectors[start : start + BATCH])
        numbers = range(start, start + len(part))
        size = pa.array([640] * len(part), pa.int32())
        columns = {
            "path": pa.array([f"photos/{number % 97:02}/{number:07}.jpg" for number in numbers]),
            "width": size,
            "height": size,
            "digest": pa.array([f"sha256:{number:064x}" for number in numbers]),
            "year": pa.array([2000 + number // 1000 * 7 % 20 for number in numbers], pa.int64()),
            "kind": pa.array([("photo", "drawing", "print")[number % 3] for number in numbers]),
            "thumbnail": pa.array([THUMBNAIL] * len(part), pa.large_binary()),
            "vector": vector_column(part),
        }
        yield pa.record_batch(list(columns.values()), list(columns))


def make(vectors: Array, texts: Array, out: Path) -> None:
    """An index as `radapter-index build` writes it, with a thumbnail a row."""
    place = out.with_name(f".{out.name}.building")
    place.mkdir(parents=True, exist_ok=True)
    write_table(place, rows_of(vectors), (len(vectors), vectors.shape[1]))
    nearest = None
    if len(vectors) > EXACT:
        mapped = np.asarray(np.load(place / VECTORS, mmap_mode="r"))
        nearest = write_neighbours(place, mapped, lambda _: texts)
    digest = "sha256:0"
    width = vectors.shape[1]
    preprocess = PreprocessFacts(224, "RGB", "bicubic", "shortest", 0, [0.5] * 3, [0.5] * 3, True)
    tower = Tower(digest, None)
    release = MadeBy("made", 0.5, False, 1, "fp32", width, tower, preprocess, digest)
    plan = BuildPlan("", "/", "image", {}, 128, True, "refuse", release, {})
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    columns = ["path", "width", "height", "digest", "year", "kind"]
    facts = IndexFacts(
        plan, len(vectors), columns, describe_files(place), nearest, None, created=now, changed=now
    )
    install(place, out, facts, datetime.timedelta(0))


def exact(vectors: Array, queries: Array, top_k: int, marks: NDArray[np.bool_]) -> list[set[int]]:
    """The positions of the nearest of some vectors, by numpy."""
    best = np.full((len(queries), top_k), -2.0, np.float32)
    rows = np.full((len(queries), top_k), -1)
    for start in range(0, len(vectors), 50_000):
        scores = queries @ vectors[start : start + 50_000].T
        scores[:, ~marks[start : start + 50_000]] = -2
        both = np.concatenate([best, scores], axis=1)
        named = np.concatenate(
            [rows, np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)], axis=1
        )
        chosen = np.argpartition(-both, top_k - 1, axis=1)[:, :top_k]
        best = np.take_along_axis(both, chosen, 1)
        rows = np.take_along_axis(named, chosen, 1)
    return [set(row.tolist()) - {-1} for row in rows]


def numbers(hits: Any) -> set[int]:
    return {int(hit.id[-11:-4]) for hit in hits}


def times_ms(function: Callable[[Array], Any], queries: Array) -> tuple[float, float]:
    """Median and 99th percentile of the time of one question over all rounds, in ms."""
    times = []
    for _ in range(ROUNDS):
        for query in queries:
            start = time.perf_counter()
            function(query)
            times.append(time.perf_counter() - start)
    middle, last = np.percentile(times, (50, 99)) * 1e3
    return float(middle), float(last)


def floor_of(index: Index, folder: Path, vectors: Array) -> Callable[[int], Callable[[Array], Any]]:
    """FAISS's or numpy's own search of the same vectors, with the same effort: no ids, no rows."""
    nearest = index.facts.nearest
    if nearest is None:

        def compared(top_k: int) -> Callable[[Array], Any]:
            return lambda query: np.argpartition(vectors @ query, -top_k)[-top_k:]

        return compared
    import faiss

    codes: Any = faiss.read_index(str(folder / index.generation / CODES))
    refined = faiss.IndexRefineFlat(codes, faiss.swig_ptr(vectors))

    def named(top_k: int) -> Callable[[Array], Any]:
        codes.nprobe = min(nearest.cells, round(nearest.nprobes * (top_k / 10) ** 0.5))
        refined.k_factor = max(nearest.candidates / top_k, 8)
        return lambda query: refined.search(query[None], top_k)

    return named


def measure(folder: Path, queries: dict[str, Array], report: Report) -> None:
    # Time what only the first search of a program waits for.
    start = time.perf_counter()
    index = FolderIndex(folder)
    opened = time.perf_counter() - start
    index.search(queries["texts"][0], 10)  # reads from the disk
    start = time.perf_counter()
    index.search(queries["texts"][0], 10, "year >= 2001")
    first = time.perf_counter() - start
    count = len(index)
    vectors = np.asarray(np.load(folder / index.generation / VECTORS, mmap_mode="r"))
    everything = np.ones(count, bool)
    floor = floor_of(index, folder, vectors)
    effort = index.facts.nearest
    said = f"{effort.nprobes}/{effort.candidates}" if effort else "–"
    rows = []
    for top_k in (10, 100):
        for kind, asked in queries.items():
            truth = exact(vectors, asked, top_k, everything)
            hits = [
                len(numbers(index.search(query, top_k)) & best)
                for query, best in zip(asked, truth, strict=True)
            ]
            alone = floor(top_k)
            lowest, _ = times_ms(alone, asked)
            whole, last = times_ms(partial(index.search, top_k=top_k), asked)
            pictures, _ = times_ms(partial(index.search, top_k=top_k, thumbnails=True), asked)
            recall = sum(hits) / (top_k * len(asked))
            rows.append(
                [str(top_k), kind, f"{recall:.3f}", said]
                + [f"{value:.2f}" for value in (lowest, whole, last, whole / lowest, pictures)]
            )
            say(" | ".join(rows[-1]))
    heads = [
        "hits",
        "queries",
        "recall",
        "effort",
        "floor ms",
        "search ms",
        "p99 ms",
        "ratio",
        "+ thumbnails",
    ]
    report.table(f"{count:,} images", heads, rows)
    report.table(
        f"{count:,} images, a condition", *conditions(index, folder, vectors, queries["texts"])
    )
    report.note(
        f"Opening {count:,} images took {opened:.2f} s, and the first condition of the"
        f" program {first * 1e3:.0f} ms."
    )


def conditions(
    index: FolderIndex, folder: Path, vectors: Array, asked: Array
) -> tuple[list[str], list[list[str]]]:
    """Time that a condition adds to a search for ten, when it is new and when asked before."""
    table = {
        name: pa.chunked_array([batch.column(name) for batch in index.rows([name], 1 << 16)])
        for name in ("path", "year", "kind")
    }
    plain, _ = times_ms(index.search, asked)
    rows = []
    for where, (meets, compare) in WHERE.items():
        marks = meets(np.arange(len(index)))
        floor, _ = times_ms(lambda _, compare=compare: compare(table), asked[:10])  # type: ignore[misc]
        truth = exact(vectors, asked, 10, marks)
        fresh = []
        for number, query in enumerate(asked[:30]):
            start = time.perf_counter()
            index.search(query, 10, f"{where} AND {number} = {number}")
            fresh.append((time.perf_counter() - start) * 1e3)
        again, last = times_ms(partial(index.search, where=where), asked)
        hits = [
            len(numbers(index.search(query, 10, where)) & best)
            for query, best in zip(asked, truth, strict=True)
        ]
        wanted = sum(map(len, truth))
        new = statistics.median(fresh)
        rows.append(
            [f"`{where}`", f"{marks.mean():.2%}"]
            + [
                f"{value:.2f}"
                for value in (floor, plain, new, again, last, new - plain, again - plain)
            ]
            + [f"{sum(hits) / wanted:.3f}"]
        )
        say(" | ".join(rows[-1]))
    heads = [
        "condition",
        "images that meet it",
        "Arrow alone, ms",
        "search without, ms",
        "new, ms",
        "asked before, ms",
        "its p99, ms",
    ]
    return [*heads, "added, new", "added, before", "recall"], rows


def served(folder: Path, report: Report) -> None:
    """`retrieve` by tritonserver: its first answer after "ready", and what it takes besides
    `text_encoder`, by Triton's own statistics.
    """
    from radapter_client import Client
    from radapter_serve.encoders.loaded import load_release
    from radapter_serve.index.build import build
    from radapter_serve.server.config import Endpoints, ServerConfig
    from radapter_serve.server.triton_server import TritonServer

    models = export_base(folder)
    photos = folder / "photos"
    photos.mkdir()
    for seed in range(64):
        (photos / f"{seed:02}.jpg").write_bytes(picture(seed=seed))
    build(str(photos), folder / "indexes" / "photos", load_release(models))
    config = ServerConfig(models, Endpoints.on_free_ports(), indexes=folder / "indexes")
    rows = []
    with TritonServer(config) as server, Client(server.http_url) as client:
        for name, where in {"no condition": None, "a condition": "width > 1"}.items():
            times = []
            before = read_totals(server.http_url)
            for _ in range(CALLS):
                start = time.perf_counter()
                client.search("a photo of a dog", index="photos", where=where)
                times.append((time.perf_counter() - start) * 1e3)
            after = read_totals(server.http_url)
            spent = {
                model: (after[model]["all"] - before[model]["all"])
                / (after[model]["count"] - before[model]["count"])
                for model in ("retrieve", "text_encoder")
            }
            task_only = (spent["retrieve"] - spent["text_encoder"]) / 1e6
            middle = statistics.median(times)
            rows.append(
                [name, *(f"{value:.2f}" for value in (times[0], times[9], middle, task_only))]
            )
            say(" | ".join(rows[-1]))
    heads = ["`retrieve` of 64 images", "first, ms", "tenth, ms", "median, ms", "its own, ms"]
    report.table("Served by Triton over HTTP", heads, rows)


def main(
    captions: tuple[Path, ...],
    indexes: Path,
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    photos: int = 4000,
    cache: Path | None = None,
    out: Path = RESULTS,
) -> None:
    """Measure a search of indexes as `radapter-index build` makes them.

    Args:
        captions: tables (CSV) with the columns image and caption; at least five captions a photo.
        indexes: folder that keeps the indexes for another run.
        sizes: numbers of images.
        photos: how many of them at most, drawn at random.
        cache: file that keeps the embeddings for another run.
        out: folder of the table.
    """
    indexes.mkdir(parents=True, exist_ok=True)
    if cache is None or not cache.exists():
        images, texts = embed(*photos_of(captions, photos), indexes)
        if cache is not None:
            np.savez(cache, images=images, texts=texts)
    else:
        with np.load(cache) as kept:
            images = kept["images"]
            texts = kept["texts"]
    queries = {}
    parts = {
        **{"images": images[:QUERIES], "texts": texts[:QUERIES]},
        "tuning": texts[QUERIES : 2 * QUERIES],
    }
    for name, part in parts.items():
        path = indexes / f"{name}.npy"
        collection(part, QUERIES, path)
        queries[name] = np.load(path)
    tuning = queries.pop("tuning")
    for size in sizes:
        if not (indexes / f"{size}").exists():
            say(f"building {size}")
            path = indexes / "vectors.npy"
            collection(images[2 * QUERIES :], size, path)
            make(np.load(path, mmap_mode="r"), tuning, indexes / f"{size}")
            path.unlink()
    report = Report(
        "search",
        "A search of an index",
        "From the query's embedding (D = 512: four crops or captions of a photo side by side,"
        " embedded by the demo's base) to ids, scores and"
        f" all metadata, with `Index.search` in one thread; {QUERIES} images and {QUERIES} texts"
        f" ask, of photos that are not in the index, {ROUNDS} times each; medians, and p99, the"
        " 99th percentile. The effort (cells and"
        " candidates) is what `build` chooses, here with the captions of other photos. The floor is"
        " FAISS's IndexRefineFlat over the same codes and vectors with the same effort, or numpy's"
        " matrix product up to 20,000 images, without ids, metadata and the order of equals. A"
        " condition is asked by the texts, for ten hits: new in other words each time, then the"
        " same again; what it adds is against the search without it; Arrow alone is its own"
        " comparison of the columns. Year and kind say nothing of what a photo shows; a path does,"
        " so that whole photos fall out. Recall is against numpy.",
        timed=False,
    )
    for size in sizes:
        measure(indexes / f"{size}", queries, report)
        report.write(out)
    with tempfile.TemporaryDirectory() as temporary:
        served(Path(temporary), report)
    report.write(out)


if __name__ == "__main__":
    tyro.cli(main)
