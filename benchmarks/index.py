"""Engines for an index of embeddings: build, size, memory, and the time and recall of images and
texts that ask.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import RESULTS, Report, memory, say
from numpy.typing import NDArray
from PIL import Image

from radapter_serve.index.arrays import npy_file
from radapter_serve.index.mapped import VECTORS
from radapter_serve.index.met import Met
from radapter_serve.index.neighbours import Neighbours, write_neighbours
from radapter_serve.index.recall import EFFORTS as OWN_EFFORTS

Array = NDArray[np.float32]
Search = Callable[
    [Array, Any], NDArray[np.int64]
]  # a query [D] and an effort to the rows of the ten nearest

QUERIES = 100
TOP_K = 10
RECALL = 0.95
# random crops of a photo; of these, so many side by side make a vector
CROPS = 6
CAPTIONS = 5
TOGETHER = 4
SHARES = (0.5, 0.1, 0.03)  # of the vectors that meet a condition
BATCH = 10_000
DEMO_BASE = Path(__file__).parents[1] / "radapter_serve" / "demo" / "base"


def lance(vectors: Array, folder: Path, index: str | None) -> None:
    """A LanceDB table, and an index of it."""
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfHnswSq, IvfPq

    dim = vectors.shape[1]
    schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), dim))])

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(vectors), BATCH):
            part = np.ascontiguousarray(vectors[start : start + BATCH])
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), dim)
            yield pa.record_batch(
                [pa.array(range(start, start + len(part))), column], schema=schema
            )

    table = lancedb.connect(folder).create_table("t", batches(), schema=schema)
    if index is not None:
        kinds = {"IVF_PQ": IvfPq("dot", num_sub_vectors=dim // 8), "IVF_HNSW_SQ": IvfHnswSq("dot")}
        table.create_index("vector", config=kinds[index])


def lance_search(folder: Path, index: str | None) -> Search:
    import lancedb

    table = lancedb.connect(folder).open_table("t")

    def search(query: Array, effort: Any) -> NDArray[np.int64]:
        asked = table.search(query).distance_type("dot").limit(TOP_K).select(["row", "_distance"])
        if index == "IVF_PQ":
            asked = asked.nprobes(effort[0]).refine_factor(effort[1])
        if index == "IVF_HNSW_SQ":
            asked = asked.nprobes(effort).refine_factor(10).ef(max(100, 4 * effort))
        return np.asarray(asked.to_arrow()["row"].to_numpy())

    return search


def numpy_build(vectors: Array, folder: Path, kind: str) -> None:
    """The vectors alone, which radapter-serve keeps in memory up to 100,000."""
    folder.mkdir()
    np.save(folder / "index.npy", vectors)


def numpy_search(folder: Path, kind: str) -> Search:
    vectors = np.load(folder / "index.npy")

    def search(query: Array, effort: int) -> NDArray[np.int64]:
        scores = vectors @ query
        best = np.argpartition(-scores, TOP_K)[:TOP_K]
        return np.asarray(best[np.argsort(-scores[best])])

    return search


def faiss_build(vectors: Array, folder: Path, kind: str) -> None:
    """A FAISS index; IVF-PQ beside the vectors themselves, by which the best are sorted again."""
    import faiss

    dim = vectors.shape[1]
    lists = int(4 * len(vectors) ** 0.5)
    made: Any = {
        "flat": lambda: faiss.IndexFlatIP(dim),
        "HNSW": lambda: faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT),
        "HNSW-SQ8": lambda: faiss.IndexHNSWSQ(
            dim, faiss.ScalarQuantizer.QT_8bit, 32, faiss.METRIC_INNER_PRODUCT
        ),
        "IVF-PQ": lambda: faiss.index_factory(
            dim, f"IVF{lists},PQ{dim // 8},RFlat", faiss.METRIC_INNER_PRODUCT
        ),
    }[kind]()
    if not made.is_trained:
        made.train(np.ascontiguousarray(vectors[:: max(1, len(vectors) // (40 * lists))]))
    for start in range(0, len(vectors), BATCH):
        made.add(np.ascontiguousarray(vectors[start : start + BATCH]))
    folder.mkdir()
    faiss.write_index(made, str(folder / "index"))


def faiss_search(folder: Path, kind: str) -> Search:
    import faiss

    index = faiss.read_index(str(folder / "index"))

    def search(query: Array, effort: int) -> NDArray[np.int64]:
        if kind.startswith("HNSW"):
            index.hnsw.efSearch = effort
        if kind == "IVF-PQ":
            faiss.downcast_index(index.base_index).nprobe = effort
            index.k_factor = 10
        return np.asarray(index.search(query[None], TOP_K)[1][0])

    return search


def usearch_build(vectors: Array, folder: Path, kind: str) -> None:
    """A usearch index (always HNSW)."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32")
    for start in range(0, len(vectors), BATCH):
        part = np.ascontiguousarray(vectors[start : start + BATCH])
        index.add(np.arange(start, start + len(part)), part)
    folder.mkdir()
    index.save(str(folder / "index"))


