"""Engines for an index of embeddings: build time, size, time of a query, recall and memory, at three sizes."""

from __future__ import annotations

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

from radapter_serve.index.recall import EFFORTS as LANCE_EFFORTS

Array = NDArray[np.float32]
Search = Callable[[Array, Any], NDArray[np.int64]]  # a query [D] and an effort to the rows of the ten nearest

QUERIES, TOP_K, RECALL = 100, 10, 0.95
CROPS, TOGETHER = 6, 4  # random crops of a photo; of these, so many side by side make a vector
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
            yield pa.record_batch([pa.array(range(start, start + len(part))), column], schema=schema)

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

    dim, lists = vectors.shape[1], int(4 * len(vectors) ** 0.5)
    made: Any = {
        "flat": lambda: faiss.IndexFlatIP(dim),
        "HNSW": lambda: faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT),
        "IVF-PQ": lambda: faiss.index_factory(dim, f"IVF{lists},PQ{dim // 8},RFlat", faiss.METRIC_INNER_PRODUCT),
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
        if kind == "HNSW":
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


ENGINES: dict[str, tuple[Any, Any, Any]] = {
    "numpy exact": (numpy_build, numpy_search, None),
    "LanceDB exact": (lance, lance_search, None),
    "LanceDB IVF-PQ": (lance, lance_search, "IVF_PQ"),
    "LanceDB IVF-HNSW-SQ": (lance, lance_search, "IVF_HNSW_SQ"),
    "FAISS flat": (faiss_build, faiss_search, "flat"),
    "FAISS IVF-PQ": (faiss_build, faiss_search, "IVF-PQ"),
    "FAISS HNSW": (faiss_build, faiss_search, "HNSW"),
    "usearch HNSW": (usearch_build, usearch_search, "HNSW"),
}
EFFORTS = (8, 16, 32, 64, 128, 256, 512)


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
    """In a process of its own: open, and search with the least effort that has the recall."""
    _, opened, kind = ENGINES[engine]
    asked, nearest = np.load(queries), np.load(exact)
    before = memory("VmRSS")
    search = opened(Path(folder), kind)
    for effort in (0,) if "exact" in engine or "flat" in engine else LANCE_EFFORTS if kind == "IVF_PQ" else EFFORTS:
        for one in asked[:3]:
            search(one, effort)
        times, hits = [], 0
        for one, truth in zip(asked, nearest, strict=True):
            start = time.perf_counter()
            found = search(one, effort)
            times.append(time.perf_counter() - start)
            hits += len(np.intersect1d(found, truth))
        recall = hits / nearest.size
        p50 = statistics.median(times)
        said = "/".join(map(str, effort)) if isinstance(effort, tuple) else str(effort or "–")
        _save(result, effort=said, recall=recall, p50=p50, memory=memory("VmRSS") - before)
        if recall >= RECALL:
            break


def _save(path: str, **values: Any) -> None:
    Path(path).write_text(json.dumps(values), encoding="utf-8")


def limited(function: Any, limit: float, result: Path, *arguments: Any) -> dict[str, Any] | None:
    """What a function wrote down from a fresh process; None where the process took longer than allowed."""
    # Threads that wait for each other say more of the machine's other work than of an engine.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANCE_CPU_THREADS": "1"}
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*map(str, arguments), str(result)))
    process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    if not late and process.exitcode:
        raise SystemExit(f"{function.__name__} {arguments} failed")
    return json.loads(result.read_text(encoding="utf-8")) if result.exists() else None


def embed(photos: list[Path], folder: Path) -> Array:
    """Random crops of photos, half of them mirrored, by the demo's base as a release: float32 [N, CROPS, D]."""
    from radapter_export import ExportSettings, export_release
    from radapter_serve.adapter import Metadata, attach, base_digest, save_adapter
    from radapter_serve.clip.base import load_base
    from radapter_serve.runtimes.local_release import LocalRelease

    name = f"local-dir:{DEMO_BASE}"
    base = load_base(name)
    adapters = attach(base.model)
    digest = base_digest(base.model.state_dict(), [site.key for site in adapters.sites])
    save_adapter(adapters.adapter(Metadata(architecture=name, base_digest=digest)), folder / "adapter.safetensors")
    models = folder / "model_repository"
    export_release(
        folder / "adapter.safetensors", None, ExportSettings(model_repository=models, merged=folder / "merged")
    )
    release = LocalRelease(models)
    random = np.random.default_rng(0)
    embeds, pixels = [], []
    for number, path in enumerate(photos, 1):
        with Image.open(path) as photo:
            photo.draft("RGB", (192, 192))
            image = photo.convert("RGB")
        for _ in range(CROPS):
            width, height = (int(side * random.uniform(0.5, 1)) for side in image.size)
            left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
            crop = image.crop((left, top, left + width, top + height))
            pixels.append(release.preprocess(crop)[:, :: random.choice((-1, 1))])
        if len(pixels) >= 512 or number == len(photos):
            embeds.append(release.encode_images(pixels))
            pixels = []
        if not number % 1000:
            say(f"embedded {CROPS} crops of each of {number} photos")
    return np.concatenate(embeds).reshape(len(photos), CROPS, -1)