def usearch_search(folder: Path, kind: str) -> Search:
    from usearch.index import Index

    index = Index.restore(str(folder / "index"), view=True)

    def search(query: Array, effort: int) -> NDArray[np.int64]:
        index.expansion_search = effort
        return np.asarray(index.search(query, TOP_K).keys.astype(np.int64))

    return search


def own_build(vectors: Array, folder: Path, kind: str) -> None:
    """What radapter-index makes of many images: IVF-PQ with 4-bit codes, and the vectors in
    float32.
    """
    folder.mkdir()
    with npy_file(folder / VECTORS, "<f4", vectors.shape) as write:
        for start in range(0, len(vectors), BATCH):
            write(vectors[start : start + BATCH])
    write_neighbours(folder, np.load(folder / VECTORS, mmap_mode="r"))


def own_open(folder: Path) -> Neighbours:
    return Neighbours(folder, np.asarray(np.load(folder / VECTORS, mmap_mode="r")))


def own_search(folder: Path, kind: str) -> Search:
    near = own_open(folder)
    return lambda query, effort: near.nearest(query, TOP_K, *effort)[0][:TOP_K]


ENGINES: dict[str, tuple[Any, Any, Any]] = {
    "numpy exact": (numpy_build, numpy_search, None),
    "LanceDB exact": (lance, lance_search, None),
    "LanceDB IVF-PQ": (lance, lance_search, "IVF_PQ"),
    "LanceDB IVF-HNSW-SQ": (lance, lance_search, "IVF_HNSW_SQ"),
    "FAISS flat": (faiss_build, faiss_search, "flat"),
    "FAISS IVF-PQ": (faiss_build, faiss_search, "IVF-PQ"),
    "FAISS HNSW": (faiss_build, faiss_search, "HNSW"),
    "FAISS HNSW-SQ8": (faiss_build, faiss_search, "HNSW-SQ8"),
    "FAISS IVF-PQ 4-bit, float32": (own_build, own_search, "own"),
    "usearch HNSW": (usearch_build, usearch_search, "HNSW"),
}
EFFORTS: tuple[Any, ...] = (8, 16, 32, 64, 128, 256, 512)
OF_ENGINE: dict[str, tuple[Any, ...]] = {
    "IVF_PQ": ((16, 10), (32, 10), (64, 10), (128, 20), (256, 50), (1024, 100), (1024, 400)),
    "own": OWN_EFFORTS,
}


def build(engine: str, data: str, folder: str, result: str) -> None:
    """In a process of its own: build, and write down what it took."""
    make, _, kind = ENGINES[engine]
    vectors = np.load(data, mmap_mode="r")
    before = memory("VmRSS")
    start = time.perf_counter()
    make(vectors, Path(folder), kind)
    took = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    _save(result, build=took, size=size, build_memory=memory() - before)


def query(engine: str, queries: str, exact: str, folder: str, result: str) -> None:
    """In a process of its own: open, and search with the least effort that has the recall on both
    kinds of query.
    """
    _, opened, kind = ENGINES[engine]
    asked = np.load(queries)
    nearest = np.load(exact)
    before = memory("VmRSS")
    search = opened(Path(folder), kind)
    efforts = (0,) if "exact" in engine or "flat" in engine else OF_ENGINE.get(kind, EFFORTS)
    for effort in efforts:
        found: dict[str, Any] = {}
        for what, part in (("images", slice(0, QUERIES)), ("texts", slice(QUERIES, None))):
            for one in asked[part][:3]:
                search(one, effort)
            times = []
            hits = 0
            for one, truth in zip(asked[part], nearest[part], strict=True):
                start = time.perf_counter()
                rows = search(one, effort)
                times.append(time.perf_counter() - start)
                hits += len(np.intersect1d(rows, truth))
            found[what] = {"recall": hits / nearest[part].size, "p50": statistics.median(times)}
        said = "/".join(map(str, effort)) if isinstance(effort, tuple) else str(effort or "–")
        _save(result, effort=said, memory=memory("VmRSS") - before, **found)
        if min(found[what]["recall"] for what in ("images", "texts")) >= RECALL:
            break


def filtered(data: str, queries: str, folder: str, effort: str, result: str) -> None:
    """In a process of its own: recall and time where few or many vectors meet a condition."""
    vectors = np.load(data, mmap_mode="r")
    asked = np.load(queries)
    near = own_open(Path(folder))
    rows = []
    nprobes, candidates = map(int, effort.split("/"))
    for share in SHARES:
        among = np.sort(
            np.random.default_rng(2).choice(len(vectors), int(len(vectors) * share), replace=False)
        )
        truth = among[exact(vectors, asked, among)]
        marks = np.zeros(len(vectors), bool)
        marks[among] = True
        met = Met(marks)
        row: list[Any] = [share]
        for part in (slice(0, QUERIES), slice(QUERIES, None)):
            times = []
            hits = 0
            for one, best in zip(asked[part], truth[part], strict=True):
                start = time.perf_counter()
                found, _ = near.nearest_of(one, TOP_K, nprobes, candidates, met)
                found = found[:TOP_K]
                times.append(time.perf_counter() - start)
                hits += len(np.intersect1d(found, best))
            row += [hits / truth[part].size, statistics.median(times)]
        rows.append(row)
    _save(result, rows=rows)


def _save(path: str, **values: Any) -> None:
    Path(path).write_text(json.dumps(values), encoding="utf-8")


def limited(function: Any, limit: float, result: Path, *arguments: Any) -> dict[str, Any] | None:
    """What a function wrote down from a fresh process; None where the process took longer than
    allowed.
    """
    # Threads that wait for each other say more of the machine's other work than of an engine.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANCE_CPU_THREADS": "1"}
    process = multiprocessing.get_context("spawn").Process(
        target=function, args=(*map(str, arguments), str(result))
    )
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    if not late and process.exitcode:
        raise SystemExit(f"{function.__name__} {arguments} failed")
    return json.loads(result.read_text(encoding="utf-8")) if result.exists() else None


def export_base(folder: Path) -> Path:
    """A model repository with the demo's base as a release."""
    from radapter_export import ExportSettings, export_release
    from radapter_serve.adapter import Metadata, attach, base_digest, save_adapter
    from radapter_serve.clip.base import load_base

    name = f"local-dir:{DEMO_BASE}"
    base = load_base(name)
    adapters = attach(base.model)
    digest = base_digest(base.model.state_dict(), [site.key for site in adapters.sites])
    save_adapter(
        adapters.adapter(Metadata(architecture=name, base_digest=digest)),
        folder / "adapter.safetensors",
    )
    models = folder / "model_repository"
    export_release(
        folder / "adapter.safetensors",
        None,
        ExportSettings(model_repository=models, merged=folder / "merged"),
    )
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