def collection(embeds: Array, count: int, path: Path) -> None:
    """Write vectors of D times TOGETHER: crops of one photo side by side in a random order, jittered a little."""
    random = np.random.default_rng(1)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (count, embeds.shape[2] * TOGETHER))
    for start in range(0, count, BATCH):
        rows = np.arange(start, min(start + BATCH, count))
        chosen = random.permuted(np.tile(np.arange(CROPS), (len(rows), 1)), axis=1)[:, :TOGETHER]
        part = embeds[(rows % len(embeds))[:, None], chosen].reshape(len(rows), -1) / TOGETHER**0.5
        part = part + random.standard_normal(part.shape) * (0.1 / part.shape[1] ** 0.5)
        out[rows] = part / np.linalg.norm(part, axis=1, keepdims=True)


def exact(data: Path, queries: Array) -> NDArray[np.int64]:
    """Rows of the nearest vectors, best first, int64 [Q, TOP_K]."""
    vectors = np.load(data, mmap_mode="r")
    best = np.full((len(queries), 0), -1), np.zeros((len(queries), 0), np.float32)
    for start in range(0, len(vectors), 100_000):
        cosines = queries @ vectors[start : start + 100_000].T
        rows = np.argpartition(-cosines, TOP_K, axis=1)[:, :TOP_K]
        rows, scores = (
            np.concatenate([old, new], axis=1)
            for old, new in zip(best, (rows + start, np.take_along_axis(cosines, rows, 1)), strict=True)
        )
        order = np.argsort(-scores, axis=1)[:, :TOP_K]
        best = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    return best[0].astype(np.int64)


def main(
    images: tuple[Path, ...],
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    photos: int = 5000,
    limit: float = 120,
    engines: tuple[str, ...] = tuple(ENGINES),
    out: Path = RESULTS,
    cache: Path | None = None,
) -> None:
    """Compare engines for an index.

    Args:
        images: folders of photos.
        sizes: numbers of vectors.
        photos: how many of them at most, drawn at random.
        limit: seconds that a build, or the queries of an engine, may take.
        engines: those to measure.
        out: folder of the table.
        cache: file that keeps the photos' embeddings for another run.
    """
    report = Report(
        "index",
        "Engines for an index of embeddings",
        f"Vectors of D = 512 are made of real embeddings: {CROPS} random crops of every photo, half of them mirrored, "
        f"are embedded by the demo's base (D = 128) as a release; a vector is {TOGETHER} of these side by side in a "
        f"random order, plus Gaussian noise of length 0.1, and unit length again: more vectors than photos are more "
        f"orders of the same crops. The {QUERIES} queries are made the same way of photos that are not in the "
        f"collection. Builds and queries run in fresh processes; a query is one vector, with no filter, one thread. "
        f"Recall@{TOP_K} is against numpy; the effort is the least with a recall of {RECALL}, else the greatest: cells "
        "probed, or HNSW's ef; of LanceDB's IVF-PQ cells and how many times as many answers are sorted again by the "
        "vectors themselves, as radapter-index tries them. Memory is that of the process, mapped files included, less "
        "its start.",
        timed=False,
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lancedb", "faiss-cpu", "usearch"))
    report.note(f"{versions}; a build, or the queries, of more than {limit:g} s: stopped.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if cache is None or not cache.exists():
            files = sorted(p for f in images for p in f.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
            chosen = np.random.default_rng(0).permutation(len(files))[:photos]
            embeds = embed([files[number] for number in chosen], folder)
            if cache is not None:
                np.save(cache, embeds)
        else:
            embeds = np.load(cache)
        report.note(f"{len(embeds)} photos.")
        collection(embeds[:QUERIES], QUERIES, folder / "queries.npy")
        queries = np.load(folder / "queries.npy")
        for size in sizes:
            data, nearest = folder / "vectors.npy", folder / "exact.npy"
            collection(embeds[QUERIES:], size, data)
            np.save(nearest, exact(data, queries))
            rows = []
            for name in engines:
                say(f"{size} vectors: {name}")
                index = folder / "engine"
                built = limited(build, limit, folder / "built.json", name, data, index)
                found = None
                if built is not None:
                    found = limited(query, limit, folder / "found.json", name, folder / "queries.npy", nearest, index)
                rows.append(_row(name, built, found))
                say(" | ".join(rows[-1]))
                shutil.rmtree(index, ignore_errors=True)
                for file in ("built.json", "found.json"):
                    (folder / file).unlink(missing_ok=True)
            columns = ["engine", "build s", "build MB", "disk MB", "p50 ms", f"recall@{TOP_K}", "effort", "MB in use"]
            report.table(f"{size:,} vectors", columns, rows)
            report.write(out)


def _row(name: str, built: dict[str, Any] | None, found: dict[str, Any] | None) -> list[str]:
    if built is None:
        return [name, "stopped", *["–"] * 6]
    row = [name, f"{built['build']:.1f}", f"{built['build_memory'] / 1e6:.0f}", f"{built['size'] / 1e6:.0f}"]
    if found is None:
        return [*row, "stopped", *["–"] * 3]
    return [
        *row,
        f"{found['p50'] * 1e3:.2f}",
        f"{found['recall']:.3f}",
        found["effort"],
        f"{found['memory'] / 1e6:.0f}",
    ]


if __name__ == "__main__":
    tyro.cli(main)