def exact(
    vectors: Array, queries: Array, among: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Rows of the nearest vectors, best first, int64 [Q, TOP_K]; with `among`, places in it."""
    best = np.full((len(queries), 0), -1), np.zeros((len(queries), 0), np.float32)
    count = len(vectors) if among is None else len(among)
    for start in range(0, count, 50_000):
        part = (
            vectors[start : start + 50_000]
            if among is None
            else vectors[among[start : start + 50_000]]
        )
        cosines = queries @ part.T
        rows = np.argpartition(-cosines, TOP_K, axis=1)[:, :TOP_K]
        rows, scores = (
            np.concatenate([old, new], axis=1)
            for old, new in zip(
                best, (rows + start, np.take_along_axis(cosines, rows, 1)), strict=True
            )
        )
        order = np.argsort(-scores, axis=1)[:, :TOP_K]
        best = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    return best[0].astype(np.int64)


def photos_of(tables: tuple[Path, ...], most: int) -> tuple[list[Path], list[list[str]]]:
    """Photos drawn at random, and the first captions of each."""
    found: dict[Path, list[str]] = {}
    for table in tables:
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(table.parent / row["image"], []).append(row["caption"])
    files = sorted(path for path, captions in found.items() if len(captions) >= CAPTIONS)
    chosen = [files[number] for number in np.random.default_rng(0).permutation(len(files))[:most]]
    return chosen, [found[path][:CAPTIONS] for path in chosen]


def main(
    captions: tuple[Path, ...],
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    photos: int = 4000,
    limit: float = 600,
    engines: tuple[str, ...] = tuple(ENGINES),
    out: Path = RESULTS,
    cache: Path | None = None,
) -> None:
    """Compare engines for an index.

    Args:
        captions: tables (CSV) with the columns image and caption; at least five captions a photo.
        sizes: numbers of vectors.
        photos: how many of them at most, drawn at random.
        limit: seconds that a build, or the queries of an engine, may take.
        engines: those to measure.
        out: folder of the table.
        cache: file that keeps the embeddings for another run.
    """
    report = Report(
        "index",
        "Engines for an index of embeddings",
        f"Vectors of D = 512 are made of real embeddings: {CROPS} random crops of every photo, half"
        " of them mirrored, are embedded by the demo's base (D = 128) as a release; a vector is"
        f" {TOGETHER} of these side by side in a random order, plus Gaussian noise of length 0.1,"
        " and unit length again: more vectors than photos are more orders of the same crops."
        f" {QUERIES} images and {QUERIES} texts ask, made the same way of the crops and of the"
        " captions of photos that are not in the collection; texts lie far from all images. Builds"
        f" and queries run in fresh processes; a query is one vector, one thread. Recall@{TOP_K} is"
        f" against numpy; the effort is the least with a recall of {RECALL} on both, else the"
        " greatest: cells probed, or HNSW's ef; of LanceDB's IVF-PQ cells and how many times as"
        " many answers are sorted again by the vectors, and of the 4-bit codes cells and how many"
        " candidates the vectors sort. Memory is that of the process, mapped files included, less"
        " its start.",
        timed=False,
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("lancedb", "faiss-cpu", "usearch")
    )
    report.note(f"{versions}; a build, or the queries, of more than {limit:g} s: stopped.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if cache is None or not cache.exists():
            images, texts = embed(*photos_of(captions, photos), folder)
            if cache is not None:
                np.savez(cache, images=images, texts=texts)
        else:
            with np.load(cache) as kept:
                images = kept["images"]
                texts = kept["texts"]
        report.note(f"{len(images)} photos.")
        asked = []
        for name, one in (("images", images), ("texts", texts)):
            collection(one[:QUERIES], QUERIES, folder / f"{name}.npy")
            asked.append(np.load(folder / f"{name}.npy"))
        np.save(folder / "queries.npy", np.concatenate(asked))
        for size in sizes:
            _compare(size, images[QUERIES:], folder, engines, limit, report)
            report.write(out)


def _compare(
    size: int, images: Array, folder: Path, engines: tuple[str, ...], limit: float, report: Report
) -> None:
    data, nearest, queries, index = (
        folder / name for name in ("vectors.npy", "exact.npy", "queries.npy", "engine")
    )
    collection(images, size, data)
    np.save(nearest, exact(np.load(data, mmap_mode="r"), np.load(queries)))
    rows = []
    shares = []
    for name in engines:
        say(f"{size} vectors: {name}")
        built = limited(build, limit, folder / "built.json", name, data, index)
        found = None
        if built is not None:
            found = limited(query, limit, folder / "found.json", name, queries, nearest, index)
        rows.append(_row(name, built, found))
        say(" | ".join(rows[-1]))
        if found is not None and ENGINES[name][2] == "own" and size >= 100_000:
            part = limited(
                filtered, limit, folder / "shares.json", data, queries, index, found["effort"]
            )
            shares = part["rows"] if part else []
        shutil.rmtree(index, ignore_errors=True)
        for file in ("built.json", "found.json"):
            (folder / file).unlink(missing_ok=True)
    kinds = [f"{what} {unit}" for what in ("images", "texts") for unit in ("p50 ms", "recall")]
    report.table(
        f"{size:,} vectors",
        ["engine", "build s", "build MB", "disk MB", *kinds, "effort", "MB in use"],
        rows,
    )
    if shares:
        said = [
            [f"{a:.0%}", f"{c * 1e3:.2f}", f"{b:.3f}", f"{e * 1e3:.2f}", f"{d:.3f}"]
            for a, b, c, d, e in shares
        ]
        report.table(f"{size:,} vectors, 4-bit codes, a condition", ["met by", *kinds], said)


def _row(name: str, built: dict[str, Any] | None, found: dict[str, Any] | None) -> list[str]:
    if built is None:
        return [name, "stopped", *["–"] * 8]
    row = [
        name,
        f"{built['build']:.1f}",
        f"{built['build_memory'] / 1e6:.0f}",
        f"{built['size'] / 1e6:.0f}",
    ]
    if found is None:
        return [*row, "stopped", *["–"] * 5]
    for what in ("images", "texts"):
        row += [f"{found[what]['p50'] * 1e3:.2f}", f"{found[what]['recall']:.3f}"]
    return [*row, found["effort"], f"{found['memory'] / 1e6:.0f}"]


if __name__ == "__main__":
    tyro.cli(main)
